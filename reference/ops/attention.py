"""Softmax attention with grouped key/value heads, and who sees whom.

o_n = sum_j softmax_j(scale * q_n . k_j) v_j        over visible slots j; head n reads key/value head n // (N/G)
"""

import torch
from torch import Tensor, nn

from reference.ops.cache import Cache
from reference.ops.norm import RMSNorm
from reference.ops.rope import Rope, rotate


def causal(positions: Tensor, slot_positions: Tensor, window: int | None = None) -> Tensor:
    """A slot is visible from position p if its own position is at most p, and above p - window on sliding layers.

    positions       [B, T]
    slot_positions  [B, S]
    ->              [B, T, S]
    """
    slot, query = slot_positions[:, None, :], positions[:, :, None]
    seen = slot <= query
    return seen if window is None else seen & (slot > query - window)


def narrow(visible: Tensor, positions: Tensor, slot_positions: Tensor, window: int | None) -> Tensor:
    """What a sliding layer leaves of what is visible: slots above position - window; all of it without a window.

    visible         [B, T, S]
    positions       [B, T]
    slot_positions  [B, S]
    ->              [B, T, S]
    """
    return visible if window is None else visible & (slot_positions[:, None, :] > positions[:, :, None] - window)


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


class Attention(nn.Module):
    """Projections, rope, cache and `attend`.

    norm_eps   puts one RMS norm, of the class `norm`, over each head of q and k, before rope
    scale      of the scores; D^-1/2 when absent
    """

    def __init__(
        self,
        into: int,
        hidden: int,
        heads: tuple[int, int],
        head_dim: int,
        rope: Rope,
        qkv_bias: bool = False,
        o_bias: bool = False,
        norm_eps: float | None = None,
        norm: type[nn.Module] = RMSNorm,
        scale: float | None = None,
    ) -> None:
        super().__init__()
        self.head_dim, self.rope, (query, grouped) = head_dim, rope, heads
        self.scale = head_dim**-0.5 if scale is None else scale
        self.q_proj = nn.Linear(into, query * head_dim, bias=qkv_bias)
        self.k_proj = nn.Linear(into, grouped * head_dim, bias=qkv_bias)
        self.v_proj = nn.Linear(into, grouped * head_dim, bias=qkv_bias)
        self.o_proj = nn.Linear(query * head_dim, hidden, bias=o_bias)
        self.q_norm = nn.Identity() if norm_eps is None else norm(head_dim, norm_eps)
        self.k_norm = nn.Identity() if norm_eps is None else norm(head_dim, norm_eps)

    def forward(
        self, x: Tensor, positions: Tensor, visible: Tensor, layer: int, cache: Cache | None, slots: Tensor
    ) -> Tensor:
        """Attend from every token to the visible slots.

        x          [B, T, X]  X features in, H out
        positions  [B, T]
        visible    [B, T, S]
        slots      [B, T]
        ->         [B, T, H]
        """
        q, k, v = (project(x).unflatten(-1, (-1, self.head_dim)) for project in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotate(self.q_norm(q), positions, self.rope), rotate(self.k_norm(k), positions, self.rope)
        if cache is not None:
            k, v = cache.write(layer, k, v, slots)
        return self.o_proj(attend(q, k, v, visible, self.scale).flatten(2))
