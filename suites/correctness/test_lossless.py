"""Claim: speculation changes how soon greedy text comes, never which text it is.

Born of SGLang #34189 (silent corruption of the cache for more than four draft tokens), vLLM #14649 and #9730 (keys of
rejected tokens kept, keys of the bonus token corrupted) and gpt-fast, whose verify crashes on its first call.
Texts are equal in float64 on either side, and bit-equal in every dtype where the twin keeps the chain rule.
A scripted draft errs where it is told to, so every accepted count is known before the loop says it.
"""

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from harness.acceptance import emitted
from harness.compare import bit_equal
from suites.draws import random_tokens
from suites.scripted import SIDES, Loop, loops, misspelt, places_for, script, tiny_draft, tiny_target, written

pytestmark = [pytest.mark.correctness, pytest.mark.pair("llama-eagle3")]

PINNED = Loop(tiny_target(7), tiny_draft(8), (5, 3, 1))
FEW_WORDS = Loop(tiny_target(6, vocab=5), tiny_draft(7, vocab=5), (2, 7))
DRAFTS = (1, 3, 5)
BATCHES = (1, 3, 8)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
RUNS = st.lists(st.integers(0, max(DRAFTS)), min_size=1, max_size=4)
# prompts, and tokens after each
COUNTS = {"pinned": (8, 8), "quick": (8, 8), "ci": (8, 8), "nightly": (64, 128)}
ERRORS = 0.3


def rotated(counts: list[int], num_draft_tokens: int, batch: int) -> list[list[int]]:
    """The same steps for every sequence, each beginning elsewhere."""
    fitting = [min(count, num_draft_tokens) for count in counts]
    turns = [row % len(fitting) for row in range(batch)]
    return [fitting[turn:] + fitting[:turn] for turn in turns]


def cut(said: Tensor, end: int, num_tokens: int) -> list[int]:
    """One text as it must look when it ends with the token `end`."""
    text = said[:num_tokens].tolist()
    length = [*text, end].index(end) + 1
    return (text[:length] + [-1] * num_tokens)[:num_tokens]


@pytest.mark.parametrize("side", SIDES)
@given(
    loop=loops(), num_draft_tokens=st.sampled_from(DRAFTS), counts=st.lists(st.integers(0, 5), min_size=1, max_size=5)
)
@example(loop=PINNED, num_draft_tokens=1, counts=[0, 1, 1, 0])
@example(loop=FEW_WORDS, num_draft_tokens=3, counts=[0, 1, 2, 3, 3, 0])
@example(loop=PINNED, num_draft_tokens=5, counts=[5, 0, 4, 1, 3, 2])
def test_every_accepted_count_leaves_the_text_alone(
    side: str, loop: Loop, num_draft_tokens: int, counts: list[int]
) -> None:
    pattern = rotated(counts, num_draft_tokens, len(loop.lengths))
    num_tokens = 1 + sum(emitted(count) for count in pattern[0])
    speculation = loop.open(side)
    plain = speculation.generate(loop.prompts, num_tokens, 0)
    places = places_for(loop.lengths, pattern, num_draft_tokens)
    known = misspelt(written(loop.prompts, plain.tokens), places, speculation.target.config.vocab)
    scripted, _ = script(speculation, known)

    said = scripted.generate(loop.prompts, num_tokens, num_draft_tokens)

    assert said.accepted == pattern
    bit_equal("tokens", said.tokens, plain.tokens)


@pytest.mark.parametrize("side", SIDES)
@given(loop=loops(), num_draft_tokens=st.sampled_from(DRAFTS), num_tokens=st.integers(1, 12))
@example(loop=PINNED, num_draft_tokens=3, num_tokens=14)
@example(
    loop=Loop(tiny_target(6, vocab=5), tiny_draft(7, vocab=5, draft_vocab_size=3), (2, 7)),
    num_draft_tokens=5,
    num_tokens=12,
)
def test_a_real_draft_leaves_the_text_alone(side: str, loop: Loop, num_draft_tokens: int, num_tokens: int) -> None:
    speculation = loop.open(side)

    said = speculation.generate(loop.prompts, num_tokens, num_draft_tokens)

    plain = speculation.generate(loop.prompts, num_tokens, 0)
    bit_equal("tokens", said.tokens, plain.tokens)


@pytest.mark.parametrize("num_draft_tokens", DRAFTS)
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("side", SIDES)
def test_a_careless_draft_leaves_the_text_alone(side: str, batch: int, num_draft_tokens: int, profile: str) -> None:
    num_prompts, num_tokens = COUNTS[profile]
    lengths = torch.randint(1, 12, (num_prompts,), generator=torch.Generator().manual_seed(batch)).tolist()
    loop = Loop(tiny_target(7), tiny_draft(8), tuple(lengths))
    speculation = loop.open(side)
    vocab = speculation.target.config.vocab

    for prompts in torch.arange(num_prompts).split(batch):
        rows = [loop.prompts[i] for i in prompts]
        plain = speculation.generate(rows, num_tokens, 0)
        text = written(rows, plain.tokens)
        chance = torch.rand(text.shape, generator=torch.Generator().manual_seed(int(prompts[0])))
        scripted, _ = script(speculation, misspelt(text, (chance < ERRORS).nonzero().tolist(), vocab))
        said = scripted.generate(rows, num_tokens, num_draft_tokens)
        bit_equal("tokens", said.tokens, plain.tokens)


@pytest.mark.parametrize("side", SIDES)
@given(loop=loops(), num_draft_tokens=st.sampled_from(DRAFTS), num_tokens=st.integers(1, 12), end_at=st.integers(-2, 1))
@example(loop=PINNED, num_draft_tokens=5, num_tokens=4, end_at=-1)
@example(loop=PINNED, num_draft_tokens=3, num_tokens=9, end_at=-1)
@example(loop=PINNED, num_draft_tokens=5, num_tokens=12, end_at=5)
@example(loop=PINNED, num_draft_tokens=3, num_tokens=12, end_at=0)
@example(loop=PINNED, num_draft_tokens=3, num_tokens=12, end_at=8)
def test_the_end_may_fall_inside_an_accepted_run(
    side: str, loop: Loop, num_draft_tokens: int, num_tokens: int, end_at: int
) -> None:
    speculation = loop.open(side)
    plain = speculation.generate(loop.prompts, num_tokens + num_draft_tokens, 0).tokens
    # a token that the first sequence says, or one that nobody can say
    end = [*plain[0].tolist(), speculation.target.config.vocab][end_at]
    scripted, _ = script(speculation, written(loop.prompts, plain))

    said = scripted.generate(loop.prompts, num_tokens, num_draft_tokens, eos_token_id=end)

    texts = [cut(row, end, num_tokens) for row in plain]
    assert said.tokens.tolist() == texts
    # the prompt gave the first token; every step gives K + 1, the last one perhaps more than is wanted
    wanted = [num_tokens - text.count(-1) - 1 for text in texts]
    steps = [-(-more // emitted(num_draft_tokens)) for more in wanted]
    assert said.accepted == [[num_draft_tokens] * count for count in steps]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(loop=loops(max_batch=2, longest=5), num_draft_tokens=st.sampled_from(DRAFTS))
@example(loop=Loop(tiny_target(7), tiny_draft(8), (5, 1)), num_draft_tokens=3)
def test_verify_has_the_bits_of_decode(dtype: torch.dtype, loop: Loop, num_draft_tokens: int) -> None:
    target = loop.open("optimized", dtype, exact=True).target
    batch, length, columns = len(loop.lengths), loop.lengths[0], num_draft_tokens + 1
    tokens = random_tokens(target.config.vocab, batch, length + columns, loop.target.seed)
    places = torch.arange(length + columns).repeat(batch, 1)
    capture = tuple(range(target.num_layers + 1))
    step_by_step, at_once = (target.module.new_cache(batch, 64) for _ in range(2))
    for cache in (step_by_step, at_once):
        target.module(tokens[:, :length], places[:, :length], capture, cache)

    steps = [slice(p, p + 1) for p in range(length, length + columns)]
    decoded = [target.module(tokens[:, s], places[:, s], capture, step_by_step) for s in steps]
    verified = target.module(tokens[:, length:], places[:, length:], capture, at_once)

    for name in verified._fields:
        bit_equal(name, getattr(verified, name), torch.cat([getattr(out, name) for out in decoded], 1))


@pytest.mark.parametrize("num_draft_tokens", DRAFTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_text_is_the_same_in_every_dtype_where_verify_is_decode(dtype: torch.dtype, num_draft_tokens: int) -> None:
    speculation = PINNED.open("optimized", dtype, exact=True)
    pattern = rotated([num_draft_tokens, 0, 1], num_draft_tokens, len(PINNED.lengths))
    num_tokens = 1 + sum(emitted(count) for count in pattern[0])
    plain = speculation.generate(PINNED.prompts, num_tokens, 0)
    places = places_for(PINNED.lengths, pattern, num_draft_tokens)
    known = misspelt(written(PINNED.prompts, plain.tokens), places, speculation.target.config.vocab)
    scripted, _ = script(speculation, known)

    said = scripted.generate(PINNED.prompts, num_tokens, num_draft_tokens)

    assert said.accepted == pattern
    bit_equal("tokens", said.tokens, plain.tokens)
