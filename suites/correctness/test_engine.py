"""Claim: vLLM's own classes compute what the reference computes, and do with every checkpoint what the audit foretold.

Born of vLLM's loaders, which leave tensors at ones, at zeros or at whatever memory held and start serving (in 0.33.0
`load_weights` of EAGLE-3 drafts returns nothing, so nothing is checked). The evidence is one full run of
`draftproof engine vllm --all --evidence FILE`, stored. Each checkpoint is made again here from its recipe, and what the
audit says of it today is held to what vLLM did.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from suites.audit.engines import INTENDED
from suites.dialects import DIALECTS
from suites.engine.cases import AGREEMENTS, EVERY, Recipe
from suites.engine.judge import came_true, foretold, pose
from suites.engine.protocol import ENGINES, HERE

pytestmark = [pytest.mark.correctness, pytest.mark.pair("eagle3")]

EVIDENCE = json.loads((HERE / "evidence" / "vllm.json").read_text(encoding="utf-8"))
FOUND: Mapping[str, Any] = {case["name"]: case for case in EVIDENCE["cases"]}
SHARED = {"embed_tokens.weight": "the target's"}
"""left to the target on purpose"""


def is_silent(case: Mapping[str, Any]) -> bool:
    """Whether vLLM started to serve a checkpoint as something that it is not."""
    left = {name: what for name, what in case["engine"].get("left", {}).items() if SHARED.get(name) != what}
    return case["kind"] == "load" and bool(left or case.get("beyond what was meant"))


@pytest.fixture(scope="module")
def targets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where targets that several recipes share are written."""
    return tmp_path_factory.mktemp("targets")


@pytest.mark.parametrize("recipe", EVERY, ids=lambda recipe: recipe.name)
def test_the_audit_foretells_what_vllm_did(recipe: Recipe, targets: Path, tmp_path: Path) -> None:
    said = foretold(pose(recipe, tmp_path, targets))

    assert came_true(said, FOUND[recipe.name]["engine"]), said
    # what was filled in, dropped or read otherwise without a word is nothing that the audit may call sound
    assert not is_silent(FOUND[recipe.name]) or said.get("outcome") != INTENDED or said["faults"]


@pytest.mark.parametrize("recipe", AGREEMENTS, ids=lambda recipe: recipe.name)
def test_vllm_computed_what_the_reference_computes(recipe: Recipe) -> None:
    rungs = FOUND[recipe.name]["rungs"]

    assert {"final", "target_logits", "logits.1", "logits.2", "logits.3", "feedback.3"} <= rungs.keys()
    assert {f"hidden.{c}" for c in range(7)} <= rungs.keys()
    assert {"aux", "fused"} <= rungs.keys() or recipe.write is not None or "assistant" in recipe.name
    assert max(share for _, share in rungs.values()) <= 1


def test_the_evidence_is_of_these_cases_and_of_the_release_that_the_audit_speaks_of() -> None:
    drafts = [recipe for recipe in AGREEMENTS if "feedback.3" in FOUND[recipe.name]["rungs"]]

    assert [case["name"] for case in EVIDENCE["cases"]] == [recipe.name for recipe in EVERY]
    assert len({recipe.name for recipe in EVERY}) == len(EVERY)
    assert all(case["agrees"] for case in EVIDENCE["cases"])
    assert EVIDENCE["versions"]["vllm"] == ENGINES["vllm"].version == DIALECTS["vllm-v1"].version
    assert len([recipe for recipe in drafts if recipe.write is None]) >= 20
    assert sum(map(is_silent, FOUND.values())) >= 15


SOUND = {"points": [2, 4, 5], "left": SHARED, "dropped": []}


@pytest.mark.parametrize(
    "did",
    [
        {"refused": "load: ValueError"},
        {**SOUND, "points": [2, 5, 4]},
        {**SOUND, "left": {**SHARED, "norm.weight": "ones"}},
        {**SOUND, "left": {"embed_tokens.weight": "uninitialised memory"}},
        {**SOUND, "dropped": ["fc.bias"]},
    ],
    ids=["refused", "order", "left", "left otherwise", "dropped"],
)
def test_an_engine_that_did_otherwise_is_told(did: Mapping[str, Any]) -> None:
    assert came_true({**SOUND, "outcome": "as intended"}, SOUND)
    assert not came_true({**SOUND, "outcome": "as intended"}, did)
    assert not came_true({"refused": "tensor: has no place"}, SOUND)
