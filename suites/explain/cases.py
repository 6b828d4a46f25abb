"""A case: a folder that another implementation can run, and that its dump is held to afterwards.

target/                 the target's checkpoint
draft/                  the draft's; absent where the target carries it or none is asked about
expected.safetensors    what the reference makes of the text: a dump (`suites/explain/dump.py`)
case.json               what it is and where it comes from
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from harness.checkpoints import CheckpointError, read_json
from suites.catalog import open_draft, open_target
from suites.explain.dump import write_dump
from suites.explain.telling import tell
from suites.opened import OpenDraft, OpenTarget

FORMAT = "draftproof-case/1"
TARGET, DRAFT, EXPECTED, CARD = "target", "draft", "expected.safetensors", "case.json"


@dataclass(frozen=True)
class Folders:
    """Where a pair lies, and how the draft is read."""

    target: Path
    draft: Path | None = None
    layer_ids: str | None = None
    norm_output: str | None = None

    def open(self, dtype: torch.dtype = torch.float32) -> tuple[OpenTarget, OpenDraft | None]:
        """Both on the reference side, with the weights as `dtype` rounds them, computing in float64."""
        target = open_target(self.target, dtype=dtype)
        draft = None
        if self.draft is not None:
            words: dict[str, Any] = {"layer_ids": self.layer_ids, "norm_output": self.norm_output}
            draft = open_draft(self.draft, target, dtype=dtype, **words)
            draft.module.double()
        target.module.double()
        return target, draft


def write_case(folder: str | os.PathLike[str], pair: Folders, tokens: Tensor, origin: Mapping[str, Any]) -> Path:
    """Write what the reference expects beside checkpoints that lie in the folder already.

    tokens  [B, T]
    """
    path = Path(folder)
    target, draft = pair.open()
    write_dump(path / EXPECTED, tell(target, draft, tokens))
    words = {"layer_ids": pair.layer_ids, "norm_output": pair.norm_output}
    card = {"format": FORMAT, "target": target.pair.name, "draft": draft.pair.name if draft else None, **words}
    card["draft_folder"] = None if pair.draft is None else os.path.relpath(pair.draft, path)
    text = json.dumps({**card, "origin": dict(origin)}, indent=2)
    (path / CARD).write_text(text + "\n", encoding="utf-8")
    return path


def read_case(folder: str | os.PathLike[str]) -> Folders:
    """The pair of a case; errors: CheckpointError."""
    path = Path(folder)
    card = read_json(path / CARD)
    if card.get("format") != FORMAT:
        raise CheckpointError(f"{path / CARD}: 'format' is {card.get('format')!r}; {FORMAT!r} is expected")
    draft = card.get("draft_folder")
    return Folders(
        path / TARGET, None if draft is None else path / draft, card.get("layer_ids"), card.get("norm_output")
    )
