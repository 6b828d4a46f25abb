"""Products of few rows with a large weight.

The weight is the left operand, so a tensor core's 64 (or 16) wide side holds rows of the weight and its narrow side
the few rows of x: nothing is wasted on padding, and the weight streams through `tl.range` stages.
"""

import triton
import triton.language as tl

from optimized.ops.kernels.act import gated


@triton.jit
def in_turn():
    """Launched early: let the kernel behind be launched too, and touch nothing before the kernel ahead has ended."""
    tl.extra.cuda.gdc_launch_dependents()
    tl.extra.cuda.gdc_wait()


@triton.jit
def product(
    x,
    weight,
    n,
    m,
    num_rows,
    num_out,
    num_in,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """x [M, K], weight [N, K] -> float32 [BLOCK_N, BLOCK_M] for the weight rows n and the rows m"""
    inner = tl.arange(0, BLOCK_K)
    w_row = weight + n.to(tl.int64)[:, None] * num_in
    x_row = x + m.to(tl.int64)[None, :] * num_in
    w_inside = (n < num_out)[:, None]
    x_inside = (m < num_rows)[None, :]
    acc = tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.float32)
    for start in tl.range(0, num_in, BLOCK_K, num_stages=STAGES):
        k = start + inner
        if WHOLE:
            w = tl.load(w_row + k[None, :], mask=w_inside, other=0.0)
            a = tl.load(x_row + k[:, None], mask=x_inside, other=0.0)
        else:
            w = tl.load(w_row + k[None, :], mask=w_inside & (k < num_in)[None, :], other=0.0)
            a = tl.load(x_row + k[:, None], mask=x_inside & (k < num_in)[:, None], other=0.0)
        acc = tl.dot(w, a, acc, input_precision="ieee")
    return acc


@triton.jit
def linear_kernel(
    x,
    weight,
    bias,
    y,
    num_rows,
    num_out,
    num_in,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    WHOLE: tl.constexpr,
    EARLY: tl.constexpr,
):
    """x [M, K], weight [N, K], bias [N], y [M, N]"""
    if EARLY:
        in_turn()
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    acc = product(x, weight, n, m, num_rows, num_out, num_in, BLOCK_M, BLOCK_N, BLOCK_K, STAGES, WHOLE)
    if HAS_BIAS:
        acc += tl.load(bias + n, mask=n < num_out, other=0.0).to(tl.float32)[:, None]
    offset = m.to(tl.int64)[None, :] * num_out + n[:, None]
    tl.store(y + offset, acc.to(y.dtype.element_ty), mask=(n < num_out)[:, None] & (m < num_rows)[None, :])


@triton.jit
def linear_scaled_kernel(
    x,
    weight,
    scales,
    bias,
    y,
    num_rows,
    num_out,
    num_in,
    block_rows,
    block_columns,
    num_across,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    WHOLE: tl.constexpr,
    EARLY: tl.constexpr,
):
    """x [M, K], weight [N, K] float8, scales [down, across], bias [N], y [M, N]; a step crosses no block"""
    if EARLY:
        in_turn()
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    inner = tl.arange(0, BLOCK_K)
    w_row = weight + n.to(tl.int64)[:, None] * num_in
    x_row = x + m.to(tl.int64)[None, :] * num_in
    w_inside = (n < num_out)[:, None]
    x_inside = (m < num_rows)[None, :]
    acc = tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.float32)
    for start in tl.range(0, num_in, BLOCK_K, num_stages=STAGES):
        k = start + inner
        if WHOLE:
            q = tl.load(w_row + k[None, :], mask=w_inside, other=0.0)
            a = tl.load(x_row + k[:, None], mask=x_inside, other=0.0)
        else:
            q = tl.load(w_row + k[None, :], mask=w_inside & (k < num_in)[None, :], other=0.0)
            a = tl.load(x_row + k[:, None], mask=x_inside & (k < num_in)[:, None], other=0.0)
        # every float8 is a number of the wider types too
        part = tl.dot(q.to(tl.float32).to(a.dtype), a, input_precision="ieee")
        scale = tl.load(scales + n // block_rows * num_across + start // block_columns, mask=n < num_out, other=0.0)
        acc += part * scale[:, None]
    if HAS_BIAS:
        acc += tl.load(bias + n, mask=n < num_out, other=0.0).to(tl.float32)[:, None]
    offset = m.to(tl.int64)[None, :] * num_out + n[:, None]
    tl.store(y + offset, acc.to(y.dtype.element_ty), mask=(n < num_out)[:, None] & (m < num_rows)[None, :])


@triton.jit
def gate_up_kernel(
    x,
    weight,
    bias,
    y,
    num_rows,
    num_out,
    num_in,
    HAS_BIAS: tl.constexpr,
    GELU: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    WHOLE: tl.constexpr,
    EARLY: tl.constexpr,
):
    """x [M, K], weight [2I, K] gate rows first, bias [2I], y [M, I]; num_out = I"""
    if EARLY:
        in_turn()
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    inner = tl.arange(0, BLOCK_K)
    gate_row = weight + n.to(tl.int64)[:, None] * num_in
    up_row = weight + (n.to(tl.int64) + num_out)[:, None] * num_in
    x_row = x + m.to(tl.int64)[None, :] * num_in
    w_inside = (n < num_out)[:, None]
    x_inside = (m < num_rows)[None, :]
    gate = tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.float32)
    up = tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.float32)
    for start in tl.range(0, num_in, BLOCK_K, num_stages=STAGES):
        k = start + inner
        if WHOLE:
            a = tl.load(x_row + k[:, None], mask=x_inside, other=0.0)
            w_gate = tl.load(gate_row + k[None, :], mask=w_inside, other=0.0)
            w_up = tl.load(up_row + k[None, :], mask=w_inside, other=0.0)
        else:
            k_inside = k < num_in
            a = tl.load(x_row + k[:, None], mask=x_inside & k_inside[:, None], other=0.0)
            w_gate = tl.load(gate_row + k[None, :], mask=w_inside & k_inside[None, :], other=0.0)
            w_up = tl.load(up_row + k[None, :], mask=w_inside & k_inside[None, :], other=0.0)
        gate = tl.dot(w_gate, a, gate, input_precision="ieee")
        up = tl.dot(w_up, a, up, input_precision="ieee")
    if HAS_BIAS:
        gate += tl.load(bias + n, mask=n < num_out, other=0.0).to(tl.float32)[:, None]
        up += tl.load(bias + num_out + n, mask=n < num_out, other=0.0).to(tl.float32)[:, None]
    act = gated(gate, up, GELU)
    offset = m.to(tl.int64)[None, :] * num_out + n[:, None]
    tl.store(y + offset, act.to(y.dtype.element_ty), mask=(n < num_out)[:, None] & (m < num_rows)[None, :])
