"""Trees of drafts by paths: what a claim about trees is held against, and how a side is asked for one.

The derivation is a second witness: it knows tuples of tokens, sorts them and compares prefixes, where the code counts
candidates and shifts bits.
"""

from fractions import Fraction
from functools import cache
from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st

from optimized import trees as twin
from optimized.ops.sight import Sight
from reference import trees as page
from reference.decoding import Generation
from suites.opened import OpenSpeculation
from suites.scripted import Loop, tiny_draft, tiny_target


class Size(NamedTuple):
    """How a tree is asked for; named as `generate` names it."""

    topk: int
    num_steps: int
    num_draft_tokens: int
    """D, with the root"""


@st.composite
def sizes(draw: st.DrawFn, max_topk: int = 4, max_steps: int = 4) -> Size:
    """Any tree that can be, of few nodes or of all there are."""
    topk, num_steps = draw(st.integers(1, max_topk)), draw(st.integers(1, max_steps))
    offered = topk + topk**2 * (num_steps - 1)
    return Size(topk, num_steps, draw(st.integers(num_steps + 1, max(num_steps + 1, min(offered + 1, 24)))))


Path = tuple[int, ...]


class Law(NamedTuple):
    """What a draft says after every path: chances in eighths, so that products are exact and ties abound."""

    seed: int
    vocab: int

    def chances(self, path: Path) -> list[Fraction]:
        generator = torch.Generator().manual_seed(hash((self.seed, path)) % 2**40)
        rows = torch.randint(0, self.vocab, (8,), generator=generator)
        return [Fraction(int(n), 8) for n in torch.bincount(rows, minlength=self.vocab)]

    def offers(self, path: Path, topk: int) -> list[tuple[int, Fraction]]:
        """The likeliest tokens, lowest number among equals."""
        ranked = sorted(enumerate(self.chances(path)), key=lambda pair: -pair[1])
        return ranked[:topk]

    def score(self, path: Path) -> Fraction:
        """The product of the chances along a path."""
        return self.score(path[:-1]) * self.chances(path[:-1])[path[-1]] if path else Fraction(1)


def best_paths(law: Law, size: Size) -> list[Path]:
    """The nodes of a tree as paths, the root first."""
    beam: list[Path] = [()]
    born: list[Path] = []
    for _ in range(size.num_steps):
        children = [(*path, token) for path in beam for token, _ in law.offers(path, size.topk)]
        born += children
        # sorting is stable: of equals the first born
        beam = sorted(children, key=law.score, reverse=True)[: size.topk]
    kept = set(sorted(born, key=law.score, reverse=True)[: size.num_draft_tokens - 1])
    return [(), *(path for path in born if path in kept)]


def grown(side: str, laws: list[Law], size: Size) -> page.Nodes:
    """The nodes that a side finds."""
    root = torch.zeros(len(laws), dtype=torch.int64)
    room: Any = page if side == "reference" else twin
    known, beam = room.begin(root) if room is page else room.begin(root, torch.float64)
    paths: list[list[Path]] = [[()] for _ in laws]
    for _ in range(size.num_steps):
        offers = [[law.offers(p, size.topk) for p in members] for law, members in zip(laws, paths, strict=True)]
        ids = torch.tensor([[[token for token, _ in offer] for offer in row] for row in offers])
        chances = torch.tensor([[[float(c) for _, c in offer] for offer in row] for row in offers]).double()
        known, beam = room.grow(known, beam, ids, chances)
        tokens = known.tokens.gather(1, beam.numbers)
        paths = [
            [(*members[o], t) for o, t in zip(origin, row, strict=True)]
            for members, origin, row in zip(paths, beam.origin.tolist(), tokens.tolist(), strict=True)
        ]
    if room is page:
        return page.select(known, root, size.num_steps, size.num_draft_tokens)
    tokens, parents = twin.select(known, root, size.num_draft_tokens)
    line = twin.lines(parents, size.num_steps)
    depths = torch.stack([node > 0 for node in line]).sum(0)
    return page.Nodes(tokens, parents, depths, Sight(1, root, line, size.num_draft_tokens).words())


FEW_WORDS = Loop(tiny_target(6, vocab=5), tiny_draft(7, vocab=5), (5, 1, 3))
"""five words: a tree that offers four of them accepts often"""
MORE_WORDS = Loop(tiny_target(7), tiny_draft(8), (4, 2))
NUM_TOKENS = 14


@cache
def _opened(side: str, loop: Loop) -> OpenSpeculation:
    return loop.open(side)


def opened(side: str, loop: Loop) -> OpenSpeculation:
    """A pair, opened once, whatever its prompts: claims draw trees and prompts for it."""
    return _opened(side, loop._replace(lengths=()))


@st.composite
def asked(draw: st.DrawFn) -> Loop:
    """Ragged prompts for one of the two pairs."""
    loop = draw(st.sampled_from([FEW_WORDS, MORE_WORDS]))
    return loop._replace(lengths=tuple(draw(st.lists(st.integers(1, 8), min_size=1, max_size=3))))


def said(speculation: OpenSpeculation, loop: Loop, size: Size, num_tokens: int = NUM_TOKENS, **more: Any) -> Generation:
    """What a speculation says in trees."""
    return speculation.generate(loop.prompts, num_tokens, **size._asdict(), **more)
