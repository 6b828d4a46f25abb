"""Gemma 3, text: norms on both sides of every block, and layers that look back no further than a window.

    (1)  h_0 = Emb(x) * sqrt(H)                         sqrt(H) rounded to the weight's dtype
    (2)  s_i = h_i + norm_post(Attn(norm_in(h_i)))      q and k normed over each head before rope
    (3)  h_{i+1} = s_i + norm_post'(MLP(norm_pre(s_i))) gelu in its tanh form
    (4)  z = norm(h_L)
    (5)  logits = W_head z                              W_head is Emb's table when tied

Every norm multiplies by 1 + w in float32 and rounds once. Scores are scaled by query_pre_attn_scalar^-1/2, whatever
the head's width. A sliding layer sees slots above position - window and turns by its own rope; a full layer sees all
and turns by another, the one that published configs stretch.

Capture point c is h_c: c = 0 the scaled embedding, c = L the last layer's output before the final norm. `embed_tokens`
is the table as stored, which is what a draft shares. Report: arXiv 2503.19786.  Letters: reference/README.md.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from reference.config import ConfigError, Keys
from reference.ops.attention import Attention, narrow
from reference.ops.cache import Cache
from reference.ops.mlp import MLP, gelu
from reference.ops.norm import GemmaRMSNorm
from reference.ops.rope import Rope
from reference.ops.stream import captured, seat
from reference.outputs import TargetOutput

# what published configs leave out, as transformers' `Gemma3TextConfig` fills it in
LEFT_OUT = {
    "vocab_size": 262_208,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 131_072,
    "tie_word_embeddings": True,
}
SLIDING, FULL = "sliding_attention", "full_attention"


@dataclass(frozen=True)
class Gemma3Config:
    """Every fact that changes the equations above."""

    vocab: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    query_scale: float
    """query_pre_attn_scalar^-1/2"""
    rope: Rope
    """of full layers"""
    local_rope: Rope
    """of sliding layers"""
    windows: tuple[int | None, ...]
    """sliding window of each layer, None where a layer sees everything"""
    eps: float = 1e-6
    attention_bias: bool = False
    tied_head: bool = True

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], path: str = "") -> "Gemma3Config":
        """Read `config.json`, or the part of it under `path`; errors: ConfigError for what cannot be read one way."""
        keys = Keys(LEFT_OUT | {key: value for key, value in config.items() if value is not None}, path)
        keys.expect("hidden_activation", "gelu_pytorch_tanh")
        keys.expect("use_bidirectional_attention", False)
        # engines cap where transformers' multimodal class does not; no published Gemma 3 has either
        keys.expect("attn_logit_softcapping", None)
        keys.expect("final_logit_softcapping", None)
        keys.get("cache_implementation")  # how transformers keeps keys and values, not what they are
        heads, kv_heads, head_dim = keys.heads()
        layers = keys.count("num_hidden_layers")
        rope, local_rope = _ropes(keys, head_dim)
        facts = cls(
            vocab=keys.count("vocab_size"),
            hidden=keys.count("hidden_size"),
            intermediate=keys.count("intermediate_size"),
            layers=layers,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            query_scale=keys.number("query_pre_attn_scalar", 256) ** -0.5,
            rope=rope,
            local_rope=local_rope,
            windows=_windows(keys, layers),
            eps=keys.number("rms_norm_eps", 1e-6),
            attention_bias=keys.flag("attention_bias"),
            tied_head=keys.flag("tie_word_embeddings", True),
        )
        keys.finish()
        return facts


def _windows(keys: Keys, layers: int) -> tuple[int | None, ...]:
    """Window of each layer, by `layer_types`, or in older files by which layers are full: every P-th."""
    pattern = keys.count("sliding_window_pattern", 6)
    keys.get("_sliding_window_pattern")  # what transformers remembers of a pattern after it wrote layer_types
    kinds = keys.names("layer_types") or [FULL if (i + 1) % pattern == 0 else SLIDING for i in range(layers)]
    if len(kinds) != layers or not set(kinds) <= {SLIDING, FULL}:
        raise ConfigError(
            f"config key {keys.path + 'layer_types'!r} is {kinds!r}; {layers} of {SLIDING!r} and {FULL!r} are expected"
        )
    window = keys.count("sliding_window", None if SLIDING in kinds else 1)
    return tuple(window if kind == SLIDING else None for kind in kinds)


def _ropes(keys: Keys, head_dim: int) -> tuple[Rope, Rope]:
    """Ropes of full and of sliding layers: one mapping a kind of layer, or the older keys beside each other."""
    new, length = keys.below("rope_parameters"), keys.get("max_position_embeddings")
    old = {"rope_scaling": keys.get("rope_scaling"), "rope_theta": keys.get("rope_theta")}
    local = {"rope_theta": keys.get("rope_local_base_freq")}
    ropes = []
    for kind, theta, older in ((FULL, 1_000_000.0, old), (SLIDING, 10_000.0, local)):
        stated = new.get(kind, {})
        if not isinstance(stated, Mapping):
            raise ConfigError(f"config key {new.path + kind!r} is {stated!r}; a mapping is expected")
        given = {**older, "rope_parameters": stated, "max_position_embeddings": length}
        if "rope_theta" not in stated and older["rope_theta"] is None:
            given["rope_theta"] = theta
        rope = Rope.from_hf(given, head_dim)
        if rope.dim != head_dim:
            raise ConfigError(f"config key {new.path + kind!r} turns {rope.dim} features; {head_dim} are expected")
        ropes.append(rope)
    new.finish()
    return ropes[0], ropes[1]


# how published checkpoints spell our parameter names: (their prefix, ours)
CHECKPOINT_NAMES = (("model.", ""),)

# how each parameter is split over W tensor-parallel ranks; norms, and names not listed, are replicated
TP_PLAN = {
    "embed_tokens.weight": "vocab",
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
    "lm_head.weight": "vocab",
}


class Gemma3Layer(nn.Module):
    """Equations (2) and (3)."""

    def __init__(self, c: Gemma3Config, index: int) -> None:
        super().__init__()
        self.window = c.windows[index]
        for name in (
            "input_layernorm",
            "post_attention_layernorm",
            "pre_feedforward_layernorm",
            "post_feedforward_layernorm",
        ):
            self.add_module(name, GemmaRMSNorm(c.hidden, c.eps))
        rope = c.rope if self.window is None else c.local_rope
        self.self_attn = Attention(
            c.hidden,
            c.hidden,
            (c.heads, c.kv_heads),
            c.head_dim,
            rope,
            c.attention_bias,
            c.attention_bias,
            norm_eps=c.eps,
            norm=GemmaRMSNorm,
            scale=c.query_scale,
        )
        self.mlp = MLP(c.hidden, c.intermediate, act=gelu)

    def forward(
        self, h: Tensor, positions: Tensor, visible: Tensor, layer: int, cache: Cache | None, slots: Tensor
    ) -> Tensor:
        """h [B, T, H] -> [B, T, H]"""
        mixed = self.self_attn(self.input_layernorm(h), positions, visible, layer, cache, slots)
        s = h + self.post_attention_layernorm(mixed)  # (2)
        return s + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(s)))  # (3)


class Gemma3Target(nn.Module):
    """The whole target; `decode` is all of it after the embedding, for a shell that puts images among the tokens."""

    def __init__(self, c: Gemma3Config) -> None:
        super().__init__()
        self.c = c
        self.embed_tokens = nn.Embedding(c.vocab, c.hidden)
        self.layers = nn.ModuleList(Gemma3Layer(c, i) for i in range(c.layers))
        self.norm = GemmaRMSNorm(c.hidden, c.eps)
        self.lm_head = nn.Linear(c.hidden, c.vocab, bias=False)
        self.tie()

    def tie(self) -> None:
        """A tied head is the embedding's table itself."""
        if self.c.tied_head:
            self.lm_head.weight = self.embed_tokens.weight

    def new_cache(self, batch: int, num_slots: int) -> Cache:
        """Room for `num_slots` tokens of each of `batch` sequences."""
        return Cache(self.c.layers, batch, num_slots)

    def embed(self, tokens: Tensor) -> Tensor:
        """Equation (1).

        tokens  [B, T]
        ->      [B, T, H]
        """
        table = self.embed_tokens.weight
        return self.embed_tokens(tokens) * torch.tensor(self.c.hidden**0.5, dtype=table.dtype, device=table.device)

    def decode(
        self,
        h: Tensor,
        positions: Tensor,
        capture: Sequence[int],
        cache: Cache | None,
        slots: Tensor,
        visible: Tensor,
    ) -> TargetOutput:
        """Equations (2) to (5).

        h          [B, T, H]
        positions  [B, T]
        slots      [B, T]
        visible    [B, T, S]  sliding layers narrow it
        ->         logits [B, T, V], hidden [B, T, H], aux [B, T, A, H]
        """
        held, stream = positions if cache is None else cache.positions, [h]
        for i, layer in enumerate(self.layers):
            h = layer(h, positions, narrow(visible, positions, held, layer.window), i, cache, slots)
            stream.append(h)
        z = self.norm(h)  # (4)
        return TargetOutput(self.lm_head(z), z, captured(stream, capture))  # (5)

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        capture: Sequence[int] = (),
        cache: Cache | None = None,
        slots: Tensor | None = None,
        visible: Tensor | None = None,
    ) -> TargetOutput:
        """Predict the token after each of `tokens`; without a cache the tokens see each other alone.

        tokens     [B, T]
        positions  [B, T]     0..T-1 when absent
        slots      [B, T]     the positions when absent; only read with a cache
        visible    [B, T, S]  by position when absent; sliding layers narrow it
        ->         logits [B, T, V], hidden [B, T, H], aux [B, T, A, H]
        """
        positions, slots, visible = seat(tokens, positions, cache, slots, visible)
        return self.decode(self.embed(tokens), positions, capture, cache, slots, visible)  # (1)
