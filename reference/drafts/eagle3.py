"""EAGLE-3: a small decoder that reads what the target knew and proposes what it will say.

At position t the draft sees the target's aux states a_t (captured while the target read x_t)
and the token that came next (x_{t+1}); it proposes the token after that.

    (1)  g_t = W_fc [n_1(a_1t); ...; n_A(a_At)]      first draft step; the target's final hidden state
                                                     as it is if not use_aux_hidden_state
    (2)  e_t = Emb(x_{t+1})
    (3)  u_t = [norm_in(e_t); norm_hid(g_t)]
    (4)  r_t = norm_hid(g_t) if norm_before_residual else g_t
    (5)  s_t = r_t + Attn(u_1 .. u_t)                q, k, v read 2H features, rope at t
    (6)  y_t = s_t + MLP(norm_post(s_t))             then plain layers on y, if the draft has more than one
    (7)  logits_t = scale W_head norm_out(y_t)       over the draft vocabulary; W_head y_t if not norm_before_head
    (8)  g_{t+1} = norm_out(y_t) if feedback_normed else y_t   later draft steps, at position t + 1
    (9)  target id = i + d2t[i]

n is the identity or one norm over the whole concatenation (norm_before_fc), then n_j the
identity or one norm per aux state (fc_norm).  Paper: arXiv 2503.01840.  Letters: reference/README.md.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from reference.config import ConfigError
from reference.drafting import Recurrent
from reference.drafts.eagle3_keys import read_facts
from reference.ops.attention import Attention, causal
from reference.ops.cache import Cache
from reference.ops.mlp import MLP
from reference.ops.norm import RMSNorm
from reference.ops.rope import Rope
from reference.ops.vocabulary import over_vocabulary
from reference.outputs import DraftOutput, TargetOutput

LATER_NORMS = ("input_layernorm", "hidden_norm")


@dataclass(frozen=True, kw_only=True)
class Eagle3Facts:
    """Every fact that changes the equations above, but those of Attn."""

    vocab: int
    draft_vocab: int
    hidden: int
    intermediate: int
    rope: Rope
    layers: int = 1
    aux_states: int = 3
    target_hidden: int = 0
    """width of an aux state; 0 means `hidden`"""
    eps: float = 1e-6
    use_aux_hidden_state: bool = True
    fc_norm: bool = False
    norm_before_fc: bool = False
    norm_before_residual: bool = False
    norm_before_head: bool = True
    feedback_normed: bool = False
    later_norm: str = "input_layernorm"
    """which of its norms a layer after the first applies; SGLang reads "hidden_norm", vLLM and speculators this"""
    mlp_bias: bool = False
    fc_bias: bool = False
    logit_scale: float = 1.0
    tied_head: bool = False

    def __post_init__(self) -> None:
        if not self.use_aux_hidden_state and self.aux_width != self.hidden:
            raise ConfigError(
                f"use_aux_hidden_state is false: the target's width {self.aux_width} must be the draft's {self.hidden}"
            )
        if self.later_norm not in LATER_NORMS:
            raise ConfigError(f"eagle_config.later_norm is {self.later_norm!r}; known are {LATER_NORMS}")
        if self.tied_head and self.draft_vocab != self.vocab:
            raise ConfigError(
                f"tie_word_embeddings is true: the draft's vocabulary {self.draft_vocab} must be "
                f"the target's {self.vocab}"
            )

    @property
    def aux_width(self) -> int:
        return self.target_hidden or self.hidden

    @property
    def reads(self) -> str:
        """What the draft reads of its target: states at capture points, or the final hidden state."""
        return "aux" if self.use_aux_hidden_state else "hidden"

    @property
    def optional(self) -> tuple[str, ...]:
        """Parameters that a checkpoint may leave to its target, or that follow from others."""
        shared = ("embed_tokens.weight", "d2t", "t2d")
        return (*shared, "lm_head.weight") if self.draft_vocab == self.vocab else shared

    def window(self, layer: int) -> int | None:
        """How far back a layer sees; None where it sees everything."""
        return None


@dataclass(frozen=True, kw_only=True)
class Eagle3Config(Eagle3Facts):
    """The facts of a draft whose heads have keys and values of their own, or in groups."""

    heads: int
    kv_heads: int
    head_dim: int
    qk_norm: bool = False
    """one norm over each head of q and k before rope, the Qwen3 body"""
    qkv_bias: bool = False
    o_bias: bool = False
    windows: tuple[int | None, ...] = ()
    """sliding window of each layer, None where a layer sees everything; () means all do"""

    def window(self, layer: int) -> int | None:
        return self.windows[layer] if self.windows else None

    @classmethod
    def from_hf(cls, config: dict[str, Any], norm_output: str | None = None) -> "Eagle3Config":
        """Read a draft's `config.json`; errors: ConfigError. What each key means: `reference/drafts/eagle3_keys.py`.

        norm_output   what this key of the file means, "head" or "feedback"; None when the file settles it itself
        """
        return cls(**read_facts(config, norm_output))


# how published checkpoints spell our parameter names: (their prefix, ours)
CHECKPOINT_NAMES = (
    ("model.", ""),
    ("midlayer.", "layers.0."),
    ("aux_norm_low.", "fc_norm.0."),
    ("aux_norm_mid.", "fc_norm.1."),
    ("aux_norm_high.", "fc_norm.2."),
)

# tensors that trainers save and no forward pass reads: (our name, why)
IGNORED = (
    ("verifier_lm_head.weight", "the target's head, kept by the trainer for its loss"),
    ("verifier_norm.weight", "the target's norm, kept by the trainer for its loss"),
    ("layers.*.hidden_norm.weight", "layers after the first apply eagle_config.later_norm alone"),
    ("layers.*.input_layernorm.weight", "layers after the first apply eagle_config.later_norm alone"),
)

# how each parameter is split over W tensor-parallel ranks; norms, and names not listed, are replicated
TP_PLAN = {
    "embed_tokens.weight": "vocab",
    "fc.weight": "replicated",
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


class Eagle3Layer(nn.Module):
    """Equations (3) to (6); a layer after the first is a plain one and reads y alone."""

    def __init__(self, c: Any, index: int) -> None:
        super().__init__()
        self.c, self.index = c, index
        for name in LATER_NORMS if index == 0 else (c.later_norm,):
            self.add_module(name, RMSNorm(c.hidden, c.eps))
        self.post_attention_layernorm = RMSNorm(c.hidden, c.eps)
        self.self_attn = self.attention(2 * c.hidden if index == 0 else c.hidden)
        self.mlp = MLP(c.hidden, c.intermediate, c.mlp_bias)

    def attention(self, into: int) -> nn.Module:
        """Attn of (5), which reads `into` features."""
        c, heads = self.c, (self.c.heads, self.c.kv_heads)
        norm_eps = c.eps if c.qk_norm else None
        return Attention(into, c.hidden, heads, c.head_dim, c.rope, c.qkv_bias, c.o_bias, norm_eps)

    def forward(
        self, embed: Tensor, hidden: Tensor, positions: Tensor, visible: Tensor, cache: Cache, slots: Tensor
    ) -> Tensor:
        """Mix the next token's embedding into the target's knowledge.

        embed      [B, T, H]
        hidden     [B, T, H]
        positions  [B, T]
        visible    [B, T, S]
        slots      [B, T]
        ->         [B, T, H]
        """
        if self.index == 0:
            normed = self.hidden_norm(hidden)
            u = torch.cat([self.input_layernorm(embed), normed], dim=-1)  # (3) [B, T, 2H]
            residual = normed if self.c.norm_before_residual else hidden  # (4)
        else:
            u = getattr(self, self.c.later_norm)(hidden)
            residual = hidden
        s = residual + self.self_attn(u, positions, visible, self.index, cache, slots)  # (5)
        return s + self.mlp(self.post_attention_layernorm(s))  # (6)


class Eagle3Draft(nn.Module):
    """The whole draft; `fuse` opens a draft, `forward` takes one step."""

    way = Recurrent
    layer = Eagle3Layer
    d2t: Tensor
    t2d: Tensor

    def __init__(self, c: Any) -> None:
        super().__init__()
        self.c = c
        self.embed_tokens = nn.Embedding(c.vocab, c.hidden)
        width, aux = c.aux_width, c.use_aux_hidden_state
        self.input_norm = RMSNorm(width * c.aux_states, c.eps) if aux and c.norm_before_fc else None
        self.fc_norm = nn.ModuleList(RMSNorm(width, c.eps) for _ in range(c.aux_states)) if aux and c.fc_norm else None
        self.fc = nn.Linear(width * c.aux_states, c.hidden, bias=c.fc_bias) if aux else None
        self.layers = nn.ModuleList(self.layer(c, i) for i in range(c.layers))
        self.norm = RMSNorm(c.hidden, c.eps)
        self.lm_head = nn.Linear(c.hidden, c.draft_vocab, bias=False)
        self.tie()
        self.register_buffer("d2t", torch.zeros(c.draft_vocab, dtype=torch.int64))
        self.register_buffer("t2d", torch.zeros(c.vocab, dtype=torch.bool))

    def tie(self) -> None:
        """A tied head is the embedding's table itself."""
        if self.c.tied_head:
            self.lm_head.weight = self.embed_tokens.weight

    def new_cache(self, batch: int, num_slots: int) -> Cache:
        """Room for `num_slots` tokens of each of `batch` sequences."""
        return Cache(self.c.layers, batch, num_slots)

    def fuse(self, aux: Tensor) -> Tensor:
        """Equation (1).

        aux  [B, T, A, X]  X is the target's width
        ->   [B, T, H]
        """
        if self.fc is None:
            raise ConfigError(
                "this draft reads the target's final hidden state (use_aux_hidden_state is false): nothing to fuse"
            )
        if self.input_norm is not None:
            aux = self.input_norm(aux.flatten(2)).view_as(aux)  # one norm over A*X
        if self.fc_norm is not None:
            aux = torch.stack([norm(a) for norm, a in zip(self.fc_norm, aux.unbind(2), strict=True)], dim=2)
        return self.fc(aux.flatten(2))

    def read(self, out: TargetOutput) -> Tensor:
        """What the first draft step reads as `hidden`: the fused aux states, or the target's final hidden state."""
        return self.fuse(out.aux) if self.c.use_aux_hidden_state else out.hidden

    def forward(
        self,
        tokens: Tensor,
        hidden: Tensor,
        positions: Tensor | None = None,
        cache: Cache | None = None,
        slots: Tensor | None = None,
        visible: Tensor | None = None,
        embeds: Tensor | None = None,
    ) -> DraftOutput:
        """Propose the token after each of `tokens`.

        tokens     [B, T]     x_{t+1} in column t
        hidden     [B, T, H]  g_t
        positions  [B, T]     t
        slots      [B, T]     the positions when absent
        visible    [B, T, S]  by position when absent; sliding layers narrow it
        embeds     [B, T, H]  e_t in full, where x_{t+1} may be a placeholder of an image
        ->         logits [B, T, Vd], feedback [B, T, H]
        """
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        if cache is None:
            # without a cache, slots are the columns themselves
            cache = self.new_cache(*tokens.shape)
            slots = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        slots = positions if slots is None else slots
        slot_positions = cache.place(slots, positions)
        y, embed = hidden, self.embed_tokens(tokens) if embeds is None else embeds  # (2)
        for i, layer in enumerate(self.layers):
            seen = causal(positions, slot_positions, self.c.window(i))
            seen = seen if visible is None else seen & visible
            y = layer(embed, y, positions, seen, cache, slots)
        z = self.norm(y)
        logits = self.lm_head(z if self.c.norm_before_head else y) * self.c.logit_scale  # (7)
        return DraftOutput(logits, z if self.c.feedback_normed else y)  # (8)

    def unroll(self, tokens: Tensor, hidden: Tensor, num_steps: int) -> Tensor:
        """Teacher-forced draft steps, as in training: column t at step k reads x_{t+k} and its own feedback.

        A column sees the first-step keys of columns 0..t and the keys of its own later steps, which is
        what serving sees once the tokens turn out as forced. Logits are NaN where x_{t+k} is not known.

        tokens  [B, T]
        hidden  [B, T, H]        from `read`
        ->      [K, B, T, Vd]    K = num_steps
        """
        batch, width = tokens.shape
        column = torch.arange(width, device=tokens.device).expand(batch, width)
        cache, steps = self.new_cache(batch, width * num_steps), []
        # among equal or earlier positions: every first-step key, later keys of the own column only
        first, own = column[:, None, :] <= column[:, :, None], column[:, None, :] == column[:, :, None]
        for k in range(num_steps):
            shifted = torch.cat([tokens[:, k + 1 :], tokens.new_zeros(batch, min(k + 1, width))], 1)
            hidden_keys = first.new_zeros(batch, width, width * (num_steps - k - 1))
            visible = torch.cat([first, *([own] * k), hidden_keys], -1)  # [B, T, T*K]
            step = self(shifted, hidden, column + k, cache, column + k * width, visible)
            unknown = (column + k + 1 >= width)[..., None]
            steps.append(step.logits.masked_fill(unknown, float("nan")))
            hidden = step.feedback
        return torch.stack(steps)

    def to_target(self, draft_ids: Tensor) -> Tensor:
        """Equation (9).

        draft_ids  [B, T]
        ->         [B, T]
        """
        return draft_ids + self.d2t[draft_ids]

    def spread(self, logits: Tensor) -> Tensor:
        """Draft logits over the target's vocabulary; a token without a draft id cannot be proposed.

        logits  [B, T, Vd]
        ->      [B, T, V]
        """
        ids = torch.arange(self.c.draft_vocab, device=logits.device)
        return over_vocabulary(logits, self.to_target(ids[None])[0], self.c.vocab)
