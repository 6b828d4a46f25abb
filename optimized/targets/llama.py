"""Llama, fast: the equations of `reference/targets/llama.py` in nine kernels a layer.

    norm + add | qkv | rope + KV write | attend: chunks, merge | o | norm + add | gate, up, silu | down

The residual stream h is added where the next norm reads it, so capture point c appears as the second result of the
norm that opens layer c (of the final norm for c = L). Rows are flattened, M = B*T, between `tokens` and the outputs.
Letters: reference/README.md.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from optimized.ops.table import Ops
from optimized.parallel import (
    GateUpLinear,
    Group,
    Norm,
    PackedModel,
    Placement,
    QKVLinear,
    RowLinear,
    VocabEmbedding,
    VocabHead,
)
from optimized.state import KVCache
from reference.targets.llama import LlamaConfig


class TargetOutput(NamedTuple):
    logits: Tensor
    """[B, T, V]"""
    hidden: Tensor
    """[B, T, H] after the final norm"""
    aux: Tensor
    """[B, T, A, H] the residual stream at the capture points, in the order asked"""


class LlamaLayer:
    """Equations (2) and (3)."""

    def __init__(self, c: LlamaConfig, index: int, model: PackedModel, at: Placement) -> None:
        self.c, self.index, self.ops, name = c, index, at.ops, f"layers.{index}."
        self.input_layernorm = model.own(Norm(f"{name}input_layernorm.weight", c.hidden, c.eps, at))
        attn, wide = f"{name}self_attn.", c.heads * c.head_dim
        self.qkv = model.own(QKVLinear(attn, c.hidden, c.heads, c.kv_heads, c.head_dim, c.attention_bias, at))
        self.o_proj = model.own(RowLinear(f"{attn}o_proj", wide, c.hidden, c.attention_bias, at))
        self.post_attention_layernorm = model.own(Norm(f"{name}post_attention_layernorm.weight", c.hidden, c.eps, at))
        self.gate_up = model.own(GateUpLinear(f"{name}mlp.", c.hidden, c.intermediate, c.mlp_bias, at))
        self.down_proj = model.own(RowLinear(f"{name}mlp.down_proj", c.intermediate, c.hidden, c.mlp_bias, at))

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
        """Both halves of a layer; what the MLP adds is left to the next norm.

        branch     [M, H]  what the layer below adds to h
        h          [M, H]  None at the bottom, where the branch is all there is
        positions  [B, T]
        slots      [M]
        ->         [M, H], [M, H], [M, H]  this layer's branch, h without it, h at the capture point below
        """
        ops, c, keys, values = self.ops, self.c, cache.keys[self.index], cache.values[self.index]
        x, captured = self.input_layernorm(branch, h)  # (3) of the layer below, (2) one kernel
        qkv, flat = self.qkv(x), positions.flatten()
        q = ops.qk_rope_kv_write(qkv, flat, slots, inv_freq, c.rope.scale, keys, values, None, None, c.eps)
        q = q.view(*positions.shape, -1, c.head_dim)
        mixed = ops.attend(q, keys, values, positions, c.head_dim**-0.5, None, num_slots)  # (2)
        x, s = self.post_attention_layernorm(self.o_proj(mixed.flatten(0, 1)), captured)  # (2)+(3) one kernel
        return self.down_proj(self.gate_up(x)), s, captured  # (3)


class LlamaTarget(PackedModel):
    """One rank's share of the whole target."""

    layer: type = LlamaLayer
    """targets that differ from Llama in their layers alone name their own"""
    final_norm: type = Norm

    def __init__(
        self, c: LlamaConfig, ops: Ops, group: Group, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> None:
        super().__init__()
        at = self.at = Placement(ops, group, dtype, torch.device(device))
        self.c = c
        self.embed_tokens = self.own(VocabEmbedding("embed_tokens.weight", c.vocab, c.hidden, at))
        self.layers = [self.layer(c, i, self, at) for i in range(c.layers)]
        self.norm = self.own(self.final_norm("norm.weight", c.hidden, c.eps, at))
        tied = self.embed_tokens if c.tied_head else None
        self.lm_head = self.own(VocabHead("lm_head.weight", c.vocab, c.hidden, at, tied))
        self.inv_freq, self.dynamic = self.frequencies(), c.rope.kind == "dynamic"

    def frequencies(self, seen: int = 0) -> Any:
        """What layers turn by; `seen` is how many positions are in view, which a dynamic rope reads."""
        return self.c.rope.frequencies(seen).to(self.at.device)

    def new_cache(self, batch: int, num_slots: int) -> KVCache:
        """Room for `num_slots` tokens of each of `batch` sequences."""
        heads = self.layers[0].qkv.kv_heads
        return KVCache(self.c.layers, batch, num_slots, heads, self.c.head_dim, self.at.dtype, self.at.device)

    def embed(self, tokens: Tensor) -> Tensor:
        """Equation (1): tokens [B, T] -> [B, T, H]"""
        return self.embed_tokens(tokens.flatten()).unflatten(0, tokens.shape)

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        capture: Sequence[int] = (),
        cache: KVCache | None = None,
        **media: Tensor | None,
    ) -> TargetOutput:
        """Predict the token after each of `tokens`; without a cache the tokens see each other alone.

        tokens     [B, T]
        positions  [B, T]  0..T-1 when absent; -1 marks padding, whose outputs mean nothing
        media      what `states` takes of tokens that are no text
        ->         logits [B, T, V], hidden [B, T, H], aux [B, T, A, H]
        """
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        tokens, positions = tokens.contiguous(), positions.contiguous()
        if cache is None:
            cache = self.new_cache(tokens.shape[0], int(positions.max()) + 1)
        inv_freq = self.frequencies(int(positions.max()) + 1) if self.dynamic else self.inv_freq
        hidden, aux = self.states(tokens, positions, cache, capture, inv_freq=inv_freq, **media)
        logits = self.lm_head.logits(hidden.flatten(0, 1)).unflatten(0, tokens.shape)  # (5)
        return TargetOutput(logits, hidden, aux)

    def states(
        self,
        tokens: Tensor,
        positions: Tensor,
        cache: KVCache,
        capture: Sequence[int] = (),
        num_slots: int | None = None,
        aux_out: Tensor | None = None,
        inv_freq: Any = None,
        embeds: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Everything below the head; reads nothing back from the device.

        tokens     [B, T]
        positions  [B, T]
        num_slots  a bound on position + 1 that the host knows
        aux_out    [B, T, A, H]  where to put the aux states; new when absent
        embeds     [B, T, H]  h_0 in full: `embed(tokens)` with features in the places of images
        ->         [B, T, H], [B, T, A, H]  after the final norm, at the capture points
        """
        slots, inv_freq = cache.slots(positions), self.inv_freq if inv_freq is None else inv_freq
        branch, h = (self.embed(tokens) if embeds is None else embeds).flatten(0, 1), None  # (1)
        stream: list[Tensor] = []
        for layer in self.layers:
            branch, h, captured = layer(branch, h, positions, slots, inv_freq, cache, num_slots)
            stream.append(captured)
        z, h = self.norm(branch, h)  # (3) of the last layer, (4) one kernel
        stream.append(h)
        hidden = z.unflatten(0, tokens.shape)
        if not capture:
            return hidden, hidden.new_empty(*tokens.shape, 0, self.c.hidden)
        rows = [stream[c].unflatten(0, tokens.shape) for c in capture]
        return hidden, torch.stack(rows, 2) if aux_out is None else torch.stack(rows, 2, out=aux_out)
