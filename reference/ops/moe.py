"""Mixture of experts: a router picks P of E feed-forward blocks for each token.

y = sum_p w_p Expert_{i_p}(x)
"""

from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def route_softmax(scores: Tensor, num_chosen: int, renormalise: bool) -> tuple[Tensor, Tensor]:
    """The P most likely experts and their weights, which sum to one when renormalised.

    scores  [B, T, E]
    ->      ids [B, T, P], weights [B, T, P]
    """
    wide = scores if scores.dtype == torch.float64 else scores.float()
    weights, ids = wide.softmax(-1).topk(num_chosen, -1)
    if renormalise:
        weights = weights / weights.sum(-1, keepdim=True)
    return ids, weights.to(scores.dtype)


def strongest(strengths: Tensor, num_chosen: int, num_groups: int = 1, num_kept: int = 1, num_best: int = 1) -> Tensor:
    """The P strongest experts of the groups that are kept; a group is as strong as its best experts together.

    strengths   [B, T, E]
    num_groups  equal runs of experts
    num_kept    groups that stay in the choice, the strongest
    num_best    experts whose strengths add up to a group's
    ->          [B, T, P]  P = num_chosen
    """
    if num_kept < num_groups:
        grouped = strengths.unflatten(-1, (num_groups, -1))
        kept = grouped.topk(num_best, -1).values.sum(-1).topk(num_kept, -1).indices
        lost = torch.ones_like(grouped[..., 0], dtype=torch.bool).scatter(-1, kept, False)
        strengths = grouped.masked_fill(lost[..., None], float("-inf")).flatten(-2)
    return strengths.topk(num_chosen, -1).indices


def mix(x: Tensor, ids: Tensor, weights: Tensor, experts: Iterable[Callable[[Tensor], Tensor]]) -> Tensor:
    """Run every token through its experts, one expert at a time.

    x        [B, T, H]
    ids      [B, T, P]
    weights  [B, T, P]
    ->       [B, T, H]
    """
    out = torch.zeros_like(x)
    for number, expert in enumerate(experts):
        b, t, place = (ids == number).nonzero(as_tuple=True)
        if len(b):
            out.index_put_((b, t), expert(x[b, t]) * weights[b, t, place, None], accumulate=True)
    return out


class FusedExperts(nn.Module):
    """Experts whose weights stand in two tensors, on disk too; in `gate_up_proj` the gate's rows come first."""

    def __init__(self, experts: int, hidden: int, intermediate: int, act: Callable[[Tensor], Tensor] = F.silu) -> None:
        super().__init__()
        self.act = act
        self.gate_up_proj = nn.Parameter(torch.zeros(experts, 2 * intermediate, hidden))
        self.down_proj = nn.Parameter(torch.zeros(experts, hidden, intermediate))

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """Every token through its experts.

        x        [B, T, H]
        ids      [B, T, P]
        weights  [B, T, P]
        ->       [B, T, H]
        """
        return mix(x, ids, weights, [partial(self.one, number) for number in range(len(self.down_proj))])

    def one(self, number: int, x: Tensor) -> Tensor:
        """x [M, H] -> [M, H]"""
        gate, up = F.linear(x, self.gate_up_proj[number]).chunk(2, -1)
        return F.linear(self.act(gate) * up, self.down_proj[number])
