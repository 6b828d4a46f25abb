"""Claim: whatever is wrong with a checkpoint, one typed error names the file, the tensor or key, and what to do.

Born of SGLang #8229 and #36528 (a bad pair of checkpoints ends in an AttributeError far from its cause), and of the
defects that engines load in silence: `d2t` missing or of absolute ids (verl-SpeCo #67), a head that was never saved.
"""

import json
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from harness.checkpoints import CONFIG, INDEX, SINGLE, CheckpointError, save_checkpoint
from harness.conventions import AmbiguousLayerIds, LayerIdsError
from suites.catalog import MissingTarget, OpenTarget, open_draft, open_speculation, open_target
from suites.damage import IDS, Damage, both, config, damaged, header, ids, index, tensors, write, write_key
from suites.draws import EAGLE3, PINNED_DRAFT, eagle3_weights

pytestmark = [pytest.mark.correctness, pytest.mark.pair("eagle3")]


@dataclass(frozen=True)
class Case:
    """One way to break a sound checkpoint, and what its owner must be told."""

    name: str
    damage: Damage
    words: tuple[str, ...]
    error: type[CheckpointError] = CheckpointError
    facts: dict[str, Any] = field(default_factory=dict)


def absolute(held: dict[str, Tensor]) -> None:
    held["d2t"] += torch.arange(held["d2t"].numel())


def swap(held: dict[str, Tensor]) -> None:
    target_ids = held["d2t"] + torch.arange(held["d2t"].numel())
    held["d2t"] = target_ids.flip(0) - torch.arange(held["d2t"].numel())


def only_pickle(folder: Path) -> None:
    (folder / SINGLE).rename(folder / "pytorch_model.bin")


NORMS = {"norm_before_head": None, "feedback_normed": None}
TOO_SHORT = {"norm.weight": {"dtype": "F32", "shape": [96], "data_offsets": [0, 380]}}

FILES = (
    Case("no config", lambda folder: (folder / CONFIG).unlink(), (CONFIG, "missing")),
    Case("no weights", lambda folder: (folder / SINGLE).unlink(), (SINGLE, INDEX, "neither")),
    Case("pickles", only_pickle, ("pytorch_model.bin", "pickles", "convert")),
    Case("config cut", write(CONFIG, '{"model_type": '), (CONFIG, "JSON", "fetch")),
    Case("config a list", write(CONFIG, "[1, 2]"), (CONFIG, "list", "object")),
    Case("config not text", write(CONFIG, b"\xff\xfe\x00"), (CONFIG, "JSON")),
    Case("config of a million brackets", write(CONFIG, "[" * 1_000_000), (CONFIG, "JSON")),
    Case("weights empty", write(SINGLE, b""), (SINGLE, "fetch")),
    Case("weights of text", write(SINGLE, "not weights at all"), (SINGLE, "safetensors")),
    Case("header beyond the file", write(SINGLE, struct.pack("<Q", 2**63) + b"{}"), (SINGLE, "cut short")),
    Case("header a list", header(lambda entries: [1]), (SINGLE, "header")),
    Case("header entry a number", header(lambda entries: {"fc.weight": 3}), (SINGLE, "'fc.weight'", "header")),
    Case("header without shape", header(lambda e: e["fc.weight"].pop("shape") and None), ("'fc.weight'", "header")),
    Case("unknown dtype", header(lambda e: e["fc.weight"].update(dtype="F4")), ("'fc.weight'", "F4")),
    Case("hostile shape", header(lambda e: e["fc.weight"].update(shape=[2**62, 2**62])), ("'fc.weight'",)),
    Case("negative shape", header(lambda e: e["fc.weight"].update(shape=[-1, -27648])), ("'fc.weight'",)),
    Case("shape a word", header(lambda e: e["fc.weight"].update(shape="wide")), ("'fc.weight'", "header")),
    Case("offsets that do not fit", header(lambda entries: TOO_SHORT), ("'norm.weight'", "380")),
    Case(
        "offsets a word",
        header(lambda e: e["fc.weight"].update(data_offsets=["a", "b"])),
        ("'fc.weight'", "header"),
    ),
    Case("index of nothing", index(lambda i: i.clear()), (INDEX, "weight_map")),
    Case("index of numbers", index(lambda i: i["weight_map"].update({"fc.weight": 1})), (INDEX, "weight_map")),
    Case("index outside", index(lambda i: i["weight_map"].update({"fc.weight": "../x"})), (INDEX, "'../x'", "plain")),
    Case("index absolute", index(lambda i: i["weight_map"].update({"fc.weight": "/x"})), (INDEX, "'/x'", "plain")),
    Case("index to nothing", index(lambda i: i["weight_map"].update({"fc.weight": "x"})), (INDEX, "'x'", "missing")),
    Case("index promises", index(lambda i: i["weight_map"].update(new="model-00001-of-00007.safetensors")), (INDEX,)),
    Case("index forgets", index(lambda i: i["weight_map"].pop("norm.weight")), (INDEX, "'norm.weight'", "again")),
)

CONFIGS = (
    Case("unknown key", config(residual_scale=2.0), ("'residual_scale'", "remove")),
    Case("unknown nested key", config(eagle_config={"fc_scale": 2.0}), ("'eagle_config.fc_scale'", "remove")),
    Case("missing key", config(hidden_size=None), ("'hidden_size'", "missing")),
    Case("activation", config(hidden_act="gelu"), ("'hidden_act'", "'gelu'", "silu")),
    Case("rope type", config(rope_parameters={"rope_type": "spiral"}), ("rope_type", "'spiral'", "yarn")),
    Case("rope number", config(rope_parameters={"rope_theta": 1e4, "twist": 2}), ("twist", "rope")),
    Case("no model type", config(model_type=None, architectures=None, draft_vocab_size=None), ("model_type", "Eagle3")),
    Case("eagle_config a list", write_key("eagle_config", [1]), ("'eagle_config'", "mapping")),
    Case("layers a word", config(num_hidden_layers="two"), ("'num_hidden_layers'", "'two'")),
    Case("no layers", config(num_hidden_layers=0), ("'num_hidden_layers'", "0")),
    Case("heads not groups", config(num_attention_heads=5), ("num_attention_heads", "num_key_value_heads", "5", "2")),
    Case("a flag of text", config(fc_norm="false"), ("'fc_norm'", "'false'")),
    Case(
        "a flag of two values", config(norm_before_fc=True, eagle_config={"norm_before_fc": False}), ("norm_before_fc",)
    ),
    Case("sliding without a window", config(layer_types=["sliding_attention"]), ("'sliding_window'", "missing")),
    Case("an unknown layer type", config(layer_types=["chunked_attention"]), ("'layer_types'", "'chunked_attention'")),
    Case("layer types of two", config(layer_types=["full_attention"] * 2), ("'layer_types'", "2")),
    Case("later norm", config(eagle_config={"later_norm": "norm"}), ("later_norm", "'norm'", "hidden_norm")),
    Case("norm_output", config(norm_output=True, eagle_config=NORMS), ("'norm_output'", "'head'", "'feedback'")),
    Case("a larger draft vocabulary", config(draft_vocab_size=332), ("draft_vocab_size", "332", "331")),
)

JOINS = (
    Case("ids out of range", ids(1, 3, 8), (IDS, "8", "0..7"), LayerIdsError),
    Case("ids twice", ids(1, 3, 3), (IDS, "3", "twice"), LayerIdsError),
    Case("ids below zero", ids(-1, 3, 5), (IDS, "-1", "0..7"), LayerIdsError),
    Case("ids of words", ids("one", 3, 5), (IDS, "'one'", "integer")),
    Case("ids of flags", ids(True, 3, 5), (IDS, "True", "integer")),
    Case("ids a number", config(eagle_config={IDS: 3}), (IDS, "3", "list")),
    Case("no ids in the list", ids(), (IDS, "list")),
    Case("two ids for three states", both(ids(1, 3), config(num_aux_hidden_states=3)), ("aux states", "2", "3")),
    Case("two ids for a wide fc", ids(1, 3), ("'fc.weight'", "288", "192")),
    Case("two lists", config(**{IDS: [2, 4, 6]}), (IDS, "[1, 3, 5]", "[2, 4, 6]", "disagree"), LayerIdsError),
    Case(
        "no convention", ids(1, 3, 5, layer_ids=None), ("(2, 4, 6)", "(1, 3, 5)", "pass layer_ids"), AmbiguousLayerIds
    ),
    Case("a third convention", ids(1, 3, 5, layer_ids="between"), ("layer_ids", "'between'"), LayerIdsError),
    Case(
        "contradicted",
        lambda folder: None,
        ("after_layer", "before_layer"),
        LayerIdsError,
        {"layer_ids": "before_layer"},
    ),
    Case("an unknown word", lambda folder: None, ("layer_ids", "'middle'"), LayerIdsError, {"layer_ids": "middle"}),
    Case("d2t missing", tensors(lambda held: held.pop("d2t")), ("'d2t'", "missing", "97", "331")),
    Case("d2t of absolute ids", tensors(absolute), ("'d2t'", "outside 0..330", "offsets")),
    Case("d2t below zero", tensors(lambda held: held["d2t"].sub_(300)), ("'d2t'", "-", "offsets")),
    Case("d2t unsorted", tensors(swap), ("'d2t'", "strictly increasing")),
    Case("d2t twice the same", tensors(lambda held: held["d2t"][1:2].copy_(held["d2t"][:1] - 1)), ("'d2t'", "share")),
    Case("d2t of floats", tensors(lambda held: held.update(d2t=held["d2t"].float())), ("'d2t'", "float32", "int64")),
    Case("d2t too short", tensors(lambda held: held.update(d2t=held["d2t"][:-1].clone())), ("'d2t'", "[96]", "[97]")),
    Case("t2d of another map", tensors(lambda held: held["t2d"].logical_not_()), ("t2d", "d2t")),
    Case("the head not saved", tensors(lambda held: held.pop("lm_head.weight")), ("'lm_head.weight'", "missing")),
    Case("an unwritten norm", tensors(lambda held: held["norm.weight"].fill_(float("nan"))), ("'norm.weight'",)),
    Case("another width of the target", config(target_hidden_size=64), ("'fc.weight'", "288", "192")),
)


@pytest.mark.parametrize("case", [*FILES, *CONFIGS, *JOINS], ids=lambda case: case.name)
def test_a_damaged_draft_is_refused_in_words(
    case: Case, target: OpenTarget, draft_folder: Path, tmp_path: Path
) -> None:
    folder = damaged(draft_folder, tmp_path, case.damage)

    with pytest.raises(case.error) as caught:
        open_draft(folder, target, **case.facts)

    message = str(caught.value)
    assert str(folder) in message
    assert [word for word in case.words if word not in message] == []


TARGETS = (
    *FILES[:9],
    Case("unknown key", config(logits_scaling=2.0), ("'logits_scaling'", "remove")),
    Case("missing key", config(vocab_size=None), ("'vocab_size'", "missing")),
    Case("activation", config(hidden_act="relu"), ("'hidden_act'", "'relu'", "silu")),
    Case("another model", config(model_type="mamba"), ("'mamba'", "llama")),
    Case("heads not groups", config(num_key_value_heads=4), ("num_attention_heads", "num_key_value_heads", "6", "4")),
    Case("a size below zero", config(intermediate_size=-96), ("'intermediate_size'", "-96")),
    Case("a size of a fraction", config(vocab_size=331.5), ("'vocab_size'", "331.5")),
    Case("tied to another head", config(tie_word_embeddings=True), ("'lm_head.weight'", "tie_word_embeddings")),
    Case("a draft", config(draft_vocab_size=97), ("open_draft",)),
)


@pytest.mark.parametrize("case", TARGETS, ids=lambda case: case.name)
def test_a_damaged_target_is_refused_in_words(case: Case, target_folder: Path, tmp_path: Path) -> None:
    folder = damaged(target_folder, tmp_path, case.damage)

    with pytest.raises(case.error) as caught:
        open_target(folder)

    message = str(caught.value)
    assert str(folder) in message
    assert [word for word in case.words if word not in message] == []


def test_a_path_that_is_no_folder(tmp_path: Path, target: OpenTarget) -> None:
    file = tmp_path / "weights"
    file.write_text("")

    for path in (tmp_path / "absent", file, "no-such-owner/no-such-model"):
        with pytest.raises(CheckpointError, match="folder"):
            open_target(path)
        with pytest.raises(CheckpointError, match="folder"):
            open_draft(path, target)


def test_a_pickle_that_holds_a_parameter_is_named(draft_folder: Path, target: OpenTarget, tmp_path: Path) -> None:
    folder = damaged(draft_folder, tmp_path, lambda path: (path / "mask_embedding.pt").write_bytes(b"any"))

    with pytest.raises(CheckpointError, match=r"mask_embedding\.pt.*pickles are not read"):
        open_draft(folder, target)


def test_a_draft_without_the_target_that_it_needs(draft_folder: Path) -> None:
    with pytest.raises(MissingTarget, match="target="):
        open_draft(draft_folder)


@pytest.mark.parametrize(
    ("changes", "own_embedding", "words"),
    [
        ({"vocab_size": 330}, True, ("330", "331", "vocabulary")),
        ({"hidden_size": 48, "target_hidden_size": 96}, False, ("'embed_tokens.weight'", "[331, 96]", "[331, 48]")),
        ({"hidden_size": 48}, True, ("48", "96", "target_hidden_size")),
    ],
    ids=["vocabulary", "embedding", "aux states"],
)
def test_a_draft_that_does_not_fit_its_target(
    changes: dict[str, Any], own_embedding: bool, words: tuple[str, ...], target: OpenTarget, tmp_path: Path
) -> None:
    keys = {**EAGLE3, **changes}
    drawn = type(PINNED_DRAFT)(json.dumps(keys), 2)
    save_checkpoint(tmp_path, keys, eagle3_weights(drawn, own_embedding))

    with pytest.raises(CheckpointError) as caught:
        open_draft(tmp_path, target)

    message = str(caught.value)
    assert [word for word in (str(tmp_path), *words) if word not in message] == []


@pytest.mark.parametrize("tp_size", [3, 4, 5])
def test_ranks_that_do_not_divide_the_heads(tp_size: int, target_folder: Path) -> None:
    with pytest.raises(CheckpointError, match=rf"tp_size={tp_size}.*heads") as caught:
        open_target(target_folder, side="optimized", tp_size=tp_size)

    assert str(target_folder) in str(caught.value)


@pytest.mark.parametrize(
    "facts", [{"side": "fast"}, {"tp_size": 2}, {"exact": True}, {"form": "triton"}], ids=lambda facts: str(facts)
)
def test_a_side_that_does_not_exist(facts: dict[str, Any], target_folder: Path) -> None:
    with pytest.raises(ValueError, match=r"side"):
        open_target(target_folder, **facts)


@pytest.mark.parametrize("facts", [{"algorithm": "EAGLE"}, {"algorithm": "DFLASH"}, {"topk": 0}], ids=str)
def test_a_way_of_drafting_that_does_not_fit(facts: dict[str, Any], target_folder: Path, draft_folder: Path) -> None:
    with pytest.raises(ValueError, match=r"EAGLE-3|topk"):
        open_speculation(target_folder, draft_folder, **facts)


@pytest.mark.parametrize("side", ["reference", "optimized"])
@pytest.mark.parametrize(
    "prompts",
    [[], [[]], [[1, 2], []], [[[1, 2]]], [[1.5, 2.0]], [[1, 331]], [[-1, 2]]],
    ids=[
        "no prompts",
        "an empty prompt",
        "one empty prompt",
        "two dims",
        "not ids",
        "beyond the vocabulary",
        "negative",
    ],
)
def test_prompts_that_are_none(side: str, prompts: list[Any], target_folder: Path, draft_folder: Path) -> None:
    speculation = open_speculation(target_folder, draft_folder, side=side)

    with pytest.raises(ValueError, match="prompt"):
        speculation.generate([torch.tensor(row) for row in prompts], num_tokens=4)


def test_a_capture_point_outside_the_target(target: OpenTarget) -> None:
    for point in (-1, 9):
        with pytest.raises(ValueError, match=r"0\.\.8"):
            target(torch.zeros(1, 2, dtype=torch.int64), capture=(2, point))
