"""Trees of drafts over static shapes: the equations of `reference/trees.py`, without a loop over nodes or a host read.

Letters: reference/README.md; T nodes, C candidates, X members of a beam, Y offers, P nodes of a path.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from optimized.ops.rows import wide_type
from optimized.ops.sight import MOST_NODES, Sight


class TreeError(ValueError):
    """A tree that cannot be."""


class Candidates(NamedTuple):
    """Every token that a draft has offered."""

    tokens: Tensor
    """[B, C]"""
    scores: Tensor
    """[B, C]"""
    parents: Tensor
    """[B, C]  the number of a candidate; -1 is the root"""


class Beam(NamedTuple):
    """The members of a level that the next one grows from."""

    numbers: Tensor
    """[B, X]  of candidates; -1 is the root"""
    scores: Tensor
    """[B, X]"""
    origin: Tensor
    """[B, X]  which member of the beam before each grew from"""


class Branches:
    """A cache whose new tokens are nodes of a tree: node j of a sequence lives in slot first + j.

    first  [B]
    line   [B, T] each: which nodes the new tokens are, their parents, and so on: what each sees of the tree
    """

    def __init__(
        self, cache: Any, first: Tensor, line: Sequence[Tensor], num_nodes: int, num_slots: int | None
    ) -> None:
        self.cache, self.place = cache, first[:, None] + line[0]
        self.sight = Sight(num_slots or cache.num_slots, first, line, num_nodes)

    def slots(self, positions: Tensor) -> Tensor:
        """Where the new tokens are written, whatever their positions.

        positions  [B, T]
        ->         [M]
        """
        return self.cache.slots(self.place)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.cache, name)


def check(topk: int, num_steps: int, num_nodes: int) -> None:
    """Whether there is such a tree; errors: TreeError."""
    offered = topk + topk**2 * (num_steps - 1)
    what = f"a tree of topk {topk}, num_steps {num_steps} and num_draft_tokens {num_nodes}"
    if min(topk, num_steps) < 1 or not num_steps < num_nodes <= offered + 1:
        raise TreeError(f"{what}: nodes with the root are more than num_steps and at most {offered + 1}")
    if max(num_nodes, topk * (num_steps - 1)) > MOST_NODES:
        raise TreeError(f"{what}: neither its nodes nor the tokens the draft reads may be more than {MOST_NODES}")


def begin(root: Tensor, dtype: torch.dtype) -> tuple[Candidates, Beam]:
    """root [B] -> the tree before its first level; scores are kept in `dtype`"""
    column = root[:, None]
    nothing, one = column[:, :0], torch.ones_like(column, dtype=dtype)
    return Candidates(nothing, one[:, :0], nothing), Beam(torch.full_like(column, -1), one, torch.zeros_like(column))


def likeliest(logits: Tensor, topk: int) -> tuple[Tensor, Tensor]:
    """The best draft ids after each row, and their chances, of equal ones any; errors: TreeError where there are fewer.

    logits  [B, X, Vd]
    ->      ids [B, X, Y], chances [B, X, Y]
    """
    if topk > logits.shape[-1]:
        raise TreeError(f"topk is {topk}, the draft knows {logits.shape[-1]} tokens")
    chances, ids = logits.to(wide_type(logits.dtype)).softmax(-1).topk(topk, -1)
    return ids, chances


def grow(known: Candidates, beam: Beam, ids: Tensor, chances: Tensor) -> tuple[Candidates, Beam]:
    """Equations (1) and (2): one level more.

    ids      [B, X, Y]  Y = topk tokens of the target's vocabulary, best first
    chances  [B, X, Y]
    """
    topk = ids.shape[2]
    scores = (beam.scores[..., None] * chances).flatten(1)
    best = leading(scores, topk)
    level = (ids.flatten(1), scores, beam.numbers.repeat_interleave(topk, 1))
    more = Candidates(*(torch.cat(pair, 1) for pair in zip(known, level, strict=True)))
    return more, Beam(known.tokens.shape[1] + best, scores.gather(1, best), best // topk)


def leading(scores: Tensor, count: int) -> Tensor:
    """Where the largest scores are, best first; of equal ones the first comes first.

    scores  [B, C]
    ->      [B, X]
    """
    return scores.sort(stable=True, dim=-1, descending=True).indices[:, :count]


def select(known: Candidates, root: Tensor, num_nodes: int) -> tuple[Tensor, Tensor]:
    """Equation (3).

    root  [B]
    ->    tokens [B, T], parents [B, T]  the root is its own
    """
    chosen = leading(known.scores, num_nodes - 1).sort(-1).values
    tokens = torch.cat([root[:, None], known.tokens.gather(1, chosen)], 1)
    numbers = known.parents.gather(1, chosen)
    parents = (chosen[:, None, :] <= numbers[:, :, None]).sum(-1)
    return tokens, torch.cat([torch.zeros_like(parents[:, :1]), parents], 1)


def lines(parents: Tensor, num_steps: int) -> list[Tensor]:
    """Each node itself, its parent, and so on; from the root on the root.

    parents  [B, T]
    ->       S + 1 times [B, T]
    """
    line = [torch.arange(parents.shape[1], device=parents.device).expand_as(parents)]
    for _ in range(num_steps):
        line.append(parents.gather(1, line[-1]))
    return line


def walk(tokens: Tensor, parents: Tensor, words: Tensor, own: Tensor, num_steps: int) -> tuple[Tensor, Tensor]:
    """Equation (6).

    tokens   [B, T]
    parents  [B, T]
    words    [B, T]
    own      [B, T]  the target's own token after each node
    ->       path [B, P], accepted [B]  P = S + 1: the nodes that stand, then others
    """
    missed = tokens[:, 1:] != own.gather(1, parents)[:, 1:]
    place = torch.arange(1, tokens.shape[1], device=tokens.device)
    stands = (words & (missed.long() << place).sum(1, keepdim=True)) == 0
    return leading(stands.long(), num_steps + 1), stands.sum(1) - 1


def pick(x: Tensor, rows: Tensor) -> Tensor:
    """Some rows of each sequence.

    x     [B, T, ...]
    rows  [B, X]
    ->    [B, X, ...]
    """
    index = rows.view(*rows.shape, *[1] * (x.dim() - 2)).expand(*rows.shape, *x.shape[2:])
    return x.gather(1, index)
