"""The ways of drafting: what a draft reads of its target, at which position, and what it keeps of a generation.

The target has read x_0 .. x_{n-1} and they stand; the root x_n is emitted and not yet read. A draft proposes
d_1 = x_{n+1}', d_2, .. d_K:

    way          step k reads                                   at position    keeps
    Recurrent    d_{k-1} (d_0: the root), the state before it   n + k - 2      keys of its own, one slot a position
    Standalone   d_{k-1}                                        n + k - 1      keys of its own, one slot a token
    FrozenKeys   d_{k-1}, its own last state                    n - 1          nothing: it sees the target's keys
    Block        a mask beside the root, all k at once          n + k          keys of the context: what the target knew
    Parallel     a mask after the root, all k at once           n + k - 2      as Recurrent; masks are written over

A target's pass settles some positions: it read x_p there and x_{p+1} is known. `start` lets the draft read them and
gives its first step; `next` takes one step more. Positions that did not stand are written over before they are seen.
Letters: reference/README.md.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from reference.trees import level


class Step(NamedTuple):
    """What the draft says of one row of each sequence."""

    logits: Tensor
    """[B, J, Vd]  J = 1; K for a way that drafts all tokens at once"""
    feedback: Tensor
    """[B, 1, H]"""


class Recurrent:
    """EAGLE-3 and next-token modules: state of p and token x_{p+1} together, at position p."""

    reads_features = True
    """where x_{p+1} is a placeholder of an image, the draft reads what the target's layer 0 read there"""

    def __init__(
        self, draft: Any, target: Any, target_cache: Any, batch: int, num_slots: int, num_draft_tokens: int
    ) -> None:
        self.draft, self.cache = draft, draft.new_cache(batch, num_slots)

    def start(
        self,
        out: Any,
        tokens: Tensor,
        following: Tensor,
        positions: Tensor,
        last: Tensor,
        embeds: Tensor | None = None,
    ) -> Step:
        """Read what a pass of the target settled.

        out        the target's output in the columns of `tokens`
        tokens     [B, T]  x_p: what the target read
        following  [B, T]  x_{p+1}: the root in column `last`
        positions  [B, T]  p
        last       [B]     the last column that stands
        embeds     [B, T, H]  what the draft reads for `following`, where that is not its table alone: `embed_ahead`
        """
        media = {} if embeds is None else {"embeds": embeds}
        logits, feedback = self.draft(following, self.draft.read(out), positions, self.cache, **media)
        return Step(row(logits, last), row(feedback, last))

    def next(self, token: Tensor, feedback: Tensor, lengths: Tensor, k: int) -> Step:
        """Draft step k = 2 .. K.

        token     [B, 1]     d_{k-1}
        feedback  [B, 1, H]  of step k - 1
        lengths   [B]        n
        """
        return Step(*self.draft(token, feedback, (lengths + k - 2)[:, None], self.cache))

    def branch(self, tokens: Tensor, feedback: Tensor, lengths: Tensor, k: int, words: Tensor) -> Step:
        """Draft step k = 2 .. S of a tree: every token of a level's beam at once.

        tokens    [B, X]
        feedback  [B, X, H]  of the rows that they came from
        lengths   [B]        n
        words     [B, X]     whom each sees of the tokens that these steps have read
        """
        positions, slots, visible = level(lengths, k, words, self.cache.num_slots)
        return Step(*self.draft(tokens, feedback, positions, self.cache, slots, visible))

    def forget(self, lengths: Tensor) -> None:
        """Drop what the steps of a tree have read.

        lengths  [B]  n
        """
        self.cache.roll_back(lengths)


class Standalone:
    """A small model of its own, which reads tokens and nothing of the target."""

    def __init__(
        self, draft: Any, target: Any, target_cache: Any, batch: int, num_slots: int, num_draft_tokens: int
    ) -> None:
        self.draft, self.cache = draft, draft.new_cache(batch, num_slots)

    def start(self, out: Any, tokens: Tensor, following: Tensor, positions: Tensor, last: Tensor) -> Step:
        """As `Recurrent.start`; the root is one column more, at the position after the last that stands.

        tokens     [B, T]
        following  [B, T]
        positions  [B, T]
        last       [B]
        """
        column = (last + 1)[:, None]
        tokens = torch.cat([tokens, tokens[:, :1]], 1).scatter(1, column, following.gather(1, last[:, None]))
        positions = torch.cat([positions, positions[:, -1:] + 1], 1)
        logits, feedback = self.draft(tokens, None, positions, self.cache)
        return Step(row(logits, last + 1), row(feedback, last + 1))

    def next(self, token: Tensor, feedback: Tensor, lengths: Tensor, k: int) -> Step:
        """token [B, 1], feedback [B, 1, H], lengths [B] -> as `Recurrent.next`"""
        return Step(*self.draft(token, None, (lengths + k - 1)[:, None], self.cache))

    def branch(self, tokens: Tensor, feedback: Tensor, lengths: Tensor, k: int, words: Tensor) -> Step:
        """tokens [B, X], feedback [B, X, H], lengths [B], words [B, X] -> as `Recurrent.branch`; the root has a slot"""
        positions, slots, visible = level(lengths + 1, k, words, self.cache.num_slots)
        return Step(*self.draft(tokens, None, positions, self.cache, slots, visible))

    def forget(self, lengths: Tensor) -> None:
        """lengths [B] -> as `Recurrent.forget`; the root stays"""
        self.cache.roll_back(lengths + 1)


class FrozenKeys:
    """Gemma 4 assistants: queries alone, which see the target's keys 0 .. n-1 from position n - 1 at every step."""

    def __init__(
        self, draft: Any, target: Any, target_cache: Any, batch: int, num_slots: int, num_draft_tokens: int
    ) -> None:
        self.draft, self.keys = draft, target_cache

    def start(self, out: Any, tokens: Tensor, following: Tensor, positions: Tensor, last: Tensor) -> Step:
        """As `Recurrent.start`; only the root and the last state that stands are read.

        tokens     [B, T]
        following  [B, T]
        positions  [B, T]
        last       [B]
        """
        root, hidden = following.gather(1, last[:, None]), row(self.draft.read(out), last)
        return Step(*self.draft(root, hidden, positions.gather(1, last[:, None]), self.keys))

    def next(self, token: Tensor, feedback: Tensor, lengths: Tensor, k: int) -> Step:
        """token [B, 1], feedback [B, 1, H], lengths [B] -> as `Recurrent.next`; the position stands still"""
        return Step(*self.draft(token, feedback, (lengths - 1)[:, None], self.keys))

    def branch(self, tokens: Tensor, feedback: Tensor, lengths: Tensor, k: int, words: Tensor) -> Step:
        """tokens [B, X], feedback [B, X, H], lengths [B], words [B, X] -> as `Recurrent.branch`; nobody sees a query"""
        return Step(*self.draft(tokens, feedback, (lengths - 1)[:, None].expand_as(tokens), self.keys))

    def forget(self, lengths: Tensor) -> None:
        """lengths [B] -> nothing: no step has written anything"""


class Block:
    """D-Flash: the root and K masks at positions n .. n + K in one pass, over keys made of what the target knew."""

    def __init__(
        self, draft: Any, target: Any, target_cache: Any, batch: int, num_slots: int, num_draft_tokens: int
    ) -> None:
        self.draft, self.num_draft_tokens = draft, num_draft_tokens
        # room for a block after the last verify, which nobody will ask for
        self.cache = draft.new_cache(batch, num_slots + num_draft_tokens + 1)

    def start(self, out: Any, tokens: Tensor, following: Tensor, positions: Tensor, last: Tensor) -> Step:
        """As `Recurrent.start`, but all K at once: `next` has nothing left to do.

        tokens     [B, T]
        following  [B, T]
        positions  [B, T]
        last       [B]
        """
        # columns that do not stand lie at n or beyond: the block takes their slots, or they lie behind it
        self.draft.remember(self.draft.read(out), positions, self.cache)
        asked = self.draft.ask(following.gather(1, last[:, None]), self.num_draft_tokens)[:, 0]
        place = torch.arange(1, asked.shape[1] + 1, device=asked.device)
        logits, feedback = self.draft.block(asked, positions.gather(1, last[:, None]) + place, self.cache)
        return Step(logits[:, 1:], feedback[:, :1])


class Parallel:
    """P-EAGLE: what EAGLE-3 reads up to the root, then masks at the positions after it, in one pass."""

    def __init__(
        self, draft: Any, target: Any, target_cache: Any, batch: int, num_slots: int, num_draft_tokens: int
    ) -> None:
        self.draft, self.num_draft_tokens = draft, num_draft_tokens
        # room behind the masks for the columns that do not stand
        self.cache = draft.new_cache(batch, num_slots + num_draft_tokens)

    def start(self, out: Any, tokens: Tensor, following: Tensor, positions: Tensor, last: Tensor) -> Step:
        """As `Recurrent.start`, but all K at once: `next` has nothing left to do.

        tokens     [B, T]
        following  [B, T]
        positions  [B, T]
        last       [B]
        """
        more, read = self.num_draft_tokens - 1, self.draft.read(out)
        column = torch.arange(tokens.shape[1] + more, device=tokens.device)
        # every column after the root is a mask: those that did not stand too, and they lie behind the ones asked for
        stands = column <= last[:, None]
        following = torch.nn.functional.pad(following, (0, more)).masked_fill(~stands, self.draft.c.mask_token)
        read = torch.nn.functional.pad(read, (0, 0, 0, more)).where(stands[..., None], self.draft.fuse_mask())
        logits, feedback = self.draft(following, read, positions[:, :1] + column, self.cache)
        asked = last[:, None] + torch.arange(more + 1, device=last.device)
        return Step(logits.gather(1, asked[..., None].expand(-1, -1, logits.shape[2])), row(feedback, last))


def row(x: Tensor, index: Tensor) -> Tensor:
    """x [B, T, X], index [B] -> [B, 1, X]"""
    return x.gather(1, index[:, None, None].expand(-1, 1, x.shape[-1]))


def embed_ahead(draft: Any, following: Tensor, h: Tensor, holes: Tensor) -> Tensor | None:
    """What a draft reads beside a prompt with images: features where they stand, its own table for text.

    A draft that does not read features, or reads another width, has the table alone: None.

    following  [B, T]     x_{p+1}, as tables know it
    h          [B, T, X]  what the target's layer 0 read at p
    holes      [B, T]     true where that is a feature
    ->         [B, T, H] or None
    """
    if not getattr(draft.way, "reads_features", False) or h.shape[2] != draft.c.hidden:
        return None
    # the last column stands before no token of the prompt
    there = torch.cat([holes[:, 1:], torch.zeros_like(holes[:, :1])], 1)
    return torch.where(there[..., None], h.roll(-1, 1), draft.embed_tokens(following))
