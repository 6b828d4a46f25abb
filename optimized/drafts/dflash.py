"""D-Flash, fast: the equations of `reference/drafts/dflash.py` over the kernels of `optimized/ops`.

A cycle writes the context of the settled columns, then asks its block: two passes over the key and value weights, one
over everything else. A block's queries turn at their own positions and see up to the block's end (`ends` of `attend`).
Rows are flattened, M = B*T, between tokens and outputs. Letters: reference/README.md.
"""

from typing import Any

import torch
from torch import Tensor

from optimized.drafting import Block
from optimized.drafts.eagle3 import DraftOutput, VocabMap
from optimized.ops.table import Ops
from optimized.ops.vocabulary import over_vocabulary
from optimized.parallel import (
    GateUpLinear,
    Group,
    Norm,
    PackedModel,
    Placement,
    QKVLinear,
    ReplicatedLinear,
    RowLinear,
    ShardError,
    VocabEmbedding,
    VocabHead,
)
from optimized.state import KVCache
from reference.drafts.dflash import DflashConfig


class DflashLayer:
    """Equations (3) to (6)."""

    def __init__(self, c: DflashConfig, index: int, model: PackedModel, at: Placement) -> None:
        self.c, self.index, self.ops, name = c, index, at.ops, f"layers.{index}."
        attn, wide = f"{name}self_attn.", c.heads * c.head_dim
        self.input_layernorm = model.own(Norm(f"{name}input_layernorm.weight", c.hidden, c.eps, at))
        self.qkv = model.own(QKVLinear(attn, c.hidden, c.heads, c.kv_heads, c.head_dim, c.bias, at))
        self.q_norm = model.own(Norm(f"{attn}q_norm.weight", c.head_dim, c.eps, at))
        self.k_norm = model.own(Norm(f"{attn}k_norm.weight", c.head_dim, c.eps, at))
        self.o_proj = model.own(RowLinear(f"{attn}o_proj", wide, c.hidden, c.bias, at))
        self.post_attention_layernorm = model.own(Norm(f"{name}post_attention_layernorm.weight", c.hidden, c.eps, at))
        self.gate_up = model.own(GateUpLinear(f"{name}mlp.", c.hidden, c.intermediate, False, at))
        self.down_proj = model.own(RowLinear(f"{name}mlp.down_proj", c.intermediate, c.hidden, False, at))
        self._kv: Tensor | None = None

    def remember(self, context: Tensor, positions: Tensor, slots: Tensor, inv_freq: Tensor, cache: KVCache) -> None:
        """Equation (3): keys and values alone, no query.

        context    [M, H]
        positions  [M]
        slots      [M]
        """
        first = self.qkv.heads * self.c.head_dim
        if self._kv is None:
            self._kv = self.ops.pack(self.qkv.weight[first:])
        bias = None if self.qkv.bias is None else self.qkv.bias[first:]
        self._turn(self.ops.linear(context, self._kv, bias), positions, slots, inv_freq, cache)

    def _turn(self, qkv: Tensor, positions: Tensor, slots: Tensor, inv_freq: Tensor, cache: KVCache) -> Tensor:
        """qkv [M, (N+2G)*D], positions [M], slots [M] -> [M, N, D]"""
        keys, values, norms = cache.keys[self.index], cache.values[self.index], (self.q_norm.weight, self.k_norm.weight)
        return self.ops.qk_rope_kv_write(
            qkv, positions, slots, inv_freq, self.c.rope.scale, keys, values, *norms, self.c.eps
        )

    def __call__(
        self,
        u: Tensor,
        residual: Tensor,
        positions: Tensor,
        slots: Tensor,
        inv_freq: Tensor,
        cache: KVCache,
        num_slots: int | None,
    ) -> tuple[Tensor, Tensor]:
        """Both halves of a layer; what the MLP adds is left to the next norm.

        u          [M, H]
        residual   [M, H]
        positions  [B, T]
        slots      [M]
        ->         [M, H], [M, H]  this layer's branch, s
        """
        c, keys, values = self.c, cache.keys[self.index], cache.values[self.index]
        q = self._turn(self.qkv(u), positions.flatten(), slots, inv_freq, cache).view(*positions.shape, -1, c.head_dim)
        window, ends = c.window(self.index), None
        if not c.causal[self.index]:
            ends = positions[:, -1:].expand_as(positions)
            ends = ends if window is None else ends.minimum(positions + (window - 1))
        mixed = self.ops.attend(q, keys, values, positions, c.head_dim**-0.5, window, num_slots, ends)  # (4), (5)
        x, s = self.post_attention_layernorm(self.o_proj(mixed.flatten(0, 1)), residual)  # (5)+(6) one kernel
        return self.down_proj(self.gate_up(x)), s  # (6)


class DflashDraft(PackedModel):
    """One rank's share of the whole draft."""

    way = Block

    def __init__(
        self, c: DflashConfig, ops: Ops, group: Group, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> None:
        super().__init__()
        at = self.at = Placement(ops, group, dtype, torch.device(device))
        self.c = c
        self.embed_tokens = self.own(VocabEmbedding("embed_tokens.weight", c.vocab, c.hidden, at))
        self.fc = self.own(ReplicatedLinear("fc", c.aux_width * c.aux_states, c.hidden, False, at))
        self.hidden_norm = self.own(Norm("hidden_norm.weight", c.hidden, c.eps, at))
        self.layers = [DflashLayer(c, i, self, at) for i in range(c.layers)]
        self.norm = self.own(Norm("norm.weight", c.hidden, c.eps, at))
        self.lm_head = self.own(VocabHead("lm_head.weight", c.draft_vocab, c.hidden, at))
        self.map = self.own(VocabMap(c.vocab, c.draft_vocab, at))
        self.inv_freq = c.rope.frequencies().to(device)

    def share_embedding(self, target: Any) -> None:
        """Read the target's table, shard by shard as it lies, instead of an own one."""
        self._check_width("embedding", target.embed_tokens, self.c.vocab)
        self.disown(self.embed_tokens)
        self.embed_tokens = target.embed_tokens

    def share_head(self, target: Any) -> None:
        """Ask the target's head, shard by shard as it lies, instead of an own one."""
        # a head with a softcap shares its product alone: the cap is the target's own
        theirs = getattr(target.lm_head, "plain", target.lm_head)
        self._check_width("head", theirs, self.c.draft_vocab)
        self.disown(self.lm_head)
        self.lm_head = theirs

    def _check_width(self, what: str, theirs: VocabEmbedding | VocabHead, vocab: int) -> None:
        here, there = (vocab, self.c.hidden), (theirs.vocab, theirs.hidden)
        if here != there:
            raise ShardError(f"the target's {what} is {there[0]} x {there[1]}, the draft reads {here[0]} x {here[1]}")

    def new_cache(self, batch: int, num_slots: int) -> KVCache:
        """Room for `num_slots` tokens of each of `batch` sequences."""
        heads = self.layers[0].qkv.kv_heads
        return KVCache(self.c.layers, batch, num_slots, heads, self.c.head_dim, self.at.dtype, self.at.device)

    def fuse(self, aux: Tensor) -> Tensor:
        """Equation (1).

        aux  [B, T, A, X]  X is the target's width
        ->   [B, T, H]
        """
        c, _ = self.hidden_norm(self.fc(aux.flatten(0, 1).flatten(1).contiguous()))
        return c.unflatten(0, aux.shape[:2])

    def read(self, out: Any) -> Tensor:
        """The context, from a target's output (or a state's buffers of the same names): -> [B, T, H]"""
        return self.fuse(out.aux)

    def remember(self, context: Tensor, positions: Tensor, cache: KVCache, inv_freq: Tensor | None = None) -> None:
        """Equation (3) in every layer.

        context    [B, T, H]  from `read`
        positions  [B, T]     -1 marks padding, which is written nowhere
        """
        slots, inv_freq = cache.slots(positions), self.inv_freq if inv_freq is None else inv_freq
        rows, flat = context.flatten(0, 1), positions.flatten()
        for layer in self.layers:
            layer.remember(rows, flat, slots, inv_freq, cache)

    def ask(self, roots: Tensor, num_draft_tokens: int) -> Tensor:
        """Equation (2) before the embedding: roots [B] -> [B, K+1]"""
        masks = roots.new_full((roots.shape[0], num_draft_tokens), self.c.mask_token)
        return torch.cat([roots[:, None], masks], 1)

    def states(
        self,
        tokens: Tensor,
        positions: Tensor,
        cache: KVCache,
        num_slots: int | None = None,
        inv_freq: Tensor | None = None,
    ) -> Tensor:
        """A block whose context is remembered, below the head; reads nothing back from the device.

        tokens     [B, T]     from `ask`
        positions  [B, T]
        num_slots  a bound on position + 1 that the host knows
        ->         [B, T, H]  what the head reads
        """
        slots, inv_freq = cache.slots(positions), self.inv_freq if inv_freq is None else inv_freq
        branch, s = self.embed_tokens(tokens.flatten()), None  # (2)
        for layer in self.layers:
            u, s = layer.input_layernorm(branch, s)
            branch, s = layer(u, s, positions, slots, inv_freq, cache, num_slots)
        z, _ = self.norm(branch, s)
        return z.unflatten(0, tokens.shape)

    def forward(self, tokens: Tensor, hidden: Tensor, positions: Tensor | None = None) -> DraftOutput:
        """One block after a context that begins with the text.

        tokens     [B, T]
        hidden     [B, X, H]  from `read`, of the positions 0 .. X-1
        positions  [B, T]     X and on when absent
        ->         logits [B, T, Vd], feedback [B, T, H]
        """
        (batch, width), length = tokens.shape, hidden.shape[1]
        place = torch.arange(length + width, device=tokens.device).expand(batch, -1)
        positions = (place[:, length:] if positions is None else positions).contiguous()
        seen = int(positions.max()) + 1
        cache, inv_freq = self.new_cache(batch, seen), self.inv_freq
        if self.c.rope.kind == "dynamic":
            inv_freq = self.c.rope.frequencies(seen).to(tokens.device)
        self.remember(hidden.contiguous(), place[:, :length].contiguous(), cache, inv_freq)
        top = self.states(tokens.contiguous(), positions, cache, inv_freq=inv_freq)
        return DraftOutput(self.logits(top), top)

    def logits(self, top: Tensor) -> Tensor:
        """Equation (7).

        top  [B, T, H]
        ->   [B, T, Vd]
        """
        return self.lm_head.logits(top.flatten(0, 1), self.c.logit_scale).unflatten(0, top.shape[:2])

    def propose(self, top: Tensor) -> Tensor:
        """The likeliest draft token as a target id, (7)+(8), without the logits.

        top  [B, H]
        ->   [B]
        """
        return self.to_target(self.lm_head.argmax(top, self.c.logit_scale))

    def to_target(self, draft_ids: Tensor) -> Tensor:
        """Equation (8): draft_ids of any shape -> the same shape"""
        return draft_ids + self.map.d2t[draft_ids]

    def spread(self, logits: Tensor) -> Tensor:
        """Draft logits over the target's vocabulary; a token without a draft id cannot be proposed.

        logits  [B, T, Vd]
        ->      [B, T, V]
        """
        ids = torch.arange(self.c.draft_vocab, device=logits.device)
        return over_vocabulary(logits, self.to_target(ids), self.c.vocab)
