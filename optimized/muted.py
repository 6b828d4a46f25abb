"""Models with tokens that are never said: what the loop sees of a target and a draft where there are such tokens.

A head's argmax is fused with its product and knows nothing of tokens, so here the logits are written out, the muted
ones put below all others, and the largest sought. Next to reading the head's matrix that is nothing. A model without
muted tokens is not wrapped, and logits that a model returns stay what they are.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class _Like:
    """Everything that is not said otherwise below is the model's own."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)


class MutedHead(_Like):
    """A head without a chance for some ids.

    muted  [M]
    """

    def __init__(self, head: Any, muted: Tensor) -> None:
        super().__init__(head)
        self.muted = muted

    def logits(self, x: Tensor) -> Tensor:
        """x [M, H] -> [M, V]"""
        return self.model.logits(x).index_fill(-1, self.muted, float("-inf"))

    def argmax(self, x: Tensor) -> Tensor:
        """x [M, H] -> [M] the lowest global id among the largest logits, on every rank"""
        return self.logits(x).argmax(-1)


class MutedTarget(_Like):
    """A target whose head never says some ids; ids beyond its vocabulary cannot be said anyway."""

    def __init__(self, target: Any, suppressed: Sequence[int]) -> None:
        super().__init__(target)
        muted = [token for token in suppressed if token < target.c.vocab]
        self.lm_head = MutedHead(target.lm_head, torch.tensor(muted, dtype=torch.int64, device=target.at.device))


class MutedDraft(_Like):
    """A draft that never proposes some target ids."""

    def __init__(self, draft: Any, suppressed: Sequence[int]) -> None:
        super().__init__(draft)
        self.suppressed = torch.tensor(suppressed, dtype=torch.int64, device=draft.at.device)

    def logits(self, top: Tensor) -> Tensor:
        """top [B, T, H] -> [B, T, Vd]"""
        logits = self.model.logits(top)
        ids = self.model.to_target(torch.arange(logits.shape[-1], device=logits.device))
        return logits.masked_fill((ids[:, None] == self.suppressed).any(-1), float("-inf"))

    def propose(self, top: Tensor) -> Tensor:
        """The likeliest draft token as a target id: top [B, H] -> [B]"""
        return self.model.to_target(self.logits(top[:, None])[:, 0].argmax(-1))
