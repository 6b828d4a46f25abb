"""Per-head norm, rotation and the write of keys and values, one program for a few heads of a row."""

import triton
import triton.language as tl


@triton.jit
def rope_kernel(
    qkv,
    positions,
    slots,
    cos_sin,
    partner,
    k_cache,
    v_cache,
    q_norm,
    k_norm,
    q,
    num_positions,
    num_flat_slots,
    eps,
    Q_HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    NORM_Q: tl.constexpr,
    NORM_K: tl.constexpr,
    NORM_V: tl.constexpr,
    PLUS_ONE: tl.constexpr,
    K_EQ_V: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """qkv [M, (N+2G)*D], cos_sin [S, 2, D], partner [D], caches [B*S, G, D], q [M, N, D]

    With K_EQ_V the rows have no values of their own, and the value heads are the key heads as they came.
    """
    PARTS: tl.constexpr = 1 if K_EQ_V else 2
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    d = tl.arange(0, BLOCK)
    wide = d < WIDTH
    is_q = head < Q_HEADS
    is_k = (head >= Q_HEADS) & (head < Q_HEADS + KV_HEADS)
    is_v = (head >= Q_HEADS + KV_HEADS) & (head < Q_HEADS + 2 * KV_HEADS)
    inside = (head < Q_HEADS + 2 * KV_HEADS)[:, None] & wide[None, :]

    other = tl.load(partner + d, mask=wide, other=0)
    source = head
    if K_EQ_V:
        source = tl.where(is_v, head - KV_HEADS, head)
    x_row = qkv + row * ((Q_HEADS + PARTS * KV_HEADS) * WIDTH) + source[:, None] * WIDTH
    x = tl.load(x_row + d[None, :], mask=inside, other=0.0).to(tl.float32)
    x_partner = tl.load(x_row + other[None, :], mask=inside, other=0.0).to(tl.float32)
    if NORM_Q or NORM_K or NORM_V:
        rstd = tl.rsqrt(tl.sum(x * x, 1) / WIDTH + eps)
    if NORM_Q:
        w = tl.load(q_norm + d, mask=wide, other=0.0).to(tl.float32)
        w_partner = tl.load(q_norm + other, mask=wide, other=0.0).to(tl.float32)
        if PLUS_ONE:
            w = w + 1.0
            w_partner = w_partner + 1.0
        x = tl.where(is_q[:, None], x * rstd[:, None] * w[None, :], x)
        x_partner = tl.where(is_q[:, None], x_partner * rstd[:, None] * w_partner[None, :], x_partner)
    if NORM_K:
        w = tl.load(k_norm + d, mask=wide, other=0.0).to(tl.float32)
        w_partner = tl.load(k_norm + other, mask=wide, other=0.0).to(tl.float32)
        if PLUS_ONE:
            w = w + 1.0
            w_partner = w_partner + 1.0
        x = tl.where(is_k[:, None], x * rstd[:, None] * w[None, :], x)
        x_partner = tl.where(is_k[:, None], x_partner * rstd[:, None] * w_partner[None, :], x_partner)
    if NORM_V:
        x = tl.where(is_v[:, None], x * rstd[:, None], x)

    # blocks, not scalars: the interpreter has no mask of a block and a scalar
    position = tl.maximum(tl.load(positions + row) + tl.zeros([BLOCK], dtype=tl.int64), 0)
    known = wide & (position < num_positions)
    turn = cos_sin + position * (2 * WIDTH) + d
    cos = tl.load(turn, mask=known, other=0.0).to(tl.float32)
    sin = tl.load(turn + WIDTH, mask=known, other=0.0).to(tl.float32)
    turned = (x * cos[None, :] + x_partner * sin[None, :]).to(q.dtype.element_ty)

    tl.store(q + row * (Q_HEADS * WIDTH) + head[:, None] * WIDTH + d[None, :], turned, mask=is_q[:, None] & inside)
    slot = tl.load(slots + row) + tl.zeros([HEADS], dtype=tl.int64)
    held = (slot >= 0) & (slot < num_flat_slots)
    inside = inside & held[:, None]
    k_head = (slot * KV_HEADS + head - Q_HEADS)[:, None] * WIDTH
    tl.store(k_cache + k_head + d[None, :], turned, mask=is_k[:, None] & inside)
    v_head = (slot * KV_HEADS + head - Q_HEADS - KV_HEADS)[:, None] * WIDTH
    tl.store(v_cache + v_head + d[None, :], x.to(q.dtype.element_ty), mask=is_v[:, None] & inside)


@triton.jit
def q_rope_kernel(
    x,
    positions,
    cos_sin,
    partner,
    q_norm,
    q,
    num_positions,
    row_stride,
    head_stride,
    eps,
    Q_HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    NORM: tl.constexpr,
    PLUS_ONE: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """x [M, N, D] with rows and heads apart, cos_sin [S, 2, D], partner [D], q [M, N, D]"""
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    d = tl.arange(0, BLOCK)
    wide = d < WIDTH
    inside = (head < Q_HEADS)[:, None] & wide[None, :]

    other = tl.load(partner + d, mask=wide, other=0)
    x_row = x + row * row_stride + head[:, None] * head_stride
    h = tl.load(x_row + d[None, :], mask=inside, other=0.0).to(tl.float32)
    h_partner = tl.load(x_row + other[None, :], mask=inside, other=0.0).to(tl.float32)
    if NORM:
        rstd = tl.rsqrt(tl.sum(h * h, 1) / WIDTH + eps)[:, None]
        w = tl.load(q_norm + d, mask=wide, other=0.0).to(tl.float32)
        w_partner = tl.load(q_norm + other, mask=wide, other=0.0).to(tl.float32)
        if PLUS_ONE:
            w = w + 1.0
            w_partner = w_partner + 1.0
        h = h * rstd * w[None, :]
        h_partner = h_partner * rstd * w_partner[None, :]

    position = tl.maximum(tl.load(positions + row) + tl.zeros([BLOCK], dtype=tl.int64), 0)
    known = wide & (position < num_positions)
    turn = cos_sin + position * (2 * WIDTH) + d
    cos = tl.load(turn, mask=known, other=0.0).to(tl.float32)
    sin = tl.load(turn + WIDTH, mask=known, other=0.0).to(tl.float32)
    turned = (h * cos[None, :] + h_partner * sin[None, :]).to(q.dtype.element_ty)
    tl.store(q + row * (Q_HEADS * WIDTH) + head[:, None] * WIDTH + d[None, :], turned, mask=inside)
