"""Claim: a D-Flash config has one reading, or is refused with the key that decides.

Born of vLLM #40727 and #43671 (which states `target_layer_ids` and speculators' ids name), of `causal`, which three
files spell in four ways, and of engines that guess: a rope base of 1000000 where none is written, a triple of layers
where there are no ids.
"""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from harness.checkpoints import CheckpointError
from harness.compare import bit_equal
from harness.conventions import LayerIdsError, resolve
from reference.config import INERT, ConfigError
from reference.drafts.dflash import DflashConfig, DflashDraft
from suites.catalog import OpenTarget
from suites.correctness.test_configs import OTHER
from suites.correctness.test_loading import ours
from suites.draws import PINNED_TARGET, Drawn, random_tokens
from suites.families.dflash import (
    BOTH_WAYS,
    CAUSAL,
    DFLASH,
    EVERY_DFLASH_FLAG,
    FULL,
    MIXED,
    PINNED_DFLASH,
    PUBLISHED_DRAFTS,
    SLIDING,
    dflash_drafts,
    speculators,
)
from suites.shells import count_parameters, without_memory
from suites.stand import stand_as

pytestmark = [pytest.mark.correctness, pytest.mark.pair("dflash")]

VOCAB, BLOCK = PINNED_TARGET.keys["vocab_size"], DFLASH["dflash_config"]
FULL_SET = {
    **EVERY_DFLASH_FLAG.keys,
    "target_hidden_size": 96,
    "hidden_act": "silu",
    "max_window_layers": 28,
    "use_cache": True,
    "is_causal": True,
    "is_neox_style": True,
    "rope_parameters": {"rope_type": "yarn", "rope_theta": 50_000.0, "factor": 4.0},
}
OTHERS = {**OTHER, "block_size": 9, "dflash_config": {**BLOCK, "mask_token_id": 8}, "model_type": "qwen3_next"}
# what another key says too, or what is the target's
ELSEWHERE = {"max_window_layers", "num_target_layers", "tie_word_embeddings", "use_sliding_window"}


def facts_of(config: Mapping[str, Any]) -> Any:
    """What a reader learns, or why it refuses."""
    try:
        return DflashConfig.from_hf(dict(config))
    except ConfigError as error:
        return str(error)


@pytest.mark.parametrize("key", sorted(FULL_SET))
def test_every_key_changes_the_facts_or_is_inert(key: str) -> None:
    value = FULL_SET[key]
    other = {**FULL_SET, key: (not value) if isinstance(value, bool) else OTHERS.get(key, "other")}

    assert not isinstance(facts_of(FULL_SET), str), facts_of(FULL_SET)
    assert facts_of(other) != facts_of(FULL_SET) or key in INERT | ELSEWHERE


def test_every_fact_can_be_written() -> None:
    configs = [DFLASH, FULL_SET, BOTH_WAYS.keys, EVERY_DFLASH_FLAG.keys, {**DFLASH, "num_hidden_layers": 1}]
    other = {"vocab_size": 400, "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 8, "head_dim": 8}
    configs += [{**DFLASH, **other, "num_key_value_heads": 1, "rms_norm_eps": 1e-5, "block_size": 5}]
    read = [DflashConfig.from_hf(config) for config in configs]

    assert not {f.name for f in dataclasses.fields(DflashConfig) if len({getattr(c, f.name) for c in read}) == 1}


def changed(**changes: Any) -> dict[str, Any]:
    """The pinned config with changes; "absent" removes a key, and `dflash_config` entries are merged."""
    config = {**DFLASH, **changes, "dflash_config": {**BLOCK, **changes.get("dflash_config", {})}}
    config["dflash_config"] = {key: value for key, value in config["dflash_config"].items() if value != "absent"}
    return {key: value for key, value in config.items() if value != "absent"}


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no mask": ({"dflash_config": {"mask_token_id": "absent"}}, "mask_token_id"),
    "a mask outside the vocabulary": ({"dflash_config": {"mask_token_id": 331}}, r"331.*0\.\.330"),
    "two masks": ({"mask_token_id": 3}, "mask_token_id.*disagree"),
    "no ids": ({"dflash_config": {"target_layer_ids": "absent"}}, "target_layer_ids.*missing"),
    "ids of two lengths": ({"target_layer_ids": [1, 2]}, r"aux states: \[2, 3\]"),
    "no rope base": ({"rope_parameters": {"rope_type": "default"}}, "rope_theta.*10000.*1000000"),
    "no window": ({"layer_types": [FULL, SLIDING]}, "sliding_window.*missing"),
    "a window for nobody": ({"sliding_window": 5}, "layer_types"),
    "a layer too few": ({**MIXED, "layer_types": [SLIDING]}, "layer_types.*lists 1"),
    "two windows": ({**MIXED, "dflash_config": {"swa_window_size": 9}}, "disagree: 4 and 9"),
    "two words about causality": ({"is_causal": True, "dflash_config": {"causal": False}}, "is_causal.*disagree"),
    "a sink": ({"dflash_config": {"attention_sink_bias": True}}, "attention_sink_bias"),
    "a head that corrects": ({"dflash_config": {"projector_type": "domino"}}, "projector_type"),
    "a convolution": ({"dflash_config": {"conv_kernel_size": 4}}, "conv_kernel_size"),
    "labels moved by one": ({"dflash_config": {"shift_label": True}}, "shift_label"),
    "an anchor that proposes": ({"dflash_config": {"sample_from_anchor": True}}, "sample_from_anchor"),
    "the target's last state": ({"dflash_config": {"use_aux_hidden_state": False}}, "use_aux_hidden_state"),
    "norms of another kind": ({"use_gemma_norm": True}, "use_gemma_norm"),
    "a word nobody knows": ({"dflash_config": {"noise": 2}}, r"dflash_config\.noise"),
    "more words than the target has": ({"draft_vocab_size": 400}, "draft_vocab_size.*331"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_has_no_single_reading_is_refused_and_named(case: str) -> None:
    changes, named = REFUSED[case]

    with pytest.raises(ConfigError, match=named):
        DflashConfig.from_hf(changed(**changes))


CAUSALITY: dict[str, tuple[dict[str, Any], tuple[bool, ...]]] = {
    "nothing slides": ({}, (False, False)),
    "what slides": (MIXED, (False, True)),
    "stated": ({**MIXED, "dflash_config": {"causal": False}}, (False, False)),
    "stated of full layers": ({"dflash_config": {"causal": True}}, (True, True)),
    "stated at the top": ({**MIXED, "is_causal": False}, (False, False)),
    "all slide and none is causal": ({"sliding_window": 4, "dflash_config": {"use_swa": True}}, (False, False)),
}


@pytest.mark.parametrize("case", CAUSALITY)
def test_a_layer_is_causal_where_the_file_says_so_or_where_it_slides(case: str) -> None:
    changes, causal = CAUSALITY[case]

    assert DflashConfig.from_hf(changed(**changes)).causal == causal


def test_use_swa_lets_every_layer_slide() -> None:
    block = {"use_swa": True, "swa_window_size": 6}

    for kinds in ("absent", [FULL, FULL]):
        assert DflashConfig.from_hf(changed(layer_types=kinds, dflash_config=block)).windows == (6, 6)


def test_speculators_speaks_of_sliding_layers_alone_and_must_speak() -> None:
    config = speculators(BOTH_WAYS, non_causal=True)
    silent = {key: value for key, value in config.items() if key != "sliding_window_non_causal"}

    assert DflashConfig.from_hf(config).causal == (False, False)
    assert DflashConfig.from_hf({**config, "sliding_window_non_causal": False}).causal == (False, True)
    with pytest.raises(ConfigError, match=r"sliding_window_non_causal.*state it"):
        DflashConfig.from_hf(silent)
    # nothing slides: nothing to say
    plain = speculators(PINNED_DFLASH)
    del plain["sliding_window_non_causal"]
    assert DflashConfig.from_hf(plain).causal == (False, False)


@given(drawn=dflash_drafts(PINNED_TARGET), seed=st.integers(0, 99))
@example(drawn=EVERY_DFLASH_FLAG, seed=0)
@example(drawn=PINNED_DFLASH, seed=1)
def test_both_spellings_are_one_draft(target: OpenTarget, drawn: Drawn, seed: int) -> None:
    keys = {key: value for key, value in drawn.keys.items() if key not in ("is_causal", "logit_scale")}
    keys["dflash_config"] = {key: value for key, value in keys["dflash_config"].items() if key != "causal"}
    plain, tokens = Drawn(json.dumps({"block_size": 4, **keys}), drawn.seed), random_tokens(VOCAB, 1, 5, seed)

    drafts = [stand_as(config, ours(plain), target) for config in (plain.keys, speculators(plain))]

    one, other = drafts
    assert one.facts.config == other.facts.config
    assert one.capture_points == other.capture_points
    assert one.facts.layer_ids.convention == "after_layer"
    assert other.facts.layer_ids.convention == "before_layer"
    said = [draft.unroll(tokens, target(tokens, capture=draft.capture_points), 2) for draft in drafts]
    bit_equal("logits", *said)


def test_ids_of_layers_that_are_not_there_are_refused(target: OpenTarget) -> None:
    beyond = changed(dflash_config={"target_layer_ids": [1, 3, 8]})

    with pytest.raises(LayerIdsError, match=r"id 8 is out of range.*0\.\.7"):
        stand_as(beyond, ours(PINNED_DFLASH), target)
    with pytest.raises(CheckpointError, match=r"fc\.weight.*asks for \[96, 192\]"):
        stand_as(changed(dflash_config={"target_layer_ids": [1, 3]}), ours(PINNED_DFLASH), target)


def count(config: Mapping[str, Any]) -> int:
    """Parameters of a draft, tables included, written out."""
    hidden, width = config["hidden_size"], config["head_dim"]
    query, grouped = config["num_attention_heads"] * width, config["num_key_value_heads"] * width
    layer = (
        2 * hidden * query + 2 * hidden * grouped + 2 * width + 3 * hidden * config["intermediate_size"] + 2 * hidden
    )
    context = len(config["dflash_config"]["target_layer_ids"]) * hidden * hidden + hidden
    return 2 * config["vocab_size"] * hidden + context + config["num_hidden_layers"] * layer + hidden


@pytest.mark.parametrize("name", PUBLISHED_DRAFTS)
def test_published_forms_are_read_in_full(name: str) -> None:
    config, layers, points = PUBLISHED_DRAFTS[name]
    facts = DflashConfig.from_hf(json.loads(json.dumps(config)))
    with without_memory():
        module = DflashDraft(facts)

    assert count_parameters(module) == count(config)
    assert resolve(config, layers).points == points
    assert facts.block_size == 16
    slides = [kind == SLIDING for kind in config.get("layer_types", [FULL] * facts.layers)]
    assert facts.causal == tuple(slides)
    assert [facts.window(i) for i in range(facts.layers)] == [2048 if s else None for s in slides]


def test_a_file_without_tables_says_so(target: OpenTarget) -> None:
    thin = {name: t for name, t in ours(PINNED_DFLASH).items() if name not in ("embed_tokens.weight", "lm_head.weight")}

    draft = stand_as(CAUSAL.keys, thin, target)

    shared = sorted(entry.parameter for entry in draft.ledger.entries if entry.status == "shared")
    assert shared == ["embed_tokens.weight", "lm_head.weight"]
    assert draft.module.lm_head is target.module.lm_head
    with pytest.raises(CheckpointError, match=r"lm_head\.weight.*missing"):
        stand_as({**CAUSAL.keys, "draft_vocab_size": 97}, {**thin, "d2t": torch.zeros(97).long()}, target)
