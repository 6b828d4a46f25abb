"""Claim: an algorithm's name and a draft resolve to one way of drafting, or to a refusal that says why.

Born of SGLang's EAGLE flag: an EAGLE-3 draft started with it runs without `fc` and accepts nothing, so that every step
says one token and nothing raises; and of STANDALONE, which vLLM once ran through the hidden states of its target.
"""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from harness.checkpoints import CheckpointError, open_checkpoint, save_checkpoint
from suites.algorithms import (
    ALGORITHMS,
    ALIASES,
    DRAFT_ARCHITECTURES,
    NAMES,
    NEXT_TOKEN,
    REASONS,
    TARGET_TYPES,
    AlgorithmError,
    find_pair,
    resolve,
)
from suites.catalog import PAIRS, open_draft, open_speculation, open_target
from suites.couples import COUPLES
from suites.draws import LLAMA, write_draft, write_target

pytestmark = [pytest.mark.correctness, pytest.mark.pair("eagle3")]

# what engines take for what, written down once more: name -> drafts that it starts as they are meant
STARTS = {
    "EAGLE": {"qwen3_moe_mtp", "deepseek_nextn", "gemma4_assistant"},
    "NEXTN": {"qwen3_moe_mtp", "deepseek_nextn", "gemma4_assistant"},
    "MTP": {"qwen3_moe_mtp", "deepseek_nextn", "gemma4_assistant"},
    "EAGLE3": {"eagle3", "eagle3_mla", "peagle"},
    "PEAGLE": {"peagle"},
    "P_EAGLE": {"peagle"},
    "FROZEN_KV_MTP": {"gemma4_assistant"},
    "DFLASH": {"dflash"},
    "STANDALONE": {"standalone"},
}


@given(name=st.sampled_from(NAMES), pair=st.sampled_from(sorted(ALGORITHMS)), lower=st.booleans())
@example(name="EAGLE", pair="eagle3", lower=False)
@example(name="NEXTN", pair="gemma4_assistant", lower=False)
@example(name="STANDALONE", pair="qwen3_moe_mtp", lower=False)
def test_a_name_starts_the_drafts_that_it_is_meant_for_and_no_other(name: str, pair: str, lower: bool) -> None:
    said = name.lower() if lower else name
    if pair in STARTS[name]:
        assert resolve(said, pair) == ALGORITHMS[pair]
        return
    with pytest.raises(AlgorithmError) as caught:
        resolve(said, pair)
    for word in (repr(said), pair, REASONS[ALGORITHMS[pair]], f"use {ALGORITHMS[pair]!r}"):
        assert word in str(caught.value)


def test_every_name_is_known_to_the_table() -> None:
    assert set(STARTS) == set(NAMES)
    assert set(ALGORITHMS) == {name for name, pair in PAIRS.items() if pair.kind == "draft"}
    assert set(ALIASES) | set(REASONS) <= set(ALGORITHMS.values())
    for pair in ALGORITHMS:
        assert resolve(None, pair) == ALGORITHMS[pair]


def test_an_unknown_name_is_refused_with_those_that_are_known() -> None:
    with pytest.raises(AlgorithmError, match=r"'MEDUSA' is unknown.*EAGLE3"):
        resolve("MEDUSA", "eagle3")


def config_of(folder: Path, **keys: Any) -> Path:
    """A checkpoint whose config has these keys; None takes a key away."""
    config = {key: value for key, value in {**LLAMA, **keys}.items() if value is not None}
    save_checkpoint(folder, config, {})
    return folder


@pytest.mark.parametrize("architecture", DRAFT_ARCHITECTURES)
def test_an_architecture_names_its_draft(architecture: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(config_of(tmp_path, architectures=[architecture]))

    assert find_pair(checkpoint, "draft") == DRAFT_ARCHITECTURES[architecture]
    with pytest.raises(CheckpointError, match=r"architectures .*open_draft"):
        find_pair(checkpoint, "target")


@pytest.mark.parametrize("model_type", TARGET_TYPES)
def test_a_target_is_a_draft_that_stands_alone(model_type: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(config_of(tmp_path, model_type=model_type, architectures=["AnyForCausalLM"]))

    assert find_pair(checkpoint, "target") == TARGET_TYPES[model_type]
    assert find_pair(checkpoint, "draft") == "standalone"


@pytest.mark.parametrize("name", [name for name in COUPLES if COUPLES[name].draft is None])
def test_a_folder_with_a_next_token_module_is_asked_for_either(name: str, tmp_path: Path) -> None:
    couple = COUPLES[name]
    target = open_target(couple.write_target(couple.target, tmp_path))

    module = NEXT_TOKEN[couple.target.keys["model_type"]][0]
    assert open_draft(tmp_path, target).pair.name == open_draft(tmp_path, target, algorithm="MTP").pair.name == module
    assert open_draft(tmp_path, target, algorithm="STANDALONE").pair.name == "standalone"


@pytest.mark.parametrize("algorithm", ["EAGLE", "NEXTN", "STANDALONE", "DFLASH"])
def test_an_eagle3_draft_is_not_started_as_anything_else(algorithm: str, tmp_path: Path) -> None:
    couple = COUPLES["llama-eagle3"]
    assert couple.draft is not None
    target, draft = write_target(couple.target, tmp_path / "t"), write_draft(couple.draft, tmp_path / "d")

    with pytest.raises(AlgorithmError, match=r"`fc`.*use 'EAGLE3'"):
        open_speculation(target, draft, algorithm=algorithm)
    assert open_speculation(target, draft, algorithm="EAGLE3").algorithm == "EAGLE3"


def test_a_config_that_is_no_draft_is_refused_in_words(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(config_of(tmp_path, model_type="mamba", architectures=["MambaForCausalLM"]))

    with pytest.raises(CheckpointError, match=r"'mamba'.*MambaForCausalLM.*known drafts are"):
        find_pair(checkpoint, "draft")
