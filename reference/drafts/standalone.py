"""A draft that is a model of its own: any small target, of any width and depth, that reads the same tokens.

It reads nothing of the target, so nothing joins the two but the vocabulary. x_p stands at position p and the model
says what comes after it, as a target does; only the calls are a draft's.

    logits_p = W_head f(x_0 .. x_p)          f is the model of the target's page
    target id = m[i]                         m: a token map, the ids that the head keeps; i itself without one

Letters: reference/README.md.
"""

from typing import Any

import torch
from torch import Tensor, nn

from reference.config import ConfigError
from reference.drafting import Standalone
from reference.ops.vocabulary import over_vocabulary
from reference.outputs import DraftOutput, TargetOutput

TP_PLAN: dict[str, str] = {}
"""that of the model's own page"""


class StandaloneDraft(nn.Module):
    """A target's module with a draft's calls.

    token_map  [Vd]  target ids that may be proposed, in the head's order; all when absent
    """

    way = Standalone
    token_map: Tensor | None

    def __init__(self, model: Any, token_map: Tensor | None = None) -> None:
        super().__init__()
        self.model, self.c = model, model.c
        self.register_buffer("token_map", token_map, persistent=False)

    def new_cache(self, batch: int, num_slots: int) -> Any:
        """The model's own cache."""
        return self.model.new_cache(batch, num_slots)

    def read(self, out: TargetOutput) -> Tensor:
        """What `forward` takes as `hidden` and does not look at."""
        return out.hidden

    def forward(
        self,
        tokens: Tensor,
        hidden: Tensor | None,
        positions: Tensor | None = None,
        cache: Any = None,
        slots: Tensor | None = None,
        visible: Tensor | None = None,
    ) -> DraftOutput:
        """Propose the token after each of `tokens`.

        tokens     [B, T]     x_p
        hidden     [B, T, X]  not read
        positions  [B, T]     p
        slots      [B, T]     the positions when absent
        visible    [B, T, S]  by position when absent
        ->         logits [B, T, Vd], feedback [B, T, H]  the model's hidden state, which nothing reads
        """
        out = self.model(tokens, positions, (), cache, slots, visible)
        return DraftOutput(out.logits if self.token_map is None else out.logits[..., self.token_map], out.hidden)

    def unroll(self, tokens: Tensor, hidden: Tensor, num_steps: int) -> Tensor:
        """Teacher-forced draft steps: column t at step k has read x_0 .. x_{t+k}, whatever came between.

        tokens  [B, T]
        hidden  [B, T, X]      not read
        ->      [K, B, T, Vd]  K = num_steps; NaN where x_{t+k} is not known
        """
        logits = self(tokens, hidden).logits
        unknown = torch.full_like(logits, float("nan"))
        return torch.stack([torch.cat([logits[:, k:], unknown[:, :k]], 1) for k in range(1, num_steps + 1)])

    def to_target(self, draft_ids: Tensor) -> Tensor:
        """draft_ids [B, T] -> [B, T]"""
        return draft_ids if self.token_map is None else self.token_map[draft_ids]

    def spread(self, logits: Tensor) -> Tensor:
        """Draft logits over the target's vocabulary; a token outside the map cannot be proposed.

        logits  [B, T, Vd]
        ->      [B, T, V]
        """
        return logits if self.token_map is None else over_vocabulary(logits, self.token_map, self.c.vocab)


def check_token_map(token_map: Tensor, vocab: int) -> None:
    """Refuse a map that is not a set of target ids; errors: ConfigError.

    token_map  [Vd]
    """
    if token_map.dim() != 1 or token_map.dtype != torch.int64 or not len(token_map):
        raise ConfigError(
            f"token_map is {token_map.dtype} {list(token_map.shape)}; expected int64 ids in one dimension"
        )
    if int(token_map.min()) < 0 or int(token_map.max()) >= vocab:
        raise ConfigError(f"token_map holds {int(token_map.min())}..{int(token_map.max())}, legal are 0..{vocab - 1}")
    if len(token_map.unique()) != len(token_map):
        raise ConfigError("token_map holds an id twice")
