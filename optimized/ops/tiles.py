"""Who multiplies by which weight, and in which tiles.

Keyed by the weight's shape and by the row bucket of the whole engine, never by the number of rows of a call: decode
and verify then run the same instructions, and a row has the same bits in both. A bucket of 16 serves steps of up to
16 rows, 64 the larger ones; a call with more rows than its bucket repeats the tile.

The table is `choices.json`, a row for each (element size, N, K, bucket); `python -m suites.benchmarks.tune` writes what
it measured there. A row that says `measured: null` was reasoned, not measured; shapes without a row follow the rule.
"""

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

BUCKETS = (16, 64)
# a Hopper SM has 227 KB of shared memory; two programs on each keep loads in flight while one computes
SHARED_BYTES = 110 * 1024
# 132 SMs: fewer programs leave memory channels idle
PROGRAMS = 128


class Tile(NamedTuple):
    """Rows of x, rows of the weight and columns of both that one program holds at a time."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int = 4
    num_stages: int = 4


class KeyTile(NamedTuple):
    """How attention cuts the keys; a chunk is a constant number of absolute slots."""

    block_m: int = 16
    block_s: int = 64
    chunk: int = 256
    num_warps: int = 4
    num_stages: int = 2


class Choice(NamedTuple):
    """How products with one weight are computed."""

    tile: Tile
    library: bool = False
    """by cuBLAS, with the rows of a call padded to the bucket"""
    early: bool = False
    """programmatic dependent launch: programs are resident before the kernel ahead has ended, and wait for it"""
    measured: Mapping[str, Any] | None = None
    """by which machine and versions, in microseconds; None: nobody measured it"""


Key = tuple[int, int, int, int]
"""element size of the weight, N, K, bucket"""
CHOICES, SCHEMA = Path(__file__).with_name("choices.json"), "draftproof-choices/1"


class ChoiceError(ValueError):
    """A table of choices that cannot be read."""


def read_choices(path: Path) -> dict[Key, Choice]:
    """The rows of a table; errors: ChoiceError names the file, the row and what is wrong."""
    table = json.loads(path.read_text(encoding="utf-8"))
    if table.get("schema") != SCHEMA:
        raise ChoiceError(f"{path}: schema is {table.get('schema')!r}, expected {SCHEMA!r}; write it with the tuner")
    found: dict[Key, Choice] = {}
    for number, row in enumerate(table["choices"]):
        try:
            key: Key = (row["element_size"], row["out"], row["in"], row["rows"])
            choice = Choice(Tile(*row["tile"]), row["library"], row["early"], row["measured"])
        except (KeyError, TypeError) as error:
            raise ChoiceError(f"{path}: row {number} is no choice: {error!r}; write it with the tuner") from error
        if key in found or choice.tile.block_m != key[3]:
            raise ChoiceError(f"{path}: row {number} is there twice, or its tile is not one of {key[3]} rows")
        found[key] = choice
    return found


def write_choices(path: Path, choices: Mapping[Key, Choice]) -> None:
    """The table of these choices, whole or not at all."""
    rows = [
        dict(zip(("element_size", "out", "in", "rows"), key, strict=True)) | choice._asdict()
        for key, choice in sorted(choices.items())
    ]
    text = ",\n".join("    " + json.dumps(row) for row in rows)
    draft = path.with_suffix(".part")
    draft.write_text(f'{{\n  "schema": "{SCHEMA}",\n  "choices": [\n{text}\n  ]\n}}\n', encoding="utf-8")
    draft.replace(path)


@functools.cache
def frozen() -> Mapping[Key, Choice]:
    """The table that comes with the project."""
    return read_choices(CHOICES)


# one row against an expert's tile: no tensor core, so nothing but bytes in flight counts
EXPERT_TILE = Tile(1, 16, 256, 4, 3)
# a router of more bytes is more than one SM reads in the time of a second launch (computed from 100 GB/s an SM, not
# measured); and how many of its weights a step takes
ROUTER_BYTES, ROUTER_NUMBERS = 1 << 20, 1 << 14
# a head's own small product; rows are those of the bucket
HEAD_TILE = Tile(16, 64, 64, 4, 2)
# what heads read of latents times their values; rows are those of one merge, whatever the bucket
VALUE_TILE = Tile(16, 64, 512, 8, 1)


def bucket(num_rows: int) -> int:
    """The smallest bucket that holds the most rows a step can have; the last one for more."""
    return next((size for size in BUCKETS if num_rows <= size), BUCKETS[-1])


def tile(num_out: int, num_in: int, rows: int, element_size: int, products: int = 1) -> Tile:
    """The rule, for shapes that the table does not know: enough programs first, then as many stages as fit.

    products  how many sums a program keeps: two for a gate and its branch
    """
    block_n = next((size for size in (64, 32) if num_out >= size * PROGRAMS), 16)
    block_k = 128 if element_size == 2 and num_in % 128 == 0 else 64
    stage = (rows + block_n) * block_k * element_size
    # four warps have no registers for two sums of 64 rows
    return Tile(rows, block_n, block_k, 8 if products * rows > 64 else 4, max(2, min(5, SHARED_BYTES // stage)))


def steps_of(t: Tile, columns: int, num_in: int) -> Tile:
    """The tile in steps that cross no block of so many columns, whose scale is one number; errors: ValueError."""
    if columns >= num_in or columns % t.block_k == 0:
        return t
    if columns % 64:
        raise ValueError(
            f"blocks of {columns} columns are no whole steps of 64; make them wider, or the weight's width"
        )
    return t._replace(block_k=64)


def router_tile(num_experts: int) -> Tile:
    """One row against all experts: as many weights a step whatever their number, which is a power of two here."""
    return Tile(1, num_experts, max(64, min(512, ROUTER_NUMBERS // num_experts)), 8, 3)


def key_tile(width: int, element_size: int) -> KeyTile:
    """Wide heads take fewer keys a step, and so do wide numbers."""
    return KeyTile(block_s=64 if width * element_size <= 256 else 32 if width * element_size <= 1024 else 16)


def latent_tile(heads: int, element_size: int) -> KeyTile:
    """A slot is 512 features that are key and value of every head: few slots a step, and many rows where there are."""
    return KeyTile(32 if heads >= 32 else 16, 32 if element_size == 2 else 16, 128, 8)
