"""Texts that drafts are measured on: a user's prompts or the shipped sample, as they are or as the target goes on."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from reference.decoding import generate
from suites.audit.losses import WIDTH, Texts
from suites.benchmarks.prompts import Prompt, PromptError, encode, read_prompts
from suites.benchmarks.shipped import HELD_OUT, ZOO
from suites.opened import OpenTarget
from suites.zoo.held_out import read_jsonl

SAMPLE = "the shipped sample"
OPENING = 16
"""tokens of a text that the target goes on from"""


@dataclass(frozen=True)
class Sample:
    """Texts and where they come from."""

    source: str
    texts: Texts
    rows: tuple[Tensor, ...]
    """one [T] a text, whole"""


def gather(target: OpenTarget, prompts: Path | None, count: int, own: bool = False) -> Sample:
    """The first texts of a file, by the target's tokenizer; errors: PromptError, CheckpointError without a tokenizer.

    prompts   Spec-Bench or MT-Bench lines, or plain text with one a line; the shipped sample when absent
    own       the target's own continuations at temperature 1, from the first tokens of each
    """
    if prompts is None:
        source, found = SAMPLE, [Prompt(str(i), "", row["text"]) for i, row in enumerate(read_jsonl(ZOO / HELD_OUT))]
    else:
        source, found = prompts.name, list(read_prompts(prompts))
    rows = encode(found[:count], source, target.checkpoint.path, 2**31).rows
    texts = Texts.of(continued(target, rows) if own else rows)
    if len(texts) < 2:
        raise PromptError(f"{source}: holds {len(texts)} texts that are long enough; two or more show a difference")
    return Sample(f"{source}, continued by the target" if own else source, texts, rows)


def continued(target: OpenTarget, rows: Sequence[Tensor]) -> list[Tensor]:
    """The beginning of each text and what the target says next, WIDTH tokens of both together."""
    found = []
    for start in range(0, len(rows), 64):
        part = [row[:OPENING] for row in rows[start : start + 64]]
        names = range(start, start + len(part))
        said = generate(target.module, None, part, WIDTH - 1, 0, temperature=1.0, sequence_ids=list(names))
        found += [torch.cat([row, more])[:WIDTH] for row, more in zip(part, said.tokens, strict=True)]
    return found
