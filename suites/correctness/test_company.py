"""Claim: what a sequence says, and how many drafts it accepts, does not depend on its company.

Born of SGLang #27846 (only the last sequence of a batch was read rightly) and #22958 (stale values in padded rows), and
of vLLM #48892 (acceptance differs between batches of one and of eight) and #39773 (indices left from the batch before).
Order, neighbours, padding, bucket and chunk size must change no token and no accepted count; neither may memory that
nobody is allowed to read. Draws are keyed by the sequence's number, so the same holds at a temperature.
"""

from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from optimized.decoding import Engine
from reference.decoding import Generation
from suites.draws import SEEDS
from suites.opened import OpenSpeculation
from suites.scripted import SIDES, Loop, PoisonedEngine, loops, tiny_draft, tiny_target

pytestmark = [pytest.mark.correctness, pytest.mark.pair("llama-eagle3")]

# few words: a draft of random weights is right often enough for every count to occur
PINNED = Loop(tiny_target(6, vocab=5), tiny_draft(7, vocab=5), (5, 1, 3, 8))
NUM_TOKENS, NUM_DRAFT_TOKENS, SEED = 10, 3, 11
TEMPERATURES = st.sampled_from([0.0, 0.8])


def speak(speculation: OpenSpeculation, loop: Loop, order: list[int], temperature: float, **engine: Any) -> Generation:
    """Some of a loop's sequences in some order, each under its own number."""
    prompts = [loop.prompts[i] for i in order]
    draws = {"temperature": temperature, "seed": SEED, "sequence_ids": order}
    return speculation.generate(prompts, NUM_TOKENS, NUM_DRAFT_TOKENS, **draws, **engine)


def texts(said: Generation) -> list[tuple[list[int], list[int]]]:
    """(tokens, accepted counts) of each sequence."""
    return list(zip(said.tokens.tolist(), said.accepted, strict=True))


def shuffled(loop: Loop, seed: int) -> list[int]:
    """The numbers of a loop's sequences in some order."""
    return torch.randperm(len(loop.lengths), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_the_pinned_batch_accepts_more_than_one_count(temperature: float) -> None:
    said = speak(PINNED.open("reference"), PINNED, [0, 1, 2, 3], temperature)

    assert len({count for row in said.accepted for count in row}) > 1


@pytest.mark.parametrize("side", SIDES)
@given(loop=loops(), temperature=TEMPERATURES, seed=SEEDS)
@example(loop=PINNED, temperature=0.0, seed=1)
@example(loop=PINNED, temperature=0.8, seed=1)
def test_any_order_says_the_same(side: str, loop: Loop, temperature: float, seed: int) -> None:
    speculation, order = loop.open(side), shuffled(loop, seed)

    turned = speak(speculation, loop, order, temperature)

    usual = texts(speak(speculation, loop, sorted(order), temperature))
    assert texts(turned) == [usual[i] for i in order]


@pytest.mark.parametrize("side", SIDES)
@given(loop=loops(), temperature=TEMPERATURES)
@example(loop=PINNED, temperature=0.0)
@example(loop=PINNED, temperature=0.8)
def test_alone_or_in_company_a_sequence_says_the_same(side: str, loop: Loop, temperature: float) -> None:
    speculation, names = loop.open(side), list(range(len(loop.lengths)))

    together = speak(speculation, loop, names, temperature)

    alone = [speak(speculation, loop, [name], temperature) for name in names]
    assert texts(together) == [texts(said)[0] for said in alone]


@given(
    loop=loops(),
    temperature=TEMPERATURES,
    chunk_size=st.integers(1, 5),
    padding=st.integers(0, 4),
    cycles=st.integers(1, 3),
)
@example(loop=PINNED, temperature=0.0, chunk_size=1, padding=4, cycles=3)
@example(loop=PINNED, temperature=0.0, chunk_size=3, padding=0, cycles=1)
@example(loop=PINNED, temperature=0.8, chunk_size=4, padding=1, cycles=2)
def test_chunks_and_buckets_change_nothing(
    loop: Loop, temperature: float, chunk_size: int, padding: int, cycles: int
) -> None:
    speculation, names = loop.open("optimized"), list(range(len(loop.lengths)))
    how = {"chunk_size": chunk_size, "bucket": len(names) + padding, "cycles_per_read": cycles}

    cut = speak(speculation, loop, names, temperature, **how)

    assert texts(cut) == texts(speak(speculation, loop, names, temperature))
    assert texts(cut) == texts(speak(loop.open("reference"), loop, names, temperature))


@given(loop=loops(), temperature=TEMPERATURES)
@example(loop=PINNED, temperature=0.0)
@example(loop=PINNED, temperature=0.8)
def test_what_may_not_be_read_may_be_poisoned(loop: Loop, temperature: float) -> None:
    speculation, names = loop.open("optimized"), list(range(len(loop.lengths)))
    engine = PoisonedEngine(speculation.target.module, speculation.draft.module, speculation.draft.capture_points)
    how = {"seed": SEED, "bucket": len(names) + 2, "chunk_size": 3}

    spoilt = engine.generate(loop.prompts, NUM_TOKENS, NUM_DRAFT_TOKENS, temperature, **how)

    assert texts(spoilt) == texts(speak(speculation, loop, names, temperature))


@given(loop=loops(), temperature=TEMPERATURES, seed=SEEDS)
@example(loop=PINNED, temperature=0.0, seed=1)
@example(loop=PINNED, temperature=0.8, seed=1)
def test_an_engine_forgets_the_batch_before(loop: Loop, temperature: float, seed: int) -> None:
    speculation, order = loop.open("optimized"), shuffled(loop, seed)
    engine = Engine(speculation.target.module, speculation.draft.module, speculation.draft.capture_points)
    engine.generate(loop.prompts, NUM_TOKENS, NUM_DRAFT_TOKENS, temperature, seed=SEED + 1)

    prompts = [loop.prompts[i] for i in order]
    again = engine.generate(prompts, NUM_TOKENS, NUM_DRAFT_TOKENS, temperature, SEED, sequence_ids=order)

    assert texts(again) == texts(speak(speculation, loop, order, temperature))
