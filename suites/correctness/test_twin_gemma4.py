"""Claim: the twin of Gemma 4 text is its reference on one rank and on many, and speculates without changing a text.

Born of SGLang #28005 (captures of Gemma 4 that the next layer went on to change), of `layer_scalar` left out of a fused
norm, of a cache that gives layers without keys of their own the wrong donor, and of key/value heads repeated by rank
modulo heads. Layers of one model differ here in all that layers can differ in: heads, widths, windows, ropes, donors.
"""

import pytest
import torch

from harness.checkpoints import CheckpointError
from harness.compare import bit_equal, hold
from suites.catalog import open_target
from suites.correctness.test_twins import hold_to_reference
from suites.draws import Drawn, eagle3_weights, folders, random_tokens
from suites.families.gemma4 import (
    DENSE,
    EXPERTS,
    PINNED,
    SIZES,
    drawn_of,
)
from suites.scripted import SIDES, tiny_draft
from suites.stand import stand_as
from suites.twins import LOOPS

pytestmark = [pytest.mark.correctness, pytest.mark.pair("gemma4")]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("drawn", [PINNED["dense"], drawn_of(EXPERTS, top_k_experts=6), PINNED["edge"]], ids=SIZES)
def test_in_half_precision_the_target_is_the_reference(drawn: Drawn, device: str) -> None:
    hold_to_reference(drawn, torch.bfloat16, 1, 9, device)


@pytest.mark.parametrize(
    ("drawn", "ranks", "what"),
    [(PINNED["experts"], 4, "6 experts"), (PINNED["dense"], 3, "4 heads")],
    ids=["experts", "heads"],
)
def test_what_ranks_do_not_divide_is_refused(drawn: Drawn, ranks: int, what: str) -> None:
    refusal = pytest.raises(CheckpointError, match=rf"cannot be split over tp_size={ranks}.*{what}")
    with folders(drawn) as (path, _), refusal:
        open_target(path, side="optimized", tp_size=ranks)


def test_layers_that_are_shared_take_no_room_in_the_cache() -> None:
    with folders(PINNED["edge"]) as (path, _):
        twin = open_target(path, side="optimized").module

    shapes = [tuple(keys.shape) for keys in twin.new_cache(2, 10).keys]

    # sliding layers have two heads of 8, full ones two of 16
    assert shapes == [(2, 64, 2, width) for width in (8, 8, 16, 8, 8)]


def test_a_draft_says_on_the_twin_what_it_says_on_the_reference() -> None:
    loop, draws = LOOPS["gemma4"], {"temperature": 0.8, "seed": 3}

    want, got = (loop.open(side).generate(loop.prompts, 10, 2, **draws) for side in SIDES)

    bit_equal("tokens", got.tokens, want.tokens)
    assert got.accepted == want.accepted
    assert len({count for row in got.accepted for count in row}) > 1


@pytest.mark.parametrize("size", SIZES)
def test_greedy_text_is_that_of_plain_decoding(size: str) -> None:
    loop = LOOPS["gemma4"]._replace(target=PINNED[size], draft=tiny_draft(7, vocab=331))
    speculation = loop.open("optimized")

    said, plain = (speculation.generate(loop.prompts, 8, k) for k in (3, 0))

    bit_equal("tokens", said.tokens, plain.tokens)


def test_a_draft_shares_the_table_unscaled_and_the_head_without_its_cap() -> None:
    target, config = drawn_of(DENSE, final_logit_softcapping=2.0), tiny_draft(4, 331).keys
    tensors = eagle3_weights(tiny_draft(4, 331), own_embedding=False)
    del tensors["lm_head.weight"]
    with folders(target) as (path, _):
        sides = [open_target(path, side=side, dtype=torch.float64) for side in SIDES]
    drafts = [stand_as(config, tensors, opened) for opened in sides]
    tokens = random_tokens(331, 2, 6, 1)
    hidden = drafts[0].fuse(sides[0](tokens, capture=drafts[0].capture_points).aux)

    want, got = (draft(tokens.roll(-1, 1), hidden) for draft in drafts)

    for name, a, b in zip(got._fields, got, want, strict=True):
        hold(name, a, b, depth=1, width=2 * sides[0].config.hidden)
