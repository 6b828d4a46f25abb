"""DeepSeek V2 and V3, fast: the equations of `reference/targets/deepseek.py` with attention absorbed.

    norm + add | q_a, kv_a | norms, rope + latent write | q_b | absorb, rope | attend: chunks, merge + values | o
    | norm + add | router: product, groups, top-P | experts: gate, up, silu | experts: down, weighted sum

Twelve kernels a layer, eleven where the query has no latent of its own, one more where a router is larger than
`ROUTER_BYTES`. Shared experts are experts that every token chooses with weight one.

Keys and values of heads are never made: a slot holds R + Dr numbers that all heads read, and the key rows of kv_b_proj
multiply the query, its value rows what was read (`reference/ops/mla.py`). Over ranks heads are cut and latents are
not: every rank makes and holds them all. What runs around the layers is Llama's: `optimized/targets/llama.py`.
Letters: reference/README.md and reference/ops/mla.py; E experts, P experts a token, M = B*T rows.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from optimized.experts import Experts
from optimized.parallel import (
    ColumnLinear,
    GateUpLinear,
    Norm,
    PackedModel,
    Part,
    Placement,
    ReplicatedLinear,
    RowLinear,
    equal_run,
    stack,
)
from optimized.state import KVCache
from optimized.targets.llama import LlamaTarget
from reference.targets.deepseek import DeepseekConfig


class LatentCache(KVCache):
    """Latents and the keys that all heads share, [B, S, 1, R+Dr] a layer, on every rank alike."""

    def __init__(
        self, layers: int, batch: int, num_slots: int, width: int, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        super().__init__(0, batch, num_slots, 1, width, dtype, device)
        shape = (batch, self.num_slots, 1, width)
        self.latents = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(layers)]

    def tensors(self) -> Iterator[Tensor]:
        """Every buffer."""
        yield from self.latents


class Unfolding(Part):
    """kv_b_proj of this rank's heads in the two layouts that absorbed attention multiplies by."""

    def __init__(self, name: str, c: Any, heads: slice, at: Placement) -> None:
        super().__init__(at)
        self.name, self.dims, out = f"{name}.weight", (c.nope_dim, c.value_dim), c.nope_dim + c.value_dim
        num_heads = heads.stop - heads.start
        self.w_uk = self.new(num_heads, c.nope_dim, c.kv_rank)
        self.w_uv = self.new(num_heads, c.kv_rank, c.value_dim)
        held = slice(heads.start * out, heads.stop * out)
        self.place(self.name, self.w_uk, (c.heads * out, c.kv_rank), held)

    def load(self, name: str, full: Tensor) -> None:
        """Part keys from values, head by head."""
        keys, values = self.shard(name, full).unflatten(0, (-1, sum(self.dims))).split(self.dims, 1)
        self.w_uk.copy_(keys)
        self.w_uv.copy_(values.transpose(1, 2))
        self.written.add(name)

    def unpack(self) -> dict[str, Tensor]:
        """This rank's rows of kv_b_proj."""
        return {self.name: torch.cat([self.w_uk, self.w_uv.transpose(1, 2)], 1).flatten(0, 1)}


class FirstLinear(Part):
    """What reads the stream: the query, or its latent, and the latent of keys and values as one weight.

    runs    name, whole size and held rows of both
    biased  those of them that have a bias
    """

    def __init__(
        self, runs: list[tuple[str, int, slice]], biased: tuple[tuple[str, int, slice], ...], into: int, at: Placement
    ) -> None:
        super().__init__(at)
        stack(self, runs, into, False)
        self.sizes = [run.stop - run.start for _, _, run in runs]
        if biased:
            # rows without a bias of their own add nothing
            self.bias = torch.zeros(sum(self.sizes), dtype=at.dtype, device=at.device)
            parts = self.bias.split(self.sizes)
        for run, size, held in biased:
            self.place(f"{run}.bias", parts[runs.index((run, size, held))], (size,), held)

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [M, X] -> [M, Q], [M, R+Dr]"""
        q, kv_a = self.ops.linear(x, self.matrix, self.bias).split(self.sizes, 1)
        return q, kv_a


class Attention:
    """Latent attention, absorbed; it reads `into` features, those of the stream where nothing else is said."""

    def __init__(self, c: Any, index: int, model: PackedModel, at: Placement, into: int = 0) -> None:
        self.c, self.index, self.ops, name = c, index, at.ops, f"layers.{index}.self_attn."
        into = into or c.hidden
        self.scale, self.q_dims = c.latent.scale, (c.nope_dim, c.rope_dim)
        heads = equal_run(c.heads, at.group.rank, at.group.size, "heads")
        query = c.heads * sum(self.q_dims)
        first = (f"{name}q_proj", query, equal_run(query, at.group.rank, at.group.size, "features of queries"))
        self.q_a_norm: Norm | None = None
        if c.q_rank is not None:
            first = (f"{name}q_a_proj", c.q_rank, slice(0, c.q_rank))
            self.q_a_norm = model.own(Norm(f"{name}q_a_layernorm.weight", c.q_rank, c.latent_norm_eps, at))
            self.q_b_proj = model.own(ColumnLinear(f"{name}q_b_proj", c.q_rank, query, False, at))
        latent = (f"{name}kv_a_proj_with_mqa", c.kv_rank + c.rope_dim, slice(0, c.kv_rank + c.rope_dim))
        biased = () if not c.attention_bias else (latent,) if c.q_rank is None else (first, latent)
        self.first_proj = model.own(FirstLinear([first, latent], biased, into, at))
        self.kv_a_norm = model.own(Norm(f"{name}kv_a_layernorm.weight", c.kv_rank, c.latent_norm_eps, at))
        self.kv_b_proj = model.own(Unfolding(f"{name}kv_b_proj", c, heads, at))
        self.o_proj = model.own(RowLinear(f"{name}o_proj", c.heads * c.value_dim, c.hidden, c.attention_bias, at))

    def __call__(
        self,
        x: Tensor,
        positions: Tensor,
        slots: Tensor,
        inv_freq: Tensor,
        cache: LatentCache,
        num_slots: int | None,
    ) -> Tensor:
        """Write the latents, then read those that each token sees.

        x          [M, X]
        positions  [B, T]
        slots      [M]
        ->         [M, H]
        """
        ops, c, flat, latents = self.ops, self.c, positions.flatten(), cache.latents[self.index][:, :, 0]
        norm, scale, up, neighbours = self.kv_a_norm, c.rope.scale, self.kv_b_proj, c.rope_interleaved
        q, kv_a = self.first_proj(x)
        written = (norm.weight, norm.eps, flat, slots, inv_freq, scale, latents, neighbours)
        if self.q_a_norm is None:
            ops.latent_write(kv_a, *written)
        else:
            q = self.q_b_proj(ops.latent_write(kv_a, *written, q, self.q_a_norm.weight))
        heads = q.unflatten(1, (-1, sum(self.q_dims)))
        asked = ops.absorb(heads, up.w_uk, flat, inv_freq, scale, cache.num_slots, neighbours)
        latent, turned = (part.unflatten(0, positions.shape) for part in asked)
        mixed = ops.attend_latent(latent, turned, latents, positions, self.scale, up.w_uv, num_slots)
        return self.o_proj(mixed.flatten(0, 1))


class Block:
    """A feed-forward block that every token reads."""

    def __init__(self, c: DeepseekConfig, intermediate: int, name: str, model: PackedModel, at: Placement) -> None:
        self.gate_up = model.own(GateUpLinear(name, c.hidden, intermediate, False, at))
        self.down_proj = model.own(RowLinear(f"{name}down_proj", intermediate, c.hidden, False, at))

    def __call__(self, u: Tensor) -> Tensor:
        """u [M, H] -> [M, H]"""
        return self.down_proj(self.gate_up(u))


class ChoiceBias(Part):
    """The bias that chooses experts: float32 at least in models of any dtype."""

    def __init__(self, name: str, experts: int, at: Placement) -> None:
        super().__init__(at._replace(dtype=torch.promote_types(at.dtype, torch.float32)))
        self.weight = self.new(experts)
        self.place(name, self.weight, (experts,))


class Router(ReplicatedLinear):
    """The scores of experts, float32 at least: weights as the model's dtype rounds them, products wider."""

    @property
    def matrix(self) -> Tensor:
        """The weight, for wide products, as the operations like it best; made at first use after loading."""
        if self._packed is None:
            self._packed = self.ops.pack(self.weight, wide=True)
        return self._packed


class ExpertBlock:
    """Equations (4) to (6), and the two sums of (7)."""

    def __init__(self, c: DeepseekConfig, name: str, model: PackedModel, at: Placement) -> None:
        self.c, self.ops = c, at.ops
        self.gate = model.own(Router(f"{name}gate", c.hidden, c.experts, False, at))
        self.bias = (
            model.own(ChoiceBias(f"{name}gate.e_score_correction_bias", c.experts, at)) if c.sigmoid_router else None
        )
        sizes = (c.experts, c.hidden, c.expert_intermediate, at, "silu", c.shared_experts)
        self.experts = model.own(Experts(f"{name}experts.", *sizes, f"{name}shared_experts."))

    def __call__(self, u: Tensor) -> Tensor:
        """u [M, H] -> [M, H]"""
        c, kind = self.c, "softmax" if self.bias is None else "sigmoid"
        choice = (c.groups, c.groups_kept, c.experts_per_token, c.norm_topk_prob, c.routed_scaling, kind)
        gate, bias = self.gate.matrix, None if self.bias is None else self.bias.weight
        ids, weights = self.ops.route_grouped(u, gate, bias, *choice, c.shared_experts)  # (4) to (6)
        return self.experts(u, ids, weights)  # (7)


class DeepseekLayer:
    """Equations (2) to (7)."""

    def __init__(self, c: DeepseekConfig, index: int, model: PackedModel, at: Placement) -> None:
        name = f"layers.{index}."
        self.input_layernorm = model.own(Norm(f"{name}input_layernorm.weight", c.hidden, c.eps, at))
        self.self_attn = Attention(c, index, model, at)
        self.post_attention_layernorm = model.own(Norm(f"{name}post_attention_layernorm.weight", c.hidden, c.eps, at))
        mlp, dense = f"{name}mlp.", index < c.dense_layers
        self.mlp = Block(c, c.intermediate, mlp, model, at) if dense else ExpertBlock(c, mlp, model, at)

    def __call__(
        self,
        branch: Tensor,
        h: Tensor | None,
        positions: Tensor,
        slots: Tensor,
        inv_freq: Tensor,
        cache: LatentCache,
        num_slots: int | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Both halves of a layer; what experts or MLP add is left to the next norm.

        branch     [M, H]  what the layer below adds to h
        h          [M, H]  None at the bottom, where the branch is all there is
        positions  [B, T]
        slots      [M]
        ->         [M, H], [M, H], [M, H]  this layer's branch, h without it, h at the capture point below
        """
        x, captured = self.input_layernorm(branch, h)  # (7) of the layer below, (2) one kernel
        mixed = self.self_attn(x, positions, slots, inv_freq, cache, num_slots)  # (2)
        u, s = self.post_attention_layernorm(mixed, captured)  # (2)+(3) one kernel
        return self.mlp(u), s, captured  # (4) to (7)


class DeepseekTarget(LlamaTarget):
    """One rank's share of the whole target."""

    layer = DeepseekLayer

    def new_cache(self, batch: int, num_slots: int) -> LatentCache:
        """Room for the latents of `num_slots` tokens of each of `batch` sequences."""
        c, at = self.c, self.at
        return LatentCache(c.layers, batch, num_slots, c.kv_rank + c.rope_dim, at.dtype, at.device)
