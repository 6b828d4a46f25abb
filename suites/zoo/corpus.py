"""The text of the zoo: the standard library of the running Python, whole files held out.

Read in the order of their paths, tests and tables left out, so that one Python version always
gives one corpus; its sha256 is recorded beside the weights.  A file is held out as a whole, by
the hash of its path: nothing of a held-out file is ever trained on, the tokenizer included.
"""

import hashlib
import re
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

END = "<|endoftext|>"
"""token 0: stands before every file and ends a text"""

# third-party code, tests, tables of characters and documentation: no text to learn from
SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data", "__phello__"}
SKIPPED_PREFIXES = ("_sysconfigdata", "config-")

HELD_OUT_SHARE = 16
"""one file of this many is held out"""

NO_LETTERS = re.compile(r"^[ \t]*#[^A-Za-z]*$\n?", re.MULTILINE)
BLANK_LINES = re.compile(r"\n[ \t]*\n(?:[ \t]*\n)+")


@dataclass(frozen=True)
class Source:
    """One file of the standard library."""

    path: str
    """relative to the library's folder, with forward slashes"""
    text: str
    held_out: bool


def clean(text: str) -> str:
    """Drop comment lines without a letter (rulers) and long runs of blank lines: a small target loops on them."""
    return BLANK_LINES.sub("\n\n", NO_LETTERS.sub("", text.expandtabs(8))).strip() + "\n"


def is_held_out(path: str) -> bool:
    """Decide by the path alone, so that a file stays on its side whatever else changes."""
    return hashlib.sha256(path.encode()).digest()[0] % HELD_OUT_SHARE == 0


def read_sources(folder: Path | None = None) -> list[Source]:
    """Every usable file of the standard library, sorted by path."""
    folder = folder or Path(sysconfig.get_path("stdlib"))
    sources = []
    for file in folder.rglob("*.py"):
        relative = file.relative_to(folder)
        if SKIPPED.intersection(relative.parts) or relative.parts[0].startswith(SKIPPED_PREFIXES):
            continue
        text = clean(file.read_text(encoding="utf-8", errors="replace"))
        if len(text) >= 200:
            sources.append(Source(relative.as_posix(), text, is_held_out(relative.as_posix())))
    return sorted(sources, key=lambda source: source.path)


def fingerprint(sources: Iterable[Source]) -> str:
    """sha256 over paths and cleaned texts, in order."""
    digest = hashlib.sha256()
    for source in sources:
        digest.update(source.path.encode() + b"\0" + source.text.encode() + b"\0")
    return digest.hexdigest()


def train_tokenizer(sources: Iterable[Source], vocab: int) -> Tokenizer:
    """Byte-level BPE over the trained files; any text can be spelled, none is unknown."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((source.text for source in sources if not source.held_out), trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, sources: Iterable[Source]) -> Tensor:
    """All files in one stream, token 0 before each.

    -> tokens [n] int64
    """
    ids: list[int] = []
    for encoding in tokenizer.encode_batch([source.text for source in sources]):
        ids.append(0)
        ids.extend(encoding.ids)
    return torch.tensor(ids)
