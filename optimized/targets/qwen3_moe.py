"""Qwen3-MoE, fast: the equations of `reference/targets/qwen3_moe.py` in ten kernels a layer with experts.

    norm + add | qkv | head norms, rope + KV write | attend: chunks, merge | o | norm + add
    | router: product, softmax, top-P | experts: gate, up, silu | experts: down, weighted sum

A dense layer ends as Llama's does. What runs around the layers is Llama's: `optimized/targets/llama.py`.
Letters: reference/README.md.
"""

from torch import Tensor

from optimized.experts import Experts
from optimized.parallel import GateUpLinear, Norm, PackedModel, Placement, QKVLinear, ReplicatedLinear, RowLinear
from optimized.state import KVCache
from optimized.targets.llama import LlamaTarget
from reference.targets.qwen3_moe import Qwen3MoeConfig


class DenseBlock:
    """Equation (5) of a layer without experts."""

    def __init__(self, c: Qwen3MoeConfig, name: str, model: PackedModel, at: Placement) -> None:
        self.gate_up = model.own(GateUpLinear(name, c.hidden, c.intermediate, False, at))
        self.down_proj = model.own(RowLinear(f"{name}down_proj", c.intermediate, c.hidden, False, at))

    def __call__(self, u: Tensor) -> Tensor:
        """u [M, H] -> [M, H]"""
        return self.down_proj(self.gate_up(u))


class ExpertBlock:
    """Equations (4) and (5) of a layer with experts."""

    def __init__(self, c: Qwen3MoeConfig, name: str, model: PackedModel, at: Placement) -> None:
        self.c, self.ops = c, at.ops
        self.gate = model.own(ReplicatedLinear(f"{name}gate", c.hidden, c.experts, False, at))
        self.experts = model.own(Experts(f"{name}experts.", c.experts, c.hidden, c.expert_intermediate, at))

    def __call__(self, u: Tensor) -> Tensor:
        """u [M, H] -> [M, H]"""
        c = self.c
        ids, weights = self.ops.route_softmax(u, self.gate.matrix, c.experts_per_token, c.norm_topk_prob)  # (4)
        return self.experts(u, ids, weights)  # (5)


class Qwen3MoeLayer:
    """Equations (2) to (5)."""

    def __init__(self, c: Qwen3MoeConfig, index: int, model: PackedModel, at: Placement) -> None:
        self.c, self.index, self.ops, name = c, index, at.ops, f"layers.{index}."
        self.input_layernorm = model.own(Norm(f"{name}input_layernorm.weight", c.hidden, c.eps, at))
        attn, wide = f"{name}self_attn.", c.heads * c.head_dim
        self.qkv = model.own(QKVLinear(attn, c.hidden, c.heads, c.kv_heads, c.head_dim, c.attention_bias, at))
        self.q_norm = model.own(Norm(f"{attn}q_norm.weight", c.head_dim, c.eps, at))
        self.k_norm = model.own(Norm(f"{attn}k_norm.weight", c.head_dim, c.eps, at))
        self.o_proj = model.own(RowLinear(f"{attn}o_proj", wide, c.hidden, c.attention_bias, at))
        self.post_attention_layernorm = model.own(Norm(f"{name}post_attention_layernorm.weight", c.hidden, c.eps, at))
        self.mlp = (ExpertBlock if c.is_sparse(index) else DenseBlock)(c, f"{name}mlp.", model, at)

    def __call__(
        self,
        branch: Tensor,
        h: Tensor | None,
        positions: Tensor,
        slots: Tensor,
        inv_freq: Tensor,
        cache: KVCache,
        num_slots: int | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Both halves of a layer; what experts or MLP add is left to the next norm.

        branch     [M, H]  what the layer below adds to h
        h          [M, H]  None at the bottom, where the branch is all there is
        positions  [B, T]
        slots      [M]
        ->         [M, H], [M, H], [M, H]  this layer's branch, h without it, h at the capture point below
        """
        ops, c, keys, values = self.ops, self.c, cache.keys[self.index], cache.values[self.index]
        x, captured = self.input_layernorm(branch, h)  # (5) of the layer below, (2) one kernel
        qkv, flat, norms = self.qkv(x), positions.flatten(), (self.q_norm.weight, self.k_norm.weight)
        q = ops.qk_rope_kv_write(qkv, flat, slots, inv_freq, c.rope.scale, keys, values, *norms, c.eps)
        q = q.view(*positions.shape, -1, c.head_dim)
        mixed = ops.attend(q, keys, values, positions, c.head_dim**-0.5, None, num_slots)  # (2)
        u, s = self.post_attention_layernorm(self.o_proj(mixed.flatten(0, 1)), captured)  # (2)+(3) one kernel
        return self.mlp(u), s, captured  # (4) (5)


class Qwen3MoeTarget(LlamaTarget):
    """One rank's share of the whole target."""

    layer = Qwen3MoeLayer
