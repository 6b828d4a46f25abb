"""Qwen3-MoE: Llama with normed heads and, in most layers, experts in place of one feed-forward block.

    (1)  h_0 = Emb(x)
    (2)  s_i = h_i + Attn(norm_in(h_i))          q and k normed over each head before rope
    (3)  u = norm_post(s_i)
    (4)  p = top-P softmax(W_router u)           over all E experts; divided by its sum if norm_topk_prob
    (5)  h_{i+1} = s_i + sum_e p_e MLP_e(u)      dense layers: s_i + MLP(u)
    (6)  z = norm(h_L)
    (7)  logits = W_head z

Layer i is dense if it is listed in mlp_only_layers or if decoder_sparse_step does not divide i + 1.
Report: arXiv 2505.09388.  Letters: reference/README.md.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from reference.config import ConfigError, Keys
from reference.ops.attention import Attention
from reference.ops.cache import Cache
from reference.ops.mlp import MLP
from reference.ops.moe import mix, route_softmax
from reference.ops.norm import RMSNorm
from reference.ops.rope import Rope
from reference.ops.stream import captured, seat
from reference.outputs import TargetOutput


@dataclass(frozen=True)
class Qwen3MoeConfig:
    """Every fact that changes the equations above."""

    vocab: int
    hidden: int
    intermediate: int
    expert_intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    rope: Rope
    experts: int
    experts_per_token: int
    norm_topk_prob: bool = False
    sparse_step: int = 1
    dense_layers: tuple[int, ...] = ()
    eps: float = 1e-6
    attention_bias: bool = False
    tied_head: bool = False

    def is_sparse(self, layer: int) -> bool:
        """Whether a layer has experts."""
        return layer not in self.dense_layers and (layer + 1) % self.sparse_step == 0

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> "Qwen3MoeConfig":
        """Read `config.json`; errors: ConfigError for missing, unknown or unsupported keys."""
        keys = Keys(config)
        keys.expect("hidden_act", "silu")
        keys.expect("use_sliding_window", False)
        for inert in ("sliding_window", "max_window_layers", "output_router_logits", "router_aux_loss_coef"):
            keys.get(inert)  # of layers that slide, and of the training loss
        for inert in ("num_nextn_predict_layers", "mtp_num_hidden_layers", "mtp_use_dedicated_embeddings"):
            keys.get(inert)  # of the multi-token module, which a draft reads
        heads, kv_heads, head_dim = keys.heads()
        # transformers writes the second name, the hub has the first
        experts, chosen = keys.count("num_experts", keys.get("num_local_experts")), keys.count("num_experts_per_tok")
        if chosen > experts:
            raise ConfigError(f"config key 'num_experts_per_tok' is {chosen}, and there are {experts} experts")
        facts = cls(
            vocab=keys.count("vocab_size"),
            hidden=keys.count("hidden_size"),
            intermediate=keys.count("intermediate_size"),
            expert_intermediate=keys.count("moe_intermediate_size"),
            layers=keys.count("num_hidden_layers"),
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            rope=Rope.from_hf(keys.rope(), head_dim),
            experts=experts,
            experts_per_token=chosen,
            norm_topk_prob=keys.flag("norm_topk_prob"),
            sparse_step=keys.count("decoder_sparse_step", 1),
            dense_layers=tuple(keys.get("mlp_only_layers", ())),
            eps=keys.number("rms_norm_eps", 1e-6),
            attention_bias=keys.flag("attention_bias"),
            tied_head=keys.flag("tie_word_embeddings"),
        )
        keys.finish()
        return facts


# how published checkpoints spell our parameter names: (their prefix, ours)
CHECKPOINT_NAMES = (("model.", ""),)

# tensors that may be there and no forward pass reads: (our name, why)
IGNORED = (("mtp.*", "the multi-token module: a draft reads it, the target does not"),)

# how each parameter is split over W tensor-parallel ranks; norms, the router, and names not listed, are replicated
TP_PLAN = {
    "embed_tokens.weight": "vocab",
    "layers.*.self_attn.q_proj.weight": "heads",
    "layers.*.self_attn.q_proj.bias": "heads",
    "layers.*.self_attn.k_proj.weight": "heads",
    "layers.*.self_attn.k_proj.bias": "heads",
    "layers.*.self_attn.v_proj.weight": "heads",
    "layers.*.self_attn.v_proj.bias": "heads",
    "layers.*.self_attn.o_proj.weight": "row",
    "layers.*.mlp.gate.weight": "replicated",
    "layers.*.mlp.experts.*.gate_proj.weight": "column",
    "layers.*.mlp.experts.*.up_proj.weight": "column",
    "layers.*.mlp.experts.*.down_proj.weight": "row",
    "layers.*.mlp.gate_proj.weight": "column",
    "layers.*.mlp.up_proj.weight": "column",
    "layers.*.mlp.down_proj.weight": "row",
    "lm_head.weight": "vocab",
}


class Experts(nn.Module):
    """Equation (4) and the sum of (5)."""

    def __init__(self, c: Qwen3MoeConfig) -> None:
        super().__init__()
        self.c = c
        self.gate = nn.Linear(c.hidden, c.experts, bias=False)
        self.experts = nn.ModuleList(MLP(c.hidden, c.expert_intermediate) for _ in range(c.experts))

    def forward(self, u: Tensor) -> Tensor:
        """u [B, T, H] -> [B, T, H]"""
        ids, weights = route_softmax(self.gate(u), self.c.experts_per_token, self.c.norm_topk_prob)  # (4)
        return mix(u, ids, weights, self.experts)  # (5)


class Qwen3MoeLayer(nn.Module):
    """Equations (2) to (5)."""

    def __init__(self, c: Qwen3MoeConfig, index: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(c.hidden, c.eps)
        self.post_attention_layernorm = RMSNorm(c.hidden, c.eps)
        heads, bias = (c.heads, c.kv_heads), c.attention_bias
        self.self_attn = Attention(c.hidden, c.hidden, heads, c.head_dim, c.rope, bias, bias, norm_eps=c.eps)
        self.mlp = Experts(c) if c.is_sparse(index) else MLP(c.hidden, c.intermediate)

    def forward(
        self, h: Tensor, positions: Tensor, visible: Tensor, layer: int, cache: Cache | None, slots: Tensor
    ) -> Tensor:
        """h [B, T, H] -> [B, T, H]"""
        s = h + self.self_attn(self.input_layernorm(h), positions, visible, layer, cache, slots)  # (2)
        return s + self.mlp(self.post_attention_layernorm(s))  # (3) (5)


class Qwen3MoeTarget(nn.Module):
    """The whole target."""

    def __init__(self, c: Qwen3MoeConfig) -> None:
        super().__init__()
        self.c = c
        self.embed_tokens = nn.Embedding(c.vocab, c.hidden)
        self.layers = nn.ModuleList(Qwen3MoeLayer(c, i) for i in range(c.layers))
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
        z = self.norm(h)  # (6)
        return TargetOutput(self.lm_head(z), z, captured(stream, capture))  # (7)
