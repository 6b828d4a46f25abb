"""EAGLE-3, fast: the equations of `reference/drafts/eagle3.py` over the kernels of `optimized/ops`.

The first draft step reads every column that the last verify settled but needs the logits of one, so `states` stops
below the head and the caller picks its rows. Rows are flattened, M = B*T, between `tokens` and the outputs.
Letters: reference/README.md.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from optimized.drafting import Recurrent
from optimized.ops.table import Ops
from optimized.ops.vocabulary import over_vocabulary
from optimized.parallel import (
    GateUpLinear,
    Group,
    Norm,
    PackedModel,
    Part,
    Placement,
    QKVLinear,
    ReplicatedLinear,
    RowLinear,
    ShardError,
    VocabEmbedding,
    VocabHead,
)
from optimized.state import KVCache
from reference.drafts.eagle3 import Eagle3Config


class DraftOutput(NamedTuple):
    logits: Tensor
    """[B, T, Vd]"""
    feedback: Tensor
    """[B, T, H] what the next draft step reads as `hidden`, equation (8)"""


class VocabMap(Part):
    """Which target id each draft id stands for."""

    def __init__(self, vocab: int, draft_vocab: int, at: Placement) -> None:
        super().__init__(at)
        self.d2t = torch.zeros(draft_vocab, dtype=torch.int64, device=at.device)
        self.t2d = torch.zeros(vocab, dtype=torch.bool, device=at.device)
        self.needed = draft_vocab != vocab
        self.place("d2t", self.d2t, (draft_vocab,))
        self.place("t2d", self.t2d, (vocab,))

    def missing(self) -> list[str]:
        """A full vocabulary needs no map, and no equation reads t2d."""
        return ["d2t"] if self.needed and "d2t" not in self.written else []


class Attention:
    """Attn of (5) by heads, grouped or not."""

    def __init__(self, c: Eagle3Config, index: int, model: PackedModel, at: Placement, into: int) -> None:
        self.c, self.index, self.ops, name = c, index, at.ops, f"layers.{index}.self_attn."
        wide = c.heads * c.head_dim
        self.qkv = model.own(QKVLinear(name, into, c.heads, c.kv_heads, c.head_dim, c.qkv_bias, at))
        self.q_norm = model.own(Norm(f"{name}q_norm.weight", c.head_dim, c.eps, at)) if c.qk_norm else None
        self.k_norm = model.own(Norm(f"{name}k_norm.weight", c.head_dim, c.eps, at)) if c.qk_norm else None
        self.o_proj = model.own(RowLinear(f"{name}o_proj", wide, c.hidden, c.o_bias, at))

    def __call__(
        self, x: Tensor, positions: Tensor, slots: Tensor, inv_freq: Tensor, cache: KVCache, num_slots: int | None
    ) -> Tensor:
        """Write keys and values, then read those that each token sees.

        x          [M, X]
        positions  [B, T]
        slots      [M]
        ->         [M, H]
        """
        ops, c, keys, values = self.ops, self.c, cache.keys[self.index], cache.values[self.index]
        q_norm = None if self.q_norm is None else self.q_norm.weight
        k_norm = None if self.k_norm is None else self.k_norm.weight
        qkv, flat = self.qkv(x), positions.flatten()
        q = ops.qk_rope_kv_write(qkv, flat, slots, inv_freq, c.rope.scale, keys, values, q_norm, k_norm, c.eps)
        q = q.view(*positions.shape, -1, c.head_dim)
        mixed = ops.attend(q, keys, values, positions, c.head_dim**-0.5, c.window(self.index), num_slots)
        return self.o_proj(mixed.flatten(0, 1))


class Eagle3Layer:
    """Equations (3) to (6); a layer after the first is a plain one and reads y alone."""

    attention: Any = Attention

    def __init__(self, c: Any, index: int, model: PackedModel, at: Placement) -> None:
        self.c, name = c, f"layers.{index}."
        opening = c.later_norm if index else "input_layernorm"
        self.first_norm = model.own(Norm(f"{name}{opening}.weight", c.hidden, c.eps, at))
        self.hidden_norm = None if index else model.own(Norm(f"{name}hidden_norm.weight", c.hidden, c.eps, at))
        self.self_attn = self.attention(c, index, model, at, c.hidden if index else 2 * c.hidden)
        self.post_attention_layernorm = model.own(Norm(f"{name}post_attention_layernorm.weight", c.hidden, c.eps, at))
        self.gate_up = model.own(GateUpLinear(f"{name}mlp.", c.hidden, c.intermediate, c.mlp_bias, at))
        self.down_proj = model.own(RowLinear(f"{name}mlp.down_proj", c.intermediate, c.hidden, c.mlp_bias, at))

    def open(self, embed: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """The first layer's input.

        embed   [M, H]
        hidden  [M, H]
        ->      [M, 2H], [M, H]  u and r
        """
        normed, _ = self.hidden_norm(hidden)  # type: ignore[misc]
        u = torch.cat([self.first_norm(embed)[0], normed], -1)  # (3)
        return u, normed if self.c.norm_before_residual else hidden  # (4)

    def read(self, branch: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        """A later layer's input: (6) of the layer below and its norm in one kernel.

        branch  [M, H]
        s       [M, H]
        ->      [M, H], [M, H]  u and r
        """
        return self.first_norm(branch, s)

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

        u          [M, X]  2H features in the first layer, H in later ones
        residual   [M, H]
        positions  [B, T]
        slots      [M]
        ->         [M, H], [M, H]  this layer's branch, s
        """
        mixed = self.self_attn(u, positions, slots, inv_freq, cache, num_slots)  # (5)
        x, s = self.post_attention_layernorm(mixed, residual)  # (5)+(6) one kernel
        return self.down_proj(self.gate_up(x)), s  # (6)


class Eagle3Draft(PackedModel):
    """One rank's share of the whole draft."""

    way = Recurrent
    layer = Eagle3Layer

    def __init__(self, c: Any, ops: Ops, group: Group, dtype: torch.dtype, device: torch.device | str = "cpu") -> None:
        super().__init__()
        at = self.at = Placement(ops, group, dtype, torch.device(device))
        self.c = c
        self.embed_tokens = self.own(VocabEmbedding("embed_tokens.weight", c.vocab, c.hidden, at))
        self.input_norm: Norm | None = None
        self.fc_norm: list[Norm] = []
        self.fc: ReplicatedLinear | None = None
        if c.use_aux_hidden_state:
            wide = c.aux_width * c.aux_states
            if c.norm_before_fc:
                self.input_norm = self.own(Norm("input_norm.weight", wide, c.eps, at))
            if c.fc_norm:
                names = [f"fc_norm.{j}.weight" for j in range(c.aux_states)]
                self.fc_norm = [self.own(Norm(name, c.aux_width, c.eps, at)) for name in names]
            self.fc = self.own(ReplicatedLinear("fc", wide, c.hidden, c.fc_bias, at))
        self.layers = [self.layer(c, i, self, at) for i in range(c.layers)]
        self.norm = self.own(Norm("norm.weight", c.hidden, c.eps, at))
        tied = self.embed_tokens if c.tied_head else None
        self.lm_head = self.own(VocabHead("lm_head.weight", c.draft_vocab, c.hidden, at, tied))
        self.map = self.own(VocabMap(c.vocab, c.draft_vocab, at))
        self.inv_freq = c.rope.frequencies().to(device)

    def share_embedding(self, target: Any) -> None:
        """Read the target's table, shard by shard as it lies, instead of an own one."""
        theirs = target.embed_tokens
        _check_width("embedding", theirs, self.c.vocab, self.c.hidden)
        self.disown(self.embed_tokens)
        self.embed_tokens = theirs
        if self.lm_head.tied is not None:
            self.lm_head.tied = theirs

    def share_head(self, target: Any) -> None:
        """Ask the target's head, shard by shard as it lies, instead of an own one."""
        # a head with a softcap shares its product alone: the cap is the target's own
        theirs = getattr(target.lm_head, "plain", target.lm_head)
        _check_width("head", theirs, self.c.draft_vocab, self.c.hidden)
        self.disown(self.lm_head)
        self.lm_head = theirs

    def new_cache(self, batch: int, num_slots: int) -> KVCache:
        """Room for `num_slots` tokens of each of `batch` sequences."""
        heads = self.layers[0].self_attn.qkv.kv_heads
        return KVCache(self.c.layers, batch, num_slots, heads, self.c.head_dim, self.at.dtype, self.at.device)

    def fuse(self, aux: Tensor) -> Tensor:
        """Equation (1).

        aux  [B, T, A, X]  X is the target's width
        ->   [B, T, H]
        """
        if self.fc is None:
            raise ValueError("this draft reads the target's final hidden state (use_aux_hidden_state is false)")
        x = aux.flatten(0, 1).flatten(1).contiguous()  # [M, A*X]
        if self.input_norm is not None:
            x, _ = self.input_norm(x)
        if self.fc_norm:
            x = torch.cat(
                [n(a.contiguous())[0] for n, a in zip(self.fc_norm, x.chunk(len(self.fc_norm), 1), strict=True)], 1
            )
        return self.fc(x).unflatten(0, aux.shape[:2])

    def read(self, out: Any) -> Tensor:
        """What the first draft step reads as `hidden`, from a target's output (or a state's buffers of the same names).

        ->  [B, T, H]
        """
        return self.fuse(out.aux) if self.c.use_aux_hidden_state else out.hidden

    def forward(
        self, tokens: Tensor, hidden: Tensor, positions: Tensor | None = None, cache: KVCache | None = None
    ) -> DraftOutput:
        """Propose the token after each of `tokens`.

        tokens     [B, T]     x_{t+1} in column t
        hidden     [B, T, H]  g_t
        positions  [B, T]     t; -1 marks padding, whose outputs mean nothing
        ->         logits [B, T, Vd], feedback [B, T, H]
        """
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        tokens, hidden, positions = tokens.contiguous(), hidden.contiguous(), positions.contiguous()
        if cache is None:
            cache = self.new_cache(tokens.shape[0], int(positions.max()) + 1)
        inv_freq = self.inv_freq
        if self.c.rope.kind == "dynamic":
            inv_freq = self.c.rope.frequencies(int(positions.max()) + 1).to(tokens.device)
        top, feedback = self.states(tokens, hidden, positions, cache, inv_freq=inv_freq)
        return DraftOutput(self.logits(top), feedback)

    def states(
        self,
        tokens: Tensor,
        hidden: Tensor,
        positions: Tensor,
        cache: KVCache,
        num_slots: int | None = None,
        inv_freq: Tensor | None = None,
        embeds: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Everything below the head; reads nothing back from the device.

        tokens     [B, T]
        hidden     [B, T, H]
        positions  [B, T]
        num_slots  a bound on position + 1 that the host knows
        embeds     [B, T, H]  e_t in full, where x_{t+1} may be a placeholder of an image
        ->         [B, T, H], [B, T, H]  what the head reads, feedback
        """
        slots, inv_freq = cache.slots(positions), self.inv_freq if inv_freq is None else inv_freq
        e = self.embed_tokens(tokens.flatten()) if embeds is None else embeds.flatten(0, 1)  # (2)
        u, s = self.layers[0].open(e, hidden.flatten(0, 1))
        branch, s = self.layers[0](u, s, positions, slots, inv_freq, cache, num_slots)
        for layer in self.layers[1:]:
            u, s = layer.read(branch, s)
            branch, s = layer(u, s, positions, slots, inv_freq, cache, num_slots)
        z, y = self.norm(branch, s)  # (6) of the last layer, norm_out of (7) and (8) one kernel
        top, feedback = z if self.c.norm_before_head else y, z if self.c.feedback_normed else y  # (7), (8)
        return top.unflatten(0, tokens.shape), feedback.unflatten(0, tokens.shape)

    def logits(self, top: Tensor) -> Tensor:
        """Equation (7).

        top  [B, T, H]
        ->   [B, T, Vd]
        """
        return self.lm_head.logits(top.flatten(0, 1), self.c.logit_scale).unflatten(0, top.shape[:2])

    def propose(self, top: Tensor) -> Tensor:
        """The likeliest draft token as a target id, (7)+(9), without the logits.

        top  [B, H]
        ->   [B]
        """
        return self.to_target(self.lm_head.argmax(top, self.c.logit_scale))

    def to_target(self, draft_ids: Tensor) -> Tensor:
        """Equation (9): draft_ids of any shape -> the same shape"""
        return draft_ids + self.map.d2t[draft_ids]

    def spread(self, logits: Tensor) -> Tensor:
        """Draft logits over the target's vocabulary; a token without a draft id cannot be proposed.

        logits  [B, T, Vd]
        ->      [B, T, V]
        """
        ids = torch.arange(self.c.draft_vocab, device=logits.device)
        return over_vocabulary(logits, self.to_target(ids), self.c.vocab)


def _check_width(what: str, theirs: VocabEmbedding | VocabHead, vocab: int, hidden: int) -> None:
    if (theirs.vocab, theirs.hidden) != (vocab, hidden):
        raise ShardError(f"the target's {what} is {theirs.vocab} x {theirs.hidden}, the draft reads {vocab} x {hidden}")
