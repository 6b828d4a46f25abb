"""The ways of drafting of `reference/drafting.py` over the static buffers of a generation.

A way is made once for a state and makes its draft's cache. `prefill` reads a chunk of the prompts; a cycle calls
`start`, which reads what the last verify settled, and `next` for each further draft. Nothing is read back.
Letters: reference/README.md.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from optimized.state import PADDING, State
from optimized.trees import Branches


class Chunk(NamedTuple):
    """Some columns of the prompts and what the target made of them; position -1 is padding."""

    tokens: Tensor
    """[B, T]"""
    positions: Tensor
    """[B, T]"""
    following: Tensor
    """[B, T']  the next prompt token; T' is T, or one less in the last chunk"""
    known: Tensor
    """[B, T']  positions whose next prompt token is known: all of a row but its last"""
    aux: Tensor
    """[B, T, A, H]"""
    hidden: Tensor
    """[B, T, H]"""
    h: Tensor | None = None
    """[B, T', H]  what the target's layer 0 reads at the next prompt tokens; None for text alone"""
    holes: Tensor | None = None
    """[B, T']  true where that is a feature, of an image or of a sound"""


class States(NamedTuple):
    """What a draft reads of its target."""

    aux: Tensor
    hidden: Tensor


class Recurrent:
    """EAGLE-3 and next-token modules: state of p and token x_{p+1} together, at position p."""

    reads_features = True
    """where x_{p+1} is a placeholder of an image, the draft reads what the target's layer 0 read there"""
    lag = 1
    """how far the draft's keys stay behind the target's"""

    def __init__(self, draft: Any, target: Any, state: State) -> None:
        self.draft, self.state = draft, state
        self.cache = state.keep(draft.new_cache(state.plan.batch, state.plan.num_slots), self.lag)

    def prefill(self, chunk: Chunk, num_slots: int | None) -> None:
        """Read the positions whose next token is known; the last one, whose next token is the root, is left."""
        width = chunk.following.shape[1]
        if width:
            read = self.draft.read(States(chunk.aux[:, :width], chunk.hidden[:, :width]))
            media = self.ahead(chunk)
            self.draft.states(chunk.following, read, chunk.known, self.cache, num_slots, **media)

    def ahead(self, chunk: Chunk) -> dict[str, Tensor]:
        """What the draft reads beside an image: features where they stand, its own table for text.

        A way that does not read features, or a draft of another width, has the table alone.
        """
        if chunk.h is None or not self.reads_features or chunk.h.shape[2] != self.draft.c.hidden:
            return {}
        own = self.draft.embed_tokens(chunk.following.flatten()).view_as(chunk.h)
        return {"embeds": torch.where(chunk.holes[..., None], chunk.h, own)}  # type: ignore[index]

    def start(self, num_slots: int | None) -> tuple[Tensor, Tensor]:
        """The draft's first step.

        ->  [B, J, H], [B, H]  what the head reads, feedback; J = 1, or K for a way that drafts all tokens at once
        """
        state, gather = self.state, self.draft.at.ops.gather_rows
        positions = state.settled_positions()
        top, feedback = self.draft.states(state.settled, self.draft.read(state), positions, self.cache, num_slots)
        return gather(top, state.accepted)[:, None], gather(feedback, state.accepted)

    def next(self, token: Tensor, feedback: Tensor, k: int, num_slots: int | None) -> tuple[Tensor, Tensor]:
        """Draft step k = 2 .. K.

        token     [B]     d_{k-1}
        feedback  [B, H]  of step k - 1
        ->        [B, H], [B, H]
        """
        # the token of step k - 1 follows position n + k - 2, whose slot the new step takes
        place = (self.state.lengths + (k - 2))[:, None]
        top, feedback = self.draft.states(token[:, None], feedback[:, None], place, self.cache, num_slots)
        return top[:, 0], feedback[:, 0]

    def branch(
        self, tokens: Tensor, feedback: Tensor, k: int, line: list[Tensor], num_read: int, num_slots: int | None
    ) -> tuple[Tensor, Tensor]:
        """Draft step k = 2 .. S of a tree: every token of a level's beam at once.

        tokens    [B, X]
        feedback  [B, X, H]  of the rows that they came from
        line      [B, X] each: which of the tree's num_read tokens they are, and which they see
        ->        [B, X, H], [B, X, H]
        """
        first = self.state.lengths + (1 - self.lag)
        view = Branches(self.cache, first, line, num_read, num_slots)
        positions = (first + (k - 2))[:, None].expand_as(tokens).contiguous()
        return self.draft.states(tokens, feedback, positions, view, view.sight)


class Standalone(Recurrent):
    """A small model of its own, which reads tokens and nothing of the target."""

    lag = 0

    def prefill(self, chunk: Chunk, num_slots: int | None) -> None:
        """Read the prompts as the target does."""
        self.draft.states(chunk.tokens, chunk.hidden, chunk.positions, self.cache, num_slots)

    def start(self, num_slots: int | None) -> tuple[Tensor, Tensor]:
        """As `Recurrent.start`: the settled tokens, each at its own position."""
        state, gather = self.state, self.draft.at.ops.gather_rows
        positions = state.settled_positions()
        positions = torch.where(positions == PADDING, PADDING, positions + 1)
        top, feedback = self.draft.states(state.settled, state.hidden, positions, self.cache, num_slots)
        return gather(top, state.accepted)[:, None], gather(feedback, state.accepted)

    def next(self, token: Tensor, feedback: Tensor, k: int, num_slots: int | None) -> tuple[Tensor, Tensor]:
        """As `Recurrent.next`."""
        place = (self.state.lengths + (k - 1))[:, None]
        top, feedback = self.draft.states(token[:, None], feedback[:, None], place, self.cache, num_slots)
        return top[:, 0], feedback[:, 0]


class FrozenKeys:
    """Gemma 4 assistants: queries alone, which see the target's keys 0 .. n-1 from position n - 1 at every step."""

    def __init__(self, draft: Any, target: Any, state: State) -> None:
        self.draft, self.state = draft, state

    def prefill(self, chunk: Chunk, num_slots: int | None) -> None:
        """Nothing: the target's keys are all there is."""

    def start(self, num_slots: int | None) -> tuple[Tensor, Tensor]:
        """As `Recurrent.start`; only the root and the last state that stands are read."""
        state = self.state
        hidden = self.draft.at.ops.gather_rows(self.draft.read(state), state.accepted)
        top, feedback = self._step(state.root, hidden, num_slots)
        return top[:, None], feedback

    def next(self, token: Tensor, feedback: Tensor, k: int, num_slots: int | None) -> tuple[Tensor, Tensor]:
        """As `Recurrent.next`; the position stands still."""
        return self._step(token, feedback, num_slots)

    def branch(
        self, tokens: Tensor, feedback: Tensor, k: int, line: list[Tensor], num_read: int, num_slots: int | None
    ) -> tuple[Tensor, Tensor]:
        """As `Recurrent.branch`; queries leave nothing that another could see."""
        positions = (self.state.lengths - 1)[:, None].expand_as(tokens).contiguous()
        return self.draft.states(tokens, feedback, positions, self.state.target_cache, num_slots)

    def _step(self, token: Tensor, hidden: Tensor, num_slots: int | None) -> tuple[Tensor, Tensor]:
        place = (self.state.lengths - 1)[:, None]
        top, feedback = self.draft.states(token[:, None], hidden[:, None], place, self.state.target_cache, num_slots)
        return top[:, 0], feedback[:, 0]


class Block:
    """D-Flash: the root and K masks at positions n .. n + K in one pass, over keys made of what the target knew."""

    lag = 1

    def __init__(self, draft: Any, target: Any, state: State) -> None:
        self.draft, self.state = draft, state
        self.cache = state.keep(draft.new_cache(state.plan.batch, state.plan.num_slots), self.lag)

    def prefill(self, chunk: Chunk, num_slots: int | None) -> None:
        """Remember what the target knew of the prompts."""
        self.draft.remember(self.draft.read(States(chunk.aux, chunk.hidden)), chunk.positions, self.cache)

    def start(self, num_slots: int | None) -> tuple[Tensor, Tensor]:
        """As `Recurrent.start`, but all K at once: `next` has nothing left to do."""
        state = self.state
        self.draft.remember(self.draft.read(state), state.settled_positions(), self.cache)
        asked = self.draft.ask(state.root, state.plan.num_draft_tokens)
        top = self.draft.states(asked, state.lengths[:, None] + state.columns, self.cache, num_slots)
        return by_draft(top[:, 1:]), top[:, 0]


class Parallel(Recurrent):
    """P-EAGLE: what EAGLE-3 reads up to the root, then masks at the positions after it, in one pass."""

    reads_features = False
    branch: Any = None
    """masks know of no candidates: a tree has nothing to grow from"""

    def start(self, num_slots: int | None) -> tuple[Tensor, Tensor]:
        """As `Recurrent.start`, but all K at once: `next` has nothing left to do."""
        state, draft, pad = self.state, self.draft, torch.nn.functional.pad
        last, more = state.accepted[:, None], state.plan.num_draft_tokens - 1
        column = torch.arange(state.plan.num_draft_tokens + 1 + more, device=state.device)
        # every column after the root is a mask; beyond the ones asked for nothing is read
        stands, asked = column <= last, last + column[: more + 1]
        tokens = pad(state.settled, (0, more)).masked_fill(~stands, draft.c.mask_token)
        read = torch.where(stands[..., None], pad(draft.read(state), (0, 0, 0, more)), draft.fuse_mask())
        place = (state.lengths - 1)[:, None] - last + column
        positions = place.masked_fill(column > last + more, PADDING)
        top, feedback = draft.states(tokens, read, positions, self.cache, num_slots)
        tops = top.gather(1, asked[..., None].expand(-1, -1, top.shape[2]))
        return by_draft(tops), draft.at.ops.gather_rows(feedback, state.accepted)


def by_draft(tops: Tensor) -> Tensor:
    """The rows of one draft side by side, as the head's kernels read them: [B, J, H] -> [B, J, H]"""
    return tops.transpose(0, 1).contiguous().transpose(0, 1)
