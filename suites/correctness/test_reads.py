"""Claim: at position p the draft reads the token x_{p+1} beside the target's state of p, and nothing else that stands.

Born of SGLang #26800 (the tail of a chunk read the predicted token instead of the prompt's next one) and #27846 (only
the last sequence of a batch got its own last token), and of vLLM #47448 (the fed-back state was not the one to feed).
Every reading of a real draft is noted while a script decides what is accepted. Replayed in order, a later reading of a
position takes the place of an earlier one; when the draft is asked for its first proposal, what lies at the positions
that stand must be the truth, which one forward pass over the finished text gives.
"""

import itertools

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from harness.acceptance import count, emitted
from harness.compare import bit_equal, hold
from suites.draws import SEEDS
from suites.scripted import SIDES, Loop, Reading, listen, loops, open_knowing, script, tiny_draft, tiny_target, written

pytestmark = [pytest.mark.correctness, pytest.mark.pair("llama-eagle3")]

PINNED = Loop(tiny_target(7), tiny_draft(8), (5, 3, 1))
FINAL_HIDDEN = Loop(tiny_target(7), tiny_draft(8, eagle_config={"use_aux_hidden_state": False}), (2, 6))
STEPS = st.lists(st.integers(0, 3), min_size=1, max_size=3)
NUM_DRAFT_TOKENS = 3
ENGINES = (*((side, {}) for side in SIDES), ("optimized", {"chunk_size": 2}))


def remembered(readings: list[Reading], row: int, last: int) -> tuple[Tensor, Tensor]:
    """What lies at positions 0..last of a sequence after some calls: tokens [P], hidden [P, H]."""
    memory: dict[int, tuple[Tensor, Tensor]] = {}
    for reading in readings:
        facts = zip(reading.positions[row].tolist(), reading.tokens[row], reading.hidden[row], strict=True)
        memory |= {position: (token, hidden) for position, token, hidden in facts}
    tokens, hidden = zip(*(memory[p] for p in range(last + 1)), strict=True)
    return torch.stack(tokens), torch.stack(hidden)


@pytest.mark.parametrize(("side", "engine"), ENGINES, ids=str)
@given(loop=loops(), steps=STEPS)
@example(loop=PINNED, steps=[0, 1, 2, 3, 0])
@example(loop=FINAL_HIDDEN, steps=[3, 1, 0])
def test_a_position_is_read_with_its_own_state_and_the_next_token(
    side: str, engine: dict[str, int], loop: Loop, steps: list[int]
) -> None:
    heard = listen(loop, side, steps, NUM_DRAFT_TOKENS, **engine)
    # one forward pass over each text on the reference, which needs no cache and no loop
    truth = loop.open("reference")
    size = {"depth": truth.target.num_layers, "width": truth.target.config.hidden}

    out = truth.target(heard.text, capture=truth.draft.capture_points)
    states = truth.draft.module.read(out)
    for cycle, standing in enumerate(heard.standing):
        before = heard.draft.readings[: heard.chain(cycle)[0].readings]
        for row, last in enumerate(standing):
            tokens, hidden = remembered(before, row, last)
            bit_equal("tokens", tokens, heard.text[row, 1 : last + 2])
            hold("hidden", hidden, states[row, : last + 1], **size)


@pytest.mark.parametrize("side", SIDES)
@given(loop=loops(), steps=STEPS)
@example(loop=PINNED, steps=[0, 1, 2, 3, 0])
@example(loop=PINNED._replace(draft=tiny_draft(8, eagle_config={"feedback_normed": True})), steps=[3, 1, 0])
def test_a_later_step_reads_its_own_feedback_one_position_on(side: str, loop: Loop, steps: list[int]) -> None:
    heard = listen(loop, side, steps, NUM_DRAFT_TOKENS)

    for cycle, standing in enumerate(heard.standing):
        chain = heard.chain(cycle)
        for row, last in enumerate(standing):
            for k in range(1, NUM_DRAFT_TOKENS):
                reading = heard.draft.readings[chain[k].readings - 1]
                _, feedback = heard.step(chain[k - 1], row, last + k - 1)
                assert reading.positions[row].tolist() == [last + k]
                assert reading.tokens[row, 0] == chain[k - 1].tokens[row]
                bit_equal("feedback", reading.hidden[row, 0], feedback)


@pytest.mark.parametrize("side", SIDES)
@given(loop=loops(), num_draft_tokens=st.sampled_from([1, 3, 5]), num_steps=st.integers(1, 3))
@example(loop=PINNED, num_draft_tokens=3, num_steps=3)
@example(loop=PINNED, num_draft_tokens=1, num_steps=4)
def test_an_oracle_draft_advances_by_all_drafts_and_one(
    side: str, loop: Loop, num_draft_tokens: int, num_steps: int
) -> None:
    speculation = loop.open(side)
    num_tokens = 1 + num_steps * emitted(num_draft_tokens)
    text = written(loop.prompts, speculation.generate(loop.prompts, num_tokens, 0).tokens)
    scripted, draft = script(speculation, text)

    said = scripted.generate(loop.prompts, num_tokens, num_draft_tokens)

    lengths = [num_tokens] * len(loop.lengths)
    assert count(said.accepted, num_draft_tokens, num_emitted=lengths).length == emitted(num_draft_tokens)
    assert [len(row) for row in said.accepted] == [num_steps] * len(loop.lengths)
    # nothing was asked twice and nothing was left out
    assert len(draft.proposals) == num_steps * num_draft_tokens


def leading(text: list[int], words: list[int], num_draft_tokens: int) -> list[int]:
    """Accepted counts of a draft that is right wherever it has the word; `text` begins after the prompt's own token."""
    counts, place = [], 0
    while place < len(text):
        run = list(itertools.takewhile(words.__contains__, text[place : place + num_draft_tokens]))
        counts.append(len(run))
        place += emitted(len(run))
    return counts


@pytest.mark.parametrize("side", SIDES)
@given(seed=SEEDS, missing=st.integers(0, 6), num_draft_tokens=st.sampled_from([1, 3, 5]))
@example(seed=7, missing=0, num_draft_tokens=3)
@example(seed=7, missing=6, num_draft_tokens=5)
@example(seed=2, missing=4, num_draft_tokens=3)
def test_a_draft_that_knows_the_target_is_right_wherever_it_has_the_word(
    side: str, seed: int, missing: int, num_draft_tokens: int
) -> None:
    vocab, num_tokens = 29, 16
    words = torch.randperm(vocab, generator=torch.Generator().manual_seed(seed))[missing:].sort().values.tolist()
    speculation = open_knowing(tiny_target(seed, vocab), words, side)
    prompts = PINNED.prompts
    # a step that passes the end counts drafts that nobody sees
    text = speculation.generate(prompts, num_tokens + num_draft_tokens, 0).tokens

    said = speculation.generate(prompts, num_tokens, num_draft_tokens)

    bit_equal("tokens", said.tokens, text[:, :num_tokens])
    for row, counts in zip(text[:, 1:].tolist(), said.accepted, strict=True):
        assert counts == leading(row, words, num_draft_tokens)[: len(counts)]
