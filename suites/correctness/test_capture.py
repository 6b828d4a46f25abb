"""Claim: capturing a target's states gives the residual stream itself and changes nothing.

Born of SGLang #39286 and #32383 (captures that were overwritten by the next in-place norm, acceptance 1.06 instead of
1.89), #38642 (a capture list that stayed empty after a refactor), #32334 (the last capture point never taken) and of
vLLM's `tuple(sorted(set(layers)))`, which forgets the order asked for. A capture is a copy: neither a later pass nor
whoever writes into it may be seen on the other side. Which layer a point means is held by test_witness and test_twin.
"""

import copy
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from harness.compare import bit_equal, hold
from optimized.decoding import Engine
from suites.catalog import OpenTarget, open_target
from suites.draws import PINNED_TARGET, Drawn, folders, llama_targets, random_tokens, variant
from suites.scripted import SIDES, Loop, loops, tiny_draft, tiny_target, written

pytestmark = [pytest.mark.correctness, pytest.mark.pair("llama")]

WIDTH = 6
every_side = pytest.mark.parametrize("side", SIDES)


class Case(NamedTuple):
    """A target, a text and what is asked of it."""

    drawn: Drawn
    capture: tuple[int, ...]
    batch: int

    @property
    def layers(self) -> int:
        return self.drawn.keys["num_hidden_layers"]

    def tokens(self, width: int, seed: int = 0) -> Tensor:
        """[B, T]"""
        return random_tokens(self.drawn.keys["vocab_size"], self.batch, width, self.drawn.seed + seed)

    def open(self, side: str, dtype: torch.dtype = torch.float32) -> OpenTarget:
        """Opened from a folder that is gone afterwards."""
        with folders(self.drawn) as (path, _):
            return open_target(path, side=side, dtype=dtype)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Points in any order, both ends and repetitions included."""
    drawn = draw(llama_targets(max_layers=4, kinds=("default",)))
    points = st.integers(0, drawn.keys["num_hidden_layers"])
    return Case(drawn, tuple(draw(st.lists(points, min_size=1, max_size=5))), draw(st.integers(1, 3)))


# the ends, a repetition and no order at all
PINNED = Case(PINNED_TARGET, (5, 8, 2, 5, 0), 2)
ONE_POINT = Case(variant(PINNED_TARGET.keys, 3, num_hidden_layers=1, tie_word_embeddings=True), (1,), 1)


@every_side
@given(case=cases(), width=st.integers(1, WIDTH))
@example(case=PINNED, width=4)
@example(case=ONE_POINT, width=1)
def test_capturing_leaves_the_output_alone(side: str, case: Case, width: int) -> None:
    target, tokens = case.open(side), case.tokens(width)

    plain, captured = target(tokens), target(tokens, capture=case.capture)

    bit_equal("logits", captured.logits, plain.logits)
    bit_equal("hidden", captured.hidden, plain.hidden)
    assert plain.aux.shape == (case.batch, width, 0, target.config.hidden)


@every_side
@given(case=cases(), width=st.integers(1, WIDTH))
@example(case=PINNED, width=4)
@example(case=ONE_POINT, width=2)
def test_states_come_in_the_order_asked(side: str, case: Case, width: int) -> None:
    target, tokens = case.open(side), case.tokens(width)

    # asked twice: a list that grows from call to call would show
    target(tokens, capture=case.capture[::-1])
    asked = target(tokens, capture=case.capture).aux

    stream = target(tokens, capture=range(case.layers + 1)).aux
    assert asked.shape == (case.batch, width, len(case.capture), target.config.hidden)
    for place, point in enumerate(case.capture):
        bit_equal(f"capture point {point} in place {place}", asked[:, :, place], stream[:, :, point])


@every_side
@given(case=cases())
@example(case=PINNED)
@example(case=ONE_POINT)
def test_the_ends_are_the_embedding_and_the_stream_before_the_final_norm(side: str, case: Case) -> None:
    target, truth, tokens = case.open(side), case.open("reference").module, case.tokens(WIDTH)

    out = target(tokens, capture=(0, case.layers))

    bit_equal("capture point 0", out.aux[:, :, 0], truth.embed_tokens(tokens))
    size = {"depth": case.layers, "width": target.config.hidden}
    hold("the norm of the last point", truth.norm(out.aux[:, :, 1]), out.hidden, **size)


@every_side
@given(case=cases(), width=st.integers(1, WIDTH))
@example(case=PINNED, width=4)
@example(case=ONE_POINT, width=2)
def test_what_was_captured_belongs_to_the_caller(side: str, case: Case, width: int) -> None:
    target, tokens = case.open(side), case.tokens(width)
    first = target(tokens, capture=case.capture)
    kept = [x.clone() for x in first]

    other = target(case.tokens(width, seed=1), capture=case.capture)
    for name, now, before in zip(first._fields, first, kept, strict=True):
        bit_equal(f"{name} after another pass", now, before)

    # two rows of one duplicated point are two copies too
    first.aux[:, :, 0] = torch.nan
    first.aux[:, :, 1:].zero_()
    bit_equal("logits beside a capture written over", first.logits, kept[0])
    bit_equal("hidden beside a capture written over", first.hidden, kept[1])
    again = target(tokens, capture=case.capture)
    for name, now, before in zip(again._fields, again, kept, strict=True):
        bit_equal(f"{name} after a capture was written over", now, before)
    assert not other.aux.isnan().any()


class NotingEngine(Engine):
    """The twin's engine; after every cycle it notes which rows go on, what stands and what was captured."""

    def _session(self, *plan: Any) -> Any:
        session = super()._session(*plan)
        run, state = session.run, session.state
        self.notes: list[list[tuple[int, int, int, Tensor]]] = []

        def run_and_note(num_slots: int | None = None) -> None:
            run(num_slots)
            going = (~state.done).nonzero().flatten().tolist()
            facts = [(row, int(state.lengths[row]), int(state.accepted[row])) for row in going]
            # a clone: the next cycle writes over the buffer
            self.notes.append([(row, n, a, state.aux[row, : a + 1].clone()) for row, n, a in facts])

        session.run = run_and_note
        return session


# few words: a draft of random weights is right often enough for every count to occur
FEW_WORDS = Loop(tiny_target(6, vocab=5), tiny_draft(7, vocab=5), (5, 1, 3))


@pytest.mark.pair("llama-eagle3")
@given(loop=loops(max_batch=3), num_draft_tokens=st.integers(1, 4))
@example(loop=FEW_WORDS, num_draft_tokens=3)
def test_a_cycle_captures_what_one_pass_over_the_text_captures(loop: Loop, num_draft_tokens: int) -> None:
    twin, truth = loop.open("optimized"), loop.open("reference")
    engine = NotingEngine(twin.target.module, twin.draft.module, twin.draft.capture_points)

    said = engine.generate(loop.prompts, 9, num_draft_tokens)

    # rows are padded on the right, where nothing that stands can see it
    text = written(loop.prompts, said.tokens)
    forced = truth.target(text, capture=truth.draft.capture_points).aux
    size = {"depth": truth.target.num_layers, "width": truth.target.config.hidden}
    for row, length, accepted, aux in (note for cycle in engine.notes for note in cycle):
        hold("aux", aux, forced[row, length - 1 - accepted : length], **size)


@every_side
@given(loop=loops(max_batch=2))
@example(loop=FEW_WORDS)
def test_a_config_is_as_it_was(side: str, loop: Loop) -> None:
    speculation = loop.open(side)
    opened = (speculation.target, speculation.draft)
    files = [copy.deepcopy(model.checkpoint.config) for model in opened]

    speculation.generate(loop.prompts, 4, 2)
    speculation.target(loop.prompts[0][None], capture=(0,))

    for model, file, drawn in zip(opened, files, (loop.target, loop.draft), strict=True):
        assert model.checkpoint.config == file
        assert drawn.keys.items() <= file.items()
        # what the models were built from, and still hold, is what the file says
        assert model.module.c == model.pair.read_config(drawn.keys)
