"""Mixture of experts: a router picks P of E feed-forward blocks for each token.

y = sum_p w_p Expert_{i_p}(x)
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn


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


def mix(x: Tensor, ids: Tensor, weights: Tensor, experts: Iterable[nn.Module]) -> Tensor:
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
