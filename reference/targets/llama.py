"""Llama: the plain decoder that most targets are a variation of.

    (1)  h_0 = Emb(x)
    (2)  s_i = h_i + Attn(norm_in(h_i))          causal, grouped key/value heads, rope on q and k
    (3)  h_{i+1} = s_i + MLP(norm_post(s_i))
    (4)  z = norm(h_L)
    (5)  logits = W_head z                       W_head is Emb's table when tied

Capture point c is h_c: c = 0 the embedding, c = L the last layer's output before the final norm.
Paper: arXiv 2302.13971.  Letters: reference/README.md.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from reference.config import Keys
from reference.ops.attention import Attention
from reference.ops.cache import Cache
from reference.ops.mlp import MLP
from reference.ops.norm import RMSNorm
from reference.ops.rope import Rope
from reference.ops.stream import captured, seat
from reference.outputs import TargetOutput


@dataclass(frozen=True)
class LlamaConfig:
    """Every fact that changes the equations above."""

    vocab: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    rope: Rope
    eps: float = 1e-6
    attention_bias: bool = False
    mlp_bias: bool = False
    tied_head: bool = False

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> "LlamaConfig":
        """Read `config.json`; errors: ConfigError for missing, unknown or unsupported keys."""
        keys = Keys(config)
        keys.expect("hidden_act", "silu")
        heads, kv_heads, head_dim = keys.heads()
        facts = cls(
            vocab=keys.count("vocab_size"),
            hidden=keys.count("hidden_size"),
            intermediate=keys.count("intermediate_size"),
            layers=keys.count("num_hidden_layers"),
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            rope=Rope.from_hf(keys.rope(), head_dim),
            eps=keys.number("rms_norm_eps", 1e-6),
            attention_bias=keys.flag("attention_bias"),
            mlp_bias=keys.flag("mlp_bias"),
            tied_head=keys.flag("tie_word_embeddings"),
        )
        keys.finish()
        return facts


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
    "layers.*.mlp.gate_proj.bias": "column",
    "layers.*.mlp.up_proj.weight": "column",
    "layers.*.mlp.up_proj.bias": "column",
    "layers.*.mlp.down_proj.weight": "row",
    "lm_head.weight": "vocab",
}


class LlamaLayer(nn.Module):
    """Equations (2) and (3)."""

    def __init__(self, c: LlamaConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(c.hidden, c.eps)
        self.post_attention_layernorm = RMSNorm(c.hidden, c.eps)
        heads, bias = (c.heads, c.kv_heads), c.attention_bias
        self.self_attn = Attention(c.hidden, c.hidden, heads, c.head_dim, c.rope, bias, bias)
        self.mlp = MLP(c.hidden, c.intermediate, c.mlp_bias)

    def forward(
        self, h: Tensor, positions: Tensor, visible: Tensor, layer: int, cache: Cache | None, slots: Tensor
    ) -> Tensor:
        """h [B, T, H] -> [B, T, H]"""
        s = h + self.self_attn(self.input_layernorm(h), positions, visible, layer, cache, slots)  # (2)
        return s + self.mlp(self.post_attention_layernorm(s))  # (3)


class LlamaTarget(nn.Module):
    """The whole target."""

    def __init__(self, c: LlamaConfig) -> None:
        super().__init__()
        self.c = c
        self.embed_tokens = nn.Embedding(c.vocab, c.hidden)
        self.layers = nn.ModuleList(LlamaLayer(c) for _ in range(c.layers))
        self.norm = RMSNorm(c.hidden, c.eps)
        self.lm_head = nn.Linear(c.hidden, c.vocab, bias=False)
        self.tie()

    def tie(self) -> None:
        """A tied head is the embedding's table itself."""
        if self.c.tied_head:
            self.lm_head.weight = self.embed_tokens.weight

    def new_cache(self, batch: int, num_slots: int) -> Cache:
        """Room for `num_slots` tokens of each of `batch` sequences."""
        return Cache(self.c.layers, batch, num_slots)

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
        visible    [B, T, S]  by position when absent
        ->         logits [B, T, V], hidden [B, T, H], aux [B, T, A, H]
        """
        positions, slots, visible = seat(tokens, positions, cache, slots, visible)
        h = self.embed_tokens(tokens)  # (1)
        stream = [h]
        for i, layer in enumerate(self.layers):
            h = layer(h, positions, visible, i, cache, slots)
            stream.append(h)
        z = self.norm(h)  # (4)
        return TargetOutput(self.lm_head(z), z, captured(stream, capture))  # (5)
