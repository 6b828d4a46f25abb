"""Experts of few rows: a program reads its tile of an expert for one pair (row, chosen expert).

Pairs are the fastest axis of the grid, so two rows that chose one expert read the same tile at about the same time,
the second from the cache. The pairs of a row are added by one program, in the order in which the router named them.
"""

import triton
import triton.language as tl

from optimized.ops.kernels.act import gated


@triton.jit
def experts_gate_up_kernel(
    x,
    ids,
    gate_up,
    h,
    first,
    num_experts,
    num_chosen,
    width,
    num_in,
    GELU: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """x [M, H], ids [M, P], gate_up [E, 2I, H], h [M, P, I]; width = I, num_in = H

    An expert of another rank gives zeros.
    """
    pair = tl.program_id(0)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inner = tl.arange(0, BLOCK_K)
    real = (n < width)[:, None]
    expert = tl.load(ids + pair) - first
    x_row = x + (pair // num_chosen).to(tl.int64) * num_in
    gate_row = gate_up + (expert * (2 * width) + n)[:, None] * num_in
    up_row = gate_up + (expert * (2 * width) + width + n)[:, None] * num_in
    gate = tl.zeros([BLOCK_N, BLOCK_K], dtype=tl.float32)
    up = tl.zeros([BLOCK_N, BLOCK_K], dtype=tl.float32)
    stop = tl.where((expert >= 0) & (expert < num_experts), num_in, 0)
    for start in tl.range(0, stop, BLOCK_K, num_stages=STAGES):
        k = start + inner
        if WHOLE:
            a = tl.load(x_row + k).to(tl.float32)
            w_gate = tl.load(gate_row + k[None, :], mask=real, other=0.0).to(tl.float32)
            w_up = tl.load(up_row + k[None, :], mask=real, other=0.0).to(tl.float32)
        else:
            k_inside = k < num_in
            a = tl.load(x_row + k, mask=k_inside, other=0.0).to(tl.float32)
            w_gate = tl.load(gate_row + k[None, :], mask=real & k_inside[None, :], other=0.0).to(tl.float32)
            w_up = tl.load(up_row + k[None, :], mask=real & k_inside[None, :], other=0.0).to(tl.float32)
        gate += w_gate * a[None, :]
        up += w_up * a[None, :]
    act = gated(tl.sum(gate, 1), tl.sum(up, 1), GELU)
    tl.store(h + pair.to(tl.int64) * width + n, act.to(h.dtype.element_ty), mask=n < width)


@triton.jit
def experts_down_kernel(
    h,
    ids,
    weights,
    down,
    y,
    first,
    num_experts,
    num_chosen,
    width,
    num_out,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    """h [M, P, I], ids, weights [M, P], down [E, H, I], y [M, H]; width = I, num_out = H"""
    row = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inner = tl.arange(0, BLOCK_K)
    trips = tl.cdiv(width, BLOCK_K)
    acc = tl.zeros([BLOCK_N, BLOCK_K], dtype=tl.float32)
    # one loop over (expert, step), so that loads run ahead across experts
    for step in tl.range(0, num_chosen * trips, num_stages=STAGES):
        pair = row * num_chosen + step // trips
        k = (step % trips) * BLOCK_K + inner
        expert = tl.load(ids + pair) - first + tl.zeros([BLOCK_N], dtype=tl.int64)
        held = (n < num_out) & (expert >= 0) & (expert < num_experts)
        inside = held[:, None] & (k < width)[None, :]
        a = tl.load(h + pair * width + k, mask=k < width, other=0.0).to(tl.float32)
        a = a * tl.load(weights + pair).to(tl.float32)
        w = tl.load(down + (expert * num_out + n)[:, None] * width + k[None, :], mask=inside, other=0.0)
        acc += w.to(tl.float32) * a[None, :]
    tl.store(y + row * num_out + n, tl.sum(acc, 1).to(y.dtype.element_ty), mask=n < num_out)
