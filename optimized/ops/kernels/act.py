"""Activations, element by element."""

import triton
import triton.language as tl

# 2 sqrt(2 / pi)
GELU_SLOPE = tl.constexpr(1.5957691216057308)


@triton.jit
def gated(gate, up, GELU: tl.constexpr):
    """act(gate) * up; both activations are gate * sigmoid(u), since (1 + tanh z) / 2 = sigmoid(2z)"""
    u = gate
    if GELU:
        u = GELU_SLOPE * (gate + 0.044715 * gate * gate * gate)
    # beyond this the result is zero, and the exponential would be infinite
    return gate * up / (1.0 + tl.exp(-tl.maximum(u, -80.0)))


@triton.jit
def act_mul_kernel(gate, up, y, gate_stride, up_stride, width, GELU: tl.constexpr, BLOCK: tl.constexpr):
    """gate, up, y [M, I]; rows of gate and up may lie apart"""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    g = tl.load(gate + row * gate_stride + column, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_stride + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + row * width + column, gated(g, u, GELU).to(y.dtype.element_ty), mask=inside)


@triton.jit
def softcap_kernel(logits, y, width, cap, BLOCK: tl.constexpr):
    """logits, y [M, V]; cap * tanh(logits / cap), tanh z = 2 sigmoid(2z) - 1"""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    z = tl.load(logits + row * width + column, mask=inside, other=0.0).to(tl.float32) / cap
    tanh = 2.0 / (1.0 + tl.exp(-2.0 * tl.maximum(z, -40.0))) - 1.0
    tl.store(y + row * width + column, (cap * tanh).to(y.dtype.element_ty), mask=inside)
