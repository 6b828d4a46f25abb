"""Gemma 3 text, fast: the equations of `reference/targets/gemma3.py` in nine kernels a layer.

    two norms + add | qkv | head norms, rope + KV write | attend: chunks, merge | o | two norms + add
    | gate, up, gelu | down

What a block adds is normed where the next block's norm reads it: one kernel norms the branch, adds it to the stream and
norms the sum. So capture point c appears as the second result of the norms that open layer c (of the final ones for
c = L), and over ranks the norm stands behind the sum of partial products. Rows are flattened, M = B*T, between `tokens`
and the outputs. What runs around the layers is Llama's: `optimized/targets/llama.py`.
Letters: reference/README.md.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from optimized.ops.kinds import GEMMA3
from optimized.ops.table import Ops
from optimized.parallel import GateUpLinear, Group, Norm, PackedModel, Placement, QKVLinear, RowLinear
from optimized.state import KVCache
from optimized.targets.llama import LlamaTarget
from reference.targets.gemma3 import Gemma3Config


class GemmaNorm(Norm):
    """A norm that multiplies by 1 + w."""

    def __call__(self, x: Tensor, residual: Tensor | None = None, post: Norm | None = None) -> tuple[Tensor, Tensor]:
        """The norm of a stream, and the stream.

        x         [M, H]  what a block adds; the stream itself where nothing came before
        residual  [M, H]  the stream without it
        post      the block's own second norm
        ->        [M, H], [M, H]
        """
        if residual is None or post is None:
            return self.ops.add_rmsnorm(x, residual, self.weight, self.eps, GEMMA3)
        return self.ops.sandwich_norm(x, residual, post.weight, self.weight, self.eps, GEMMA3)


class Gemma3Layer:
    """Equations (2) and (3)."""

    def __init__(self, c: Gemma3Config, index: int, model: PackedModel, at: Placement) -> None:
        self.c, self.index, self.ops, name = c, index, at.ops, f"layers.{index}."
        self.window = c.windows[index]
        self.rope = c.rope if self.window is None else c.local_rope
        self.input_layernorm = model.own(GemmaNorm(f"{name}input_layernorm.weight", c.hidden, c.eps, at))
        attn, wide = f"{name}self_attn.", c.heads * c.head_dim
        self.qkv = model.own(QKVLinear(attn, c.hidden, c.heads, c.kv_heads, c.head_dim, c.attention_bias, at))
        self.q_norm = model.own(GemmaNorm(f"{attn}q_norm.weight", c.head_dim, c.eps, at))
        self.k_norm = model.own(GemmaNorm(f"{attn}k_norm.weight", c.head_dim, c.eps, at))
        self.o_proj = model.own(RowLinear(f"{attn}o_proj", wide, c.hidden, c.attention_bias, at))
        self.post_attention_layernorm, self.pre_feedforward_layernorm, self.post_feedforward_layernorm = (
            model.own(GemmaNorm(f"{name}{norm}_layernorm.weight", c.hidden, c.eps, at))
            for norm in ("post_attention", "pre_feedforward", "post_feedforward")
        )
        self.gate_up = model.own(GateUpLinear(f"{name}mlp.", c.hidden, c.intermediate, False, at, "gelu_tanh"))
        self.down_proj = model.own(RowLinear(f"{name}mlp.down_proj", c.intermediate, c.hidden, False, at))

    def __call__(
        self,
        branch: Tensor,
        h: Tensor | None,
        below: Norm | None,
        positions: Tensor,
        slots: Tensor,
        inv_freq: tuple[Tensor, Tensor],
        cache: KVCache,
        num_slots: int | None,
        ends: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Both halves of a layer; what the MLP adds is left, not yet normed, to the next norm.

        branch     [M, H]  what the layer below adds to h
        h          [M, H]  None at the bottom, where the branch is all there is
        below      the norm that the layer below puts behind its MLP
        positions  [B, T]
        slots      [M]
        inv_freq   [R/2], [R/2]  of full and of sliding layers
        ends       [B, T]  the last position that a token sees, None for its own
        ->         [M, H], [M, H], [M, H]  this layer's branch, h without it, h at the capture point below
        """
        x, captured = self.input_layernorm(branch, h, below)  # (3) of the layer below, (2) one kernel
        mixed = self.attend(self.qkv(x), positions, slots, inv_freq, cache, num_slots, ends)
        # (2) of the branch's norm and the sum, (3) of the next norm one kernel
        x, s = self.pre_feedforward_layernorm(self.o_proj(mixed), captured, self.post_attention_layernorm)
        return self.down_proj(self.gate_up(x)), s, captured  # (3)

    def attend(
        self,
        qkv: Tensor,
        positions: Tensor,
        slots: Tensor,
        inv_freq: tuple[Tensor, Tensor],
        cache: KVCache,
        num_slots: int | None,
        ends: Tensor | None,
    ) -> Tensor:
        """qkv [M, (N+2G)*D] -> [M, N*D]"""
        ops, c, keys, values = self.ops, self.c, cache.keys[self.index], cache.values[self.index]
        turn, norms = inv_freq[self.window is not None], (self.q_norm.weight, self.k_norm.weight)
        flat, scale = positions.flatten(), self.rope.scale
        q = ops.qk_rope_kv_write(qkv, flat, slots, turn, scale, keys, values, *norms, c.eps, GEMMA3)
        q = q.view(*positions.shape, -1, c.head_dim)
        mixed = ops.attend(q, keys, values, positions, c.query_scale, self.window, num_slots, ends)  # (2)
        return mixed.flatten(0, 1)


class Gemma3Target(LlamaTarget):
    """One rank's share of the whole target."""

    layer, final_norm = Gemma3Layer, GemmaNorm

    def __init__(
        self, c: Gemma3Config, ops: Ops, group: Group, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> None:
        super().__init__(c, ops, group, dtype, device)  # type: ignore[arg-type]
        self.dynamic = "dynamic" in (c.rope.kind, c.local_rope.kind)

    def frequencies(self, seen: int = 0) -> tuple[Tensor, Tensor]:
        """Of full and of sliding layers."""
        full, local = (rope.frequencies(seen).to(self.at.device) for rope in (self.c.rope, self.c.local_rope))
        return full, local

    def embed(self, tokens: Tensor) -> Tensor:
        """Equation (1): tokens [B, T] -> [B, T, H]"""
        # a draft that shares the table reads it unscaled
        return self.embed_tokens(tokens.flatten(), self.c.hidden**0.5).unflatten(0, tokens.shape)

    def states(
        self,
        tokens: Tensor,
        positions: Tensor,
        cache: KVCache,
        capture: Sequence[int] = (),
        num_slots: int | None = None,
        aux_out: Tensor | None = None,
        inv_freq: tuple[Tensor, Tensor] | None = None,
        embeds: Tensor | None = None,
        ends: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Everything below the head; reads nothing back from the device.

        tokens     [B, T]
        positions  [B, T]
        num_slots  a bound on position + 1, and on end + 1, that the host knows
        aux_out    [B, T, A, H]  where to put the aux states; new when absent
        embeds     [B, T, H]  h_0 in full: `embed(tokens)` with features in the places of images
        ends       [B, T]  the last position that a token sees: its image's last; None for its own
        ->         [B, T, H], [B, T, A, H]  after the final norm, at the capture points
        """
        slots, inv_freq = cache.slots(positions), self.inv_freq if inv_freq is None else inv_freq
        branch, h, below = (self.embed(tokens) if embeds is None else embeds).flatten(0, 1), None, None  # (1)
        stream: list[Tensor] = []
        for layer in self.layers:
            branch, h, captured = layer(branch, h, below, positions, slots, inv_freq, cache, num_slots, ends)
            below = layer.post_feedforward_layernorm
            stream.append(captured)
        z, h = self.norm(branch, h, below)  # (3) of the last layer, (4) one kernel
        stream.append(h)
        hidden = z.unflatten(0, tokens.shape)
        if not capture:
            return hidden, hidden.new_empty(*tokens.shape, 0, self.c.hidden)
        rows = [stream[c].unflatten(0, tokens.shape) for c in capture]
        return hidden, torch.stack(rows, 2) if aux_out is None else torch.stack(rows, 2, out=aux_out)
