"""Adds and RMS norms of one row a program."""

import triton
import triton.language as tl


@triton.jit
def normed_row(
    h,
    weight,
    y,
    column,
    inside,
    width,
    eps,
    HAS_WEIGHT: tl.constexpr,
    CAST_FIRST: tl.constexpr,
    PLUS_ONE: tl.constexpr,
):
    """h float32 [H], zero outside; weight [H] -> [H] in the dtype of y"""
    u = h * tl.rsqrt(tl.sum(h * h, 0) / width + eps)
    if CAST_FIRST:
        u = u.to(y.dtype.element_ty).to(tl.float32)
    if HAS_WEIGHT:
        w = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
        if PLUS_ONE:
            w = w + 1.0
        u = u * w
    return u.to(y.dtype.element_ty)


@triton.jit
def add_rmsnorm_kernel(
    x,
    residual,
    weight,
    scale,
    normed,
    total,
    width,
    eps,
    HAS_RESIDUAL: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    CAST_FIRST: tl.constexpr,
    PLUS_ONE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """x, residual, normed, total [M, H]; weight [H]; scale [1]"""
    column = tl.arange(0, BLOCK)
    inside = column < width
    offset = tl.program_id(0).to(tl.int64) * width + column
    h = tl.load(x + offset, mask=inside, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        r = tl.load(residual + offset, mask=inside, other=0.0).to(tl.float32)
        # rounded before it is squared: the stream that the next layer reads is the stream that was normed
        h = (h + r).to(total.dtype.element_ty).to(tl.float32)
    if HAS_SCALE:
        h = (h * tl.load(scale).to(tl.float32)).to(total.dtype.element_ty).to(tl.float32)
    if HAS_RESIDUAL or HAS_SCALE:
        tl.store(total + offset, h.to(total.dtype.element_ty), mask=inside)
    y = normed_row(h, weight, normed, column, inside, width, eps, HAS_WEIGHT, CAST_FIRST, PLUS_ONE)
    tl.store(normed + offset, y, mask=inside)


@triton.jit
def sandwich_norm_kernel(
    branch,
    residual,
    post,
    pre,
    scale,
    normed,
    total,
    width,
    eps,
    HAS_POST: tl.constexpr,
    HAS_PRE: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    CAST_FIRST: tl.constexpr,
    PLUS_ONE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """branch, residual, normed, total [M, H]; post, pre [H]; scale [1]"""
    column = tl.arange(0, BLOCK)
    inside = column < width
    offset = tl.program_id(0).to(tl.int64) * width + column
    b = tl.load(branch + offset, mask=inside, other=0.0).to(tl.float32)
    b = normed_row(b, post, normed, column, inside, width, eps, HAS_POST, CAST_FIRST, PLUS_ONE).to(tl.float32)
    r = tl.load(residual + offset, mask=inside, other=0.0).to(tl.float32)
    h = (b + r).to(total.dtype.element_ty).to(tl.float32)
    if HAS_SCALE:
        h = (h * tl.load(scale).to(tl.float32)).to(total.dtype.element_ty).to(tl.float32)
    tl.store(total + offset, h.to(total.dtype.element_ty), mask=inside)
    y = normed_row(h, pre, normed, column, inside, width, eps, HAS_PRE, CAST_FIRST, PLUS_ONE)
    tl.store(normed + offset, y, mask=inside)
