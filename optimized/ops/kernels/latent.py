"""Multi-head latent attention: one cached row a slot, R latent features that are key and value, and Dr turned ones."""

import triton
import triton.language as tl

from optimized.ops.kernels.attention import along_line, merged
from optimized.ops.kernels.norm import normed_row


@triton.jit
def latent_write_kernel(
    kv_a,
    norm_weight,
    positions,
    slots,
    cos_sin,
    partner,
    cache,
    q_a,
    q_norm,
    q,
    num_positions,
    num_flat_slots,
    row_stride,
    q_stride,
    q_width,
    eps,
    HAS_QUERY: tl.constexpr,
    RANK: tl.constexpr,
    ROPE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
):
    """kv_a [M, R+Dr], norm_weight [R], cos_sin [S, 2, Dr], partner [Dr], cache [B*S, R+Dr]

    With HAS_QUERY the row's query latent is normed as well: q_a, q [M, Q], q_norm [Q].
    """
    row = tl.program_id(0).to(tl.int64)
    r = tl.arange(0, BLOCK_R)
    d = tl.arange(0, BLOCK_D)
    wide = d < ROPE
    x = kv_a + row * row_stride
    if HAS_QUERY:
        at = tl.arange(0, BLOCK_Q)
        h = tl.load(q_a + row * q_stride + at, mask=at < q_width, other=0.0).to(tl.float32)
        normed = normed_row(h, q_norm, q, at, at < q_width, q_width, eps, True, True, False)
        tl.store(q + row * q_width + at, normed, mask=at < q_width)
    c = tl.load(x + r, mask=r < RANK, other=0.0).to(tl.float32)
    w = tl.load(norm_weight + r, mask=r < RANK, other=0.0).to(tl.float32)
    c = (c * tl.rsqrt(tl.sum(c * c, 0) / RANK + eps)).to(cache.dtype.element_ty).to(tl.float32)

    other = tl.load(partner + d, mask=wide, other=0)
    k = tl.load(x + RANK + d, mask=wide, other=0.0).to(tl.float32)
    k_partner = tl.load(x + RANK + other, mask=wide, other=0.0).to(tl.float32)
    # blocks, not scalars: the interpreter has no mask of a block and a scalar
    position = tl.maximum(tl.load(positions + row) + tl.zeros([BLOCK_D], dtype=tl.int64), 0)
    known = wide & (position < num_positions)
    turn = cos_sin + position * (2 * ROPE) + d
    cos = tl.load(turn, mask=known, other=0.0).to(tl.float32)
    sin = tl.load(turn + ROPE, mask=known, other=0.0).to(tl.float32)

    slot = tl.load(slots + row)
    out = cache + slot * (RANK + ROPE)
    latent_slot = slot + tl.zeros([BLOCK_R], dtype=tl.int64)
    latent_held = (latent_slot >= 0) & (latent_slot < num_flat_slots) & (r < RANK)
    tl.store(out + r, (c * w).to(cache.dtype.element_ty), mask=latent_held)
    rope_slot = slot + tl.zeros([BLOCK_D], dtype=tl.int64)
    rope_held = (rope_slot >= 0) & (rope_slot < num_flat_slots) & wide
    tl.store(out + RANK + d, (k * cos + k_partner * sin).to(cache.dtype.element_ty), mask=rope_held)


@triton.jit
def attend_latent_kernel(
    q_latent,
    q_rope,
    cache,
    positions,
    tree_first,
    words,
    partial,
    tops,
    totals,
    scale,
    num_queries,
    num_slots,
    num_nodes,
    HAS_TREE: tl.constexpr,
    Q_HEADS: tl.constexpr,
    RANK: tl.constexpr,
    ROPE: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
):
    """q_latent [B, T, N, R], q_rope [B, T, N, Dr], cache [B, S, R+Dr], positions [B, T]; partial [B*T*N, chunks, R]

    A tile's rows are (query, head): all heads read the same slot. Chunks, their merge and trees: `attend_chunk_kernel`.
    """
    chunk = tl.program_id(0)
    batch = tl.program_id(2).to(tl.int64)
    row = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    query = row // Q_HEADS
    real = query < num_queries
    r = tl.arange(0, BLOCK_R)
    d = tl.arange(0, BLOCK_D)

    position = tl.load(positions + batch * num_queries + query, mask=real, other=-1)
    q_row = batch * num_queries * Q_HEADS + row
    latent_wide = real[:, None] & (r < RANK)[None, :]
    x = tl.load(q_latent + q_row[:, None] * RANK + r[None, :], mask=latent_wide, other=0.0)
    rope_wide = real[:, None] & (d < ROPE)[None, :]
    x_rope = tl.load(q_rope + q_row[:, None] * ROPE + d[None, :], mask=rope_wide, other=0.0)
    begin = chunk * CHUNK
    end = tl.max(position, 0).to(tl.int32) + 1
    if HAS_TREE:
        root = tl.load(tree_first + batch).to(tl.int32)
        word = tl.load(words + batch * num_queries + query, mask=real, other=0)
        end = root + num_nodes
    end = tl.minimum(tl.minimum(begin + CHUNK, num_slots), end)

    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], dtype=tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_R], dtype=tl.float32)
    for start in tl.range(begin, end, BLOCK_S, num_stages=STAGES):
        slot = start + tl.arange(0, BLOCK_S)
        live = slot < end
        at = (batch * num_slots + slot) * (RANK + ROPE)
        c = tl.load(cache + at[:, None] + r[None, :], mask=live[:, None] & (r < RANK)[None, :], other=0.0)
        k_wide = live[None, :] & (d < ROPE)[:, None]
        k_rope = tl.load(cache + at[None, :] + RANK + d[:, None], mask=k_wide, other=0.0)
        score = tl.dot(x, tl.trans(c), input_precision="ieee")
        score = tl.dot(x_rope, k_rope, score, input_precision="ieee") * scale
        seen = live[None, :] & (slot[None, :] <= position[:, None])
        if HAS_TREE:
            seen = along_line(seen, live, word, slot - root)
        score = tl.where(seen, score, float("-inf"))
        new_top = tl.maximum(top, tl.max(score, 1))
        # a row that has seen nothing yet must not subtract infinities
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        p = tl.exp(score - base[:, None])
        fade = tl.exp(top - base)
        total = total * fade + tl.sum(p, 1)
        acc = tl.dot(p.to(c.dtype), c, acc * fade[:, None], input_precision="ieee")
        top = new_top

    out = q_row * tl.num_programs(0) + chunk
    tl.store(tops + out, top, mask=real)
    tl.store(totals + out, total, mask=real)
    # what nobody reads is not written: the merge asks for a chunk only where its top is finite
    written = (top > float("-inf"))[:, None] & latent_wide
    tl.store(partial + out[:, None] * RANK + r[None, :], acc, mask=written)


@triton.jit
def absorb_kernel(
    q,
    weight,
    positions,
    cos_sin,
    partner,
    q_latent,
    q_rope,
    num_rows,
    num_heads,
    row_stride,
    head_stride,
    num_positions,
    NOPE: tl.constexpr,
    RANK: tl.constexpr,
    ROPE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
):
    """q [M, N, Dn+Dr] with rows and heads apart, weight [N, Dn, R]; q_latent [M, N, R], q_rope [M, N, Dr]

    The last program of a head and tile of rows turns, the others multiply.
    """
    head = tl.program_id(0).to(tl.int64)
    m = (tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    real = m < num_rows
    x_row = q + m[:, None] * row_stride + head * head_stride
    if tl.program_id(1) == tl.num_programs(1) - 1:
        d = tl.arange(0, BLOCK_D)
        wide = real[:, None] & (d < ROPE)[None, :]
        other = tl.load(partner + d, mask=d < ROPE, other=0)
        x = tl.load(x_row + NOPE + d[None, :], mask=wide, other=0.0).to(tl.float32)
        x_partner = tl.load(x_row + NOPE + other[None, :], mask=wide, other=0.0).to(tl.float32)
        position = tl.maximum(tl.load(positions + m, mask=real, other=0), 0)
        known = wide & (position < num_positions)[:, None]
        turn = cos_sin + position[:, None] * (2 * ROPE) + d[None, :]
        cos = tl.load(turn, mask=known, other=0.0).to(tl.float32)
        sin = tl.load(turn + ROPE, mask=known, other=0.0).to(tl.float32)
        turned = (x * cos + x_partner * sin).to(q_rope.dtype.element_ty)
        tl.store(q_rope + (m[:, None] * num_heads + head) * ROPE + d[None, :], turned, mask=wide)
    else:
        n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
        inner = tl.arange(0, BLOCK_K)
        acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
        for start in tl.range(0, NOPE, BLOCK_K, num_stages=STAGES):
            k = start + inner
            a = tl.load(x_row + k[None, :], mask=real[:, None] & (k < NOPE)[None, :], other=0.0)
            w_row = weight + (head * NOPE + k)[:, None] * RANK
            w = tl.load(w_row + n[None, :], mask=(n < RANK)[None, :] & (k < NOPE)[:, None], other=0.0)
            acc = tl.dot(a, w, acc, input_precision="ieee")
        offset = (m[:, None] * num_heads + head) * RANK + n[None, :]
        tl.store(q_latent + offset, acc.to(q_latent.dtype.element_ty), mask=real[:, None] & (n < RANK)[None, :])


@triton.jit
def merge_values_kernel(
    partial,
    tops,
    totals,
    weight,
    y,
    num_rows,
    num_heads,
    num_chunks,
    num_out,
    RANK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """partial [M*N, chunks, R], tops, totals [M*N, chunks], weight [N, R, Dv] -> y [M, N, Dv]"""
    head = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = (tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    r = tl.arange(0, BLOCK_R)
    real = m < num_rows
    mixed = merged(partial, tops, totals, m * num_heads + head, real, r, num_chunks, RANK, BLOCK_M, BLOCK_R)
    inside = (r < RANK)[:, None] & (n < num_out)[None, :]
    w = tl.load(weight + (head * RANK + r)[:, None] * num_out + n[None, :], mask=inside, other=0.0)
    out = tl.dot(mixed.to(w.dtype), w, input_precision="ieee")
    offset = (m[:, None] * num_heads + head) * num_out + n[None, :]
    tl.store(y + offset, out.to(y.dtype.element_ty), mask=real[:, None] & (n < num_out)[None, :])
