"""Multi-head latent attention as Triton kernels. Signatures and shapes: `optimized/ops/table.py`."""

import torch
import triton
from torch import Tensor

from optimized.ops.kernels.latent import (
    absorb_kernel,
    attend_latent_kernel,
    latent_write_kernel,
    merge_values_kernel,
)
from optimized.ops.launches import PREFILL_FROM, Launches
from optimized.ops.sight import sight_of
from optimized.ops.slots import checked
from optimized.ops.tiles import HEAD_TILE, VALUE_TILE, latent_tile


class TritonLatent(Launches):
    """What surrounds a cache of latents."""

    def latent_write(
        self,
        kv_a: Tensor,
        norm_weight: Tensor,
        eps: float,
        positions: Tensor,
        slots: Tensor,
        inv_freq: Tensor,
        rope_scale: float,
        cache: Tensor,
        interleaved: bool = True,
        q_a: Tensor | None = None,
        q_norm: Tensor | None = None,
    ) -> Tensor:
        """kv_a [M, R+Dr], norm_weight [R], positions, slots [M], inv_freq [Dr/2], cache [B, S, R+Dr] -> [M, Q]"""
        (num_rows, whole), rank, (batch, num_slots, _) = kv_a.shape, norm_weight.shape[0], cache.shape
        slots, rope = checked(slots, num_rows), whole - rank
        turns = self._angles(inv_freq, rope_scale, num_slots, rope, kv_a.dtype, interleaved)
        width, q_stride = (0, 0) if q_a is None else (q_a.shape[1], q_a.stride(0))
        q = kv_a.new_empty(num_rows, width)
        latent_write_kernel[(num_rows,)](
            *(kv_a, norm_weight, positions.contiguous(), slots, turns.cos_sin, turns.partner, cache.view(-1)),
            *(q_a, q_norm, q, num_slots, batch * num_slots, kv_a.stride(0), q_stride, width, eps),
            HAS_QUERY=q_a is not None,
            RANK=rank,
            ROPE=rope,
            BLOCK_R=triton.next_power_of_2(rank),
            BLOCK_D=triton.next_power_of_2(rope),
            BLOCK_Q=triton.next_power_of_2(max(1, width)),
        )
        return q

    def attend_latent(
        self,
        q_latent: Tensor,
        q_rope: Tensor,
        cache: Tensor,
        positions: Tensor,
        scale: float,
        w_uv: Tensor,
        num_slots: int | None = None,
    ) -> Tensor:
        """q_latent [B, T, N, R], q_rope [B, T, N, Dr], cache [B, S, R+Dr], positions [B, T] -> [B, T, N*Dv]"""
        (batch, num_queries, heads, rank), rope, size = q_latent.shape, q_rope.shape[3], cache.shape[1]
        tree = sight_of(num_slots)
        if batch * num_queries >= PREFILL_FROM and tree is None:
            return self._prefill.attend_latent(q_latent, q_rope, cache, positions, scale, w_uv, num_slots)
        t = self._key_tile or latent_tile(heads, q_latent.element_size())
        block_r = max(16, triton.next_power_of_2(rank))
        rows, chunks = batch * num_queries * heads, triton.cdiv(min(num_slots or size, size), t.chunk)
        partial = q_latent.new_empty(rows, chunks, rank, dtype=torch.float32)
        tops, totals = (q_latent.new_empty(rows, chunks, dtype=torch.float32) for _ in range(2))
        attend_latent_kernel[(chunks, triton.cdiv(num_queries * heads, t.block_m), batch)](
            *(q_latent.contiguous(), q_rope.contiguous(), cache.view(-1), positions.contiguous()),
            *((None, None) if tree is None else (tree.first, tree.words())),
            *(partial, tops, totals, scale, num_queries, size, 0 if tree is None else tree.num_nodes),
            HAS_TREE=tree is not None,
            Q_HEADS=heads,
            RANK=rank,
            ROPE=rope,
            CHUNK=t.chunk,
            BLOCK_M=t.block_m,
            BLOCK_S=t.block_s,
            BLOCK_R=block_r,
            BLOCK_D=max(16, triton.next_power_of_2(rope)),
            STAGES=t.num_stages,
            num_warps=t.num_warps,
        )
        num_rows, num_out, v = batch * num_queries, w_uv.shape[2], VALUE_TILE
        y = q_latent.new_empty(batch, num_queries, heads * num_out)
        merge_values_kernel[(heads, triton.cdiv(num_out, v.block_n), triton.cdiv(num_rows, v.block_m))](
            *(partial, tops, totals, w_uv, y, num_rows, heads, chunks, num_out),
            RANK=rank,
            BLOCK_M=v.block_m,
            BLOCK_N=v.block_n,
            BLOCK_R=block_r,
            num_warps=v.num_warps,
        )
        return y

    def absorb(
        self,
        q: Tensor,
        w_uk: Tensor,
        positions: Tensor,
        inv_freq: Tensor,
        rope_scale: float,
        num_positions: int,
        interleaved: bool = True,
    ) -> tuple[Tensor, Tensor]:
        """q [M, N, Dn+Dr], w_uk [N, Dn, R], positions [M], inv_freq [Dr/2] -> [M, N, R], [M, N, Dr]"""
        if q.shape[0] >= PREFILL_FROM:
            return self._prefill.absorb(q, w_uk, positions, inv_freq, rope_scale, num_positions, interleaved)
        num_rows, (heads, nope, rank) = q.shape[0], w_uk.shape
        rope = q.shape[2] - nope
        turns = self._angles(inv_freq, rope_scale, num_positions, rope, q.dtype, interleaved)
        t = self._tile or HEAD_TILE._replace(block_m=self.bucket)
        q_latent, q_rope = (q.new_empty(num_rows, heads, width) for width in (rank, rope))
        # a program more than there are tiles: it turns
        absorb_kernel[(heads, triton.cdiv(rank, t.block_n) + 1, triton.cdiv(num_rows, t.block_m))](
            *(q, w_uk, positions.contiguous(), turns.cos_sin, turns.partner, q_latent, q_rope),
            *(num_rows, heads, q.stride(0), q.stride(1), num_positions),
            NOPE=nope,
            RANK=rank,
            ROPE=rope,
            BLOCK_M=t.block_m,
            BLOCK_N=t.block_n,
            BLOCK_K=t.block_k,
            BLOCK_D=triton.next_power_of_2(rope),
            STAGES=t.num_stages,
            num_warps=t.num_warps,
        )
        return q_latent, q_rope
