"""Text that the zoo never trained on, cut for use: prompts for demo and bench, sequences for teacher forcing.

Shipped as files, because another Python version has another standard library.
"""

import json
import random
from collections import defaultdict
from collections.abc import Iterable
from itertools import chain, zip_longest
from pathlib import Path

from tokenizers import Tokenizer

from suites.zoo.corpus import Source

# the kind of a module, by the first part of its path
KINDS = {
    "data": ("collections", "enum.py", "uuid.py", "chunk.py", "stat.py", "bz2.py", "aifc.py", "uu.py"),
    "files": ("pathlib.py", "json", "tomllib", "zipfile.py", "csv.py", "shutil.py"),
    "interface": ("idlelib", "tkinter", "turtledemo", "pydoc.py"),
    "language": ("lib2to3", "__future__.py", "ast.py", "inspect.py", "typing.py"),
    "network": ("http", "email", "urllib", "asyncio", "socketserver.py", "xmlrpc"),
    "system": ("ctypes", "distutils", "multiprocessing", "subprocess.py", "importlib"),
}
KIND_OF = {first: kind for kind, firsts in KINDS.items() for first in firsts}

PIECE = (104, 160)
"""tokens of a piece of a file, so that 96 can always be cut from it"""
PROMPT = (48, 96)
"""tokens of a prompt"""


def pieces(tokenizer: Tokenizer, source: Source) -> list[str]:
    """Consecutive runs of whole lines with a number of tokens within PIECE; runs that jump over it are dropped."""
    found, run = [], ""
    for line in source.text.splitlines(keepends=True):
        if not run and not line.strip():
            continue
        run += line
        size = len(tokenizer.encode(run).ids)
        if size >= PIECE[0]:
            if size <= PIECE[1]:
                found.append(run)
            run = ""
    return found


def cut_prompt(tokenizer: Tokenizer, piece: str) -> str | None:
    """The first lines of a piece that make a prompt, without the last line's end; None if none do."""
    run, best = "", None
    for line in piece.splitlines(keepends=True):
        run += line
        if PROMPT[0] <= len(tokenizer.encode(run.rstrip()).ids) <= PROMPT[1]:
            best = run.rstrip()
    return best


def cut(
    tokenizer: Tokenizer, sources: Iterable[Source], num_prompts: int, num_sequences: int, seed: int = 0
) -> tuple[list[dict], list[dict]]:
    """Prompts (as Spec-Bench writes them, kinds in turn) and sequences, from different pieces of held-out files."""
    draw, sources = random.Random(seed), list(sources)
    # the library repeats itself: a piece of a held-out file may stand in a trained one too
    trained = "\n".join(source.text for source in sources if not source.held_out)
    by_kind: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for source in sources:
        if source.held_out:
            kind = KIND_OF.get(source.path.split("/")[0], "general")
            by_kind[kind].extend((source.path, piece) for piece in pieces(tokenizer, source))
    for found in by_kind.values():
        draw.shuffle(found)
    prompts, sequences = [], []
    # kinds in turn: (first of each kind, second of each kind, ...)
    columns = [[(kind, *entry) for entry in by_kind[kind]] for kind in sorted(by_kind)]
    for entry in chain.from_iterable(zip_longest(*columns)):
        if entry is None or entry[2] in trained:
            continue
        kind, path, piece = entry
        prompt = cut_prompt(tokenizer, piece) if len(prompts) < num_prompts else None
        if prompt is not None:
            prompts.append({"question_id": len(prompts) + 1, "category": kind, "turns": [prompt]})
        elif len(sequences) < num_sequences:
            sequences.append({"file": path, "text": piece})
    return prompts, sequences


def write_jsonl(rows: Iterable[dict], file: Path) -> None:
    """One JSON object a line."""
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def read_jsonl(file: Path) -> list[dict]:
    """Every row of a file that `write_jsonl` wrote."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
