"""Prompts from a file, as token ids.

    *.jsonl        Spec-Bench, one object a line: {"question_id", "category", "turns"}; the first turn is the prompt
    anything else  plain text, one prompt a line

A prompt that leaves no room for its answer within the target's positions is cut at its front, and the count is told.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from harness.checkpoints import CheckpointError
from harness.headers import held_file

TOKENIZER = "tokenizer.json"


class PromptError(ValueError):
    """A file that holds no prompts; names the file, the line and what a line must be."""


@dataclass(frozen=True)
class Prompt:
    """One text to continue."""

    name: str
    category: str
    text: str


@dataclass(frozen=True)
class Encoded:
    """Prompts as one tokenizer reads them."""

    dataset: str
    prompts: tuple[Prompt, ...]
    rows: tuple[Tensor, ...]
    """one [T] a prompt"""
    num_cut: int
    """prompts that lost their beginning"""

    @property
    def sha256(self) -> str:
        """Of the token ids, so that two records with equal hashes answered the same."""
        return sha256(json.dumps([row.tolist() for row in self.rows]).encode()).hexdigest()

    def first(self, count: int) -> "Encoded":
        """The first of them; num_cut still speaks of all."""
        return Encoded(self.dataset, self.prompts[:count], self.rows[:count], self.num_cut)


def read_prompts(file: str | Path) -> tuple[Prompt, ...]:
    """Every prompt of a file; errors: PromptError."""
    file = Path(file)
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise PromptError(f"{file}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise PromptError(f"{file}: is not UTF-8 text: {error.reason} at byte {error.start}") from error
    parse = _spec_bench if file.suffix == ".jsonl" else _plain
    found = tuple(parse(f"{file}:{i}", i, line) for i, line in enumerate(lines, 1) if line.strip())
    if not found:
        raise PromptError(f"{file}: holds no prompt")
    names: set[str] = set()
    for prompt in found:
        if prompt.name in names:
            raise PromptError(f"{file}: question_id {prompt.name} stands twice, so its two answers would be one")
        names.add(prompt.name)
    return found


def encode(prompts: Sequence[Prompt], dataset: str, target: Path, room: int) -> Encoded:
    """Token ids by the tokenizer that lies beside the target's weights.

    room   tokens that a prompt may take
    """
    file = target / TOKENIZER
    if not file.is_file():
        raise CheckpointError(f"{file}: is missing; text becomes token ids by the target's own tokenizer")
    if room < 1:
        raise PromptError(f"{dataset}: no room for a prompt: the answer alone fills the target's positions")
    try:
        tokenizer = Tokenizer.from_file(str(held_file(file)))
    except CheckpointError:
        raise
    except Exception as error:  # the library has no narrower one
        raise CheckpointError(f"{file}: is no tokenizer ({error}); fetch it again") from error
    rows = [torch.tensor(found.ids) for found in tokenizer.encode_batch([prompt.text for prompt in prompts])]
    empty = [prompt.name for prompt, row in zip(prompts, rows, strict=True) if not len(row)]
    if empty:
        raise PromptError(f"{dataset}: prompt {empty[0]} has no tokens")
    return Encoded(dataset, tuple(prompts), tuple(row[-room:] for row in rows), sum(len(row) > room for row in rows))


def _plain(where: str, number: int, line: str) -> Prompt:
    return Prompt(str(number), "", line.strip())


def _spec_bench(where: str, number: int, line: str) -> Prompt:
    try:
        row: Any = json.loads(line)
    except json.JSONDecodeError as error:
        raise PromptError(f"{where}: is no JSON: {error}") from error
    turns = row.get("turns") if isinstance(row, dict) else None
    if not (isinstance(turns, list) and turns and isinstance(turns[0], str) and turns[0].strip()):
        raise PromptError(f'{where}: is no prompt of Spec-Bench: it needs "turns", a list that begins with its text')
    if "question_id" not in row:
        raise PromptError(f'{where}: has no "question_id"')
    return Prompt(str(row["question_id"]), str(row.get("category", "")), turns[0])
