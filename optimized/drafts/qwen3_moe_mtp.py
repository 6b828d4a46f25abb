"""The multi-token module of Qwen3-MoE, fast: the equations of `reference/drafts/qwen3_moe_mtp.py`.

    embed | norm | norm | fc | a layer of optimized/targets/qwen3_moe.py | norm + add | head

What runs around the layer: optimized/drafts/next_token.py. Letters: reference/README.md.
"""

import torch
from torch import Tensor

from optimized.drafts.next_token import NextTokenDraft
from optimized.ops.table import Ops
from optimized.parallel import Group, Norm, ReplicatedLinear
from optimized.state import KVCache
from optimized.targets.qwen3_moe import Qwen3MoeLayer
from reference.drafts.qwen3_moe_mtp import Qwen3MoeMtpConfig


class Qwen3MoeMtpDraft(NextTokenDraft):
    """One rank's share of the whole module."""

    def __init__(
        self, c: Qwen3MoeMtpConfig, ops: Ops, group: Group, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> None:
        super().__init__(c, ops, group, dtype, device)
        at = self.at
        self.pre_fc_norm_embedding = self.own(Norm("pre_fc_norm_embedding.weight", c.hidden, c.eps, at))
        self.pre_fc_norm_hidden = self.own(Norm("pre_fc_norm_hidden.weight", c.hidden, c.eps, at))
        self.fc = self.own(ReplicatedLinear("fc", 2 * c.hidden, c.hidden, False, at))
        self.layers = [Qwen3MoeLayer(c, i, self, at) for i in range(c.layers)]
        self.norm = self.own(Norm("norm.weight", c.hidden, c.eps, at))

    def new_cache(self, batch: int, num_slots: int) -> KVCache:
        """Room for `num_slots` tokens of each of `batch` sequences."""
        heads = self.layers[0].qkv.kv_heads
        return KVCache(self.c.layers, batch, num_slots, heads, self.c.head_dim, self.at.dtype, self.at.device)

    def mix(
        self,
        embed: Tensor,
        hidden: Tensor,
        positions: Tensor,
        slots: Tensor,
        inv_freq: Tensor,
        cache: KVCache,
        num_slots: int | None,
        layer: int,
    ) -> Tensor:
        """Equations (2) to (4).

        embed      [M, H]
        hidden     [M, H]
        positions  [B, T]
        slots      [M]
        ->         [M, H]
        """
        both = torch.cat([self.pre_fc_norm_embedding(embed)[0], self.pre_fc_norm_hidden(hidden)[0]], -1)  # [M, 2H]
        u = self.fc(both)  # (2)
        branch, s, _ = self.layers[layer](u, None, positions, slots, inv_freq, cache, num_slots)  # (3)
        return self.norm(branch, s)[0]  # the sum of (3) and (4) one kernel
