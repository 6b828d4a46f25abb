"""EAGLE-3 with latent attention: the draft of DeepSeek and Kimi targets, whose cache holds latents as theirs does.

    (1)  g_t = W_fc [n_1(a_1t); ...; n_A(a_At)]
    (2)  e_t = Emb(x_{t+1})
    (3)  u_t = [norm_in(e_t); norm_hid(g_t)]
    (4)  r_t = norm_hid(g_t) if norm_before_residual else g_t
    (5)  s_t = r_t + Attn(u_1 .. u_t)                as in ops/mla.py:
             [q'_t; c'_t; k'_t] = [W_qa; W_kva] u_t  2H features in; engines hold one weight, the query's rows first
             q_t = W_qb norm_q(q'_t)                 W_q u_t without q_lora_rank
             c_t = norm_kv(c'_t),  k_t = rope(k'_t)  what a slot holds; k' has no norm, all heads share it
    (6)  y_t = s_t + MLP(norm_post(s_t))             dense, also where the target has experts
    (7)  logits_t = scale W_head norm_out(y_t)
    (8)  g_{t+1} = norm_out(y_t) if feedback_normed else y_t
    (9)  target id = i + d2t[i]

Flags and all that stands around Attn are those of `drafts/eagle3.py`. Facts of the draft that its target's config
also states are the draft's own: rope's base and stretching, yarn's mscale (which enters the scale of the scores
squared), and both epsilons. The norms of the latents take `latent_norm_eps`, rms_norm_eps where the file has none:
so do the trainer of these drafts (TorchSpec) and SGLang and vLLM, but not transformers' module of the same name (1e-6
always), which other trainers build on.  Papers: arXiv 2503.01840, 2405.04434.  Letters: reference/README.md.
"""

from dataclasses import dataclass
from typing import Any

from torch import nn

from reference.config import Keys
from reference.drafts import eagle3
from reference.drafts.eagle3 import Eagle3Draft, Eagle3Facts, Eagle3Layer
from reference.drafts.eagle3_keys import read_draft
from reference.ops.mla import Latent, LatentAttention
from reference.targets.deepseek import read_latent

COPIED = (
    "aux_loss_alpha",
    "ep_size",
    "first_k_dense_replace",
    "head_dim",
    "moe_intermediate_size",
    "moe_layer_freq",
    "n_group",
    "n_routed_experts",
    "n_shared_experts",
    "norm_topk_prob",
    "num_experts_per_tok",
    "num_mtp_layers",
    "num_nextn_predict_layers",
    "routed_scaling_factor",
    "scoring_func",
    "seq_aux",
    "topk_group",
    "topk_method",
)
"""keys of the target's experts that exporters copy; tensors of experts have no place here and are refused"""


@dataclass(frozen=True, kw_only=True)
class Eagle3MlaConfig(Eagle3Facts):
    """The facts of a draft whose heads read one latent a token."""

    heads: int
    q_rank: int | None
    kv_rank: int
    nope_dim: int
    rope_dim: int
    value_dim: int
    latent_norm_eps: float
    rope_interleaved: bool = True
    attention_bias: bool = False

    @property
    def latent(self) -> Latent:
        """The facts of Attn."""
        dims = (self.heads, self.q_rank, self.kv_rank, self.nope_dim, self.rope_dim, self.value_dim)
        return Latent(*dims, self.rope, self.rope_interleaved, self.latent_norm_eps, self.attention_bias)

    @classmethod
    def from_hf(cls, config: dict[str, Any], norm_output: str | None = None) -> "Eagle3MlaConfig":
        """Read a draft's `config.json`; errors: ConfigError. What keys mean: `eagle3_keys.py`, `targets/deepseek.py`.

        norm_output   what this key of the file means, "head" or "feedback"; None when the file settles it itself
        """
        return cls(**read_draft(config, norm_output, _read_attention))


def _read_attention(keys: Keys) -> dict[str, Any]:
    keys.expect("use_moe", False)
    keys.expect("mla_use_nope", False)
    for key in COPIED:
        keys.get(key)
    own = {"latent_norm_eps": keys.number("latent_norm_eps", keys.number("rms_norm_eps", 1e-6))}
    return {**read_latent(keys), **own, "rope_interleaved": keys.flag("rope_interleave", True)}


# how published checkpoints spell our parameter names, and what no forward pass reads
CHECKPOINT_NAMES, IGNORED = eagle3.CHECKPOINT_NAMES, eagle3.IGNORED

# how each parameter is split over W tensor-parallel ranks; norms, and names not listed, are replicated
TP_PLAN = {
    "embed_tokens.weight": "vocab",
    "fc.weight": "replicated",
    "layers.*.self_attn.q_proj.weight": "heads",
    "layers.*.self_attn.q_a_proj.weight": "replicated",
    "layers.*.self_attn.q_b_proj.weight": "heads",
    "layers.*.self_attn.kv_a_proj_with_mqa.weight": "replicated",
    "layers.*.self_attn.kv_b_proj.weight": "heads",
    "layers.*.self_attn.o_proj.weight": "row",
    "layers.*.mlp.gate_proj.weight": "column",
    "layers.*.mlp.gate_proj.bias": "column",
    "layers.*.mlp.up_proj.weight": "column",
    "layers.*.mlp.up_proj.bias": "column",
    "layers.*.mlp.down_proj.weight": "row",
    "lm_head.weight": "vocab",
}


class Eagle3MlaLayer(Eagle3Layer):
    """Equations (3) to (6)."""

    def attention(self, into: int) -> nn.Module:
        """Attn of (5), which reads `into` features."""
        return LatentAttention(into, self.c.hidden, self.c.latent)


class Eagle3MlaDraft(Eagle3Draft):
    """The whole draft; `new_cache` holds c_t and k_t of a token, no keys and values of heads."""

    layer = Eagle3MlaLayer
