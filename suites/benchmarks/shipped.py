"""The speculations whose trained weights pair with the project, and the cases that measure them."""

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from harness.checkpoints import CONFIG, CheckpointError
from harness.environment import ROOT
from harness.pairs import Speculation
from harness.record import Case
from suites.catalog import PAIRS, SPECULATIONS, open_speculation
from suites.opened import OpenSpeculation

ZOO = ROOT / "suites" / "zoo"
PROMPTS, HELD_OUT = "prompts.jsonl", "heldout.jsonl"


@dataclass(frozen=True)
class Located:
    """A speculation and where its two checkpoints lie."""

    speculation: Speculation
    zoo: Path
    target: Path
    draft: Path

    @property
    def name(self) -> str:
        return self.speculation.name

    def open(self, **side: Any) -> OpenSpeculation:
        """Both sides read the same two folders."""
        return open_speculation(self.target, self.draft, algorithm=self.speculation.algorithm, **side)

    def case(self, **facts: Any) -> Case:
        """A case of this pair with the hashes of what was read."""
        folders = (self.target, self.draft)
        weights = [file for folder in folders for file in sorted(folder.glob("*.safetensors"))]
        return Case(
            pair=self.name,
            family=PAIRS[self.speculation.target].name,
            weights_sha256=digest(weights),
            config_sha256=digest([folder / CONFIG for folder in folders]),
            **facts,
        )


def shipped(zoo: Path = ZOO, names: Sequence[str] = ()) -> list[Located]:
    """Every speculation with weights of its own (or the named ones); CheckpointError where they are not there."""
    found = []
    for speculation in SPECULATIONS.values():
        if speculation.checkpoints is None or (names and speculation.name not in names):
            continue
        target, draft = (zoo / folder for folder in speculation.checkpoints)
        for folder in (target, draft):
            if not (folder / CONFIG).is_file():
                raise CheckpointError(f"{folder}: holds no checkpoint; `draftproof zoo train` makes it")
        found.append(Located(speculation, zoo, target, draft))
    return found


def digest(files: Sequence[Path]) -> str:
    """One hash over the contents of several files, in their order."""
    every = sha256()
    for file in files:
        with file.open("rb") as stream:
            every.update(sha256(stream.read()).digest())
    return every.hexdigest()
