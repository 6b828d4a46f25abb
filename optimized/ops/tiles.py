"""Which tile multiplies which weight.

Keyed by the weight's shape and by the row bucket of the whole engine, never by the number of rows of a call: decode
and verify then run the same instructions, and a row has the same bits in both. A bucket of 16 serves steps of up to
16 rows, 64 the larger ones; a call with more rows than its bucket repeats the tile.
"""

from typing import NamedTuple

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


# (N, K, bucket): shapes that the rule below serves badly. A long K in narrow tiles wants wider steps.
FROZEN: dict[tuple[int, int, int], Tile] = {
    (4096, 14336, 16): Tile(16, 32, 256, 4, 3),
    (2560, 10240, 16): Tile(16, 16, 256, 4, 4),
    (3840, 15360, 16): Tile(16, 32, 256, 4, 3),
}


# one row against an expert's tile: no tensor core, so nothing but bytes in flight counts
EXPERT_TILE = Tile(1, 16, 256, 4, 3)
# a head's own small product; rows are those of the bucket
HEAD_TILE = Tile(16, 64, 64, 4, 2)


def bucket(num_rows: int) -> int:
    """The smallest bucket that holds the most rows a step can have; the last one for more."""
    return next((size for size in BUCKETS if num_rows <= size), BUCKETS[-1])


def tile(num_out: int, num_in: int, rows: int, element_size: int) -> Tile:
    """The frozen entry of a 16-bit weight, or the rule: enough programs first, then as many stages as fit."""
    if element_size == 2 and (num_out, num_in, rows) in FROZEN:
        return FROZEN[num_out, num_in, rows]
    block_n = next((size for size in (64, 32) if num_out >= size * PROGRAMS), 16)
    block_k = 128 if element_size == 2 and num_in % 128 == 0 else 64
    stage = (rows + block_n) * block_k * element_size
    return Tile(rows, block_n, block_k, 4, max(2, min(5, SHARED_BYTES // stage)))


def key_tile(width: int, element_size: int) -> KeyTile:
    """Wide heads take fewer keys a step, and so do wide numbers."""
    return KeyTile(block_s=64 if width * element_size <= 256 else 32 if width * element_size <= 1024 else 16)


def latent_tile(heads: int, element_size: int) -> KeyTile:
    """A slot is 512 features that are key and value of every head: few slots a step, and many rows where there are."""
    return KeyTile(32 if heads >= 32 else 16, 32 if element_size == 2 else 16, 128, 8)
