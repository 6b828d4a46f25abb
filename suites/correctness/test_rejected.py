"""Claim: a rejected token leaves no trace in anything that is proposed after it.

Born of vLLM #14649 (keys of rejected drafts stayed in the draft's cache, 8 to 15 % of acceptance lost) and of SGLang
#34189 (a cache silently corrupted by more than four drafts). Two generations that differ only in their wrong tokens
must go on with the same bits, and after all rejections the draft must say what a draft says that reads the text once,
from scratch.
"""

from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from harness.compare import bit_equal, hold
from suites.draws import random_tokens
from suites.opened import OpenSpeculation
from suites.scripted import SIDES, Loop, listen, loops, tiny_draft, tiny_target

pytestmark = [pytest.mark.correctness, pytest.mark.pair("llama-eagle3")]

PINNED = Loop(tiny_target(7), tiny_draft(8), (5, 3, 1))
TWO_LAYERS = Loop(tiny_target(2), tiny_draft(3, num_hidden_layers=2), (2, 6))
NUM_DRAFT_TOKENS = 3
STEPS = st.lists(st.integers(0, NUM_DRAFT_TOKENS), min_size=1, max_size=3)


def sure(accepted: int) -> range:
    """Which proposals of a cycle follow true tokens alone: one more than were accepted."""
    return range(min(accepted + 1, NUM_DRAFT_TOKENS))


@pytest.mark.parametrize("side", SIDES)
@given(loop=loops(), steps=STEPS)
@example(loop=PINNED, steps=[0, 1, 2, 0, 3])
@example(loop=TWO_LAYERS, steps=[1, 0, 3])
def test_it_does_not_matter_which_wrong_token_was_proposed(side: str, loop: Loop, steps: list[int]) -> None:
    one, other = (listen(loop, side, steps, NUM_DRAFT_TOKENS, by) for by in (1, 2))

    for cycle, standing in enumerate(one.standing):
        for k in sure(steps[cycle]):
            for row, last in enumerate(standing):
                a, b = (heard.step(heard.chain(cycle)[k], row, last + k) for heard in (one, other))
                bit_equal("logits", a[0], b[0])
                bit_equal("feedback", a[1], b[1])


@pytest.mark.parametrize("side", SIDES)
@given(loop=loops(), steps=STEPS)
@example(loop=PINNED, steps=[0, 1, 2, 0, 3])
@example(loop=TWO_LAYERS, steps=[1, 0, 3])
def test_after_rejections_the_draft_says_what_it_says_from_scratch(side: str, loop: Loop, steps: list[int]) -> None:
    heard = listen(loop, side, steps, NUM_DRAFT_TOKENS)

    truth = loop.open("reference")
    out = truth.target(heard.text, capture=truth.draft.capture_points)
    scratch = truth.draft.unroll(heard.text, out, NUM_DRAFT_TOKENS)
    size = {"depth": truth.target.num_layers + NUM_DRAFT_TOKENS, "width": truth.target.config.hidden}
    for cycle, standing in enumerate(heard.standing):
        for k in sure(steps[cycle]):
            for row, last in enumerate(standing):
                logits, _ = heard.step(heard.chain(cycle)[k], row, last + k)
                hold("logits", logits, scratch[k, row, last], **size)


def read_target(speculation: OpenSpeculation, tokens: Tensor, positions: Tensor, cache: Any) -> Tensor:
    """[B, T, V]"""
    return speculation.target.module(tokens, positions, (), cache).logits


def read_draft(speculation: OpenSpeculation, tokens: Tensor, positions: Tensor, cache: Any) -> Tensor:
    """[B, T, Vd], beside hidden states that follow from the tokens"""
    width = speculation.target.config.hidden
    hidden = torch.sin(tokens[..., None] + torch.arange(width)).to(torch.float64)
    return speculation.draft.module(tokens, hidden, positions, cache).logits


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize(("model", "read"), [("target", read_target), ("draft", read_draft)], ids=["target", "draft"])
@given(loop=loops(), kept=st.integers(1, 6), rejected=st.integers(1, 5))
@example(loop=PINNED, kept=3, rejected=4)
def test_rolled_back_is_never_read(model: str, read: Any, side: str, loop: Loop, kept: int, rejected: int) -> None:
    speculation = loop.open(side)
    batch, vocab = len(loop.lengths), speculation.target.config.vocab
    tokens = random_tokens(vocab, batch, kept + rejected, loop.target.seed)
    places = torch.arange(kept + rejected).repeat(batch, 1)
    module = getattr(speculation, model).module
    straight, returned = (module.new_cache(batch, kept + rejected) for _ in range(2))
    for cache in (straight, returned):
        read(speculation, tokens[:, :kept], places[:, :kept], cache)

    read(speculation, (tokens + 1)[:, kept:] % vocab, places[:, kept:], returned)
    returned.roll_back(torch.full((batch,), kept))

    for got, want in zip([*returned.keys, *returned.values], [*straight.keys, *straight.values], strict=True):
        bit_equal("cache", got, want)
    logits = [read(speculation, tokens[:, kept:], places[:, kept:], cache) for cache in (returned, straight)]
    bit_equal("logits", *logits)
