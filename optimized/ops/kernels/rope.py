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
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """qkv [M, (N+2G)*D], cos_sin [S, 2, D], partner [D], caches [B*S, G, D], q [M, N, D]"""
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    d = tl.arange(0, BLOCK)
    wide = d < WIDTH
    is_q = head < Q_HEADS
    is_k = (head >= Q_HEADS) & (head < Q_HEADS + KV_HEADS)
    is_v = (head >= Q_HEADS + KV_HEADS) & (head < Q_HEADS + 2 * KV_HEADS)
    inside = (head < Q_HEADS + 2 * KV_HEADS)[:, None] & wide[None, :]

    other = tl.load(partner + d, mask=wide, other=0)
    x_row = qkv + row * ((Q_HEADS + 2 * KV_HEADS) * WIDTH) + head[:, None] * WIDTH
    x = tl.load(x_row + d[None, :], mask=inside, other=0.0).to(tl.float32)
    x_partner = tl.load(x_row + other[None, :], mask=inside, other=0.0).to(tl.float32)
    if NORM_Q or NORM_K:
        rstd = tl.rsqrt(tl.sum(x * x, 1) / WIDTH + eps)
    if NORM_Q:
        w = tl.load(q_norm + d, mask=wide, other=0.0).to(tl.float32)
        w_partner = tl.load(q_norm + other, mask=wide, other=0.0).to(tl.float32)
        x = tl.where(is_q[:, None], x * rstd[:, None] * w[None, :], x)
        x_partner = tl.where(is_q[:, None], x_partner * rstd[:, None] * w_partner[None, :], x_partner)
    if NORM_K:
        w = tl.load(k_norm + d, mask=wide, other=0.0).to(tl.float32)
        w_partner = tl.load(k_norm + other, mask=wide, other=0.0).to(tl.float32)
        x = tl.where(is_k[:, None], x * rstd[:, None] * w[None, :], x)
        x_partner = tl.where(is_k[:, None], x_partner * rstd[:, None] * w_partner[None, :], x_partner)

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
