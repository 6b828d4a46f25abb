"""The operations as Triton kernels. Signatures and shapes: `optimized/ops/table.py`; kernels: `optimized/ops/kernels`.

Fixed tiles whatever the number of rows, so the chain rule holds by construction. Serves float32, float16 and bfloat16.
Without a GPU the same kernels run under TRITON_INTERPRET=1, set before triton is imported; bfloat16 is wrong there.
"""

import torch
import triton
from torch import Tensor

from optimized.ops.chance import uniform
from optimized.ops.kernels.act import act_mul_kernel, softcap_kernel
from optimized.ops.kernels.attention import attend_chunk_kernel, attend_merge_kernel
from optimized.ops.kernels.head import argmax_kernel, head_merge_kernel, head_tile_kernel, score_rows_kernel
from optimized.ops.kernels.linear import gate_up_kernel, linear_scaled_kernel
from optimized.ops.kernels.moves import accept_greedy_kernel, compact_kernel, embed_kernel, gather_rows_kernel
from optimized.ops.kernels.norm import add_rmsnorm_kernel, sandwich_norm_kernel
from optimized.ops.kernels.rope import q_rope_kernel, rope_kernel
from optimized.ops.kinds import ACTIVATIONS, LLAMA, NormKind, one_of, rounded
from optimized.ops.launch_latent import TritonLatent
from optimized.ops.launch_mixture import TritonMixture
from optimized.ops.launches import PREFILL_FROM, meta, start
from optimized.ops.sight import sight_of
from optimized.ops.slots import checked
from optimized.ops.tiles import EXPERT_TILE, key_tile, steps_of

ROPE_HEADS = 8
MERGE_ROWS = 4
MOVE_COLUMNS = 1024
ARGMAX_COLUMNS = 4096


class Triton(TritonMixture, TritonLatent):
    """Kernel launches; `tile` and `key_tile` override the table, for tests that want many small blocks."""

    def pack(self, weight: Tensor, wide: bool = False) -> Tensor:
        """weight [N, K] -> [N, K]"""
        # wide or not: products of 16-bit numbers are exact in float32, where kernels add them
        return weight.contiguous()

    def embed(self, ids: Tensor, table: Tensor, first: int | None = None, scale: float | None = None) -> Tensor:
        """ids [M], table [Vr, H] -> [M, H]"""
        width, factor = table.shape[1], 1.0 if scale is None else rounded(scale, table.dtype)
        y = table.new_empty(ids.shape[0], width)
        embed_kernel[(ids.shape[0], triton.cdiv(width, MOVE_COLUMNS))](
            *(ids, table, y, first or 0, table.shape[0], width, factor), SCALED=scale is not None, BLOCK=MOVE_COLUMNS
        )
        return y

    def add_rmsnorm(
        self,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        eps: float,
        kind: NormKind = LLAMA,
        scale: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """x [M, H], residual [M, H] or None, weight [H] or None, scale [1] or None -> [M, H], [M, H]"""
        has_residual, has_scale = residual is not None, scale is not None
        normed = torch.empty_like(x)
        total = torch.empty_like(x) if has_residual or has_scale else x
        add_rmsnorm_kernel[(x.shape[0],)](
            *(x, residual, weight, scale, normed, total, x.shape[1], eps),
            HAS_RESIDUAL=has_residual,
            HAS_WEIGHT=weight is not None,
            HAS_SCALE=has_scale,
            CAST_FIRST=kind.cast_first,
            PLUS_ONE=kind.plus_one,
            **_row(x.shape[1]),
        )
        return normed, total

    def sandwich_norm(
        self,
        branch: Tensor,
        residual: Tensor,
        post: Tensor | None,
        pre: Tensor | None,
        eps: float,
        kind: NormKind,
        scale: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """branch [M, H], residual [M, H], post, pre [H] or None, scale [1] or None -> [M, H], [M, H]"""
        normed, total = (torch.empty_like(residual) for _ in range(2))
        sandwich_norm_kernel[(branch.shape[0],)](
            *(branch, residual, post, pre, scale, normed, total, branch.shape[1], eps),
            HAS_POST=post is not None,
            HAS_PRE=pre is not None,
            HAS_SCALE=scale is not None,
            CAST_FIRST=kind.cast_first,
            PLUS_ONE=kind.plus_one,
            **_row(branch.shape[1]),
        )
        return normed, total

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [M, K], weight [N, K], bias [N] or None -> [M, N]"""
        return self._product(x, weight, bias, x.dtype)

    def gate_up_act(self, x: Tensor, weight: Tensor, bias: Tensor | None = None, act: str = "silu") -> Tensor:
        """x [M, K], weight [2I, K], bias [2I] or None -> [M, I]"""
        gelu = one_of(act, ACTIVATIONS, "act") == "gelu_tanh"
        if x.shape[0] >= PREFILL_FROM:
            return self._prefill.gate_up_act(x, weight, bias, act)
        width = weight.shape[0] // 2
        y = x.new_empty(x.shape[0], width)
        choice = self._choice_of(width, weight, 2)
        t = choice.tile
        grid = (triton.cdiv(width, t.block_n), triton.cdiv(x.shape[0], t.block_m))
        gate_up_kernel[grid](
            *(x, weight, bias, y, x.shape[0], width, x.shape[1]),
            HAS_BIAS=bias is not None,
            GELU=gelu,
            **meta(t, x.shape[1]),
            **start(choice.early),
        )
        return y

    def linear_scaled(
        self, x: Tensor, weight: Tensor, scales: Tensor, block: tuple[int, int], bias: Tensor | None = None
    ) -> Tensor:
        """x [M, K], weight [N, K], scales [N/b, K/c], bias [N] or None -> [M, N]"""
        if x.shape[0] >= PREFILL_FROM:
            return self._prefill.linear_scaled(x, weight, scales, block, bias)
        num_out, num_in = weight.shape
        choice = self._choice_of(num_out, weight)
        t = steps_of(choice.tile, block[1], num_in)
        y = x.new_empty(x.shape[0], num_out)
        linear_scaled_kernel[(triton.cdiv(num_out, t.block_n), triton.cdiv(x.shape[0], t.block_m))](
            *(x, weight, scales, bias, y, x.shape[0], num_out, num_in, *block, scales.shape[1]),
            HAS_BIAS=bias is not None,
            **meta(t, num_in),
            **start(choice.early),
        )
        return y

    def score_rows(self, x: Tensor, table: Tensor, ids: Tensor, first: int | None = None) -> Tensor:
        """x [M, H], table [Vr, H], ids [M, Z] -> [M, Z]"""
        (num_rows, num_ids), t = ids.shape, self._tile or EXPERT_TILE
        y = x.new_empty(num_rows, num_ids)
        score_rows_kernel[(num_rows, triton.cdiv(num_ids, t.block_n))](
            *(x.contiguous(), table, ids.contiguous(), y, first or 0, table.shape[0], num_ids, x.shape[1]),
            BLOCK_N=t.block_n,
            BLOCK_K=t.block_k,
            STAGES=t.num_stages,
            WHOLE=x.shape[1] % t.block_k == 0,
            num_warps=t.num_warps,
        )
        return y

    def act_mul(self, gate: Tensor, up: Tensor, act: str = "silu") -> Tensor:
        """gate [M, I], up [M, I] -> [M, I]"""
        gelu, (num_rows, width) = one_of(act, ACTIVATIONS, "act") == "gelu_tanh", gate.shape
        y = gate.new_empty(num_rows, width)
        act_mul_kernel[(num_rows, triton.cdiv(width, MOVE_COLUMNS))](
            gate, up, y, gate.stride(0), up.stride(0), width, GELU=gelu, BLOCK=MOVE_COLUMNS
        )
        return y

    def qk_rope_kv_write(
        self,
        qkv: Tensor,
        positions: Tensor,
        slots: Tensor,
        inv_freq: Tensor,
        rope_scale: float,
        k_cache: Tensor,
        v_cache: Tensor,
        q_norm: Tensor | None,
        k_norm: Tensor | None,
        eps: float,
        kind: NormKind = LLAMA,
        v_normed: bool = False,
        k_eq_v: bool = False,
        interleaved: bool = False,
    ) -> Tensor:
        """qkv [M, (N+2G)*D] or [M, (N+G)*D], positions [M], slots [M], caches [B, S, G, D] -> q [M, N, D]"""
        num_rows, (batch, num_slots, kv_heads, width) = qkv.shape[0], k_cache.shape
        slots = checked(slots, num_rows)
        q_heads = qkv.shape[1] // width - (1 if k_eq_v else 2) * kv_heads
        turns = self._angles(inv_freq, rope_scale, num_slots, width, qkv.dtype, interleaved)
        q = qkv.new_empty(num_rows, q_heads, width)
        rope_kernel[(num_rows, triton.cdiv(q_heads + 2 * kv_heads, ROPE_HEADS))](
            *(qkv, positions.contiguous(), slots, turns.cos_sin, turns.partner),
            *(k_cache.view(-1), v_cache.view(-1), q_norm, k_norm, q),
            *(num_slots, batch * num_slots, eps),
            Q_HEADS=q_heads,
            KV_HEADS=kv_heads,
            WIDTH=width,
            NORM_Q=q_norm is not None,
            NORM_K=k_norm is not None,
            NORM_V=v_normed,
            PLUS_ONE=kind.plus_one,
            K_EQ_V=k_eq_v,
            HEADS=ROPE_HEADS,
            BLOCK=triton.next_power_of_2(width),
        )
        return q

    def q_rope(
        self,
        q: Tensor,
        positions: Tensor,
        inv_freq: Tensor,
        rope_scale: float,
        num_positions: int,
        q_norm: Tensor | None,
        eps: float,
        kind: NormKind = LLAMA,
        interleaved: bool = False,
    ) -> Tensor:
        """q [M, N, D], positions [M], inv_freq [R/2], q_norm [D] or None -> [M, N, D]"""
        num_rows, heads, width = q.shape
        turns = self._angles(inv_freq, rope_scale, num_positions, width, q.dtype, interleaved)
        turned = q.new_empty(num_rows, heads, width)
        q_rope_kernel[(num_rows, triton.cdiv(heads, ROPE_HEADS))](
            *(q, positions.contiguous(), turns.cos_sin, turns.partner, q_norm, turned),
            *(num_positions, q.stride(0), q.stride(1), eps),
            Q_HEADS=heads,
            WIDTH=width,
            NORM=q_norm is not None,
            PLUS_ONE=kind.plus_one,
            HEADS=ROPE_HEADS,
            BLOCK=triton.next_power_of_2(width),
        )
        return turned

    def attend(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        positions: Tensor,
        scale: float,
        window: int | None = None,
        num_slots: int | None = None,
        ends: Tensor | None = None,
    ) -> Tensor:
        """q [B, T, N, D], caches [B, S, G, D], positions [B, T], ends [B, T] or None -> [B, T, N*D]"""
        (batch, num_queries, q_heads, width), tree = q.shape, sight_of(num_slots)
        if batch * num_queries >= PREFILL_FROM and tree is None:
            return self._prefill.attend(q, k_cache, v_cache, positions, scale, window, num_slots, ends)
        size, kv_heads = k_cache.shape[1:3]
        t = self._key_tile or key_tile(width, q.element_size())
        block_d = max(16, triton.next_power_of_2(width))
        rows, chunks = batch * num_queries * q_heads, triton.cdiv(min(num_slots or size, size), t.chunk)
        partial = q.new_empty(rows, chunks, width, dtype=torch.float32)
        tops, totals = (q.new_empty(rows, chunks, dtype=torch.float32) for _ in range(2))
        grid = (chunks, triton.cdiv(num_queries * (q_heads // kv_heads), t.block_m), batch * kv_heads)
        attend_chunk_kernel[grid](
            *(q.contiguous(), k_cache.view(-1), v_cache.view(-1), positions.contiguous()),
            None if ends is None else ends.contiguous(),
            *((None, None) if tree is None else (tree.first, tree.words(window))),
            *(partial, tops, totals, scale, num_queries, size, 0 if tree is None else tree.num_nodes, window or 0),
            HAS_WINDOW=window is not None,
            HAS_ENDS=ends is not None,
            HAS_TREE=tree is not None,
            Q_HEADS=q_heads,
            KV_HEADS=kv_heads,
            WIDTH=width,
            CHUNK=t.chunk,
            BLOCK_M=t.block_m,
            BLOCK_S=t.block_s,
            BLOCK_D=block_d,
            STAGES=t.num_stages,
            num_warps=t.num_warps,
        )
        y = q.new_empty(batch, num_queries, q_heads * width)
        attend_merge_kernel[(triton.cdiv(rows, MERGE_ROWS),)](
            partial, tops, totals, y, rows, chunks, WIDTH=width, BLOCK_M=MERGE_ROWS, BLOCK_D=block_d
        )
        return y

    def head_argmax(self, x: Tensor, weight: Tensor, rows: int, scale: float = 1.0) -> tuple[Tensor, Tensor]:
        """x [M, H], weight [Vr, H] -> value [M], index [M]"""
        t = self._choice_of(rows, weight).tile
        num_rows, num_tiles = x.shape[0], triton.cdiv(rows, t.block_n)
        best_value = x.new_empty(num_rows, num_tiles, dtype=torch.float32)
        best_index = x.new_empty(num_rows, num_tiles, dtype=torch.int32)
        value, index = x.new_empty(num_rows, dtype=torch.float32), x.new_empty(num_rows, dtype=torch.int64)
        head_tile_kernel[(num_tiles, triton.cdiv(num_rows, t.block_m))](
            *(x, weight, best_value, best_index, num_rows, rows, x.shape[1], scale),
            SCALED=scale != 1.0,
            **meta(t, x.shape[1]),
        )
        block = triton.next_power_of_2(num_tiles)
        head_merge_kernel[(num_rows,)](best_value, best_index, value, index, num_tiles, BLOCK=block)
        return value, index

    def argmax(self, logits: Tensor) -> Tensor:
        """logits [M, V] -> [M]"""
        index = logits.new_empty(logits.shape[0], dtype=torch.int64)
        block = min(ARGMAX_COLUMNS, triton.next_power_of_2(logits.shape[1]))
        argmax_kernel[(logits.shape[0],)](logits.contiguous(), index, logits.shape[1], BLOCK=block)
        return index

    def accept_greedy(self, drafted: Tensor, chosen: Tensor) -> Tensor:
        """drafted [B, K], chosen [B, K+1] -> [B]"""
        batch, num_drafted = drafted.shape
        accepted = drafted.new_empty(batch)
        block = triton.next_power_of_2(max(1, num_drafted))
        accept_greedy_kernel[(batch,)](drafted.contiguous(), chosen.contiguous(), accepted, num_drafted, BLOCK=block)
        return accepted

    def gather_rows(self, x: Tensor, index: Tensor) -> Tensor:
        """x [B, T, C], index [B] -> [B, C]"""
        batch, num_rows, width = x.shape
        y = x.new_empty(batch, width)
        grid = (batch, triton.cdiv(width, MOVE_COLUMNS))
        gather_rows_kernel[grid](x.contiguous(), index, y, num_rows, width, BLOCK=MOVE_COLUMNS)
        return y

    def compact(self, x: Tensor, first: Tensor, path: Tensor) -> None:
        """x [B, S, C], first [B], path [B, P]"""
        (batch, num_rows, width), num_moved = x.shape, path.shape[1]
        block_p = triton.next_power_of_2(num_moved)
        block = min(MOVE_COLUMNS, triton.next_power_of_2(width))
        compact_kernel[(batch, triton.cdiv(width, block))](
            *(x, first, path.contiguous(), num_rows, width), NUM_MOVED=num_moved, BLOCK_P=block_p, BLOCK=block
        )

    def uniform(self, seed: Tensor, sequence: Tensor, position: Tensor, stream: int) -> Tensor:
        """seed [1], sequence [B], position [B] or [B, T] -> like position"""
        return uniform(seed, sequence, position, stream)

    def softcap(self, logits: Tensor, cap: float) -> Tensor:
        """logits [M, V] -> [M, V]"""
        num_rows, width = logits.shape
        y = logits.new_empty(num_rows, width)
        grid = (num_rows, triton.cdiv(width, MOVE_COLUMNS))
        softcap_kernel[grid](logits.contiguous(), y, width, cap, BLOCK=MOVE_COLUMNS)
        return y


def _row(width: int) -> dict[str, int]:
    block = triton.next_power_of_2(width)
    # bytes in flight: a wide row wants more warps, and more than eight leave a thread too few registers
    return {"BLOCK": block, "num_warps": max(4, min(8, block // 512))}
