"""Gemma 4, the text model: dense, with experts beside the dense block, or with an input of its own for every layer.

    (1)  h_0 = sqrt(H) Emb(x)                               or the embeddings that the caller gives
    (2)  p = (norm(H^-1/2 W_model h_0) + sqrt(U) Emb_layers(x)) / sqrt(2)     U features a layer, if per_layer_width
    (3)  u = norm_in(h_i);  q = rope(norm_q(W_q u)),  k = rope(norm_k(W_k u)),  v = norm_1(W_v u)
             norm_1 has no weight; W_v is W_k if k_eq_v; a shared layer has W_q alone and reads its donor's k and v
    (4)  s_i = h_i + norm_post(W_o Attn(q, k, v))           scores are q . k, not scaled
    (5)  f = MLP(norm_pre(s_i))                             gelu; shared layers are shared_widening times as wide
    (6)  w = top-P softmax(W_router (H^-1/2 g * norm_1(s_i))), divided by its sum; w_e <- w_e c_e
    (7)  f <- norm_a(f) + norm_b(sum_e w_e Expert_e(norm_c(s_i)))             (6) and (7) if experts
    (8)  y = s_i + norm_ffw(f)
    (9)  y <- y + norm_out(W_out (gelu(W_gate y) * p_i))                      if per_layer_width
    (10) h_{i+1} = l_i y                                    l_i is one number, stored beside the weights
    (11) z = norm(h_L)
    (12) logits = c tanh(W_head z / c)                      W_head z if there is no softcap

Layers are of two kinds. Sliding layers see `window` tokens; full layers see all, and have key/value heads, a head width
and a rope of their own. A shared layer is one of the last `shared_layers`; its donor is the last earlier layer of its
kind. Tokens of one image see each other both ways on layers whose kind has `sees_image`, within the window.

Capture point c is h_c: after l_i, before any norm. Source: transformers `modeling_gemma4.py`.  Letters:
reference/README.md; U is the width of a per-layer input.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from reference.config import ConfigError
from reference.ops.attention import attend, causal, narrow
from reference.ops.blocks import later_of_block
from reference.ops.cache import Cache
from reference.ops.mlp import MLP, gelu
from reference.ops.moe import FusedExperts, route_softmax
from reference.ops.norm import WideRMSNorm
from reference.ops.rope import Rope, rotate
from reference.ops.stream import captured
from reference.outputs import TargetOutput
from reference.targets.gemma4_keys import FULL, read_facts


@dataclass(frozen=True)
class Kind:
    """What the layers of one kind have in common."""

    kv_heads: int
    head_dim: int
    rope: Rope
    window: int | None = None
    """tokens in sight, None for all of them"""
    k_eq_v: bool = False
    """values are made by the key projection"""
    sees_image: bool = False
    """tokens of one image see each other both ways"""


@dataclass(frozen=True)
class Gemma4Config:
    """Every fact that changes the equations above."""

    vocab: int
    hidden: int
    intermediate: int
    layer_types: tuple[str, ...]
    heads: int
    sliding: Kind
    full: Kind
    shared_layers: int = 0
    """layers at the end that read a donor's keys and values"""
    shared_widening: int = 1
    """how many times as wide their feed-forward block is"""
    experts: int = 0
    experts_per_token: int = 0
    expert_intermediate: int = 0
    per_layer_width: int = 0
    per_layer_vocab: int = 0
    softcap: float | None = None
    eps: float = 1e-6
    attention_bias: bool = False
    tied_head: bool = True

    def __post_init__(self) -> None:
        own = self.layer_types[: self.layers - self.shared_layers]
        orphans = sorted(set(self.layer_types[len(own) :]) - set(own))
        if orphans:
            raise ConfigError(
                f"num_kv_shared_layers is {self.shared_layers}: of {self.layers} layers none before the shared ones is "
                f"of kind {orphans[0]!r}, so they have no keys and values to read"
            )

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> "Gemma4Config":
        """Read a text config, alone or from `text_config`; errors: ConfigError. Keys: `gemma4_keys.py`."""
        facts = read_facts(config)
        return cls(**{**facts, "sliding": Kind(**facts["sliding"]), "full": Kind(**facts["full"])})

    @property
    def layers(self) -> int:
        return len(self.layer_types)

    @property
    def ignored(self) -> tuple[tuple[str, str], ...]:
        """Tensors that a checkpoint may hold and nothing reads: (pattern of our name, why)."""
        return tuple(
            (f"layers.{i}.self_attn.{name}.*", "a shared layer reads its donor's keys and values")
            for i in range(self.layers - self.shared_layers, self.layers)
            for name in ("k_proj", "v_proj", "k_norm")
        )

    def kind(self, layer: int) -> Kind:
        return self.full if self.layer_types[layer] == FULL else self.sliding

    def is_shared(self, layer: int) -> bool:
        """Whether a layer reads another's keys and values."""
        return layer >= self.layers - self.shared_layers

    def last_own(self, layer_type: str) -> int:
        """The last layer of a kind with keys and values of its own, the donor of the shared ones."""
        own = self.layer_types[: self.layers - self.shared_layers]
        return len(own) - 1 - own[::-1].index(layer_type)

    def donor(self, layer: int) -> int:
        """The layer whose keys and values a layer reads: itself unless it is shared."""
        return self.last_own(self.layer_types[layer]) if self.is_shared(layer) else layer


# how published checkpoints spell our parameter names: (their prefix, ours)
CHECKPOINT_NAMES = (("model.", ""),)

# how each parameter is split over W tensor-parallel ranks; norms, the router, and names not listed, are replicated
TP_PLAN = {
    "embed_tokens.weight": "vocab",
    "embed_tokens_per_layer.weight": "vocab",
    "per_layer_model_projection.weight": "replicated",
    "layers.*.self_attn.q_proj.weight": "heads",
    "layers.*.self_attn.q_proj.bias": "heads",
    "layers.*.self_attn.k_proj.weight": "heads",
    "layers.*.self_attn.k_proj.bias": "heads",
    "layers.*.self_attn.v_proj.weight": "heads",
    "layers.*.self_attn.v_proj.bias": "heads",
    "layers.*.self_attn.o_proj.weight": "row",
    "layers.*.mlp.gate_proj.weight": "column",
    "layers.*.mlp.up_proj.weight": "column",
    "layers.*.mlp.down_proj.weight": "row",
    "layers.*.router.proj.weight": "replicated",
    "layers.*.experts.gate_up_proj": "experts",
    "layers.*.experts.down_proj": "experts",
    "layers.*.per_layer_input_gate.weight": "replicated",
    "layers.*.per_layer_projection.weight": "replicated",
    "lm_head.weight": "vocab",
}


class Gemma4Attention(nn.Module):
    """Equation (3) and the sum of (4)."""

    def __init__(self, c: Gemma4Config, layer: int) -> None:
        super().__init__()
        self.kind, self.layer, self.donor = c.kind(layer), layer, c.donor(layer)
        width, bias = self.kind.head_dim, c.attention_bias
        self.q_proj = nn.Linear(c.hidden, c.heads * width, bias=bias)
        self.q_norm = WideRMSNorm(width, c.eps)
        self.o_proj = nn.Linear(c.heads * width, c.hidden, bias=bias)
        if self.donor == layer:
            self.k_proj = nn.Linear(c.hidden, self.kind.kv_heads * width, bias=bias)
            self.k_norm = WideRMSNorm(width, c.eps)
            self.v_norm = WideRMSNorm(None, c.eps)
            if not self.kind.k_eq_v:
                self.v_proj = nn.Linear(c.hidden, self.kind.kv_heads * width, bias=bias)

    def forward(self, u: Tensor, positions: Tensor, visible: Tensor, cache: Cache, slots: Tensor) -> Tensor:
        """Attend from every token to the visible slots.

        u          [B, T, H]
        positions  [B, T]
        visible    [B, T, S]
        slots      [B, T]
        ->         [B, T, H]
        """
        rope, heads = self.kind.rope, (-1, self.kind.head_dim)
        q = rotate(self.q_norm(self.q_proj(u).unflatten(-1, heads)), positions, rope)
        if self.donor == self.layer:
            projected = self.k_proj(u).unflatten(-1, heads)
            k = rotate(self.k_norm(projected), positions, rope)
            v = self.v_norm(projected if self.kind.k_eq_v else self.v_proj(u).unflatten(-1, heads))
            cache.write(self.layer, k, v, slots)
        k, v = cache.keys[self.donor], cache.values[self.donor]
        return self.o_proj(attend(q, k, v, visible, 1.0).flatten(2))


class Gemma4Router(nn.Module):
    """Equation (6)."""

    def __init__(self, c: Gemma4Config) -> None:
        super().__init__()
        self.chosen, self.shrink = c.experts_per_token, c.hidden**-0.5
        self.norm = WideRMSNorm(None, c.eps)
        self.scale = nn.Parameter(torch.ones(c.hidden))
        self.proj = nn.Linear(c.hidden, c.experts, bias=False)
        self.per_expert_scale = nn.Parameter(torch.ones(c.experts))

    def forward(self, s: Tensor) -> tuple[Tensor, Tensor]:
        """Which experts each token goes to, and how much each counts.

        s   [B, T, H]
        ->  ids [B, T, P], weights [B, T, P]
        """
        scores = self.proj(self.norm(s) * self.scale * self.shrink)
        ids, weights = route_softmax(scores, self.chosen, True)
        return ids, weights * self.per_expert_scale[ids]


class Gemma4Layer(nn.Module):
    """Equations (3) to (10)."""

    def __init__(self, c: Gemma4Config, layer: int) -> None:
        super().__init__()
        self.c = c
        self.input_layernorm = WideRMSNorm(c.hidden, c.eps)
        self.self_attn = Gemma4Attention(c, layer)
        self.post_attention_layernorm = WideRMSNorm(c.hidden, c.eps)
        self.pre_feedforward_layernorm = WideRMSNorm(c.hidden, c.eps)
        self.mlp = MLP(c.hidden, c.intermediate * (c.shared_widening if c.is_shared(layer) else 1), act=gelu)
        self.post_feedforward_layernorm = WideRMSNorm(c.hidden, c.eps)
        if c.experts:
            self.router = Gemma4Router(c)
            self.experts = FusedExperts(c.experts, c.hidden, c.expert_intermediate, gelu)
            self.post_feedforward_layernorm_1 = WideRMSNorm(c.hidden, c.eps)
            self.post_feedforward_layernorm_2 = WideRMSNorm(c.hidden, c.eps)
            self.pre_feedforward_layernorm_2 = WideRMSNorm(c.hidden, c.eps)
        if c.per_layer_width:
            self.per_layer_input_gate = nn.Linear(c.hidden, c.per_layer_width, bias=False)
            self.per_layer_projection = nn.Linear(c.per_layer_width, c.hidden, bias=False)
            self.post_per_layer_input_norm = WideRMSNorm(c.hidden, c.eps)
        self.register_buffer("layer_scalar", torch.ones(1))

    def forward(
        self, h: Tensor, per_layer: Tensor | None, positions: Tensor, visible: Tensor, cache: Cache, slots: Tensor
    ) -> Tensor:
        """One layer of the stream.

        h          [B, T, H]
        per_layer  [B, T, U]
        positions  [B, T]
        visible    [B, T, S]
        slots      [B, T]
        ->         [B, T, H]
        """
        u = self.input_layernorm(h)
        s = h + self.post_attention_layernorm(self.self_attn(u, positions, visible, cache, slots))  # (3) (4)
        f = self.mlp(self.pre_feedforward_layernorm(s))  # (5)
        if self.c.experts:
            ids, weights = self.router(s)  # (6)
            mixed = self.experts(self.pre_feedforward_layernorm_2(s), ids, weights)
            f = self.post_feedforward_layernorm_1(f) + self.post_feedforward_layernorm_2(mixed)  # (7)
        y = s + self.post_feedforward_layernorm(f)  # (8)
        if per_layer is not None:
            gated = gelu(self.per_layer_input_gate(y)) * per_layer
            y = y + self.post_per_layer_input_norm(self.per_layer_projection(gated))  # (9)
        return y * self.layer_scalar  # (10)


class Gemma4Target(nn.Module):
    """The whole target."""

    def __init__(self, c: Gemma4Config) -> None:
        super().__init__()
        self.c = c
        self.embed_tokens = nn.Embedding(c.vocab, c.hidden)
        if c.per_layer_width:
            packed = c.layers * c.per_layer_width
            self.embed_tokens_per_layer = nn.Embedding(c.per_layer_vocab, packed)
            self.per_layer_model_projection = nn.Linear(c.hidden, packed, bias=False)
            self.per_layer_projection_norm = WideRMSNorm(c.per_layer_width, c.eps)
        self.layers = nn.ModuleList(Gemma4Layer(c, i) for i in range(c.layers))
        self.norm = WideRMSNorm(c.hidden, c.eps)
        self.lm_head = nn.Linear(c.hidden, c.vocab, bias=False)
        self.tie()

    def tie(self) -> None:
        """A tied head is the embedding's table itself, before its scale."""
        if self.c.tied_head:
            self.lm_head.weight = self.embed_tokens.weight

    def new_cache(self, batch: int, num_slots: int) -> Cache:
        """Room for `num_slots` tokens of each of `batch` sequences; the entries of shared layers stay empty."""
        return Cache(self.c.layers, batch, num_slots)

    def shared_kv(self, cache: Cache) -> dict[str, tuple[Tensor, Tensor]]:
        """The last keys and values of each kind of layer, by slot: (keys, values), each [B, S, G, D] of the kind.

        What the Gemma 4 assistant reads in place of keys and values of its own; `cache.positions` says whose they are.
        """
        last = {layer_type: self.c.last_own(layer_type) for layer_type in dict.fromkeys(self.c.layer_types)}
        return {layer_type: (cache.keys[i], cache.values[i]) for layer_type, i in last.items()}

    def embed(self, tokens: Tensor) -> Tensor:
        """Equation (1); the scale is rounded to the table's dtype first.

        tokens  [B, T]
        ->      [B, T, H]
        """
        return scaled(self.embed_tokens(tokens), self.c.hidden)

    def per_layer_inputs(self, h: Tensor, tokens: Tensor) -> Tensor:
        """Equation (2).

        h       [B, T, H]  h_0
        tokens  [B, T]     what `embed_tokens_per_layer` is asked for
        ->      [B, T, L, U]
        """
        parts = (self.c.layers, self.c.per_layer_width)
        context = (self.per_layer_model_projection(h) * self.c.hidden**-0.5).unflatten(-1, parts)
        own = scaled(self.embed_tokens_per_layer(tokens), self.c.per_layer_width).unflatten(-1, parts)
        return (self.per_layer_projection_norm(context) + own) * 2**-0.5

    def sight(
        self, kind: Kind, positions: Tensor, cache: Cache, slots: Tensor, visible: Tensor | None, blocks: Tensor | None
    ) -> Tensor:
        """Which slots each token sees on layers of a kind.

        positions  [B, T]
        slots      [B, T]
        visible    [B, T, S]
        blocks     [B, T]
        ->         [B, T, S]
        """
        seen = causal(positions, cache.positions) if visible is None else visible
        if blocks is not None and kind.sees_image:
            seen = seen | later_of_block(blocks, slots, positions, cache.positions)
        return narrow(seen, positions, cache.positions, kind.window)

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        capture: Sequence[int] = (),
        cache: Cache | None = None,
        slots: Tensor | None = None,
        visible: Tensor | None = None,
        *,
        embeds: Tensor | None = None,
        per_layer_tokens: Tensor | None = None,
        blocks: Tensor | None = None,
    ) -> TargetOutput:
        """Predict the token after each of `tokens`; without a cache the tokens see each other alone.

        tokens            [B, T]
        positions         [B, T]     0..T-1 when absent
        slots             [B, T]     the positions when absent; only read with a cache
        visible           [B, T, S]  by position when absent; sliding layers narrow it
        embeds            [B, T, H]  h_0 in full: `embed(tokens)` with features in the places of images and sounds
        per_layer_tokens  [B, T]     ids for (2) where they are not `tokens`: padding in the places of features
        blocks            [B, T]     number of a token's image, -1 for none; an image comes in one pass
        ->                logits [B, T, V], hidden [B, T, H], aux [B, T, A, H]
        """
        columns = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        positions = columns if positions is None else positions
        if cache is None:
            # shared layers read their donor's slots: without a memory to keep, one for this pass
            cache, slots = self.new_cache(*tokens.shape), columns
        slots = positions if slots is None else slots
        cache.place(slots, positions)
        seen = {
            kind: self.sight(kind, positions, cache, slots, visible, blocks) for kind in (self.c.sliding, self.c.full)
        }
        h = self.embed(tokens) if embeds is None else embeds  # (1)
        per_layer: Sequence[Tensor | None] = [None] * self.c.layers
        if self.c.per_layer_width:
            per_layer = self.per_layer_inputs(h, tokens if per_layer_tokens is None else per_layer_tokens).unbind(2)
        stream = [h]
        for i, layer in enumerate(self.layers):
            h = layer(h, per_layer[i], positions, seen[self.c.kind(i)], cache, slots)
            stream.append(h)
        z = self.norm(h)  # (11)
        logits, cap = self.lm_head(z), self.c.softcap
        logits = logits if cap is None else (logits / cap).tanh() * cap  # (12)
        return TargetOutput(logits, z, captured(stream, capture))


def scaled(rows: Tensor, width: int) -> Tensor:
    """Rows of a table times sqrt(width), rounded to their dtype first, as the checkpoints were trained.

    rows  [B, T, X]
    ->    [B, T, X]
    """
    return rows * torch.tensor(width**0.5, dtype=rows.dtype, device=rows.device)
