"""The next-token module of DeepSeek V3: layers behind the target's last, each with norms and a projection before it.

    (1)  e_t = Emb(x_{t+1})                            zero at t = 0 if zero_first_embedding
    (2)  u_t = W_eh [enorm(e_t); hnorm(g_t)]           g_t: the target's final hidden state, after its final norm
    (3)  y_t = Layer(u_1 .. u_t)                       reference/targets/deepseek.py (2) to (7), with experts
    (4)  z_t = norm_head(y_t)
    (5)  logits_t = W_head z_t
    (6)  g_{t+1} = z_t

The module stands in its target's own checkpoint: its layer i is layer N + i, N the target's number of layers, and
draft step k asks layer (k - 1) mod n (reference/drafts/next_token.py). An export of the module alone counts from 0.
Its copies of embedding and head are read where they are there, and dropped where they say the same as the target's.
vLLM reads a zero for the embedding at position 0; SGLang and transformers read the token, and so does a config that
does not say `nextn_zero_first_embedding`.
Paper: arXiv 2412.19437.  Letters: reference/README.md.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from reference.config import ConfigError, Keys
from reference.drafts.next_token import NextTokenDraft
from reference.ops.cache import Cache
from reference.ops.norm import RMSNorm
from reference.targets.deepseek import TP_PLAN as TARGET_PLAN
from reference.targets.deepseek import DeepseekConfig, DeepseekLayer


@dataclass(frozen=True)
class DeepseekNextnConfig(DeepseekConfig):
    """The facts of the target's config, of which the module has the layers behind the last."""

    first: int = 0
    """what the checkpoint calls the module's layer 0: N, or 0 in an export of the module alone"""
    zero_first_embedding: bool = False

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

    @property
    def names(self) -> tuple[tuple[str, str], ...]:
        """How published checkpoints spell our parameter names: (their prefix, ours)."""
        # the target's own tables stand beside the module and would be taken for its copies
        layers = ((f"model.layers.{self.first + i}.", f"layers.{i}.") for i in range(self.layers))
        tables = (("layers.0.embed_tokens.", "embed_tokens."), ("layers.0.shared_head.head.", "lm_head."))
        theirs = (("lm_head.", "model.lm_head."), ("embed_tokens.", "model.embed_tokens."))
        return (*theirs, *layers, *tables)

    @property
    def copies(self) -> dict[str, str]:
        """Tensors that are not read and must say what a parameter says: our name -> the parameter's."""
        tables = (("embed_tokens.weight", "embed_tokens.weight"), ("shared_head.head.weight", "lm_head.weight"))
        return {f"layers.{i}.{name}": ours for i in range(1, self.layers) for name, ours in tables}

    @property
    def ignored(self) -> tuple[tuple[str, str], ...]:
        """Tensors that may be there and are not read: (our name, why)."""
        return tuple((name, f"a copy of {ours}") for name, ours in self.copies.items())

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], path: str = "", **facts: Any) -> "DeepseekNextnConfig":
        """Read the target's `config.json`, or the module's own, which is like it; errors: ConfigError."""
        keys, target = Keys(config, path), super().from_hf(config, path)
        if not target.next_token_layers:
            raise ConfigError(f"config key {path + 'num_nextn_predict_layers'!r} is 0: there is no next-token layer")
        alone = any("NextN" in name for name in keys.names("architectures")) and target.layers == 1
        stated = {"zero_first_embedding": keys.flag("nextn_zero_first_embedding"), **facts}
        # another config, never this one changed: the target reads the same file
        return replace(
            target,
            layers=target.next_token_layers,
            first=0 if alone else target.layers,
            dense_layers=0,
            tied_head=False,
            **stated,
        )


# every spelling depends on the target's number of layers: `DeepseekNextnConfig.names`
CHECKPOINT_NAMES: tuple[tuple[str, str], ...] = ()

# tensors that may stand beside the module: (our name, why)
IGNORED = (("model.*", "the target's"),)

# how each parameter is split over W tensor-parallel ranks; norms, `eh_proj`, what makes the latents, the router, and
# names not listed, are replicated
TP_PLAN = {**TARGET_PLAN, "layers.*.eh_proj.weight": "replicated"}


class NextTokenLayer(DeepseekLayer):
    """Equations (2) to (4)."""

    def __init__(self, c: DeepseekNextnConfig, index: int) -> None:
        super().__init__(c, index)
        self.enorm = RMSNorm(c.hidden, c.eps)
        self.hnorm = RMSNorm(c.hidden, c.eps)
        self.eh_proj = nn.Linear(2 * c.hidden, c.hidden, bias=False)
        self.shared_head = nn.ModuleDict({"norm": RMSNorm(c.hidden, c.eps)})

    def project(self, embed: Tensor, hidden: Tensor) -> Tensor:
        """Equation (2).

        embed   [B, T, H]
        hidden  [B, T, H]
        ->      [B, T, H]
        """
        return self.eh_proj(torch.cat([self.enorm(embed), self.hnorm(hidden)], -1))


class DeepseekNextnDraft(NextTokenDraft):
    """The whole module."""

    def __init__(self, c: DeepseekNextnConfig) -> None:
        super().__init__(c)
        self.layers = nn.ModuleList(NextTokenLayer(c, i) for i in range(c.layers))

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
        if self.c.zero_first_embedding:
            embed = embed.masked_fill((positions == 0)[..., None], 0.0)  # (1)
        block = self.layers[layer]
        y = block(block.project(embed, hidden), positions, visible, layer, cache, slots)  # (2) (3)
        return block.shared_head["norm"](y)  # (4)
