"""Claim: every speculation of the catalog changes how soon greedy text comes, never which text it is.

Ways of drafting differ in what a draft reads, where it stands and what it keeps; what they share is held here, one
claim for all of them. Born of SGLang #34189 (cache corrupted for more than four drafts), vLLM #14649 (keys of rejected
tokens kept) and of transformers' Gemma 4 assistant, whose proposals depend on tokens that were rejected.
"""

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from harness.acceptance import emitted
from harness.compare import bit_equal
from optimized.decoding import Engine
from suites.algorithms import ALGORITHMS
from suites.catalog import PAIRS, SPECULATIONS
from suites.couples import COUPLES
from suites.opened import OpenSpeculation
from suites.scripted import SIDES, PoisonedEngine, seat, written

pytestmark = [pytest.mark.correctness]

EACH = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.pair(name)) for name in COUPLES if name in SPECULATIONS]
)
BOTH = pytest.mark.parametrize("side", SIDES)
DRAFTS = (1, 3, 5)
NUM_TOKENS = {"nightly": 48}
STEPS = [3, 0, 1, 2, 0, 3]
"""accepted drafts of three, step by step: every count, and every count after a rejection"""


@cache
def opened(name: str, side: str) -> OpenSpeculation:
    return COUPLES[name].open(side)


class Dictated:
    """A real draft whose greedy proposals are taken down and replaced by what makes a step accept what it should.

    text     [B, P]  prompts and what the target says after them
    lengths  of the prompts
    steps    accepted drafts of each step, the same for every row
    by       what is added to a token to make it wrong
    """

    def __init__(
        self, inner: Any, text: Tensor, lengths: list[int], steps: list[int], k: int, by: int, vocab: int
    ) -> None:
        self.inner, self.text, self.steps, self.k, self.by = inner, text, steps, k, by
        self.lengths, self.vocab = torch.tensor(lengths), vocab
        self.meant: list[Tensor] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner(*args, **kwargs)

    def to_target(self, draft_ids: Tensor) -> Tensor:
        """The reference's proposal: [B, 1] -> [B, 1]"""
        return self._replace(self.inner.to_target(draft_ids))

    def propose(self, top: Tensor) -> Tensor:
        """The twin's proposal: [B, H] -> [B]"""
        return self._replace(self.inner.propose(top))

    def _replace(self, tokens: Tensor) -> Tensor:
        if tokens.numel() != len(self.lengths):
            return tokens  # ids that are asked about, not proposed
        cycle, k = divmod(len(self.meant), self.k)
        self.meant.append(tokens.flatten().clone())
        # rows that are done repeat their last step
        before = self.steps[: min(cycle, len(self.steps) - 1)]
        place = self.lengths + 1 + sum(emitted(count) for count in before) + k
        true = self.text.gather(1, place.clamp(max=self.text.shape[1] - 1)[:, None])[:, 0]
        wrong = k == self.steps[min(cycle, len(self.steps) - 1)]
        said = (true + self.by) % self.vocab if wrong else true
        return said.view(tokens.shape)


def dictate(name: str, side: str, steps: list[int], k: int, by: int = 1) -> tuple[Any, Dictated, Tensor]:
    """What a speculation says whose steps accept what they are told; its draft; what the target says alone."""
    speculation, prompts = opened(name, side), COUPLES[name].prompts()
    num_tokens = 1 + sum(emitted(count) for count in steps)
    plain = speculation.generate(prompts, num_tokens + k, 0).tokens
    lengths = [len(row) for row in prompts]
    vocab, text = speculation.target.config.vocab, written(prompts, plain)
    seated, draft = seat(speculation, lambda inner: Dictated(inner, text, lengths, steps, k, by, vocab))
    said = seated.generate(prompts, num_tokens, k)
    return said, draft, plain[:, :num_tokens]


def test_every_speculation_has_a_couple() -> None:
    assert set(COUPLES) == set(SPECULATIONS)
    for name, speculation in SPECULATIONS.items():
        assert PAIRS[speculation.target].kind == "target"
        assert ALGORITHMS[speculation.draft] == speculation.algorithm, name


@EACH
@BOTH
def test_its_own_draft_leaves_the_text_alone(name: str, side: str, profile: str) -> None:
    speculation, prompts = opened(name, side), COUPLES[name].prompts()
    num_tokens = NUM_TOKENS.get(profile, 12)
    plain = speculation.generate(prompts, num_tokens, 0).tokens

    for num_drafts in DRAFTS:
        for rows in (slice(0, 3), slice(2, 3)) if num_drafts == 3 or profile == "nightly" else (slice(0, 3),):
            said = speculation.generate(prompts[rows], num_tokens, num_drafts)
            bit_equal("tokens", said.tokens, plain[rows])


@EACH
@BOTH
def test_every_accepted_count_leaves_the_text_alone(name: str, side: str) -> None:
    said, _, plain = dictate(name, side, STEPS, 3)

    assert said.accepted == [STEPS] * 3
    bit_equal("tokens", said.tokens, plain)


@EACH
@BOTH
@pytest.mark.parametrize("num_drafts", DRAFTS)
def test_a_draft_that_is_always_right_says_all_its_tokens(name: str, side: str, num_drafts: int) -> None:
    said, _, plain = dictate(name, side, [num_drafts] * 3, num_drafts)

    assert said.accepted == [[num_drafts] * 3] * 3
    bit_equal("tokens", said.tokens, plain)


@EACH
@BOTH
def test_a_rejected_token_changes_no_proposal(name: str, side: str) -> None:
    one, other = (dictate(name, side, STEPS, 3, by)[1].meant for by in (1, 2))

    for cycle, accepted in enumerate(STEPS):
        # proposals that follow true tokens alone: one more than were accepted
        for k in range(min(accepted + 1, 3)):
            bit_equal("proposal", one[3 * cycle + k], other[3 * cycle + k])


@EACH
def test_both_sides_accept_alike(name: str) -> None:
    prompts = COUPLES[name].prompts()
    for how in ({"temperature": 0.0}, {"temperature": 1.0, "seed": 3}):
        reference, twin = (opened(name, side).generate(prompts, 12, 3, **how) for side in SIDES)
        bit_equal("tokens", twin.tokens, reference.tokens)
        assert twin.accepted == reference.accepted


@EACH
def test_nothing_that_is_spoilt_between_cycles_was_needed(name: str) -> None:
    speculation, prompts = opened(name, "optimized"), COUPLES[name].prompts()
    models = (speculation.target.module, speculation.draft.module, speculation.draft.capture_points)

    usual, spoilt = (make(*models).generate(prompts, 12, 3) for make in (Engine, PoisonedEngine))

    bit_equal("tokens", spoilt.tokens, usual.tokens)
    assert spoilt.accepted == usual.accepted
