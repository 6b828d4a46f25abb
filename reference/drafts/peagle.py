"""P-EAGLE: EAGLE-3 that proposes K tokens in one pass, the later ones from mask tokens.

The page is `reference/drafts/eagle3.py`, whose numbers hold; what differs is what a column reads. The target has read
x_0 .. x_{n-1}, the root x_n is emitted and not yet read, and a_p are the target's aux states:

    (1')  g_p = fuse(a_p)    at p < n, x_n beside the last of them: the first draft, as EAGLE-3's
          g_p = fuse(m)      at p = n .. n + K - 2, m the parameter `mask_hidden`, as wide as all aux states together
    (2')  e_p = Emb(x_{p+1}) at p < n
          e_p = Emb(mask)    at p = n .. n + K - 2
    (8')  nothing is fed back: draft k stands at position n + k - 2 whatever d_1 .. d_{k-1} turn out to be

so a smaller K proposes the beginning of what a larger one does. Keys at mask positions are written over by the next
pass before anything sees them. Trainers sample which columns get masks; a mask column sees the real columns up to where
its run began and the masks of its own run, which is what serving sees. Sources: speculators `models/peagle`, vLLM
`v1/spec_decode/utils.py`.  Letters: reference/README.md.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from reference.config import ConfigError, Keys
from reference.drafting import Parallel
from reference.drafts.eagle3 import CHECKPOINT_NAMES, IGNORED, TP_PLAN, Eagle3Config, Eagle3Draft
from reference.drafts.eagle3_keys import read_facts

__all__ = ["CHECKPOINT_NAMES", "IGNORED", "TP_PLAN", "PeagleConfig", "PeagleDraft"]

MASK_KEYS = ("mask_token_id", "pard_token", "ptd_token_id")
"""where files put the mask's id"""
TRAINING = ("num_depths", "down_sample_ratio", "down_sample_ratio_min", "parallel_drafting")
"""keys of the trainer's sampling"""


@dataclass(frozen=True, kw_only=True)
class PeagleConfig(Eagle3Config):
    """The facts of EAGLE-3 and the token that stands for what is not known yet."""

    mask_token: int

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.use_aux_hidden_state:
            raise ConfigError("eagle_config.use_aux_hidden_state is false: P-EAGLE fuses its mask as aux states")
        if self.mask_token >= self.vocab:
            raise ConfigError(f"config key 'mask_token_id' is {self.mask_token}; ids are 0..{self.vocab - 1}")

    @classmethod
    def from_hf(cls, config: dict[str, Any], norm_output: str | None = None) -> "PeagleConfig":
        """Read a draft's `config.json`: an EAGLE-3 file with a mask token; errors: ConfigError.

        norm_output   "head" where this key of the file means the norm before the head; it cannot mean feedback here
        """
        keys = Keys(config)
        given = {key: keys.count(key, least=0) for key in MASK_KEYS if keys.get(key) is not None}
        if len(set(given.values())) != 1:
            raise ConfigError(f"one mask token is expected under {', '.join(MASK_KEYS)}; the config has {given}")
        rest = {k: v for k, v in config.items() if k not in (*MASK_KEYS, *TRAINING)}
        kind = rest.get("speculators_model_type", "peagle")
        if kind != "peagle":
            raise ConfigError(f"speculators_model_type {kind!r} is not a P-EAGLE draft")
        if "speculators_model_type" in rest:
            rest["speculators_model_type"] = "eagle3"
        return cls(**read_facts(rest, norm_output or "feedback"), mask_token=next(iter(given.values())))


class PeagleDraft(Eagle3Draft):
    """EAGLE-3's draft and what it reads where the target has not been."""

    way = Parallel

    def __init__(self, c: PeagleConfig) -> None:
        super().__init__(c)
        self.mask_hidden = nn.Parameter(torch.zeros(1, 1, c.aux_states * c.aux_width))

    def fuse_mask(self) -> Tensor:
        """Equation (1') of a mask: -> [1, 1, H]"""
        return self.fuse(self.mask_hidden.unflatten(2, (self.c.aux_states, -1)))

    def unroll(self, tokens: Tensor, hidden: Tensor, num_steps: int) -> Tensor:
        """A run of masks after every column: column t at step k stands at position t + k - 1 and knows x_0 .. x_{t+1}.

        Logits are NaN where x_{t+k} is not known: there is nothing to hold them to.

        tokens  [B, T]
        hidden  [B, T, H]        from `read`
        ->      [K, B, T, Vd]    K = num_steps
        """
        batch, width = tokens.shape
        column = torch.arange(width, device=tokens.device).expand(batch, width)
        cache, steps = self.new_cache(batch, width * num_steps), []
        # every real column up to the own one, and the masks of the own run so far
        real, own = column[:, None, :] <= column[:, :, None], column[:, None, :] == column[:, :, None]
        read = torch.cat([tokens[:, 1:], tokens[:, :1]], 1)
        for k in range(num_steps):
            unseen = real.new_zeros(batch, width, width * (num_steps - k - 1))
            visible = torch.cat([real, *([own] * k), unseen], -1)  # [B, T, T*K]
            step = self(read, hidden, column + k, cache, column + k * width, visible)
            steps.append(step.logits.masked_fill((column + k + 1 >= width)[..., None], float("nan")))
            read, hidden = torch.full_like(tokens, self.c.mask_token), self.fuse_mask().expand_as(hidden)
        return torch.stack(steps)
