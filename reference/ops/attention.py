"""Softmax attention with grouped key/value heads, and who sees whom.

o_n = sum_j softmax_j(scale * q_n . k_j) v_j        over visible slots j; head n reads key/value head n // (N/G)
"""

import torch
from torch import Tensor


def causal(positions: Tensor, slot_positions: Tensor, window: int | None = None) -> Tensor:
    """A slot is visible from position p if its own position is at most p, and above p - window on sliding layers.

    positions       [B, T]
    slot_positions  [B, S]
    ->              [B, T, S]
    """
    slot, query = slot_positions[:, None, :], positions[:, :, None]
    seen = slot <= query
    return seen if window is None else seen & (slot > query - window)


def attend(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float) -> Tensor:
    """Weigh the visible values.

    q        [B, T, N, D]
    k        [B, S, G, D]
    v        [B, S, G, Dv]
    visible  [B, T, S]
    ->       [B, T, N, Dv]
    """
    group = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)
    score = torch.einsum("btnd,bsnd->bnts", q, k) * scale
    score = score.masked_fill(~visible[:, None], float("-inf"))
    wide = score if score.dtype == torch.float64 else score.float()
    weight = wide.softmax(-1).to(q.dtype)
    return torch.einsum("bnts,bsnd->btnd", weight, v)
