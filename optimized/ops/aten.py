"""The operations as PyTorch calls. Signatures and shapes: `optimized/ops/table.py`.

Natural shapes are for speed: few calls, weights packed for oneDNN where that makes four rows cost what one costs.
`exact` computes every row in one constant shape instead; why and how: `optimized/ops/rows.py`.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from optimized.ops.chance import uniform
from optimized.ops.kinds import LLAMA, NormKind, rounded
from optimized.ops.latent import AtenLatent
from optimized.ops.mixture import AtenMixture
from optimized.ops.rows import attend_by_query, probe, visible, wide_type
from optimized.ops.sight import sight_of
from optimized.ops.slots import checked

__all__ = ["Aten", "probe"]

# below this many numbers the packed product's longer way to the kernel costs more than it saves (float32)
PACK_FROM = 1 << 17


class Aten(AtenMixture, AtenLatent):
    """PyTorch calls; on a CPU with natural shapes, or with `exact` by the chain rule."""

    def pack(self, weight: Tensor, wide: bool = False) -> Tensor:
        """weight [N, K] -> [N, K]"""
        weight = weight.to(wide_type(weight.dtype)) if wide else weight
        return weight if self.exact or not _packs(weight) else torch.ops.mkldnn._reorder_linear_weight(weight, 4)

    def embed(self, ids: Tensor, table: Tensor, first: int | None = None, scale: float | None = None) -> Tensor:
        """ids [M], table [Vr, H] -> [M, H]"""
        if first is None:
            out = table.index_select(0, ids)
        else:
            row = ids - first
            outside = (row < 0) | (row >= table.shape[0])
            out = table.index_select(0, row.clamp_(0, table.shape[0] - 1)).masked_fill_(outside[:, None], 0)
        return out if scale is None else out.mul_(rounded(scale, table.dtype))

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
        total = x if residual is None else x + residual
        total = total if scale is None else total * scale
        return self._normed(total, weight, eps, kind), total

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
        return self.add_rmsnorm(self._normed(branch, post, eps, kind), residual, pre, eps, kind, scale)

    def linear_scaled(
        self, x: Tensor, weight: Tensor, scales: Tensor, block: tuple[int, int], bias: Tensor | None = None
    ) -> Tensor:
        """x [M, K], weight [N, K], scales [N/b, K/c], bias [N] or None -> [M, N]"""
        wide, (rows, columns) = wide_type(x.dtype), block
        factors = scales.to(wide).repeat_interleave(rows, 0).repeat_interleave(columns, 1)
        whole = weight.to(wide) * factors[: weight.shape[0], : weight.shape[1]]
        return self.linear(x.to(wide), whole, None if bias is None else bias.to(wide)).to(x.dtype)

    def gate_up_act(self, x: Tensor, weight: Tensor, bias: Tensor | None = None, act: str = "silu") -> Tensor:
        """x [M, K], weight [2I, K], bias [2I] or None -> [M, I]"""
        return self.act_mul(*self.linear(x, weight, bias).chunk(2, -1), act)

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
        num_slots, kv_heads, width = k_cache.shape[1:]
        slots = checked(slots, qkv.shape[0])
        heads = qkv.view(qkv.shape[0], -1, width)  # [M, N+2G, D]
        q_heads = heads.shape[1] - (1 if k_eq_v else 2) * kv_heads
        x, v = heads[:, : q_heads + kv_heads], heads[:, -kv_heads:]
        if q_norm is not None or k_norm is not None:
            q, k = self._headnorm(x[:, :q_heads], q_norm, eps, kind), self._headnorm(x[:, q_heads:], k_norm, eps, kind)
            x = torch.cat([q, k], 1)
        turned = self._turn(x, positions, inv_freq, rope_scale, num_slots, interleaved)
        k_cache.view(-1, kv_heads, width).index_copy_(0, slots, turned[:, q_heads:])
        v = self._normed(v.flatten(0, 1), None, eps, kind).view_as(v) if v_normed else v
        v_cache.view(-1, kv_heads, width).index_copy_(0, slots, v)
        return turned[:, :q_heads]

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
        normed = self._headnorm(q, q_norm, eps, kind)
        return self._turn(normed, positions, inv_freq, rope_scale, num_positions, interleaved)

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
        if self.exact:
            seen = visible(positions, k_cache.shape[1], window, ends, sight_of(num_slots))
            return attend_by_query(q, k_cache, v_cache, seen, scale).flatten(2)
        size = min(num_slots or k_cache.shape[1], k_cache.shape[1])
        seen = visible(positions, size, window, ends, sight_of(num_slots))
        k, v = k_cache[:, :size].transpose(1, 2), v_cache[:, :size].transpose(1, 2)
        out = F.scaled_dot_product_attention(
            q.transpose(1, 2), k, v, attn_mask=seen[:, None], scale=scale, enable_gqa=True
        )
        return out.transpose(1, 2).flatten(2)

    def score_rows(self, x: Tensor, table: Tensor, ids: Tensor, first: int | None = None) -> Tensor:
        """x [M, H], table [Vr, H], ids [M, Z] -> [M, Z]"""
        rows = self.embed(ids.flatten(), table, first).unflatten(0, ids.shape)  # [M, Z, H]
        if not self.exact:
            return torch.bmm(rows, x[:, :, None])[..., 0]
        # one product a row of x, whose shape does not depend on how many rows there are
        return torch.stack([(one.clone() @ row.clone()) for one, row in zip(rows, x, strict=True)])

    def head_argmax(self, x: Tensor, weight: Tensor, rows: int, scale: float = 1.0) -> tuple[Tensor, Tensor]:
        """x [M, H], weight [Vr, H] -> value [M], index [M]"""
        logits = self.linear(x, weight)[:, :rows]
        value, index = (logits if scale == 1.0 else logits * scale).max(-1)
        return (value if value.dtype == torch.float64 else value.float()), index

    def argmax(self, logits: Tensor) -> Tensor:
        """logits [M, V] -> [M]"""
        # `max` promises the first of equal values on every device
        return logits.max(-1).indices

    def accept_greedy(self, drafted: Tensor, chosen: Tensor) -> Tensor:
        """drafted [B, K], chosen [B, K+1] -> [B]"""
        return (drafted == chosen[:, :-1]).cumprod(-1).sum(-1)

    def gather_rows(self, x: Tensor, index: Tensor) -> Tensor:
        """x [B, T, C], index [B] -> [B, C]"""
        return x.gather(1, index.view(-1, 1, 1).expand(-1, 1, x.shape[2]))[:, 0]

    def compact(self, x: Tensor, first: Tensor, path: Tensor) -> None:
        """x [B, S, C], first [B], path [B, P]"""
        place = torch.arange(path.shape[1], device=x.device)
        into, source = ((first[:, None] + row)[..., None].expand(-1, -1, x.shape[2]) for row in (place, path))
        # gather copies, so that no row is read after it was written
        x.scatter_(1, into, x.gather(1, source))

    def uniform(self, seed: Tensor, sequence: Tensor, position: Tensor, stream: int) -> Tensor:
        """seed [1], sequence [B], position [B] or [B, T] -> like position"""
        return uniform(seed, sequence, position, stream)

    def softcap(self, logits: Tensor, cap: float) -> Tensor:
        """logits [M, V] -> [M, V]"""
        return self._elementwise(lambda rows: rows.div(cap).tanh_().mul_(cap), logits)

    def _headnorm(self, x: Tensor, weight: Tensor | None, eps: float, kind: NormKind) -> Tensor:
        """x [M, N, D], weight [D] or None -> [M, N, D]"""
        return x if weight is None else self._normed(x.flatten(0, 1), weight, eps, kind).view_as(x)


def _packs(weight: Tensor) -> bool:
    if weight.device.type != "cpu" or weight.is_mkldnn or not torch.backends.mkldnn.is_available():
        return False
    if weight.dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return weight.dtype == torch.float32 and weight.numel() >= PACK_FROM
