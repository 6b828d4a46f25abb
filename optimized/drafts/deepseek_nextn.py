"""The next-token module of DeepSeek V3, fast: the equations of `reference/drafts/deepseek_nextn.py`.

    embed | norm | norm | eh | a layer of optimized/targets/deepseek.py, absorbed | norm + add | head

What runs around the layers: optimized/drafts/next_token.py. Letters: reference/README.md.
"""

import torch
from torch import Tensor

from optimized.drafts.next_token import NextTokenDraft
from optimized.ops.table import Ops
from optimized.parallel import Group, Norm, PackedModel, Placement, ReplicatedLinear
from optimized.targets.deepseek import DeepseekLayer, LatentCache
from reference.drafts.deepseek_nextn import DeepseekNextnConfig


class NextTokenLayer(DeepseekLayer):
    """Equations (2) to (4)."""

    def __init__(self, c: DeepseekNextnConfig, index: int, model: PackedModel, at: Placement) -> None:
        super().__init__(c, index, model, at)
        name = f"layers.{index}."
        self.enorm = model.own(Norm(f"{name}enorm.weight", c.hidden, c.eps, at))
        self.hnorm = model.own(Norm(f"{name}hnorm.weight", c.hidden, c.eps, at))
        self.eh_proj = model.own(ReplicatedLinear(f"{name}eh_proj", 2 * c.hidden, c.hidden, False, at))
        self.head_norm = model.own(Norm(f"{name}shared_head.norm.weight", c.hidden, c.eps, at))

    def project(self, embed: Tensor, hidden: Tensor) -> Tensor:
        """Equation (2).

        embed   [M, H]
        hidden  [M, H]
        ->      [M, H]
        """
        return self.eh_proj(torch.cat([self.enorm(embed)[0], self.hnorm(hidden)[0]], -1))


class DeepseekNextnDraft(NextTokenDraft):
    """One rank's share of the whole module."""

    def __init__(
        self, c: DeepseekNextnConfig, ops: Ops, group: Group, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> None:
        super().__init__(c, ops, group, dtype, device)
        self.layers = [NextTokenLayer(c, i, self, self.at) for i in range(c.layers)]

    def new_cache(self, batch: int, num_slots: int) -> LatentCache:
        """Room for the latents of `num_slots` tokens of each of `batch` sequences."""
        c, at = self.c, self.at
        return LatentCache(c.layers, batch, num_slots, c.kv_rank + c.rope_dim, at.dtype, at.device)

    def mix(
        self,
        embed: Tensor,
        hidden: Tensor,
        positions: Tensor,
        slots: Tensor,
        inv_freq: Tensor,
        cache: LatentCache,
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
        if self.c.zero_first_embedding:
            embed = embed.masked_fill((positions == 0).flatten()[:, None], 0.0)  # (1)
        block = self.layers[layer]
        u = block.project(embed, hidden)  # (2)
        branch, s, _ = block(u, None, positions, slots, inv_freq, cache, num_slots)  # (3)
        return block.head_norm(branch, s)[0]  # the sum of (3) and (4) one kernel
