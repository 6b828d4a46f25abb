"""A draft that is a model of its own, fast: the twin of any target with a draft's calls.

Equations: `reference/drafts/standalone.py`. Letters: reference/README.md.
"""

from typing import Any, NamedTuple

from torch import Tensor

from optimized.drafting import Standalone
from optimized.ops.vocabulary import over_vocabulary


class DraftOutput(NamedTuple):
    logits: Tensor
    """[B, T, Vd]"""
    feedback: Tensor
    """[B, T, H]  the model's hidden state, which nothing reads"""


class StandaloneDraft:
    """One rank's share.

    token_map  [Vd]  target ids that may be proposed; all when absent
    """

    way = Standalone

    def __init__(self, model: Any, token_map: Tensor | None = None) -> None:
        self.model, self.token_map = model, token_map
        self.c, self.at, self.lm_head = model.c, model.at, model.lm_head

    def parameters_missing(self) -> list[str]:
        """Parameters that nothing has written."""
        return self.model.parameters_missing()

    def new_cache(self, batch: int, num_slots: int) -> Any:
        """The model's own cache."""
        return self.model.new_cache(batch, num_slots)

    def read(self, out: Any) -> Tensor:
        """What `states` takes as `hidden` and does not look at: [B, T, X]"""
        return out.hidden

    def __call__(
        self, tokens: Tensor, hidden: Tensor | None, positions: Tensor | None = None, cache: Any = None
    ) -> DraftOutput:
        """Propose the token after each of `tokens`.

        tokens     [B, T]     x_p
        hidden     [B, T, X]  not read
        positions  [B, T]     p; -1 marks padding
        ->         logits [B, T, Vd], feedback [B, T, H]
        """
        out = self.model(tokens, positions, (), cache)
        return DraftOutput(self._known(out.logits), out.hidden)

    def states(
        self, tokens: Tensor, hidden: Tensor, positions: Tensor, cache: Any, num_slots: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Everything below the head; reads nothing back from the device.

        tokens     [B, T]
        hidden     [B, T, X]  not read
        positions  [B, T]
        ->         [B, T, H], [B, T, H]  what the head reads, feedback
        """
        top, _ = self.model.states(tokens, positions, cache, (), num_slots)
        return top, top

    def logits(self, top: Tensor) -> Tensor:
        """top [B, T, H] -> [B, T, Vd]"""
        return self._known(self.lm_head.logits(top.flatten(0, 1)).unflatten(0, top.shape[:2]))

    def propose(self, top: Tensor) -> Tensor:
        """The likeliest draft token as a target id: top [B, H] -> [B]"""
        if self.token_map is None:
            return self.lm_head.argmax(top)
        return self.token_map[self.logits(top[:, None])[:, 0].argmax(-1)]

    def to_target(self, draft_ids: Tensor) -> Tensor:
        """draft_ids of any shape -> the same shape"""
        return draft_ids if self.token_map is None else self.token_map[draft_ids]

    def spread(self, logits: Tensor) -> Tensor:
        """Draft logits over the target's vocabulary: [B, T, Vd] -> [B, T, V]"""
        return logits if self.token_map is None else over_vocabulary(logits, self.token_map, self.c.vocab)

    def _known(self, logits: Tensor) -> Tensor:
        return logits if self.token_map is None else logits.index_select(-1, self.token_map)
