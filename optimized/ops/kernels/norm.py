"""Add and RMS norm of one row a program."""

import triton
import triton.language as tl


@triton.jit
def add_rmsnorm_kernel(
    x,
    residual,
    weight,
    normed,
    total,
    width,
    eps,
    HAS_RESIDUAL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """x, residual, normed, total [M, H]; weight [H]"""
    column = tl.arange(0, BLOCK)
    inside = column < width
    offset = tl.program_id(0).to(tl.int64) * width + column
    h = tl.load(x + offset, mask=inside, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        r = tl.load(residual + offset, mask=inside, other=0.0).to(tl.float32)
        # rounded before it is squared: the stream that the next layer reads is the stream that was normed
        rounded = (h + r).to(total.dtype.element_ty)
        tl.store(total + offset, rounded, mask=inside)
        h = rounded.to(tl.float32)
    mean = tl.sum(h * h, 0) / width
    y = (h * tl.rsqrt(mean + eps)).to(normed.dtype.element_ty).to(tl.float32)
    w = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(normed + offset, (y * w).to(normed.dtype.element_ty), mask=inside)
