"""Multi-head latent attention as Triton kernels. Signatures and shapes: `optimized/ops/table.py`."""

import torch
import triton
from torch import Tensor

from optimized.ops.kernels.attention import attend_merge_kernel
from optimized.ops.kernels.latent import attend_latent_kernel, heads_kernel, latent_write_kernel
from optimized.ops.launches import PREFILL_FROM, Launches
from optimized.ops.sight import sight_of
from optimized.ops.slots import checked
from optimized.ops.tiles import HEAD_TILE, latent_tile

MERGE_ROWS = 4


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
    ) -> None:
        """kv_a [M, R+Dr], norm_weight [R], positions [M], slots [M], inv_freq [Dr/2], cache [B, S, R+Dr]"""
        (num_rows, whole), rank, (batch, num_slots, _) = kv_a.shape, norm_weight.shape[0], cache.shape
        slots, rope = checked(slots, num_rows), whole - rank
        turns = self._angles(inv_freq, rope_scale, num_slots, rope, kv_a.dtype, interleaved)
        latent_write_kernel[(num_rows,)](
            *(kv_a, norm_weight, positions.contiguous(), slots, turns.cos_sin, turns.partner, cache.view(-1)),
            *(num_slots, batch * num_slots, kv_a.stride(0), eps),
            RANK=rank,
            ROPE=rope,
            BLOCK_R=triton.next_power_of_2(rank),
            BLOCK_D=triton.next_power_of_2(rope),
        )

    def attend_latent(
        self,
        q_latent: Tensor,
        q_rope: Tensor,
        cache: Tensor,
        positions: Tensor,
        scale: float,
        num_slots: int | None = None,
    ) -> Tensor:
        """q_latent [B, T, N, R], q_rope [B, T, N, Dr], cache [B, S, R+Dr], positions [B, T] -> [B, T, N, R]"""
        (batch, num_queries, heads, rank), rope, size = q_latent.shape, q_rope.shape[3], cache.shape[1]
        tree = sight_of(num_slots)
        if batch * num_queries >= PREFILL_FROM and tree is None:
            return self._prefill.attend_latent(q_latent, q_rope, cache, positions, scale, num_slots)
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
        y = torch.empty_like(q_latent, memory_format=torch.contiguous_format)
        attend_merge_kernel[(triton.cdiv(rows, MERGE_ROWS),)](
            partial, tops, totals, y, rows, chunks, WIDTH=rank, BLOCK_M=MERGE_ROWS, BLOCK_D=block_r
        )
        return y

    def absorb(self, q_nope: Tensor, w_uk: Tensor) -> Tensor:
        """q_nope [M, N, Dn], w_uk [N, Dn, R] -> [M, N, R]"""
        return self._prefill.absorb(q_nope, w_uk) if q_nope.shape[0] >= PREFILL_FROM else self._by_head(q_nope, w_uk)

    def expand(self, o: Tensor, w_uv: Tensor) -> Tensor:
        """o [M, N, R], w_uv [N, R, Dv] -> [M, N, Dv]"""
        return self._prefill.expand(o, w_uv) if o.shape[0] >= PREFILL_FROM else self._by_head(o, w_uv)

    def _by_head(self, x: Tensor, weight: Tensor) -> Tensor:
        """x [M, N, K], weight [N, K, O] -> [M, N, O]"""
        num_rows, (heads, num_in, num_out) = x.shape[0], weight.shape
        t = self._tile or HEAD_TILE._replace(block_m=self.bucket)
        y = x.new_empty(num_rows, heads, num_out)
        heads_kernel[(heads, triton.cdiv(num_out, t.block_n), triton.cdiv(num_rows, t.block_m))](
            *(x, weight, y, num_rows, heads, x.stride(0), x.stride(1), num_in, num_out),
            BLOCK_M=t.block_m,
            BLOCK_N=t.block_n,
            BLOCK_K=t.block_k,
            STAGES=t.num_stages,
            num_warps=t.num_warps,
        )
        return y
