"""Claim: every key of a config is a fact, is known to be inert, or is refused; and no config is changed by being used.

Born of vLLM #46488 and #38111 (`norm_output`, `fc_norm`, a nested `norm_before_fc` that nobody read) and of five SGLang
files that set `num_hidden_layers = 1` on the config object that they share with the target.
"""

import copy
import dataclasses
import json
from typing import Any

import pytest
import torch
from hypothesis import example, given

from harness.checkpoints import CONFIG, CheckpointError
from harness.conventions import resolve
from reference.config import INERT, ConfigError
from reference.drafts.eagle3 import Eagle3Config, Eagle3Draft
from reference.targets.llama import LlamaConfig, LlamaTarget
from suites.catalog import open_draft, open_target
from suites.draws import (
    EAGLE3,
    EVERY_FLAG,
    LLAMA,
    PINNED_DRAFT,
    PINNED_TARGET,
    ROPES,
    Drawn,
    eagle3_drafts,
    folders,
    llama_targets,
    variant,
)

pytestmark = [pytest.mark.correctness, pytest.mark.pair("eagle3")]

IDS = "eagle_aux_hidden_state_layer_ids"
DROP = "dropped"
"""an altered value that stands for taking the key away"""

# a value beside each key's own that is as legal, so that only a reader can tell them apart
OTHER: dict[str, Any] = {
    "vocab_size": 512,
    "draft_vocab_size": 96,
    "hidden_size": 192,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-3,
    "rope_theta": 100.0,
    "rope_parameters": {"rope_type": "linear", "factor": 7.0, "rope_theta": 30.0},
    "rope_scaling": {"rope_type": "linear", "factor": 7.0},
    "partial_rotary_factor": 1.0,
    "hidden_act": "gelu",
    "target_hidden_size": 64,
    "num_aux_hidden_states": 2,
    "num_aux_layers": 2,
    IDS: [1, 2, 3, 4],
    "eagle_config": {},
    "eagle_config." + IDS: [1, 2, 3, 4],
    "eagle_config.layer_ids": "before_layer",
    "eagle_config.later_norm": "input_layernorm",
    "logit_scale": 2.0,
    "sliding_window": 3,
    "layer_types": ["sliding_attention", "sliding_attention"],
    "transformer_layer_config": {},
    "speculators_model_type": "dflash",
}

RICH_LLAMA = {
    **LLAMA,
    "attention_bias": True,
    "tie_word_embeddings": True,
    "rms_norm_eps": 1e-4,
    "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 5e5, "partial_rotary_factor": 0.5},
}
# the spelling before rope_parameters
OLD_LLAMA = {
    **{k: v for k, v in RICH_LLAMA.items() if k != "rope_parameters"},
    "rope_theta": 5e5,
    "rope_scaling": {"type": "dynamic", "factor": 2.0},
    "partial_rotary_factor": 0.5,
}
RICH_EAGLE3 = {
    **EVERY_FLAG.keys,
    "model_type": "qwen3",
    "architectures": ["Qwen3ForCausalLMEagle3"],
    "target_hidden_size": 96,
    "num_aux_hidden_states": 4,
    "num_aux_layers": 4,
    "use_sliding_window": True,
    "rope_parameters": {**ROPES[2], "rope_theta": 3e4},
    IDS: [0, 3, 5, 7],
    "eagle_config": {
        **EVERY_FLAG.keys["eagle_config"],
        "norm_before_fc": True,
        "norm_before_head": False,
        "later_norm": "hidden_norm",
        "use_aux_hidden_state": True,
    },
}
SPECULATORS = {
    "speculators_model_type": "eagle3",
    "draft_vocab_size": 97,
    IDS: [0, 3, 5, 7],
    "norm_before_residual": True,
    "norm_output": True,
    "norm_before_fc": True,
    "fc_norm": True,
    "transformer_layer_config": {k: v for k, v in EAGLE3.items() if k not in ("eagle_config", "draft_vocab_size")},
}


def facts_of(config: dict[str, Any]) -> Any:
    """Everything that a reader learns from a config, layer ids included, or that it is refused."""
    is_draft = "draft_vocab_size" in config or "eagle_config" in config or "speculators_model_type" in config
    try:
        if not is_draft:
            return LlamaConfig.from_hf(config)
        return Eagle3Config.from_hf(config), resolve(config, LLAMA["num_hidden_layers"]).points
    except (ConfigError, CheckpointError, ValueError) as error:
        return str(error)


def altered(config: dict[str, Any], path: str) -> dict[str, Any]:
    """The config with another value at a dotted key; true becomes false."""
    above, _, key = path.rpartition(".")
    holder = config[above] if above else config
    value = not holder[key] if isinstance(holder[key], bool) else OTHER.get(path, OTHER.get(key, DROP))
    rest = {k: v for k, v in holder.items() if k != key}
    changed = rest if value is DROP else {**rest, key: value}
    return {**config, above: changed} if above else changed


def paths(config: dict[str, Any]) -> list[str]:
    nested = [f"{key}.{inner}" for key in ("eagle_config",) for inner in config.get(key, {})]
    return sorted([*config, *nested])


RICH = {"llama": RICH_LLAMA, "llama, old rope": OLD_LLAMA, "eagle3": RICH_EAGLE3, "speculators": SPECULATORS}


@pytest.mark.parametrize(("name", "path"), [(name, path) for name, config in RICH.items() for path in paths(config)])
def test_every_key_changes_the_facts_or_is_inert(name: str, path: str) -> None:
    facts = facts_of(RICH[name])

    assert not isinstance(facts, str), facts
    assert facts_of(altered(RICH[name], path)) != facts or path in INERT


@pytest.mark.parametrize("name", RICH)
def test_an_unknown_key_is_refused_and_named(name: str) -> None:
    assert "'residual_multiplier'" in facts_of({**RICH[name], "residual_multiplier": 0.5})


def test_every_fact_of_a_config_can_be_written() -> None:
    plain = {**LLAMA, "attention_bias": False, "mlp_bias": False}
    thin = {**RICH_EAGLE3, "rms_norm_eps": 1e-4}
    known = {LlamaConfig: [plain, RICH_LLAMA], Eagle3Config: [EAGLE3, RICH_EAGLE3, thin, SPECULATORS, TIED_DRAFT]}

    for page, configs in known.items():
        read = [page.from_hf(config) for config in configs]
        # a field with one value in all of these has no reader, or this claim does not know how to write it
        constant = [f.name for f in dataclasses.fields(page) if len({getattr(facts, f.name) for facts in read}) == 1]
        assert set(constant) <= {"vocab", "hidden", "heads", "kv_heads", "head_dim", "intermediate", "layers"}


TIED_DRAFT = {
    **EAGLE3,
    "draft_vocab_size": EAGLE3["vocab_size"],
    "tie_word_embeddings": True,
    "eagle_config": {"use_aux_hidden_state": False},
}


@pytest.mark.parametrize(
    ("stated", "meaning", "head", "feedback"),
    [
        ({}, None, True, False),
        ({"norm_output": True}, "head", True, False),
        ({"norm_output": False}, "head", False, False),
        ({"norm_output": True}, "feedback", True, True),
        ({"norm_output": False}, "feedback", True, False),
        ({"eagle_config": {"feedback_normed": True}}, None, True, True),
        ({"eagle_config": {"norm_before_head": False}}, None, False, False),
        (
            {"norm_output": True, "eagle_config": {"norm_before_head": False, "feedback_normed": False}},
            None,
            False,
            False,
        ),
        ({"norm_output": True, "eagle_config": {"norm_before_head": False}}, "feedback", False, True),
    ],
)
def test_norm_output_stands_for_two_facts(
    stated: dict[str, Any], meaning: str | None, head: bool, feedback: bool
) -> None:
    facts = Eagle3Config.from_hf(variant(**stated).keys, norm_output=meaning)

    assert (facts.norm_before_head, facts.feedback_normed) == (head, feedback)


@pytest.mark.parametrize("flag", [True, False])
@pytest.mark.parametrize("stated", [{}, {"norm_before_head": True}, {"feedback_normed": False}])
def test_norm_output_without_a_word_is_refused_with_both_readings(flag: bool, stated: dict[str, bool]) -> None:
    config = variant(norm_output=flag, eagle_config=stated).keys

    with pytest.raises(ConfigError, match=r"two readings.*norm_output='head'.*norm_output='feedback'"):
        Eagle3Config.from_hf(config)


def test_speculators_say_what_their_norm_output_means() -> None:
    for flag in (True, False):
        facts = Eagle3Config.from_hf({**SPECULATORS, "norm_output": flag})
        assert (facts.norm_before_head, facts.feedback_normed) == (True, flag)


@given(drawn=eagle3_drafts(PINNED_TARGET))
@example(drawn=PINNED_DRAFT)
@example(drawn=EVERY_FLAG)
def test_reading_and_building_a_draft_leaves_its_config_alone(drawn: Drawn) -> None:
    config = drawn.keys
    facts = Eagle3Config.from_hf(config)
    before = copy.deepcopy(facts)

    with torch.device("meta"):
        module = Eagle3Draft(facts)

    assert config == drawn.keys
    assert facts == before
    assert module.c is facts


@given(drawn=llama_targets())
@example(drawn=PINNED_TARGET)
def test_reading_and_building_a_target_leaves_its_config_alone(drawn: Drawn) -> None:
    config = drawn.keys
    facts = LlamaConfig.from_hf(config)
    before = copy.deepcopy(facts)

    with torch.device("meta"):
        LlamaTarget(facts)

    assert config == drawn.keys
    assert facts == before


@pytest.mark.parametrize("facts", [LlamaConfig.from_hf(LLAMA), Eagle3Config.from_hf(EAGLE3)], ids=["llama", "eagle3"])
def test_facts_are_frozen_through_and_through(facts: Any) -> None:
    for field in dataclasses.fields(facts):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(facts, field.name, None)
    # a frozen shell around a list would still be shared and changed
    assert isinstance(hash(facts), int)
    assert dataclasses.replace(facts, layers=5) != facts


@pytest.mark.parametrize("side", ["reference", "optimized"])
def test_opening_on_either_side_leaves_files_and_facts_alone(side: str) -> None:
    target_facts, draft_facts = LlamaConfig.from_hf(LLAMA), Eagle3Config.from_hf(EVERY_FLAG.keys)
    with folders(PINNED_TARGET, EVERY_FLAG) as (target_path, draft_path):
        before = [(path / CONFIG).read_bytes() for path in (target_path, draft_path)]
        target = open_target(target_path, side=side)
        draft = open_draft(draft_path, target, side=side)
        after = [(path / CONFIG).read_bytes() for path in (target_path, draft_path)]

    assert before == after
    assert draft.checkpoint.config == json.loads(before[1]) == EVERY_FLAG.keys
    assert target.config == target_facts
    assert draft.facts.config == draft_facts
