"""Claim: what a draft was trained with is found from its weights and texts alone, and a config that lies is named.

Born of layer ids read in the wrong convention (SGLang #25454: 0.10 tokens of acceptance lost) and of norms read with
two meanings: nothing in a checkpoint says which, and every reading runs. The truth stands here by hand, as the recipe
of `suites/zoo` has it; the search begins from a checkpoint whose config has lost every hint.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from harness.checkpoints import Checkpoint, open_checkpoint, state_of
from suites.audit.candidates import NORM_HIDES, NOT_FED_BACK
from suites.audit.claims import CONTRADICTED, edits_of, hold, open_neutral, read_claims
from suites.audit.contrasts import SAME
from suites.audit.identify import IDENTIFIED, Identified, identify
from suites.audit.losses import Resampled, Stand
from suites.audit.respelled import copies
from suites.audit.texts import gather
from suites.benchmarks.shipped import Located, shipped
from suites.catalog import open_target
from suites.opened import OpenDraft

pytestmark = pytest.mark.correctness

EAGLE3 = {
    "fc_norm": False,
    "norm_before_residual": False,
    "norm_before_head": True,
    "feedback_normed": False,
    "capture shift": 0,
    "capture order": (0, 1, 2),
    "vocabulary map": "offset",
}
DFLASH = {"causal block": False, "draft layers": 2, "capture shift": 0, "capture order": (0, 1, 2),
          "embedding": "raw", "norm behind fc": True, "final norm": True}  # fmt: skip
ASSISTANT = {"embedding": "scaled", "target state": "after the final norm", "final norm": True,
             "feedback": "after the final norm", "last key": True}  # fmt: skip
MTP = {"norm_topk_prob": True, "input order": "embedding first", "norm of the embedding": True,
       "norm of the state": True, "final norm": True}  # fmt: skip
STANDALONE = {"draft layers": 3, "embedding": "raw", "final norm": True, "vocabulary map": "absolute"}
TRUTH: dict[str, tuple[tuple[int, ...], dict[str, Any], dict[str, str]]] = {
    "llama-eagle3": ((2, 4, 5), EAGLE3, {"embedding": NORM_HIDES}),
    "llama-eagle3-postnorm": (
        (2, 4, 5),
        {**EAGLE3, "fc_norm": True, "feedback_normed": True},
        {"embedding": NORM_HIDES, "norm_before_fc": NORM_HIDES},
    ),
    "llama-peagle": (
        (2, 4, 5),
        {name: value for name, value in EAGLE3.items() if name != "feedback_normed"},
        {"embedding": NORM_HIDES, "feedback_normed": NOT_FED_BACK},
    ),
    "llama-dflash": ((2, 4, 5), DFLASH, {}),
    "llama-standalone": ((), STANDALONE, {}),
    "gemma3-eagle3": ((2, 4, 5), EAGLE3, {"embedding": NORM_HIDES}),
    "gemma4-assistant": ((), ASSISTANT, {}),
    "qwen3_moe-mtp": ((), MTP, {"embedding": NORM_HIDES, "target state": "", "feedback": ""}),
    "deepseek-eagle3-mla": ((2, 3, 4), {**EAGLE3, "rope pairs": "interleaved"}, {"embedding": NORM_HIDES}),
}
"""pair -> capture points, what must be identified, and what must be found to have no effect and why"""
BY_DAY = ("llama-eagle3-postnorm", "llama-standalone")
NUM_TEXTS = {"nightly": 256}
FEW = 20
RESAMPLES = {"nightly": (50, 64)}


@dataclass
class Case:
    """One trained pair on its stand."""

    pair: Located
    source: Checkpoint
    token_map: Tensor | None
    stand: Stand

    def neutral(self, checkpoint: Checkpoint) -> OpenDraft:
        return open_neutral(checkpoint, self.stand.target, self.token_map)

    def read(self, checkpoint: Checkpoint) -> tuple[Identified, list[str]]:
        """What was found, and the facts in which a config is contradicted."""
        claims = read_claims(checkpoint, self.stand.draft.pair, self.stand.target)
        found = identify(self.stand, edits_of(claims, self.stand.draft, self.stand.target), look=0)
        return found, [claim.fact for claim in hold(claims, found) if claim.verdict == CONTRADICTED]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """By night all pairs; by day two, which bear flags, a search and a map between them."""
    if "case" in metafunc.fixturenames:
        names = TRUTH if metafunc.config.getoption("--profile") == "nightly" else BY_DAY
        every = [pytest.param(name, marks=pytest.mark.pair(name), id=name) for name in names]
        metafunc.parametrize("case", every, indirect=True, scope="module")


@pytest.fixture(scope="module")
def case(request: pytest.FixtureRequest) -> Case:
    """A shipped pair whose losses are computed once for all that is asked of it."""
    (pair,) = shipped(names=[request.param])
    target, source = open_target(pair.target), open_checkpoint(pair.draft)
    token_map = None
    if pair.name == "llama-standalone":
        d2t = open_checkpoint(pair.zoo / "llama-eagle3").read("d2t")
        token_map = torch.arange(len(d2t)) + d2t
    texts = gather(target, None, NUM_TEXTS.get(request.config.getoption("--profile"), FEW)).texts
    return Case(pair, source, token_map, Stand(target, open_neutral(source, target, token_map), texts))


def test_a_trained_pair_is_identified_without_its_config(case: Case) -> None:
    points, facts, idle = TRUTH[case.pair.name]

    found, contradicted = case.read(case.source)

    assert found.points == points
    told = {answer.fact: (answer.verdict, answer.value) for answer in found.answers}
    assert {fact: told[fact] for fact in facts} == {fact: (IDENTIFIED, value) for fact, value in facts.items()}
    whys = {fact: (found.answer(fact).verdict, found.answer(fact).why) for fact in idle}
    assert whys == {fact: (SAME, why) for fact, why in idle.items()}
    assert contradicted == []
    assert found.tokens == int(case.stand.texts.lengths.sum())


def test_a_copy_that_lies_is_named_and_an_honest_one_is_not(case: Case, tmp_path: Path) -> None:
    target = case.stand.target
    every = copies(case.source, case.stand.draft.pair.name, target.num_layers, target.pair.name)
    assert len(every) >= 8
    assert any(copy.lie for copy in every)

    for i, copy in enumerate(every):
        copied = open_checkpoint(copy.write(case.source, tmp_path / str(i), target.num_layers, target.pair.name))
        bare = case.neutral(copied)
        assert bare.facts.config == case.stand.draft.facts.config, copy.name
        assert bare.capture_points == case.stand.draft.capture_points, copy.name
        assert all(map(torch.equal, state_of(bare.module).values(), state_of(case.stand.draft.module).values()))

        _, contradicted = case.read(copied)

        assert contradicted == [copy.lie] * bool(copy.lie), copy.name


def test_no_honest_config_is_accused_on_fewer_texts(case: Case, profile: str) -> None:
    count, size = RESAMPLES.get(profile, (3, FEW * 2 // 3))
    claims = read_claims(case.source, case.stand.draft.pair, case.stand.target)
    generator = torch.Generator().manual_seed(0)

    for _ in range(count):
        chosen = torch.randperm(case.stand.count, generator=generator)[:size]
        found = identify(Resampled(case.stand, chosen), edits_of(claims, case.stand.draft, case.stand.target), look=0)
        assert [str(claim) for claim in hold(claims, found) if claim.verdict == CONTRADICTED] == []
