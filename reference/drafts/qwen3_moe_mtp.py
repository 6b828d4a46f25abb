"""The multi-token module of Qwen3-MoE: one more layer with experts, which reads the token that came next.

    (1)  e_t = Emb(x_{t+1})
    (2)  u_t = W_fc [norm_emb(e_t); norm_hid(g_t)]     g_t: the target's final hidden state, after its final norm
    (3)  y_t = Layer(u_1 .. u_t)                       reference/targets/qwen3_moe.py (2) to (5), with experts
    (4)  z_t = norm(y_t)
    (5)  logits_t = W_head z_t
    (6)  g_{t+1} = z_t

The module stands in its target's own checkpoint under `mtp.`, or in a folder of its own. Its layer has experts whatever
decoder_sparse_step and mlp_only_layers say: these count the target's layers. Embedding and head are the target's; a
checkpoint's own copies of them are read where they are there, and dropped where they say the same.
Paper: arXiv 2509.18362.  Letters: reference/README.md.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from reference.config import Keys
from reference.drafts.next_token import NextTokenDraft
from reference.ops.cache import Cache
from reference.ops.norm import RMSNorm
from reference.targets.qwen3_moe import TP_PLAN as TARGET_PLAN
from reference.targets.qwen3_moe import Qwen3MoeConfig, Qwen3MoeLayer


@dataclass(frozen=True)
class Qwen3MoeMtpConfig(Qwen3MoeConfig):
    """The facts of the target's config, of which the module has one layer."""

    aux_states = 0
    reads = "hidden"
    optional = ("embed_tokens.weight", "lm_head.weight")
    """what a checkpoint may leave to the target"""

    @property
    def draft_vocab(self) -> int:
        return self.vocab

    @property
    def aux_width(self) -> int:
        return self.hidden

    @classmethod
    def from_hf(cls, config: dict[str, Any], **facts: Any) -> "Qwen3MoeMtpConfig":
        """Read the target's `config.json`, or the module's own, which is like it; errors: ConfigError."""
        keys = Keys(config)
        for count in ("num_nextn_predict_layers", "mtp_num_hidden_layers"):
            keys.expect(count, 1)
        # another config, never this one changed: the target reads the same file
        return replace(super().from_hf(config), layers=1, sparse_step=1, dense_layers=(), tied_head=False, **facts)


# how published checkpoints spell our parameter names: (their prefix, ours). The target's own head stands beside the
# module and would be taken for it: it goes where the rest of the target is
CHECKPOINT_NAMES = (
    ("lm_head.", "model.lm_head."),
    ("embed_tokens.", "model.embed_tokens."),
    ("model.mtp.", "mtp."),
    ("mtp.model.", "mtp."),
    ("mtp.", ""),
)

# tensors that may stand beside the module: (our name, why)
IGNORED = (("model.*", "the target's"),)

# how each parameter is split over W tensor-parallel ranks; norms, the router, and names not listed, are replicated
TP_PLAN = {**TARGET_PLAN, "fc.weight": "replicated"}


class Qwen3MoeMtpDraft(NextTokenDraft):
    """The whole module."""

    def __init__(self, c: Qwen3MoeMtpConfig) -> None:
        super().__init__(c)
        self.pre_fc_norm_embedding = RMSNorm(c.hidden, c.eps)
        self.pre_fc_norm_hidden = RMSNorm(c.hidden, c.eps)
        self.fc = nn.Linear(2 * c.hidden, c.hidden, bias=False)
        self.layers = nn.ModuleList(Qwen3MoeLayer(c, i) for i in range(c.layers))
        self.norm = RMSNorm(c.hidden, c.eps)

    def mix(
        self,
        embed: Tensor,
        hidden: Tensor,
        positions: Tensor,
        visible: Tensor,
        cache: Cache | None,
        slots: Tensor,
        layer: int,
    ) -> Tensor:
        """Equations (2) to (4).

        embed      [B, T, H]
        hidden     [B, T, H]
        positions  [B, T]
        visible    [B, T, S]
        slots      [B, T]
        ->         [B, T, H]
        """
        both = torch.cat([self.pre_fc_norm_embedding(embed), self.pre_fc_norm_hidden(hidden)], -1)  # [B, T, 2H]
        y = self.layers[layer](self.fc(both), positions, visible, layer, cache, slots)  # (2) (3)
        return self.norm(y)  # (4)
