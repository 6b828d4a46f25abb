"""Multi-head latent attention: one latent a token, from which every head makes its keys and values.

    c_j = norm(W_a x_j)                       R features; beside them one key r_j of Dr features that all heads share
    q_t = W_q x_t, or W_qb norm(W_qa x_t)     a head's query: Dn features that stand still, Dr that turn (with q-LoRA)
    k_nj = [W_uk,n c_j; rope(r_j)]            W_uk,n and W_uv,n: the rows of kv_b_proj that belong to head n
    v_nj = W_uv,n c_j

    as written  o_n = sum_j softmax_j(scale q_n . k_nj) v_nj
    absorbed    q_n . k_nj = (W_uk,n^T q_n) . c_j + q_n . rope(r_j) and o_n = W_uv,n sum_j softmax_j(..) c_j

The second needs no keys or values of heads: R + Dr numbers a token are the whole cache. scale = (Dn + Dr)^-1/2 m^2,
with yarn's m = 0.1 mscale_all_dim ln(factor) + 1: once for the queries, once for the keys.
Paper: arXiv 2405.04434.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from reference.ops.attention import attend
from reference.ops.cache import Cache
from reference.ops.norm import RMSNorm
from reference.ops.rope import Rope, rotate, yarn_mscale


@dataclass(frozen=True)
class Latent:
    """Every fact of one latent attention."""

    heads: int
    q_rank: int | None
    """features between the two query projections; None: there is one projection"""
    kv_rank: int
    """R"""
    nope_dim: int
    """Dn"""
    rope_dim: int
    """Dr"""
    value_dim: int
    rope: Rope
    interleaved: bool = True
    norm_eps: float = 1e-6
    """of the norms of both latents"""
    bias: bool = False
    """of the projections that read or write the stream, without q-LoRA not of the query's"""

    @property
    def scale(self) -> float:
        """What scores are multiplied by."""
        mscale = 1.0 if self.rope.kind == "default" else yarn_mscale(self.rope.factor, self.rope.mscale_all_dim)
        return (self.nope_dim + self.rope_dim) ** -0.5 * mscale**2


def written(
    q_nope: Tensor, q_rope: Tensor, latent: Tensor, turned: Tensor, up: Tensor, visible: Tensor, scale: float
) -> Tensor:
    """Attention with keys and values of every head.

    q_nope   [B, T, N, Dn]
    q_rope   [B, T, N, Dr]
    latent   [B, S, R]
    turned   [B, S, Dr]     the key that all heads share
    up       [N, Dn+Dv, R]  rows of keys first
    visible  [B, T, S]
    ->       [B, T, N, Dv]
    """
    k_nope, v = torch.einsum("bsr,nor->bsno", latent, up).tensor_split([q_nope.shape[-1]], -1)
    shared = turned[:, :, None].expand(-1, -1, up.shape[0], -1)
    return attend(torch.cat([q_nope, q_rope], -1), torch.cat([k_nope, shared], -1), v, visible, scale)


def absorbed(
    q_nope: Tensor, q_rope: Tensor, latent: Tensor, turned: Tensor, up: Tensor, visible: Tensor, scale: float
) -> Tensor:
    """The same with the key rows moved into the query and the value rows behind the sum: one key and value a token.

    q_nope   [B, T, N, Dn]
    q_rope   [B, T, N, Dr]
    latent   [B, S, R]
    turned   [B, S, Dr]     the key that all heads share
    up       [N, Dn+Dv, R]  rows of keys first
    visible  [B, T, S]
    ->       [B, T, N, Dv]
    """
    w_uk, w_uv = up.tensor_split([q_nope.shape[-1]], 1)
    q = torch.cat([torch.einsum("btnd,ndr->btnr", q_nope, w_uk), q_rope], -1)
    k, v = torch.cat([latent, turned], -1)[:, :, None], latent[:, :, None]
    return torch.einsum("btnr,nvr->btnv", attend(q, k, v, visible, scale), w_uv)


class LatentAttention(nn.Module):
    """Projections, norms, rope and cache of latents; `attend` is `written` or `absorbed`."""

    def __init__(self, into: int, hidden: int, c: Latent) -> None:
        super().__init__()
        self.c = c
        self.attend: Callable[..., Tensor] = written
        query = c.heads * (c.nope_dim + c.rope_dim)
        if c.q_rank is None:
            self.q_proj = nn.Linear(into, query, bias=False)
        else:
            self.q_a_proj = nn.Linear(into, c.q_rank, bias=c.bias)
            self.q_a_layernorm = RMSNorm(c.q_rank, c.norm_eps)
            self.q_b_proj = nn.Linear(c.q_rank, query, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(into, c.kv_rank + c.rope_dim, bias=c.bias)
        self.kv_a_layernorm = RMSNorm(c.kv_rank, c.norm_eps)
        self.kv_b_proj = nn.Linear(c.kv_rank, c.heads * (c.nope_dim + c.value_dim), bias=False)
        self.o_proj = nn.Linear(c.heads * c.value_dim, hidden, bias=c.bias)

    def query(self, x: Tensor) -> Tensor:
        """x [B, T, X] -> [B, T, N*(Dn+Dr)]"""
        if self.c.q_rank is None:
            return self.q_proj(x)
        return self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))

    def forward(
        self, x: Tensor, positions: Tensor, visible: Tensor, layer: int, cache: Cache | None, slots: Tensor
    ) -> Tensor:
        """Attend from every token to the visible slots; a slot holds (c_j, rope(r_j)).

        x          [B, T, X]  X features in, H out
        positions  [B, T]
        visible    [B, T, S]
        slots      [B, T]
        ->         [B, T, H]
        """
        c = self.c
        q_nope, q_rope = self.query(x).unflatten(-1, (c.heads, -1)).tensor_split([c.nope_dim], -1)
        latent, turned = self.kv_a_proj_with_mqa(x)[:, :, None].tensor_split([c.kv_rank], -1)
        latent = self.kv_a_layernorm(latent)
        q_rope, turned = (rotate(t, positions, c.rope, c.interleaved) for t in (q_rope, turned))
        if cache is not None:
            latent, turned = cache.write(layer, latent, turned, slots)
        up = self.kv_b_proj.weight.unflatten(0, (c.heads, -1))
        mixed = self.attend(q_nope, q_rope, latent[:, :, 0], turned[:, :, 0], up, visible, c.scale)
        return self.o_proj(mixed.flatten(2))
