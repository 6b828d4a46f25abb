"""DeepSeek V2 and V3: latent attention, and experts that a router picks by group beside some that every token reads.

    (1)  h_0 = Emb(x)
    (2)  s_i = h_i + Attn(norm_in(h_i))          ops/mla.py
    (3)  u = norm_post(s_i)
    (4)  p = softmax(W_router u)                 V2
         p = sigmoid(W_router u)                 V3
    (5)  groups: the topk_group with the largest max p (V2), or sum of the two largest p + b (V3)
         chosen: the P experts of these groups with the largest p (V2), p + b (V3); b chooses and weighs nothing
    (6)  w_e = routed_scaling p_e                divided by the sum of the chosen p first, if norm_topk_prob (V3)
    (7)  h_{i+1} = s_i + sum_e w_e MLP_e(u) + MLP_shared(u)      the first dense_layers: s_i + MLP(u)
    (8)  z = norm(h_L)
    (9)  logits = W_head z

The norms of the latents have an epsilon of their own, `latent_norm_eps`: 1e-6 in the authors' code and transformers,
whatever rms_norm_eps is; SGLang and vLLM take rms_norm_eps for it, which is another model where the two differ.
Papers: arXiv 2405.04434, 2412.19437.  Letters: reference/README.md.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reference.config import ConfigError, Keys
from reference.ops.cache import Cache
from reference.ops.mla import Latent, LatentAttention
from reference.ops.mlp import MLP
from reference.ops.moe import mix, strongest
from reference.ops.norm import RMSNorm
from reference.ops.rope import Rope
from reference.ops.stream import captured, seat
from reference.outputs import TargetOutput


@dataclass(frozen=True)
class DeepseekConfig:
    """Every fact that changes the equations above."""

    vocab: int
    hidden: int
    intermediate: int
    expert_intermediate: int
    layers: int
    heads: int
    q_rank: int | None
    kv_rank: int
    nope_dim: int
    rope_dim: int
    value_dim: int
    rope: Rope
    experts: int
    experts_per_token: int
    shared_experts: int
    """experts' worth of width in the one block that every token reads"""
    dense_layers: int
    """layers without experts, the first"""
    routed_scaling: float
    sigmoid_router: bool
    """V3's equations (4) to (6); V2's when not"""
    groups: int = 1
    groups_kept: int = 1
    norm_topk_prob: bool = False
    rope_interleaved: bool = True
    eps: float = 1e-6
    latent_norm_eps: float = 1e-6
    attention_bias: bool = False
    tied_head: bool = False
    next_token_layers: int = 0
    """layers behind the last that a checkpoint may carry for drafting; no target reads them"""

    def __post_init__(self) -> None:
        kept, least = self.groups_kept * (self.experts // self.groups), 2 if self.sigmoid_router else 1
        if self.experts % self.groups or self.experts // self.groups < least or self.groups_kept > self.groups:
            raise ConfigError(
                f"config keys 'n_routed_experts', 'n_group' and 'topk_group' are {self.experts}, {self.groups} and "
                f"{self.groups_kept}; equal groups of at least {least}, of which some are kept, are expected"
            )
        if self.experts_per_token > kept:
            raise ConfigError(
                f"config key 'num_experts_per_tok' is {self.experts_per_token}, but only {kept} experts stay in the "
                "choice ('n_routed_experts', 'n_group', 'topk_group')"
            )

    @property
    def latent(self) -> Latent:
        """The facts of equation (2)."""
        dims = (self.heads, self.q_rank, self.kv_rank, self.nope_dim, self.rope_dim, self.value_dim)
        return Latent(*dims, self.rope, self.rope_interleaved, self.latent_norm_eps, self.attention_bias)

    @property
    def ignored(self) -> tuple[tuple[str, str], ...]:
        """Tensors that may be there and no forward pass reads: (our name, why)."""
        beyond = range(self.layers, self.layers + self.next_token_layers)
        return tuple((f"layers.{i}.*", "a next-token layer: a draft reads it, the target does not") for i in beyond)

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], path: str = "") -> "DeepseekConfig":
        """Read `config.json`, or the part of it under `path`; errors: ConfigError for what cannot be read one way."""
        keys = Keys(config, path)
        keys.expect("hidden_act", "silu")
        keys.expect("mlp_bias", False)
        keys.expect("moe_layer_freq", 1)
        for inert in ("aux_loss_alpha", "seq_aux", "ep_size", "head_dim", "nextn_zero_first_embedding"):
            keys.get(inert)  # of the training loss, of a launcher, a name for rope's width, of the next-token layers
        facts = cls(
            vocab=keys.count("vocab_size"),
            hidden=keys.count("hidden_size"),
            intermediate=keys.count("intermediate_size"),
            expert_intermediate=keys.count("moe_intermediate_size"),
            layers=keys.count("num_hidden_layers"),
            experts=keys.count("n_routed_experts"),
            experts_per_token=keys.count("num_experts_per_tok"),
            shared_experts=keys.count("n_shared_experts"),
            dense_layers=keys.count("first_k_dense_replace", least=0),
            routed_scaling=keys.number("routed_scaling_factor", keys.need("routed_scaling_factor")),
            eps=keys.number("rms_norm_eps", 1e-6),
            tied_head=keys.flag("tie_word_embeddings"),
            **read_latent(keys),
            **(_second(keys) if keys.get("model_type") == "deepseek_v2" else _third(keys)),
        )
        keys.finish()
        return facts


def read_latent(keys: Keys) -> dict[str, Any]:
    """The facts of `Latent` but `interleaved`, by the names that configs have for them here."""
    if "q_lora_rank" not in keys.config:
        # its default differs among readers, and null is a value
        raise ConfigError(f"config key {keys.path + 'q_lora_rank'!r} is missing; null says that there is none")
    heads, nope_dim, rope_dim = map(keys.count, ("num_attention_heads", "qk_nope_head_dim", "qk_rope_head_dim"))
    keys.expect("num_key_value_heads", heads)
    keys.expect("qk_head_dim", nope_dim + rope_dim)
    rope = Rope.from_hf(keys.rope(), rope_dim)
    if rope.dim != rope_dim:
        raise ConfigError(f"rope turns {rope.dim} features of {keys.path + 'qk_rope_head_dim'!r}, {rope_dim}, not all")
    return {
        "heads": heads,
        "q_rank": None if keys.get("q_lora_rank") is None else keys.count("q_lora_rank"),
        "kv_rank": keys.count("kv_lora_rank"),
        "nope_dim": nope_dim,
        "rope_dim": rope_dim,
        "value_dim": keys.count("v_head_dim"),
        "rope": rope,
        "latent_norm_eps": keys.number("latent_norm_eps", 1e-6),
        "attention_bias": keys.flag("attention_bias"),
    }


def _second(keys: Keys) -> dict[str, Any]:
    """The router of V2."""
    keys.expect("scoring_func", "softmax")
    keys.expect("topk_method", "greedy", "group_limited_greedy")
    keys.expect("rope_interleave", True)
    # with true, the authors' code leaves out the scaling, engines do both, and transformers does not renormalise
    keys.expect("norm_topk_prob", False)
    groups, kept = (keys.count(key, 1) for key in ("n_group", "topk_group"))
    limited = keys.get("topk_method", "greedy") == "group_limited_greedy"
    return {"sigmoid_router": False, "groups": groups if limited else 1, "groups_kept": kept if limited else 1}


def _third(keys: Keys) -> dict[str, Any]:
    """The router of V3, and what else only V3 has."""
    keys.expect("scoring_func", "sigmoid")
    keys.expect("topk_method", "noaux_tc")
    return {
        "sigmoid_router": True,
        "groups": keys.count("n_group"),
        "groups_kept": keys.count("topk_group"),
        "norm_topk_prob": keys.flag("norm_topk_prob", True),
        "rope_interleaved": keys.flag("rope_interleave", True),
        # transformers' name for it is the second
        "next_token_layers": keys.count("num_nextn_predict_layers", keys.count("num_mtp_layers", 1, 0), 0),
    }


# how published checkpoints spell our parameter names: (their prefix, ours)
CHECKPOINT_NAMES = (("model.", ""),)

# how each parameter is split over W tensor-parallel ranks; norms, what makes the latents, the router, and names not
# listed, are replicated
TP_PLAN = {
    "embed_tokens.weight": "vocab",
    "layers.*.self_attn.q_proj.weight": "heads",
    "layers.*.self_attn.q_a_proj.weight": "replicated",
    "layers.*.self_attn.q_b_proj.weight": "heads",
    "layers.*.self_attn.kv_a_proj_with_mqa.weight": "replicated",
    "layers.*.self_attn.kv_b_proj.weight": "heads",
    "layers.*.self_attn.o_proj.weight": "row",
    "layers.*.mlp.gate.weight": "replicated",
    "layers.*.mlp.gate.e_score_correction_bias": "replicated",
    "layers.*.mlp.experts.*.gate_proj.weight": "column",
    "layers.*.mlp.experts.*.up_proj.weight": "column",
    "layers.*.mlp.experts.*.down_proj.weight": "row",
    "layers.*.mlp.shared_experts.gate_proj.weight": "column",
    "layers.*.mlp.shared_experts.up_proj.weight": "column",
    "layers.*.mlp.shared_experts.down_proj.weight": "row",
    "layers.*.mlp.gate_proj.weight": "column",
    "layers.*.mlp.up_proj.weight": "column",
    "layers.*.mlp.down_proj.weight": "row",
    "lm_head.weight": "vocab",
}


class Router(nn.Module):
    """Equations (4) to (6), in float32 at least."""

    def __init__(self, c: DeepseekConfig) -> None:
        super().__init__()
        self.c = c
        self.weight = nn.Parameter(torch.zeros(c.experts, c.hidden))
        self.register_buffer("e_score_correction_bias", torch.zeros(c.experts) if c.sigmoid_router else None)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Router":
        super()._apply(fn, recurse)
        bias = self.e_score_correction_bias
        if bias is not None and bias.dtype != torch.float64:
            # float32 in models of any smaller dtype, as on disk: steps of training are finer than bfloat16
            self.e_score_correction_bias = bias.float()
        return self

    def forward(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """The chosen experts of each token and their weights.

        u   [B, T, H]
        ->  ids [B, T, P], weights [B, T, P]
        """
        c, wide = self.c, u if u.dtype == torch.float64 else u.float()
        scores = F.linear(wide, self.weight.to(wide.dtype))
        if c.sigmoid_router:
            p = scores.sigmoid()  # (4)
            ids = strongest(p + self.e_score_correction_bias, c.experts_per_token, c.groups, c.groups_kept, 2)  # (5)
        else:
            p = scores.softmax(-1)  # (4)
            ids = strongest(p, c.experts_per_token, c.groups, c.groups_kept)  # (5)
        weights = p.gather(-1, ids)
        if c.norm_topk_prob:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return ids, (weights * c.routed_scaling).to(u.dtype)  # (6)


class Experts(nn.Module):
    """The two sums of equation (7)."""

    def __init__(self, c: DeepseekConfig) -> None:
        super().__init__()
        self.gate = Router(c)
        self.experts = nn.ModuleList(MLP(c.hidden, c.expert_intermediate) for _ in range(c.experts))
        self.shared_experts = MLP(c.hidden, c.expert_intermediate * c.shared_experts)

    def forward(self, u: Tensor) -> Tensor:
        """u [B, T, H] -> [B, T, H]"""
        return mix(u, *self.gate(u), self.experts) + self.shared_experts(u)


class DeepseekLayer(nn.Module):
    """Equations (2) to (7)."""

    def __init__(self, c: DeepseekConfig, index: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(c.hidden, c.eps)
        self.post_attention_layernorm = RMSNorm(c.hidden, c.eps)
        self.self_attn = LatentAttention(c.hidden, c.hidden, c.latent)
        self.mlp = MLP(c.hidden, c.intermediate) if index < c.dense_layers else Experts(c)

    def forward(
        self, h: Tensor, positions: Tensor, visible: Tensor, layer: int, cache: Cache | None, slots: Tensor
    ) -> Tensor:
        """h [B, T, H] -> [B, T, H]"""
        s = h + self.self_attn(self.input_layernorm(h), positions, visible, layer, cache, slots)  # (2)
        return s + self.mlp(self.post_attention_layernorm(s))  # (3) (7)


class DeepseekTarget(nn.Module):
    """The whole target; `decode` is all of it after the embedding, for a shell that puts images among the tokens."""

    def __init__(self, c: DeepseekConfig) -> None:
        super().__init__()
        self.c = c
        self.embed_tokens = nn.Embedding(c.vocab, c.hidden)
        self.layers = nn.ModuleList(DeepseekLayer(c, i) for i in range(c.layers))
        self.norm = RMSNorm(c.hidden, c.eps)
        self.lm_head = nn.Linear(c.hidden, c.vocab, bias=False)
        self.tie()

    def tie(self) -> None:
        """A tied head is the embedding's table itself."""
        if self.c.tied_head:
            self.lm_head.weight = self.embed_tokens.weight

    def new_cache(self, batch: int, num_slots: int) -> Cache:
        """Room for the latents of `num_slots` tokens of each of `batch` sequences."""
        return Cache(self.c.layers, batch, num_slots)

    def embed(self, tokens: Tensor) -> Tensor:
        """Equation (1).

        tokens  [B, T]
        ->      [B, T, H]
        """
        return self.embed_tokens(tokens)

    def decode(
        self,
        h: Tensor,
        positions: Tensor,
        capture: Sequence[int],
        cache: Cache | None,
        slots: Tensor,
        visible: Tensor,
    ) -> TargetOutput:
        """Equations (2) to (9).

        h          [B, T, H]
        positions  [B, T]
        slots      [B, T]
        visible    [B, T, S]
        ->         logits [B, T, V], hidden [B, T, H], aux [B, T, A, H]
        """
        stream = [h]
        for i, layer in enumerate(self.layers):
            h = layer(h, positions, visible, i, cache, slots)
            stream.append(h)
        z = self.norm(h)  # (8)
        return TargetOutput(self.lm_head(z), z, captured(stream, capture))  # (9)

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
        return self.decode(self.embed(tokens), positions, capture, cache, slots, visible)
