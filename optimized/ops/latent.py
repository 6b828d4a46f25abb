"""Multi-head latent attention as PyTorch calls, with the key projection absorbed into the query.

score_j = q_latent . c_j + q_rope . r_j        c_j the normed latent of slot j, r_j its turned features
o = sum_j softmax_j(scale * score_j) c_j       every head reads the same slot
"""

import torch
from torch import Tensor

from optimized.ops.kinds import LLAMA
from optimized.ops.rows import Rows, attend_by_query, visible, wide_type
from optimized.ops.sight import sight_of
from optimized.ops.slots import checked


class AtenLatent(Rows):
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
        rank, num_slots = norm_weight.shape[0], cache.shape[1]
        slots = checked(slots, kv_a.shape[0])
        turned = self._turn(kv_a[:, None, rank:], positions, inv_freq, rope_scale, num_slots, interleaved)[:, 0]
        normed = self._normed(kv_a[:, :rank], norm_weight, eps, LLAMA)
        cache.view(-1, cache.shape[2]).index_copy_(0, slots, torch.cat([normed, turned], 1))
        return kv_a[:, :0] if q_a is None else self._normed(q_a, q_norm, eps, LLAMA)

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
        mixed = self._mix(q_latent, q_rope, cache, positions, scale, num_slots)
        return self._by_head(mixed.flatten(0, 1), w_uv).unflatten(0, positions.shape).flatten(2)

    def _mix(
        self,
        q_latent: Tensor,
        q_rope: Tensor,
        cache: Tensor,
        positions: Tensor,
        scale: float,
        num_slots: int | None,
    ) -> Tensor:
        """q_latent [B, T, N, R], q_rope [B, T, N, Dr], cache [B, S, R+Dr], positions [B, T] -> [B, T, N, R]"""
        q, rank, size = torch.cat([q_latent, q_rope], -1), q_latent.shape[3], cache.shape[1]
        if self.exact:
            slots = cache[:, :, None]
            seen = visible(positions, size, None, None, sight_of(num_slots))
            return attend_by_query(q, slots, slots[..., :rank], seen, scale)
        c = cache[:, : min(num_slots or size, size)]
        hidden = ~visible(positions, c.shape[1], None, None, sight_of(num_slots))[:, :, None]  # [B, T, 1, S]
        score = torch.bmm(q.flatten(1, 2), c.transpose(1, 2)).unflatten(1, q.shape[1:3]) * scale
        weight = score.to(wide_type(q.dtype)).masked_fill_(hidden, float("-inf")).softmax(-1)
        # a query that sees nothing has the softmax of nothing; the second fill makes it zero
        weight = weight.masked_fill_(hidden, 0).to(q.dtype).flatten(1, 2)
        return torch.bmm(weight, c[..., :rank]).unflatten(1, q.shape[1:3])

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
        q_nope, q_rope = q.tensor_split([w_uk.shape[1]], -1)
        turned = self._turn(q_rope, positions, inv_freq, rope_scale, num_positions, interleaved)
        return self._by_head(q_nope, w_uk), turned

    def _by_head(self, x: Tensor, weight: Tensor) -> Tensor:
        """x [M, N, K], weight [N, K, O] -> [M, N, O]"""
        if not self.exact:
            return torch.bmm(x.transpose(0, 1), weight).transpose(0, 1).contiguous()
        # copies laid out as the probe's weights are
        heads = [self.linear(x[:, n], w.T.contiguous()) for n, w in enumerate(weight)]
        return torch.stack(heads, 1)
