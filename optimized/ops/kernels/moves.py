"""Rows from here to there, and the count of accepted drafts."""

import triton
import triton.language as tl


@triton.jit
def embed_kernel(ids, table, y, first, num_table_rows, width, scale, SCALED: tl.constexpr, BLOCK: tl.constexpr):
    """ids [M], table [Vr, H], y [M, H]; ids outside [first, first + Vr) give zeros"""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    # a block, not a scalar: the interpreter has no mask of a block and a scalar
    local = tl.load(ids + row) - first + tl.zeros([BLOCK], dtype=tl.int64)
    inside = (column < width) & (local >= 0) & (local < num_table_rows)
    x = tl.load(table + local * width + column, mask=inside, other=0.0)
    if SCALED:
        x = (x.to(tl.float32) * scale).to(y.dtype.element_ty)
    tl.store(y + row * width + column, x, mask=column < width)


@triton.jit
def gather_rows_kernel(x, index, y, num_rows, width, BLOCK: tl.constexpr):
    """x [B, T, C], index [B], y [B, C]; num_rows = T"""
    batch = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row = batch * num_rows + tl.load(index + batch)
    value = tl.load(x + row * width + column, mask=column < width)
    tl.store(y + batch * width + column, value, mask=column < width)


@triton.jit
def compact_kernel(
    x, first, path, num_rows, width, NUM_MOVED: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK: tl.constexpr
):
    """x [B, S, C], first [B], path [B, P]; num_rows = S. A program moves its columns of the whole path: it has read all
    before it writes, and nobody else touches them.
    """
    batch = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    place = tl.arange(0, BLOCK_P)
    moved = place < NUM_MOVED
    inside = moved[:, None] & (column < width)[None, :]
    begin = batch * num_rows + tl.load(first + batch)
    source = begin + tl.load(path + batch * NUM_MOVED + place, mask=moved, other=0)
    rows = tl.load(x + source[:, None] * width + column[None, :], mask=inside)
    tl.store(x + (begin + place)[:, None] * width + column[None, :], rows, mask=inside)


@triton.jit
def accept_greedy_kernel(drafted, chosen, accepted, num_drafted, BLOCK: tl.constexpr):
    """drafted [B, K], chosen [B, K+1], accepted [B]"""
    batch = tl.program_id(0).to(tl.int64)
    step = tl.arange(0, BLOCK)
    inside = step < num_drafted
    draft = tl.load(drafted + batch * num_drafted + step, mask=inside, other=-1)
    choice = tl.load(chosen + batch * (num_drafted + 1) + step, mask=inside, other=-1)
    first_miss = tl.min(tl.where(inside & (draft != choice), step, num_drafted), 0)
    tl.store(accepted + batch, first_miss.to(tl.int64))
