"""Claim: what is said of made losses is what was put into them: no more, no less, and no oftener wrong than promised.

The truth, how much each other reading costs and how hard each text is are drawn; the search and its verdicts are the
real ones. Texts differ from each other twenty times as much as readings do on one text, as real ones do. What an edit
does is held to a draft whose config says the same, and what a loss is to its formula, column by column.

Born of a norm whose weights are ones but for their last bits: left out, it changed the loss for certain and by 0.0015
nats, and a search without a margin accused a sound checkpoint of it.
"""

import zlib
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from harness.checkpoints import open_checkpoint, state_of
from harness.planting import Bug, planted
from reference.ops.rope import rotate
from suites.audit.candidates import Edit, candidates, standing
from suites.audit.claims import (
    AGREES,
    CONTRADICTED,
    Claims,
    edits_of,
    hold,
    neutral,
    open_neutral,
    read_claims,
)
from suites.audit.contrasts import ALPHA, BETTER, SAME, SMALLEST, WORSE, adjusted, paired
from suites.audit.identify import IDENTIFIED, POINTS, identify
from suites.audit.losses import FLOOR, Hypothesis, Stand, Texts, key, losses
from suites.audit.variants import Restated
from suites.catalog import SPECULATIONS, open_draft
from suites.couples import COUPLES
from suites.draws import EAGLE3, LLAMA, random_tokens
from suites.formats.writing import put
from suites.opened import OpenDraft, OpenTarget

pytestmark = pytest.mark.correctness

EACH = sorted({SPECULATIONS[name].draft: name for name in COUPLES}.values())
"""a speculation of every draft"""
COUNT, STEPS = 96, 3
PLAIN, FAINT = 0.05, SMALLEST / 4
FAMILIES, READINGS, SEQUENCES = 60, 30, 32


@pytest.fixture(scope="module")
def stand(target: OpenTarget, draft_folder: Path) -> Stand:
    """The pinned draft beside its target, on random texts."""
    draft = open_draft(draft_folder, target, layer_ids="after_layer")
    rows = random_tokens(LLAMA["vocab_size"], 5, 14, seed=3)
    return Stand(target, draft, Texts.of([row[: 14 - 2 * i] for i, row in enumerate(rows)]))


@dataclass
class Made(Stand):
    """A stand whose losses are made: a fact that is not as the truth has it costs what was drawn."""

    truth: Hypothesis = ()
    faint: str = ""
    """a fact whose other values cost next to nothing"""
    seed: int = 0

    @property
    def count(self) -> int:
        return COUNT

    def losses(self, hypotheses: Sequence[Hypothesis], count: int) -> list[Tensor]:
        """hypotheses, count -> one [K, count] each"""
        hard = torch.randn(COUNT, generator=torch.Generator().manual_seed(self.seed)) + 4
        return [(hard + self._cost(one))[:, :count] for one in hypotheses]

    def _cost(self, hypothesis: Hypothesis) -> Tensor:
        """What is wrong with a hypothesis, a little more or less on each text. -> [K, B]"""
        wrong = {edit.fact for edit in (*hypothesis, *self.truth) if (edit in hypothesis) != (edit in self.truth)}
        cost = sum(FAINT if fact == self.faint else PLAIN for fact in wrong)
        seed = zlib.crc32(repr(key(hypothesis)).encode())
        noise = torch.randn(STEPS, COUNT, generator=torch.Generator().manual_seed(seed))
        return cost + cost / 5 * noise


def made(stand: Stand, picks: Sequence[int], faint: int, seed: int) -> Made:
    """A truth a few edits away from what the search begins with."""
    edits = [edit for edit in candidates(stand.draft, stand.target) if not edit.idle]
    chosen = {edits[pick % len(edits)].fact: edits[pick % len(edits)] for pick in picks}
    others = sorted({edit.fact for edit in edits} - chosen.keys())
    truth = tuple(edit for edit in edits if chosen.get(edit.fact) == edit)
    return Made(stand.target, stand.draft, stand.texts, truth=truth, faint=others[faint % len(others)], seed=seed)


@given(picks=st.lists(st.integers(0, 30), max_size=3), faint=st.integers(0, 30), seed=st.integers(0, 2**16))
@example(picks=[3, 11], faint=0, seed=1)
def test_the_truth_is_found_and_what_costs_nothing_has_no_effect(
    picks: list[int], faint: int, seed: int, stand: Stand
) -> None:
    one = made(stand, picks, faint, seed)

    found = identify(one)

    assert found.edits == one.truth
    verdicts = {answer.fact: answer.verdict for answer in found.answers if not answer.alternatives[0].idle}
    assert verdicts == {fact: SAME if fact == one.faint else IDENTIFIED for fact in verdicts}
    for answer in found.answers:
        cost = FAINT if answer.fact == one.faint else PLAIN
        assert all(abs(other.contrast.nats - cost) < cost / 2 for other in answer.alternatives)


def test_a_family_of_readings_is_accused_as_seldom_as_promised() -> None:
    generator, accused = torch.Generator().manual_seed(0), 0

    for _ in range(FAMILIES):
        stated = torch.randn(1, SEQUENCES, generator=generator)
        # as far apart as may be told of nobody
        others = stated + SMALLEST + 0.01 * torch.randn(READINGS, SEQUENCES, generator=generator)
        family = adjusted([paired(other[None], stated) for other in others])
        accused += any(one.verdict in (WORSE, BETTER) for one in family)

    # 1 in 20 of 60 families; more than 12 of them would be seen once in ten thousand times
    assert accused <= 4 * ALPHA * FAMILIES


def test_a_loss_is_its_formula_whatever_stands_beside_the_text(stand: Stand) -> None:
    shifted = next(edit for edit in candidates(stand.draft, stand.target) if edit.fact == "capture shift")
    both = [stand.draft, shifted.apply(stand.draft, stand.target)]

    found = losses(stand.target, both, stand.texts)

    for i, draft in enumerate(both):
        for b, length in enumerate(stand.texts.lengths.tolist()):
            tokens = stand.texts.tokens[b : b + 1, :length]
            out = stand.target(tokens, capture=draft.capture_points)
            steps = draft.unroll(tokens, out, STEPS)
            for k in range(1, STEPS + 1):
                # after x_0 .. x_{t+k}, both say what comes next
                columns = [(out.logits[0, t + k], steps[k - 1, 0, t]) for t in range(length - k - 1)]
                expected = torch.stack([by_hand(draft, *column) for column in columns]).mean()
                torch.testing.assert_close(found[i, k - 1, b], expected)


def by_hand(draft: OpenDraft, meant: Tensor, said: Tensor) -> Tensor:
    """Cross-entropy of one column.

    meant  [V]
    said   [Vd]
    """
    q = torch.zeros_like(meant)
    q[torch.arange(len(said)) + draft.module.d2t] = said.softmax(0)
    return -(meant.softmax(0) * ((1 - FLOOR) * q + FLOOR / len(q)).log()).sum()


SPELLED: tuple[tuple[str, dict[str, Any]], ...] = (
    ("norm_before_residual: on", {"norm_before_residual": True}),
    ("feedback_normed: on", {"eagle_config.norm_before_head": True, "eagle_config.feedback_normed": True}),
    ("norm_before_head: off", {"eagle_config.norm_before_head": False, "eagle_config.feedback_normed": False}),
    ("rope theta: 500000", {"rope_parameters.rope_theta": 500_000.0}),
    ("rope scaling: linear by 2", {"rope_parameters.rope_type": "linear", "rope_parameters.factor": 2.0}),
    ("capture shift: -1", {"eagle_config.layer_ids": "before_layer"}),
    ("capture order: (2, 1, 0)", {"eagle_config.eagle_aux_hidden_state_layer_ids": [5, 3, 1]}),
)


@pytest.mark.parametrize(("name", "keys"), SPELLED, ids=[name for name, _ in SPELLED])
def test_an_edit_is_the_draft_whose_config_says_so(name: str, keys: dict[str, Any], stand: Stand) -> None:
    before = {name: tensor.clone() for name, tensor in state_of(stand.draft.module).items()}
    source = stand.draft.checkpoint
    config = deepcopy(source.config)
    put(config, "eagle_config.layer_ids", "after_layer")
    put(config, "eagle_config.eagle_aux_hidden_state_layer_ids", [c - 1 for c in stand.draft.capture_points])
    for at, value in keys.items():
        put(config, at, value)

    edited = named(stand, name).apply(stand.draft, stand.target)

    told = open_draft(replace(source, config=config), stand.target)
    assert edited.capture_points == told.capture_points
    torch.testing.assert_close(unrolled(stand, edited), unrolled(stand, told))
    assert not torch.allclose(unrolled(stand, edited), unrolled(stand, stand.draft))
    after = state_of(stand.draft.module)
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


@pytest.mark.parametrize("pair", EACH)
def test_every_edit_of_every_draft_runs_and_changes_nothing_that_was_given(pair: str) -> None:
    speculation = COUPLES[pair].open("reference")
    target, draft = speculation.target, speculation.draft
    texts = Texts.of(COUPLES[pair].prompts((7, 9)))
    edits = candidates(draft, target)

    stated = losses(target, [draft], texts)
    found = losses(target, [edit.apply(draft, target) for edit in edits], texts)

    assert len({edit.name for edit in edits}) == len(edits) > 0
    assert found.isfinite().all()
    # an edit is seen, or its weights are such that none could see it: a rope of one pair, a norm that follows a norm
    assert (found - stated).abs().amax((1, 2)).gt(0).float().mean() > 1 / 2
    torch.testing.assert_close(losses(target, [draft], texts), stated)


def test_neighbours_are_turned_as_the_equation_turns_them(stand: Stand) -> None:
    # the same rope by its own word, in the place of rows in another order
    turned = Bug("", "", "reference.ops.attention.rotate", lambda right: partial(rotate, interleaved=True), "")
    tokens = stand.texts.tokens
    out = stand.target(tokens, capture=stand.draft.capture_points)
    with planted(turned):
        expected = stand.draft.unroll(tokens, out, STEPS).nan_to_num()
    stated = unrolled(stand, stand.draft)

    edited = unrolled(stand, named(stand, "rope pairs: interleaved").apply(stand.draft, stand.target))

    torch.testing.assert_close(edited, expected)
    torch.testing.assert_close(unrolled(stand, stand.draft), stated)


@pytest.mark.parametrize(("value", "base"), [("absolute", 0), ("none", None)])
def test_a_map_is_read_as_it_is_called(value: str, base: int | None, stand: Stand) -> None:
    edited = named(stand, f"vocabulary map: {value}").apply(stand.draft, stand.target)
    d2t, vocab = stand.draft.module.d2t, stand.target.config.vocab
    ids = torch.arange(len(d2t)) if base is None else d2t
    said = torch.randn(1, 2, len(d2t), generator=torch.Generator().manual_seed(1))

    spread = edited.module.spread(said).softmax(-1)

    # ids that mean the same token share its probability
    expected = torch.zeros(1, 2, vocab).index_add_(2, ids, said.softmax(-1))
    torch.testing.assert_close(spread, expected)
    assert edited.module.to_target(torch.arange(len(d2t))[None])[0].tolist() == ids.tolist()


def test_a_map_of_target_ids_is_read_as_one(stand: Stand) -> None:
    source = stand.draft.checkpoint
    ids = torch.arange(len(stand.draft.module.d2t)) + source.read("d2t")
    absolute = Restated(source.path, source.config, source.headers, values={"d2t": ids})

    draft = open_neutral(absolute, stand.target)

    assert standing(draft)["vocabulary map"] == "absolute"
    assert draft.module.to_target(torch.arange(len(ids))[None])[0].tolist() == ids.tolist()
    offset = next(edit for edit in candidates(draft) if edit.name == "vocabulary map: offset")
    last = stand.target.config.vocab - 1
    wrong = [min(i + target, last) for i, target in enumerate(ids.tolist())]
    assert offset.apply(draft).module.to_target(torch.arange(len(ids))[None])[0].tolist() == wrong
    assert read_claims(absolute, draft.pair, stand.target, "after_layer").values["vocabulary map"] == ("offset",)


def test_the_kindest_reading_of_a_claim_decides(stand: Stand) -> None:
    one = replace(made(stand, [], 0, 4), faint="norm_before_residual")
    right = stand.draft.capture_points
    wrong = tuple(point - 1 for point in right)
    rope = Claims({"rope theta": (500_000.0,)}, (wrong,))

    def held(claims: Claims) -> dict[str, str]:
        found = identify(one, edits_of(claims, stand.draft, stand.target))
        return {claim.fact: claim.verdict for claim in hold(claims, found)}

    assert held(Claims({}, (right,))) == {POINTS: AGREES}
    assert held(Claims({}, (wrong, right))) == {POINTS: AGREES}
    assert held(rope) == {POINTS: CONTRADICTED, "rope theta": CONTRADICTED}
    assert held(Claims({one.faint: (True, False)})) == {one.faint: AGREES}
    assert held(Claims({one.faint: (True,)})) == {one.faint: SAME}
    # of two readings the cheaper stands for the file: here one that costs nothing beside one that was never tried
    assert held(Claims({"rope theta": (1e6, 2e6), one.faint: (True,)})) == {"rope theta": CONTRADICTED, one.faint: SAME}


HINTS = (
    ("eagle_config.layer_ids", "before_layer"),
    ("eagle_config.eagle_aux_hidden_state_layer_ids", [0, 2, 3]),
    ("eagle_config.feedback_normed", True),
    ("norm_output", True),
    ("norm_before_residual", True),
    ("fc_norm", True),
    ("norm_before_fc", True),
    ("rope_theta", 7.0),
    ("rope_scaling", {"type": "linear", "factor": 3.0}),
    ("num_hidden_layers", 5),
    ("logit_scale", 2.0),
)


@given(hints=st.lists(st.sampled_from(HINTS), max_size=4))
@example(hints=list(HINTS))
def test_no_hint_of_a_config_is_left(hints: list[tuple[str, Any]], stand: Stand) -> None:
    source = open_checkpoint(stand.draft.checkpoint.path)
    config = {**deepcopy(EAGLE3), "eagle_config": {}}
    for at, value in hints:
        put(config, at, value)

    bare, told = (neutral(one, stand.draft.pair, 8).config for one in (source, replace(source, config=config)))

    assert bare == told


def named(stand: Stand, name: str) -> Edit:
    return next(edit for edit in candidates(stand.draft, stand.target) if edit.name == name)


def unrolled(stand: Stand, draft: OpenDraft) -> Tensor:
    """-> [K, B, T, Vd], 0 where nothing is known"""
    tokens = stand.texts.tokens
    return draft.unroll(tokens, stand.target(tokens, capture=draft.capture_points), STEPS).nan_to_num()
