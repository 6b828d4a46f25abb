"""The Gemma 4 assistant: a draft that has no keys and values of its own and asks those of its target.

The target has read x_0 .. x_t. The draft reads the token that came next and what the target made of x_t; its layers
have queries alone. Nothing of it is kept from one step to the next but the feedback, so every draft step of a cycle
stands at the same position t and sees the same keys.

    (1)  e_t = sqrt(X) Emb_target(x_{t+1})         the target's own table and scale
    (2)  h_0 = W_pre [e_t; g_t]                    first draft step: g_t is the target's state after its final norm
    (3)  q = rope_t(norm_q(W_q norm_in(h_i)))
    (4)  s_i = h_i + norm_post(W_o Attn(q, K, V))  K, V at positions 0..t of the target's last layer of this kind that
                                                   has its own; scores are q . k, not scaled
    (5)  h_{i+1} = l_i (s_i + norm_ffw(MLP(norm_pre(s_i))))              gelu; l_i is one number
    (6)  z = norm(h_L)
    (7)  logits = c tanh(W_head z / c)             W_head z if there is no softcap; a tied head is the draft's own table
    (8)  if the vocabulary is ordered into C clusters: -inf but for the members of the top-Z clusters of W_c z;
             the members of cluster i are the ids ordering[i V/C .. (i+1) V/C - 1]
    (9)  g_t <- W_post z                           later draft steps, with the token that was drafted, again at t

What readers disagree about, and what this page says (the numbers: suites/correctness/test_gemma4_assistant.py)
    position   t, of the last token that the target has read, as SGLang and vLLM have it; the loop of transformers turns
               queries for t + 1 although it asks the same keys
    keys       0..t; the loop of transformers hands over a slot more, after a rejection that of the rejected token
    window     w keys on sliding layers, as in the target; the module of transformers shows w + 1
    softcap    applied, as by the engines; transformers leaves it out. It moves no token past another

Source: transformers `modeling_gemma4_assistant.py`; the Unified assistant computes the same.  Letters:
reference/README.md; X is the target's width, C clusters of which Z are looked into.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from reference.config import ConfigError, Keys
from reference.drafting import FrozenKeys
from reference.ops.attention import attend, causal
from reference.ops.cache import Cache
from reference.ops.mlp import MLP, gelu
from reference.ops.norm import WideRMSNorm
from reference.ops.rope import rotate
from reference.outputs import DraftOutput, TargetOutput
from reference.targets.gemma4 import Gemma4Config, Kind
from reference.targets.gemma4_keys import read_facts

# what a file that does not say means: the body's kind, the target's width
DEFAULTS: Mapping[str, tuple[str, int]] = {
    "gemma4_assistant": ("gemma4_text", 1536),
    "gemma4_unified_assistant": ("gemma4_unified_text", 3840),
}


@dataclass(frozen=True)
class Gemma4AssistantConfig(Gemma4Config):
    """Every fact that changes the equations above: a Gemma 4 of which every layer reads another's keys and values."""

    aux_width: int = 0
    """of the target's states, X"""
    clusters: int = 0
    """C; 0 if the vocabulary has no order"""
    clusters_asked: int = 0
    """Z, how many of them are looked into"""

    aux_states = 0
    reads = "keys"
    optional = ()

    def __post_init__(self) -> None:
        if self.clusters and self.vocab % self.clusters:
            raise ConfigError(f"num_centroids is {self.clusters}, which does not divide the vocabulary of {self.vocab}")
        if self.clusters_asked > self.clusters:
            raise ConfigError(
                f"centroid_intermediate_top_k is {self.clusters_asked}, more than num_centroids, {self.clusters}"
            )

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> "Gemma4AssistantConfig":
        """Read an assistant's `config.json`; errors: ConfigError."""
        keys = Keys(config)
        if config.get("model_type") not in DEFAULTS:
            raise ConfigError(f"config key 'model_type' is {config.get('model_type')!r}; known are {sorted(DEFAULTS)}")
        body, width = DEFAULTS[config["model_type"]]
        facts = read_facts({"model_type": body, **keys.need("text_config")})
        _check_body(facts)
        for kind in ("sliding", "full"):
            facts[kind] = Kind(**{name: facts[kind].get(name) for name in ("kv_heads", "head_dim", "rope", "window")})
        facts |= {
            "shared_layers": len(facts["layer_types"]),
            "per_layer_vocab": 0,
            "tied_head": keys.flag("tie_word_embeddings", True),
            "aux_width": keys.count("backbone_hidden_size", width),
        }
        clusters, asked = keys.count("num_centroids", 2048), keys.count("centroid_intermediate_top_k", 32)
        if keys.flag("use_ordered_embeddings"):
            facts |= {"clusters": clusters, "clusters_asked": asked}
        keys.finish()
        return cls(**facts)

    @property
    def draft_vocab(self) -> int:
        """All of the target's."""
        return self.vocab

    @property
    def ignored(self) -> tuple[tuple[str, str], ...]:
        """Tensors that a checkpoint may hold and nothing reads: (pattern of our name, why)."""
        if self.tied_head:
            return (("lm_head.weight", "the head is the embedding (tie_word_embeddings)"),)
        return (
            ("embed_tokens.weight", "tokens are embedded by the target's table, and the head is not tied to this one"),
        )

    def is_shared(self, layer: int) -> bool:
        return True

    def donor(self, layer: int) -> int:
        """None of its own; `donor_in` says which layer of the target."""
        return -1

    def donor_in(self, layer: int, target: Gemma4Config) -> int:
        """The target's layer whose keys and values a layer reads; errors: ConfigError where heads do not fit them."""
        layer_type, mine = self.layer_types[layer], self.kind(layer)
        if layer_type not in target.layer_types:
            raise ConfigError(f"layer {layer} reads keys of a layer of kind {layer_type!r}, and the target has none")
        donor = target.last_own(layer_type)
        theirs = target.kind(donor)
        if (mine.kv_heads, mine.head_dim) != (theirs.kv_heads, theirs.head_dim):
            raise ConfigError(
                f"{layer_type} layers read {mine.kv_heads} key/value heads of width {mine.head_dim}, layer {donor} of "
                f"the target has {theirs.kv_heads} of width {theirs.head_dim}; pair this draft with its own target"
            )
        return donor

    def check_target(self, target: Gemma4Config) -> None:
        """Whether this draft can read that target; errors: ConfigError."""
        if (self.vocab, self.aux_width) != (target.vocab, target.hidden):
            raise ConfigError(
                f"reads {self.vocab} tokens and states of width {self.aux_width}, the target has {target.vocab} and "
                f"{target.hidden}; pair this draft with its own target"
            )
        for layer in range(self.layers):
            self.donor_in(layer, target)

    def check_ordering(self, ordering: Tensor) -> None:
        """Whether every token has one place in the order of clusters; errors: ConfigError.

        ordering  [V]
        """
        if not torch.equal(ordering.sort().values.cpu(), torch.arange(self.vocab)):
            raise ConfigError(f"'token_ordering' is no permutation of the {self.vocab} token ids")


def _check_body(facts: Mapping[str, Any]) -> None:
    """Refuse what only a target's layers can have."""
    shared, layers = facts["shared_layers"], len(facts["layer_types"])
    if shared not in (0, layers):
        raise ConfigError(
            f"config key 'text_config.num_kv_shared_layers' is {shared}; all {layers} layers of an assistant read its "
            "target's keys and values"
        )
    for name, key, off in (
        ("per_layer_width", "hidden_size_per_layer_input", 0),
        ("experts", "enable_moe_block", 0),
        ("shared_widening", "use_double_wide_mlp", 1),
    ):
        if facts.get(name, off) != off:
            raise ConfigError(f"config key 'text_config.{key}' is set; no layer of an assistant has that")


# how published checkpoints spell our parameter names: (their prefix, ours)
CHECKPOINT_NAMES = (("model.", ""), ("masked_embedding.", ""))

# tensors that trainers save and no forward pass reads; the config's own `ignored` comes on top
IGNORED: tuple[tuple[str, str], ...] = ()

# how each parameter is split over W tensor-parallel ranks; norms, and names not listed, are replicated. The heads of a
# rank are those that read its share of the target's key/value heads
TP_PLAN = {
    "pre_projection.weight": "replicated",
    "post_projection.weight": "replicated",
    "embed_tokens.weight": "vocab",
    "lm_head.weight": "vocab",
    "centroids.weight": "replicated",
    "token_ordering": "replicated",
    "layers.*.self_attn.q_proj.weight": "heads",
    "layers.*.self_attn.q_proj.bias": "heads",
    "layers.*.self_attn.o_proj.weight": "row",
    "layers.*.mlp.gate_proj.weight": "column",
    "layers.*.mlp.up_proj.weight": "column",
    "layers.*.mlp.down_proj.weight": "row",
}


class QueryAttention(nn.Module):
    """Equation (3) and the sum of (4)."""

    def __init__(self, c: Gemma4AssistantConfig, kind: Kind) -> None:
        super().__init__()
        self.kind, wide = kind, c.heads * kind.head_dim
        self.q_proj = nn.Linear(c.hidden, wide, bias=c.attention_bias)
        self.q_norm = WideRMSNorm(kind.head_dim, c.eps)
        self.o_proj = nn.Linear(wide, c.hidden, bias=c.attention_bias)

    def forward(self, u: Tensor, positions: Tensor, visible: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Ask the target's keys.

        u          [B, T, H]
        positions  [B, T]
        visible    [B, T, S]
        keys       [B, S, G, D]
        values     [B, S, G, D]
        ->         [B, T, H]
        """
        heads = self.q_norm(self.q_proj(u).unflatten(-1, (-1, self.kind.head_dim)))
        q = rotate(heads, positions, self.kind.rope)
        return self.o_proj(attend(q, keys, values, visible, 1.0).flatten(2))


class Gemma4AssistantLayer(nn.Module):
    """Equations (3) to (5)."""

    def __init__(self, c: Gemma4AssistantConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = WideRMSNorm(c.hidden, c.eps)
        self.self_attn = QueryAttention(c, c.kind(layer))
        self.post_attention_layernorm = WideRMSNorm(c.hidden, c.eps)
        self.pre_feedforward_layernorm = WideRMSNorm(c.hidden, c.eps)
        self.mlp = MLP(c.hidden, c.intermediate, act=gelu)
        self.post_feedforward_layernorm = WideRMSNorm(c.hidden, c.eps)
        self.register_buffer("layer_scalar", torch.ones(1))

    def forward(self, h: Tensor, positions: Tensor, visible: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """One layer.

        h          [B, T, H]
        positions  [B, T]
        visible    [B, T, S]
        keys       [B, S, G, D]
        values     [B, S, G, D]
        ->         [B, T, H]
        """
        mixed = self.self_attn(self.input_layernorm(h), positions, visible, keys, values)  # (3)
        s = h + self.post_attention_layernorm(mixed)  # (4)
        f = self.mlp(self.pre_feedforward_layernorm(s))
        return (s + self.post_feedforward_layernorm(f)) * self.layer_scalar  # (5)


class Gemma4AssistantDraft(nn.Module):
    """The whole draft; it speaks once it is joined to its target."""

    way = FrozenKeys
    token_ordering: Tensor
    target: Any
    """the text model that it is joined to; none of its parameters are the draft's"""

    def __init__(self, c: Gemma4AssistantConfig) -> None:
        super().__init__()
        self.c = c
        self.pre_projection = nn.Linear(2 * c.aux_width, c.hidden, bias=False)
        self.layers = nn.ModuleList(Gemma4AssistantLayer(c, i) for i in range(c.layers))
        self.norm = WideRMSNorm(c.hidden, c.eps)
        self.post_projection = nn.Linear(c.hidden, c.aux_width, bias=False)
        if c.tied_head:
            self.embed_tokens = nn.Embedding(c.vocab, c.hidden)
        self.lm_head = nn.Linear(c.hidden, c.vocab, bias=False)
        self.tie()
        if c.clusters:
            self.centroids = nn.Linear(c.hidden, c.clusters, bias=False)
            self.register_buffer("token_ordering", torch.arange(c.vocab))
        object.__setattr__(self, "target", None)

    def tie(self) -> None:
        """A tied head is the embedding's table itself, which nothing else reads."""
        if self.c.tied_head:
            self.lm_head.weight = self.embed_tokens.weight

    def join(self, target: Any) -> list[tuple[str, str, tuple[int, ...]]]:
        """Take the table, its scale and the keys of a target; errors: ConfigError where they do not fit.

        target   a Gemma 4, or a model with towers around one
        ->       what is shared: (name, whose it is, shape)
        """
        text = getattr(target, "language_model", target)
        self.c.check_target(text.c)
        if self.c.clusters:
            self.c.check_ordering(self.token_ordering)
        # past nn.Module: the target's parameters are no part of this model
        object.__setattr__(self, "target", text)
        shape = (text.c.vocab, text.c.hidden)
        return [("target.embed_tokens.weight", "the target's table embeds the tokens", shape)]

    def read(self, out: TargetOutput) -> Tensor:
        """What the first draft step reads as `hidden`: the target's state after its final norm."""
        return out.hidden

    def head(self, z: Tensor) -> Tensor:
        """Equations (7) and (8).

        z   [B, T, H]
        ->  [B, T, V]
        """
        logits, cap = self.lm_head(z), self.c.softcap
        logits = logits if cap is None else (logits / cap).tanh() * cap  # (7)
        if not self.c.clusters:
            return logits
        best = self.centroids(z).topk(self.c.clusters_asked, -1).indices
        members = self.token_ordering.view(self.c.clusters, -1)[best].flatten(2)  # [B, T, Z*V/C]
        return torch.full_like(logits, float("-inf")).scatter(2, members, logits.gather(2, members))  # (8)

    def forward(self, tokens: Tensor, hidden: Tensor, positions: Tensor, cache: Cache) -> DraftOutput:
        """Propose the token after each of `tokens`.

        tokens     [B, T]     x_{t+1}; in later draft steps the token that was drafted
        hidden     [B, T, X]  g_t
        positions  [B, T]     t, in every draft step of a cycle
        cache      the target's: slots of positions up to t are seen, whatever lies in the others
        ->         logits [B, T, V], feedback [B, T, X]
        """
        if self.target is None:
            raise ValueError("this draft reads its target's table and keys; join it to its target first")
        h = self.pre_projection(torch.cat([self.target.embed(tokens), hidden], -1))  # (1) (2)
        shared = self.target.shared_kv(cache)
        for i, layer in enumerate(self.layers):
            seen = causal(positions, cache.positions, self.c.kind(i).window)
            h = layer(h, positions, seen, *shared[self.c.layer_types[i]])
        z = self.norm(h)  # (6)
        return DraftOutput(self.head(z), self.post_projection(z))  # (9)

    def unroll(self, tokens: Tensor, hidden: Tensor, num_steps: int, cache: Cache | None = None) -> Tensor:
        """Teacher-forced draft steps: column t at step k reads x_{t+k} and its own feedback, and stays at position t.

        Logits are NaN where x_{t+k} is not known.

        tokens  [B, T]
        hidden  [B, T, X]        from `read`
        cache   the target's after reading `tokens`; when absent the target reads them here
        ->      [K, B, T, V]     K = num_steps
        """
        batch, width = tokens.shape
        column, steps = torch.arange(width, device=tokens.device).expand(batch, width), []
        if cache is None:
            cache = self.target.new_cache(batch, width)
            self.target(tokens, cache=cache)
        for k in range(num_steps):
            shifted = torch.cat([tokens[:, k + 1 :], tokens.new_zeros(batch, min(k + 1, width))], 1)
            step = self(shifted, hidden, column, cache)
            unknown = (column + k + 1 >= width)[..., None]
            steps.append(step.logits.masked_fill(unknown, float("nan")))
            hidden = step.feedback
        return torch.stack(steps)

    def to_target(self, draft_ids: Tensor) -> Tensor:
        """Draft ids are target ids.

        draft_ids  [...]
        ->         [...]
        """
        return draft_ids

    def spread(self, logits: Tensor) -> Tensor:
        """Logits over the target's vocabulary, which they are already.

        logits  [B, T, V]
        ->      [B, T, V]
        """
        return logits
