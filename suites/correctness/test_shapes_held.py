"""Claim: every shape line of the reference is true of every call.

Born of SGLang #24620 and #24215 (a width taken from the wrong config, seen only where target and draft differ) and of
shape comments in general, which nobody runs. Here a docstring is held to every call of a forward, an unroll and a
generation whose sizes are all different, so that no letter can stand for another.
"""

import sys
from types import ModuleType

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

import reference.decoding
from harness.shapes import watch
from reference.drafts import eagle3_keys
from suites.catalog import PAIRS, OpenTarget
from suites.draws import EVERY_FLAG, PINNED_DRAFT, PINNED_TARGET, Drawn, eagle3_drafts, random_tokens
from suites.stand import stand

pytestmark = [pytest.mark.correctness, pytest.mark.pair("eagle3")]


def pages_of(*starts: ModuleType) -> list[ModuleType]:
    """These pages and every page of the reference that they take something from."""
    found = {page.__name__ for page in starts}
    waiting = list(starts)
    while waiting:
        taken = {getattr(value, "__module__", None) or "" for value in vars(waiting.pop()).values()}
        new = {name for name in taken if name.startswith("reference.")} - found
        found |= new
        waiting += [sys.modules[name] for name in new]
    return [sys.modules[name] for name in sorted(found)]


OWN = (reference.decoding, PAIRS["llama"].page, PAIRS["eagle3"].page, eagle3_keys)
PAGES = pages_of(*OWN)


def use_all(target: OpenTarget, drawn: Drawn, batch: int, width: int) -> None:
    """Forward, unroll, greedy and drawn generation, a rollback: every page at work."""
    draft = stand(drawn, target)
    tokens = random_tokens(target.config.vocab, batch, width, drawn.seed)
    out = target(tokens, capture=draft.capture_points)
    draft.unroll(tokens, out, 3)
    eagle3_keys.check_vocab_map(draft.module.d2t, draft.module.t2d, target.config.vocab)
    prompts = [row[: 1 + i % width] for i, row in enumerate(tokens)]
    for temperature in (0.0, 1.0):
        reference.decoding.generate(
            target.module, draft.module, prompts, 5, 2, draft.capture_points, temperature=temperature
        )
        reference.decoding.generate(
            target.module, draft.module, prompts, 5, 9, draft.capture_points, temperature, topk=6, num_steps=2
        )
    reference.decoding.generate(target.module, None, tokens, 2, 0, temperature=1.0)
    cache = target.module.new_cache(batch, width + 3)
    target.module(tokens, cache=cache)
    cache.roll_back(torch.ones(batch, dtype=torch.int64))


@given(drawn=eagle3_drafts(PINNED_TARGET), batch=st.integers(1, 3), width=st.integers(1, 7))
@example(drawn=PINNED_DRAFT, batch=5, width=7)
@example(drawn=EVERY_FLAG, batch=3, width=11)
@torch.no_grad()
def test_every_call_keeps_its_shape_lines(target: OpenTarget, drawn: Drawn, batch: int, width: int) -> None:
    with watch(*PAGES):
        use_all(target, drawn, batch, width)


@torch.no_grad()
def test_no_shape_line_goes_unheld(target: OpenTarget) -> None:
    with watch(*PAGES) as seen:
        use_all(target, EVERY_FLAG, 5, 7)

    # the ops that all pages share also hold what other pages need
    own = tuple(f"{page.__name__}." for page in OWN)
    assert [name for name, calls in seen.calls.items() if not calls and name.startswith(own)] == []
    assert sum(calls > 0 for calls in seen.calls.values()) > 20
