"""The head that never stores its logits, and argmax: lowest index among equals, in every order of programs."""

import triton
import triton.language as tl

from optimized.ops.kernels.linear import product

NOWHERE = tl.constexpr(2147483647)


@triton.jit
def head_tile_kernel(
    x,
    weight,
    best_value,
    best_index,
    num_rows,
    num_out,
    num_in,
    scale,
    SCALED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """x [M, H], weight [Vr, H]; best_value, best_index [M, tiles]; num_out = rows that are no padding"""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    acc = product(x, weight, n, m, num_rows, num_out, num_in, BLOCK_M, BLOCK_N, BLOCK_K, STAGES, WHOLE)
    # a logits tensor would have been rounded; ties among rounded logits are ties
    logit = acc.to(x.dtype.element_ty).to(tl.float32)
    if SCALED:
        logit = (logit * scale).to(x.dtype.element_ty).to(tl.float32)
    logit = tl.where((n < num_out)[:, None], logit, float("-inf"))
    value = tl.max(logit, 0)
    index = tl.min(tl.where(logit == value[None, :], n[:, None], NOWHERE), 0)
    offset = m.to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    tl.store(best_value + offset, value, mask=m < num_rows)
    tl.store(best_index + offset, index, mask=m < num_rows)


@triton.jit
def head_merge_kernel(best_value, best_index, value, index, num_tiles, BLOCK: tl.constexpr):
    """best_value, best_index [M, tiles]; value, index [M]"""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < num_tiles
    v = tl.load(best_value + row * num_tiles + column, mask=inside, other=float("-inf"))
    i = tl.load(best_index + row * num_tiles + column, mask=inside, other=NOWHERE)
    best = tl.max(v, 0)
    tl.store(value + row, best)
    tl.store(index + row, tl.min(tl.where(v == best, i, NOWHERE), 0).to(tl.int64))


@triton.jit
def argmax_kernel(logits, index, width, BLOCK: tl.constexpr):
    """logits [M, V], index [M]"""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    best = tl.full([], float("-inf"), tl.float32)
    where = tl.full([], 0, tl.int32)
    for start in tl.range(0, width, BLOCK):
        at = start + column
        v = tl.load(logits + row * width + at, mask=at < width, other=float("-inf")).to(tl.float32)
        block_best = tl.max(v, 0)
        block_where = tl.min(tl.where(v == block_best, at, NOWHERE), 0)
        # strictly better only: an equal value in a later block has a higher index
        where = tl.where(block_best > best, block_where, where)
        best = tl.maximum(best, block_best)
    tl.store(index + row, where.to(tl.int64))


@triton.jit
def score_rows_kernel(
    x,
    table,
    ids,
    y,
    first,
    num_table_rows,
    num_ids,
    width,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """x [M, H], table [Vr, H], ids [M, Z], y [M, Z]; ids outside [first, first + Vr) give zeros"""
    row = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inner = tl.arange(0, BLOCK_K)
    local = tl.load(ids + row * num_ids + n, mask=n < num_ids, other=-1) - first
    held = ((n < num_ids) & (local >= 0) & (local < num_table_rows))[:, None]
    w_row = table + local[:, None] * width
    acc = tl.zeros([BLOCK_N, BLOCK_K], dtype=tl.float32)
    for start in tl.range(0, width, BLOCK_K, num_stages=STAGES):
        k = start + inner
        if WHOLE:
            a = tl.load(x + row * width + k)
            w = tl.load(w_row + k[None, :], mask=held, other=0.0)
        else:
            a = tl.load(x + row * width + k, mask=k < width, other=0.0)
            w = tl.load(w_row + k[None, :], mask=held & (k < width)[None, :], other=0.0)
        acc += w.to(tl.float32) * a.to(tl.float32)[None, :]
    tl.store(y + row * num_ids + n, tl.sum(acc, 1).to(y.dtype.element_ty), mask=n < num_ids)
