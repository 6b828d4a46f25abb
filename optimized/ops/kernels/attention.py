"""Decode and verify attention in two passes: chunks of keys, then their merge.

A chunk is a constant number of absolute slots, so the sums of a row are cut at the same places however long the
sequence is and however many queries ask. Chunks and steps that a row does not see add exact zeros to it.
"""

import triton
import triton.language as tl


@triton.jit
def along_line(seen, live, word, node):
    """seen [M, S], live [S], word [M], node [S]: slots below a tree as they are, its nodes by a row's word"""
    bit = (word[:, None] >> tl.minimum(tl.maximum(node, 0), 63)[None, :]) & 1
    return live[None, :] & tl.where((node < 0)[None, :], seen, bit == 1)


@triton.jit
def attend_chunk_kernel(
    q,
    k_cache,
    v_cache,
    positions,
    ends,
    tree_first,
    words,
    partial,
    tops,
    totals,
    scale,
    num_queries,
    num_slots,
    num_nodes,
    window,
    HAS_WINDOW: tl.constexpr,
    HAS_ENDS: tl.constexpr,
    HAS_TREE: tl.constexpr,
    Q_HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
):
    """q [B, T, N, D], caches [B, S, G, D], positions, ends [B, T]; partial [M*N, chunks, D], tops, totals [M*N, chunks]

    A tile's rows are (query, head of the group): the heads that share a key read it once. tree_first [B], words [B, T]
    """
    GROUP: tl.constexpr = Q_HEADS // KV_HEADS
    chunk = tl.program_id(0)
    batch = (tl.program_id(2) // KV_HEADS).to(tl.int64)
    kv_head = tl.program_id(2) % KV_HEADS
    row = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    query = row // GROUP
    real = query < num_queries
    d = tl.arange(0, BLOCK_D)
    wide = d < WIDTH

    position = tl.load(positions + batch * num_queries + query, mask=real, other=-1)
    last = position
    if HAS_ENDS:
        last = tl.load(ends + batch * num_queries + query, mask=real, other=-1)
    q_row = (batch * num_queries + query) * Q_HEADS + kv_head * GROUP + row % GROUP
    x = tl.load(q + q_row[:, None] * WIDTH + d[None, :], mask=real[:, None] & wide[None, :], other=0.0)
    begin = chunk * CHUNK
    end = tl.max(last, 0).to(tl.int32) + 1
    if HAS_TREE:
        root = tl.load(tree_first + batch).to(tl.int32)
        word = tl.load(words + batch * num_queries + query, mask=real, other=0)
        end = root + num_nodes
    end = tl.minimum(tl.minimum(begin + CHUNK, num_slots), end)
    if HAS_WINDOW:
        first = tl.min(tl.where(real, position, num_slots), 0).to(tl.int32) - window + 1
        # whole steps, so that steps begin at the same slots for every query
        begin = tl.maximum(begin, tl.maximum(first, 0) // BLOCK_S * BLOCK_S)

    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], dtype=tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    for start in tl.range(begin, end, BLOCK_S, num_stages=STAGES):
        slot = start + tl.arange(0, BLOCK_S)
        live = slot < end
        at = ((batch * num_slots + slot) * KV_HEADS + kv_head) * WIDTH
        k = tl.load(k_cache + at[None, :] + d[:, None], mask=live[None, :] & wide[:, None], other=0.0)
        score = tl.dot(x, k, input_precision="ieee") * scale
        seen = live[None, :] & (slot[None, :] <= last[:, None])
        if HAS_WINDOW:
            seen = seen & (slot[None, :] > position[:, None] - window)
        if HAS_TREE:
            seen = along_line(seen, live, word, slot - root)
        score = tl.where(seen, score, float("-inf"))
        new_top = tl.maximum(top, tl.max(score, 1))
        # a row that has seen nothing yet must not subtract infinities
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        p = tl.exp(score - base[:, None])
        fade = tl.exp(top - base)
        total = total * fade + tl.sum(p, 1)
        v = tl.load(v_cache + at[:, None] + d[None, :], mask=live[:, None] & wide[None, :], other=0.0)
        acc = tl.dot(p.to(v.dtype), v, acc * fade[:, None], input_precision="ieee")
        top = new_top

    out = q_row * tl.num_programs(0) + chunk
    tl.store(tops + out, top, mask=real)
    tl.store(totals + out, total, mask=real)
    # what nobody reads is not written: the merge asks for a chunk only where its top is finite
    written = (top > float("-inf"))[:, None] & real[:, None] & wide[None, :]
    tl.store(partial + out[:, None] * WIDTH + d[None, :], acc, mask=written)


@triton.jit
def merged(
    partial,
    tops,
    totals,
    row,
    real,
    d,
    num_chunks,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """partial [M*N, chunks, D], tops, totals [M*N, chunks] -> [BLOCK_M, BLOCK_D] float32 of these rows

    Chunk after chunk, not as a tree: the order then does not depend on how many chunks there are.
    """
    wide = d < WIDTH
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], dtype=tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    for chunk in tl.range(0, num_chunks):
        at = row * num_chunks + chunk
        chunk_top = tl.load(tops + at, mask=real, other=float("-inf"))
        chunk_total = tl.load(totals + at, mask=real, other=0.0)
        held = (chunk_top > float("-inf"))[:, None] & wide[None, :]
        o = tl.load(partial + at[:, None] * WIDTH + d[None, :], mask=held, other=0.0)
        new_top = tl.maximum(top, chunk_top)
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        fade = tl.exp(top - base)
        gain = tl.exp(chunk_top - base)
        total = total * fade + chunk_total * gain
        acc = acc * fade[:, None] + o * gain[:, None]
        top = new_top
    # a row that saw no slot has total 0 and stays zero
    return acc / tl.where(total > 0, total, 1.0)[:, None]


@triton.jit
def attend_merge_kernel(
    partial,
    tops,
    totals,
    y,
    num_rows,
    num_chunks,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """partial [M*N, chunks, D], tops, totals [M*N, chunks] -> y [M*N, D]"""
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    real = row < num_rows
    d = tl.arange(0, BLOCK_D)
    out = merged(partial, tops, totals, row, real, d, num_chunks, WIDTH, BLOCK_M, BLOCK_D)
    inside = real[:, None] & (d < WIDTH)[None, :]
    tl.store(y + row[:, None] * WIDTH + d[None, :], out.to(y.dtype.element_ty), mask=inside)
