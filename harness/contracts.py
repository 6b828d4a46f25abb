"""What the rooms expect of one another: structural types, no behaviour.

The output types live where they are computed (`reference`), as NamedTuples; the protocols below name the fields that
harness and suites read, so a reference, its twin and a test double are interchangeable.
"""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from torch import Tensor


@runtime_checkable
class Group(Protocol):
    """The ranks that share one model: torch.distributed, or threads in a test."""

    rank: int
    size: int

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """The sum over ranks, a new tensor."""

    def all_gather(self, tensor: Tensor, dim: int = 0) -> Tensor:
        """Every rank's tensor along `dim`, in rank order."""

    def broadcast(self, tensor: Tensor, src: int = 0) -> Tensor:
        """The tensor of rank `src`."""


@runtime_checkable
class Cache(Protocol):
    """Keys and values by slot; a query at position p sees slots 0..p."""

    batch: int
    num_slots: int

    def roll_back(self, lengths: Tensor) -> None:
        """Forget every slot at or beyond each sequence's length.

        lengths  [B]
        """


class TargetOutput(Protocol):
    """What a target says about T new tokens."""

    @property
    def logits(self) -> Tensor:
        """[B, T, V]"""

    @property
    def hidden(self) -> Tensor:
        """[B, T, H] after the final norm"""

    @property
    def aux(self) -> Tensor:
        """[B, T, A, H] at the capture points, in the order asked"""


class DraftOutput(Protocol):
    """What one draft step proposes."""

    @property
    def logits(self) -> Tensor:
        """[B, T, Vd]"""

    @property
    def feedback(self) -> Tensor:
        """[B, T, H] what the next draft step reads as `hidden`"""


class Target(Protocol):
    """The model whose text must not change."""

    def __call__(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        capture: Sequence[int] = (),
        cache: Cache | None = None,
    ) -> TargetOutput:
        """Run the target.

        tokens     [B, T]
        positions  [B, T]
        """

    def new_cache(self, batch: int, num_slots: int) -> Cache:
        """An empty cache."""


class Draft(Protocol):
    """The model that proposes (EAGLE-style)."""

    def fuse(self, aux: Tensor) -> Tensor:
        """Aux hidden states to the draft's first hidden state.

        aux  [B, T, A, H]
        ->   [B, T, H]
        """

    def __call__(self, tokens: Tensor, hidden: Tensor, positions: Tensor, cache: Cache | None = None) -> DraftOutput:
        """One draft step.

        tokens     [B, T]
        hidden     [B, T, H]
        positions  [B, T]
        """

    def to_target(self, draft_ids: Tensor) -> Tensor:
        """Draft ids as target ids.

        draft_ids  [B, T]
        ->         [B, T]
        """

    def new_cache(self, batch: int, num_slots: int) -> Cache:
        """An empty cache."""


class Generation(Protocol):
    """A decoded batch."""

    @property
    def tokens(self) -> Tensor:
        """[B, num_tokens], -1 after the end"""

    @property
    def accepted(self) -> Sequence[Sequence[int]]:
        """per sequence: accepted drafts of each verify step"""
