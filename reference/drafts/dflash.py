"""D-Flash: a block of mask tokens that a small decoder fills in at once, seeing what the target knew.

The target has read x_0 .. x_{n-1}; the root x_n is emitted and not yet read. Given its aux states a_p, the draft reads
the root and K mask tokens at positions n .. n + K, and the mask at position n + k becomes the proposal for x_{n+k}:

    (1)  c_p = norm_hid(W_fc [a_1p; ...; a_Ap])             the context, p < n
    (2)  y_q = Emb(x_n) at q = n, Emb(mask) at q = n + 1 .. n + K
    (3)  k_p, v_p = rope_p(norm_k(W_k c_p)), W_v c_p         each layer's own, straight from c_p: no norm_in
    (4)  k_q, v_q = the same of u_q = norm_in(y_q)
    (5)  s_q = y_q + Attn(rope_q(norm_q(W_q u_q)))           over the context and the block: all of it, or up to q on
                                                             causal layers; nothing window or further away on sliding
    (6)  y_q = s_q + MLP(norm_post(s_q))
    (7)  logits_k = scale W_head norm_out(y_{n+k})           k = 1 .. K: the root's own row proposes nothing
    (8)  target id = i + d2t[i]

Nothing is fed back, so a block's tokens know nothing of each other but their places. Emb and W_head are the target's,
unscaled and uncapped. Sliding layers measure from each query, as vLLM, SGLang and SpecForge do; speculators 0.9.0
measures the context from the block's first token and is one wider.  Paper: arXiv 2602.06036.
Letters: reference/README.md.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from reference.drafting import Block
from reference.drafts.dflash_keys import read_facts
from reference.ops.attention import Attention
from reference.ops.cache import Cache
from reference.ops.mlp import MLP
from reference.ops.norm import RMSNorm
from reference.ops.rope import Rope, rotate
from reference.ops.vocabulary import over_vocabulary
from reference.outputs import DraftOutput, TargetOutput


@dataclass(frozen=True, kw_only=True)
class DflashConfig:
    """Every fact that changes the equations above."""

    vocab: int
    draft_vocab: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    rope: Rope
    aux_states: int
    mask_token: int
    causal: tuple[bool, ...]
    """of each layer: a token of the block sees the block up to itself"""
    layers: int = 1
    target_hidden: int = 0
    """width of an aux state; 0 means `hidden`"""
    eps: float = 1e-6
    bias: bool = False
    """of q, k, v and o"""
    logit_scale: float = 1.0
    windows: tuple[int | None, ...] = ()
    """sliding window of each layer, None where a layer sees everything; () means all do"""
    block_size: int = 0
    """K + 1 in training, 0 where the file does not say; any K can be asked for"""

    reads = "aux"
    tied_head = False
    """whatever `tie_word_embeddings` says: a head that is not in the file is the target's"""

    @property
    def aux_width(self) -> int:
        return self.target_hidden or self.hidden

    @property
    def optional(self) -> tuple[str, ...]:
        """Parameters that a checkpoint may leave to its target, or that follow from others."""
        shared = ("embed_tokens.weight", "d2t", "t2d")
        return (*shared, "lm_head.weight") if self.draft_vocab == self.vocab else shared

    def window(self, layer: int) -> int | None:
        return self.windows[layer] if self.windows else None

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> "DflashConfig":
        """Read a draft's `config.json`; errors: ConfigError. What each key means: `reference/drafts/dflash_keys.py`."""
        return cls(**read_facts(config))


# how published checkpoints spell our parameter names: (their prefix, ours)
CHECKPOINT_NAMES = (
    ("model.", ""),
    ("midlayer.", "layers.0."),
    ("encoder.fc.", "fc."),
    ("encoder.output_norm_enc.", "hidden_norm."),
)

# tensors that trainers save and no forward pass reads: (our name, why)
IGNORED = (
    ("verifier_lm_head.weight", "the target's head, kept by the trainer for its loss"),
    ("verifier_norm.weight", "the target's norm, kept by the trainer for its loss"),
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
    "layers.*.mlp.up_proj.weight": "column",
    "layers.*.mlp.down_proj.weight": "row",
    "lm_head.weight": "vocab",
}


class DflashLayer(nn.Module):
    """Equations (3) to (6)."""

    def __init__(self, c: DflashConfig, index: int) -> None:
        super().__init__()
        self.c, self.index, heads = c, index, (c.heads, c.kv_heads)
        self.input_layernorm = RMSNorm(c.hidden, c.eps)
        self.self_attn = Attention(c.hidden, c.hidden, heads, c.head_dim, c.rope, c.bias, c.bias, c.eps)
        self.post_attention_layernorm = RMSNorm(c.hidden, c.eps)
        self.mlp = MLP(c.hidden, c.intermediate)

    def remember(self, context: Tensor, positions: Tensor, cache: Cache, slots: Tensor) -> None:
        """Equation (3).

        context    [B, T, H]
        positions  [B, T]
        slots      [B, T]
        """
        attn = self.self_attn
        k, v = (project(context).unflatten(-1, (-1, self.c.head_dim)) for project in (attn.k_proj, attn.v_proj))
        cache.write(self.index, rotate(attn.k_norm(k), positions, self.c.rope), v, slots)

    def forward(self, y: Tensor, positions: Tensor, visible: Tensor, cache: Cache, slots: Tensor) -> Tensor:
        """Let every token of a block read the context and the block.

        y          [B, T, H]
        positions  [B, T]
        visible    [B, T, S]
        slots      [B, T]
        ->         [B, T, H]
        """
        u = self.input_layernorm(y)
        s = y + self.self_attn(u, positions, visible, self.index, cache, slots)  # (4), (5)
        return s + self.mlp(self.post_attention_layernorm(s))  # (6)


class DflashDraft(nn.Module):
    """The whole draft: `read` and `remember` the context, then fill in a `block`."""

    way = Block
    d2t: Tensor
    t2d: Tensor

    def __init__(self, c: DflashConfig) -> None:
        super().__init__()
        self.c = c
        self.embed_tokens = nn.Embedding(c.vocab, c.hidden)
        self.fc = nn.Linear(c.aux_width * c.aux_states, c.hidden, bias=False)
        self.hidden_norm = RMSNorm(c.hidden, c.eps)
        self.layers = nn.ModuleList(DflashLayer(c, i) for i in range(c.layers))
        self.norm = RMSNorm(c.hidden, c.eps)
        self.lm_head = nn.Linear(c.hidden, c.draft_vocab, bias=False)
        self.register_buffer("d2t", torch.zeros(c.draft_vocab, dtype=torch.int64))
        self.register_buffer("t2d", torch.zeros(c.vocab, dtype=torch.bool))

    def tie(self) -> None:
        """Nothing is tied: what the file leaves out is the target's."""

    def new_cache(self, batch: int, num_slots: int) -> Cache:
        """Room for `num_slots` tokens of each of `batch` sequences."""
        return Cache(self.c.layers, batch, num_slots)

    def fuse(self, aux: Tensor) -> Tensor:
        """Equation (1).

        aux  [B, T, A, X]  X is the target's width
        ->   [B, T, H]
        """
        return self.hidden_norm(self.fc(aux.flatten(2)))

    def read(self, out: TargetOutput) -> Tensor:
        """The context of what a target's pass has read: out -> [B, T, H]"""
        return self.fuse(out.aux)

    def remember(self, context: Tensor, positions: Tensor, cache: Cache) -> None:
        """Equation (3) in every layer; a position lives in the slot of its number.

        context    [B, T, H]  from `read`
        positions  [B, T]
        """
        cache.place(positions, positions)
        for layer in self.layers:
            layer.remember(context, positions, cache, positions)

    def block(
        self,
        tokens: Tensor,
        positions: Tensor,
        cache: Cache,
        slots: Tensor | None = None,
        visible: Tensor | None = None,
    ) -> DraftOutput:
        """Fill in a block whose context is remembered.

        tokens     [B, T]     the root and masks, see `ask`
        positions  [B, T]
        slots      [B, T]     the positions when absent
        visible    [B, T, S]  everything up to the block's end when absent; causal and sliding layers narrow it
        ->         logits [B, T, Vd], feedback [B, T, H]  column 0 is the root's own
        """
        slots = positions if slots is None else slots
        slot_positions = cache.place(slots, positions)
        if visible is None:
            visible = (slot_positions <= positions[:, -1:])[:, None].expand(-1, tokens.shape[1], -1)
        y = self.embed_tokens(tokens)  # (2)
        ahead = slot_positions[:, None, :] - positions[:, :, None]
        for i, layer in enumerate(self.layers):
            seen, window = visible & (ahead <= 0) if self.c.causal[i] else visible, self.c.window(i)
            seen = seen if window is None else seen & (ahead.abs() < window)
            y = layer(y, positions, seen, cache, slots)
        z = self.norm(y)
        return DraftOutput(self.lm_head(z) * self.c.logit_scale, z)  # (7)

    def ask(self, roots: Tensor, num_draft_tokens: int) -> Tensor:
        """Equation (2) before the embedding.

        roots  [B, X]
        ->     [B, X, K+1]
        """
        masks = roots.new_full((*roots.shape, num_draft_tokens), self.c.mask_token)
        return torch.cat([roots[..., None], masks], -1)

    def forward(self, tokens: Tensor, hidden: Tensor, positions: Tensor | None = None) -> DraftOutput:
        """One block after a context that begins with the text.

        tokens     [B, T]
        hidden     [B, X, H]  from `read`, of the positions 0 .. X-1
        positions  [B, T]     X and on when absent
        ->         logits [B, T, Vd], feedback [B, T, H]
        """
        (batch, width), length = tokens.shape, hidden.shape[1]
        place = torch.arange(length + width, device=tokens.device).expand(batch, -1)
        positions = place[:, length:] if positions is None else positions
        cache = self.new_cache(batch, int(positions.max()) + 1)
        self.remember(hidden, place[:, :length], cache)
        return self.block(tokens, positions, cache)

    def blocks(self, tokens: Tensor, hidden: Tensor, anchors: Tensor, num_draft_tokens: int) -> Tensor:
        """Blocks at many places of one text, as in training; each sees the text before its anchor, and itself.

        tokens   [B, T]
        hidden   [B, T, H]      from `read`
        anchors  [B, X]         positions of roots
        ->       [B, X, K, Vd]  draft k of an anchor p proposes x_{p+k}
        """
        (batch, length), num_blocks, width = tokens.shape, anchors.shape[1], num_draft_tokens + 1
        place = torch.arange(length + num_blocks * width, device=tokens.device).expand(batch, -1)
        cache = self.new_cache(*place.shape)
        self.remember(hidden, place[:, :length], cache)
        before = place[:, None, :length] < anchors[..., None]  # [B, X, T]
        own = torch.eye(num_blocks, dtype=torch.bool, device=tokens.device).repeat_interleave(width, 1)
        visible = torch.cat([before, own.expand(batch, -1, -1)], -1).repeat_interleave(width, 1)
        asked = self.ask(tokens.gather(1, anchors), num_draft_tokens).flatten(1)
        positions = (anchors[..., None] + place[0, :width]).flatten(1)
        out = self.block(asked, positions, cache, place[:, length:], visible)
        return out.logits.unflatten(1, (num_blocks, width))[:, :, 1:]

    def unroll(self, tokens: Tensor, hidden: Tensor, num_steps: int) -> Tensor:
        """A block after every column: column t has read x_0 .. x_t, its root is x_{t+1}, step k proposes x_{t+k+1}.

        Logits are NaN where x_{t+k} is not known: there is nothing to hold them to.

        tokens  [B, T]
        hidden  [B, T, H]        from `read`
        ->      [K, B, T, Vd]    K = num_steps
        """
        batch, length = tokens.shape
        column = torch.arange(length, device=tokens.device).expand(batch, -1)
        steps = tokens.new_full((num_steps, batch, length, self.c.draft_vocab), 0, dtype=hidden.dtype)
        if length > 1:
            logits = self.blocks(tokens, hidden, column[:, 1:], num_steps)  # [B, T-1, K, Vd]
            steps = torch.cat([logits.permute(2, 0, 1, 3), steps[:, :, :1]], 2)
        ahead = torch.arange(1, num_steps + 1, device=tokens.device)[:, None, None]
        return steps.masked_fill((column + ahead >= length)[..., None], float("nan"))

    def to_target(self, draft_ids: Tensor) -> Tensor:
        """Equation (8).

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
