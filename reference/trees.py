"""Trees of drafts: many continuations of one text, read by the target in one pass.

A draft offers the `topk` likeliest tokens after the root, and again after each member of a level's beam. Every token
it offers is a candidate. For a tree of S levels (`num_steps`) and D nodes (`num_draft_tokens`, the root included):

    (1)  c(v) = c(u) q(v | root .. u)                  the score of v, offered after u; c(root) = 1
    (2)  the beam of a level: its topk best candidates      out of topk on level 1, of topk^2 on every other
    (3)  the nodes: the root and the D - 1 best candidates of all levels
    (4)  node v at depth d stands at position n + d         n tokens are read and stand; the root, at n, is not
    (5)  node v sees those n, its ancestors and itself      as bits: w(v) = w(parent of v) | 1 << v
    (6)  v stands if the target's own token after its parent is v, and its parent stands; the root always does

Candidates are numbered level by level, on a level by (place of u in the beam, rank of v after u); of equal scores the
lower number is the better. A child's score is at most its parent's and its number is higher, so an ancestor is always
the better one: beams and nodes hold every parent of theirs. Nodes are numbered as their candidates are: breadth first.

The nodes that stand are one path from the root down, and the token of the target's own after its last node comes next.
Greedy or drawn, that own token is chosen before anybody looks whether a child says it, so the text is the target's,
whatever the tree. (Engines walk through the children of a node with one number and accept where it falls into their
share of the target's chances: the same law. Rejection sampling would need children that were drawn, not the best.)

In the caches node v lies in slot n + v until `Cache.compact` moves the path that stands to slots n, n + 1, ..
A chain is the tree of topk = 1.  Papers: arXiv 2305.09781 (trees), 2406.16858 (scores).

Letters: reference/README.md; T = D nodes, C candidates, X members of a beam, Y = topk offers, P = S + 1 of a path.
"""

from typing import NamedTuple

import torch
from torch import Tensor

MOST_NODES = 64
"""bits of a word"""


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


class Nodes(NamedTuple):
    """What the target reads; node 0 is the root."""

    tokens: Tensor
    """[B, T]"""
    parents: Tensor
    """[B, T]  the root is its own"""
    depths: Tensor
    """[B, T]"""
    words: Tensor
    """[B, T]  bit j: sees node j"""


def check(topk: int, num_steps: int, num_draft_tokens: int) -> None:
    """Whether there is such a tree; errors: ValueError."""
    offered = topk + topk**2 * (num_steps - 1)
    what = f"a tree of topk {topk}, num_steps {num_steps} and num_draft_tokens {num_draft_tokens}"
    if min(topk, num_steps) < 1 or not num_steps < num_draft_tokens <= offered + 1:
        raise ValueError(f"{what}: nodes with the root are more than num_steps and at most {offered + 1}")
    if max(num_draft_tokens, topk * (num_steps - 1)) > MOST_NODES:
        raise ValueError(f"{what}: neither its nodes nor the tokens the draft reads may be more than {MOST_NODES}")


def begin(root: Tensor) -> tuple[Candidates, Beam]:
    """root [B] -> the tree before its first level"""
    column = root[:, None]
    nothing, one = column[:, :0], torch.ones_like(column, dtype=torch.float64)
    return Candidates(nothing, one[:, :0], nothing), Beam(torch.full_like(column, -1), one, torch.zeros_like(column))


def grow(known: Candidates, beam: Beam, ids: Tensor, chances: Tensor) -> tuple[Candidates, Beam]:
    """One level more.

    ids      [B, X, Y]  what each member of the beam offers: Y = topk tokens of the target's vocabulary, best first
    chances  [B, X, Y]
    """
    topk = ids.shape[2]
    scores = (beam.scores[..., None] * chances).flatten(1)  # (1)
    best = leading(scores, topk)  # (2)
    parents = beam.numbers.repeat_interleave(topk, 1)
    level = (ids.flatten(1), scores, parents)
    more = Candidates(*(torch.cat(pair, 1) for pair in zip(known, level, strict=True)))
    return more, Beam(known.tokens.shape[1] + best, scores.gather(1, best), best // topk)


def likeliest(logits: Tensor, topk: int) -> tuple[Tensor, Tensor]:
    """The best draft ids after each row, and their chances; errors: ValueError where there are fewer.

    logits  [B, X, Vd]
    ->      ids [B, X, Y], chances [B, X, Y]
    """
    if topk > logits.shape[-1]:
        raise ValueError(f"topk is {topk}, the draft knows {logits.shape[-1]} tokens")
    chances = logits.double().softmax(-1)
    ids = leading(chances, topk)
    return ids, chances.gather(-1, ids)


def leading(scores: Tensor, count: int) -> Tensor:
    """Where the largest scores are, best first; of equal ones the first comes first.

    scores  [..., C]
    ->      [..., X]
    """
    return scores.sort(stable=True, dim=-1, descending=True).indices[..., :count]


def select(known: Candidates, root: Tensor, num_steps: int, num_draft_tokens: int) -> Nodes:
    """The nodes of the tree.

    root  [B]
    """
    chosen = leading(known.scores, num_draft_tokens - 1).sort(-1).values  # (3) in the order of their numbers
    tokens = torch.cat([root[:, None], known.tokens.gather(1, chosen)], 1)
    # a parent's place is how many chosen numbers are not above its own: none where it is the root
    numbers = known.parents.gather(1, chosen)
    parents = (chosen[:, None, :] <= numbers[:, :, None]).sum(-1)
    parents = torch.cat([torch.zeros_like(root)[:, None], parents], 1)
    return Nodes(tokens, parents, *lineage(parents, num_steps))


def lineage(parents: Tensor, num_steps: int) -> tuple[Tensor, Tensor]:
    """How deep each node lies and whom it sees: (4) and (5).

    parents  [B, T]
    ->       depths [B, T], words [B, T]
    """
    up = torch.arange(parents.shape[1], device=parents.device).expand_as(parents)
    depths, words = torch.zeros_like(parents), 1 << up
    for _ in range(num_steps):
        depths = depths + (up > 0)
        up = parents.gather(1, up)
        words = words | (1 << up)
    return depths, words


def visible(words: Tensor, first: Tensor, num_slots: int) -> Tensor:
    """Who sees which slots: all below the first one of the tree, and those that the words name.

    words  [B, T]
    first  [B]
    ->     [B, T, S]  S = num_slots
    """
    node = torch.arange(num_slots, device=words.device) - first[:, None]  # [B, S]
    named = (words[:, :, None] >> node.clamp(0, MOST_NODES - 1)[:, None]) & 1
    return torch.where(node[:, None] < 0, True, (named == 1) & (node[:, None] < MOST_NODES))


def level(first: Tensor, k: int, words: Tensor, num_slots: int) -> tuple[Tensor, Tensor, Tensor]:
    """Where the tokens of one level sit while the draft reads them at its step k = 2 .. S.

    first  [B]     the slot after the text that the draft has read
    words  [B, X]  whom each sees of all tokens of this tree that the draft has read
    ->     positions [B, X], slots [B, X], visible [B, X, S]
    """
    column = torch.arange(words.shape[1], device=words.device) + (k - 2) * words.shape[1]
    positions = (first + k - 2)[:, None].expand_as(words)
    return positions, first[:, None] + column, visible(words, first, num_slots)


def pick(x: Tensor, rows: Tensor) -> Tensor:
    """Some rows of each sequence.

    x     [B, T, ...]
    rows  [B, X]
    ->    [B, X, ...]
    """
    return x[torch.arange(len(x), device=x.device)[:, None], rows]


def walk(nodes: Nodes, own: Tensor, num_steps: int) -> tuple[Tensor, Tensor, Tensor]:
    """Equation (6).

    own  [B, T]  the target's own token after each node
    ->   path [B, P], accepted [B], next [B]  P = S + 1: the nodes that stand, then others; how many without the root
    """
    missed = nodes.tokens != own.gather(1, nodes.parents)
    missed[:, 0] = False
    bits = 1 << torch.arange(missed.shape[1], device=own.device)
    stands = (nodes.words & (missed * bits).sum(1, keepdim=True)) == 0
    path = leading(stands.long(), num_steps + 1)
    accepted = stands.sum(1) - 1
    return path, accepted, own.gather(1, path.gather(1, accepted[:, None]))[:, 0]
