"""Claim: the table of dialects predicts what each consumer makes of each producer's draft, down to the draft step.

Born of SGLang #25454 (layer ids of another convention: 0.10 tokens of acceptance), vLLM #42764 (`norm_output` and
`fc_norm` unread) and of every pair of a trainer and an engine that was seen to disagree. Each checkpoint is made here
by hand, as its trainer writes it, and not by the writer that is under test elsewhere; the predicted model is the
reference with the consumer's facts, and where it should differ, its logits do, and no step earlier than foretold.
"""

import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from harness.checkpoints import Checkpoint, open_checkpoint, save_checkpoint
from suites.audit.engines import INTENDED, WRONGLY, judge
from suites.catalog import OpenTarget
from suites.dialects import DIALECTS, ENGINES
from suites.draws import EAGLE3, Drawn, eagle3_weights, random_tokens
from suites.families.eagle3_mla import EAGLE3_MLA
from suites.formats.effect import differences, realise
from suites.formats.reading import Reading, Refusal, read_as
from suites.formats.rows import IMAGES, READ, UNREAD
from suites.formats.writing import put, remove

pytestmark = [pytest.mark.correctness, pytest.mark.pair("eagle3")]

LAYERS = 8
BODY = {key: value for key, value in EAGLE3.items() if key != "eagle_config"}
SQUARE = {"num_attention_heads": 6}
"""heads that fill the hidden width: one trainer knows no head_dim"""
TWO_LAYERS = {"num_hidden_layers": 2}
Change = Callable[[dict[str, Tensor]], Any]


def nested(*ids: int) -> dict[str, Any]:
    return {"eagle_config": {"eagle_aux_hidden_state_layer_ids": list(ids), "use_aux_hidden_state": True}}


def speculators(**flags: Any) -> dict[str, Any]:
    """As speculators saves a config: the body below, its own keys beside it."""
    body = {key: value for key, value in BODY.items() if key not in ("architectures", "draft_vocab_size")}
    own = {"architectures": ["Eagle3DraftModel"], "speculators_model_type": "eagle3", "draft_vocab_size": 97}
    own |= {"speculators_config": {"algorithm": "eagle3", "verifier": {"name_or_path": None}}}
    return {**own, "eagle_aux_hidden_state_layer_ids": [2, 4, 5], "transformer_layer_config": body, **flags}


def plain_layers(tensors: dict[str, Tensor]) -> None:
    """Names as speculators and Model-Optimizer write them."""
    for name in [name for name in tensors if name.startswith("midlayer.")]:
        tensors["layers.0." + name.removeprefix("midlayer.")] = tensors.pop(name)


def without(*names: str) -> Change:
    return lambda tensors: [tensors.pop(name) for name in names]


def legacy_norms(tensors: dict[str, Tensor]) -> None:
    for i, word in enumerate(("low", "mid", "high")):
        tensors[f"aux_norm_{word}.weight"] = tensors.pop(f"fc_norm.{i}.weight")


def as_is(tensors: dict[str, Tensor]) -> None:
    return None


FC_NORMS = tuple(f"fc_norm.{i}.weight" for i in range(3))
YARN_THETA = {"rope_parameters": {**EAGLE3_MLA["rope_parameters"], "rope_theta": 50_000.0}}


@dataclass(frozen=True)
class Case:
    """One row of who misreads whom."""

    name: str
    producer: str
    config: Mapping[str, Any]
    consumer: str
    wrong: tuple[str, ...] = ()
    """facts that the consumer runs with and nobody meant, or the one that it refuses"""
    step: int = 1
    """the draft step that shows it first; 0: it refuses"""
    target: str = "llama"
    change: Change = as_is
    shape: Mapping[str, Any] = field(default_factory=dict)
    """flags of the tensors, where the file hides them"""


V1, V2, SGL, SF = "vllm-v1", "vllm-v2", "sglang", "specforge"
OLD_31 = {**BODY, "norm_output": True}
CASES = (
    Case("SpecForge's ids in V1", SF, {**BODY, **nested(1, 3, 4)}, V1, ("points",)),
    Case("SpecForge's odd ids in V2", SF, {**BODY, **nested(1, 3, 6)}, V2, ("points",)),
    Case("Model-Optimizer's ids in V1", "modelopt", {**BODY, **nested(1, 3, 4)}, V1, ("points",), change=plain_layers),
    Case("TorchSpec's ids in V1", "torchspec", {**BODY, **nested(1, 3, 4)}, V1, ("points",)),
    Case("ids that count inputs in SGLang", "torchspec-vllm", {**BODY, **nested(2, 4, 5)}, SGL, ("points",),
         change=plain_layers),
    Case("ids that count inputs, gemma 4", "torchspec-vllm", {**BODY, **nested(2, 4, 5)}, SGL, ("points",), 1, "gemma4",
         plain_layers),
    Case("outputs that do not begin with 1", SF, {**BODY, **nested(0, 3, 5)}, SGL, ("points",), 1, "deepseek"),
    Case("inputs that begin with 1", "torchspec-vllm", {**BODY, **nested(1, 3, 5)}, SGL, ("points",), 1, "deepseek",
         plain_layers),
    Case("speculators in SGLang", "speculators", speculators(), SGL, ("layout",), 0, change=plain_layers),
    Case("speculators, residual unsaid", "speculators", speculators(), V1, ("norm_before_residual",), 1,
         change=plain_layers),
    Case("speculators, residual unsaid, V2", "speculators", speculators(), V2, ("norm_before_residual",), 1,
         change=plain_layers),
    Case("SpecForge 3.1 in V1", SF, OLD_31, V1, ("feedback_normed",), 2),
    Case("SpecForge 3.1 in SGLang", SF, OLD_31, SGL, ("feedback_normed",), 2),
    Case("SpecForge 3.1 in speculators", SF, OLD_31, "speculators-convert", ("feedback_normed",), 2),
    Case("SpecForge 3.1 in TensorRT-LLM", SF, OLD_31, "tensorrt-llm", ("feedback_normed",), 2),
    Case("a head without a norm", SF, {**BODY, "norm_output": False}, V1, ("norm_before_head",)),
    Case("a head without a norm, SGLang", SF, {**BODY, "norm_output": False}, SGL, ("norm_before_head",)),
    Case("fc_norm's flag unsaid", SF, BODY, V1, ("tensor",), 0, shape={"fc_norm": True}),
    Case("latent, norm before fc, in vLLM", "torchspec", {**EAGLE3_MLA, "norm_before_fc": True, **nested(2, 4, 5)}, V1,
         ("tensor",), 0, "deepseek"),
    Case("old names of norms in vLLM", "torchspec", {**BODY, "fc_norm": True}, V1, ("tensor",), 0, change=legacy_norms),
    Case("base of rope, trained and served", "safeailab-training", {**BODY, **SQUARE, "rope_parameters": None,
         "rope_theta": 5e5}, "safeailab", ("rope",)),
    Case("base of rope in vLLM", "safeailab-training", {**BODY, **SQUARE, "rope_parameters": None, "rope_theta": 5e5},
         V1, ("rope",)),
    Case("base of yarn", "torchspec", {**EAGLE3_MLA, **YARN_THETA, "eagle_config": {}}, V1, ("rope",), 1, "deepseek"),
    Case("base of yarn, SGLang", "torchspec", {**EAGLE3_MLA, **YARN_THETA, "eagle_config": {}}, SGL, ("rope",), 1,
         "deepseek"),
)  # fmt: skip


def weights(config: Mapping[str, Any], shape: Mapping[str, Any]) -> dict[str, Tensor]:
    """Random tensors of a draft with these flags, whatever its file says of them."""
    flat = {**config, **config.get("transformer_layer_config", {})}
    kept = {key: flat[key] for key in (*EAGLE3, "rope_theta", *EAGLE3_MLA) if flat.get(key) is not None}
    one = "Eagle3DeepseekV2ForCausalLM" if "kv_lora_rank" in flat else "LlamaForCausalLMEagle3"
    flags = {key: flat[key] for key in ("fc_norm", "norm_before_fc") if key in flat}
    keys = {**kept, "architectures": [one], "draft_vocab_size": 97, "eagle_config": {}, **flags, **shape}
    return eagle3_weights(Drawn(json.dumps(keys), 5), own_embedding=False)


def write(folder: Path, config: Mapping[str, Any], change: Change = as_is, **shape: Any) -> Checkpoint:
    tensors = weights(config, shape)
    change(tensors)
    save_checkpoint(folder, {k: v for k, v in config.items() if v is not None}, tensors)
    return open_checkpoint(folder)


def logits(reading: Reading, checkpoint: Checkpoint, target: OpenTarget) -> Tensor:
    """[K, B, T, Vd] of the model that this consumer would run, three draft steps."""
    tokens = random_tokens(target.config.vocab, 1, 8, 3)
    module = realise(reading, checkpoint, target.module)
    with torch.no_grad():
        hidden = module.fuse(target(tokens, capture=reading.points).aux)
        return module.unroll(tokens, hidden, 3).nan_to_num()


def first_difference(one: Tensor, other: Tensor) -> int:
    """The first draft step whose logits differ; 0 where none does."""
    return next((k + 1 for k in range(len(one)) if not torch.equal(one[k], other[k])), 0)


def trained_by(checkpoint: Checkpoint, producer: str, target: str = "llama") -> Reading:
    found = read_as(checkpoint, producer, LAYERS, target)
    assert isinstance(found, Reading), found
    return found


@pytest.mark.parametrize("case", [c for c in CASES if c.step], ids=lambda case: case.name)
def test_what_is_read_otherwise_shows_from_its_step_on(case: Case, target: OpenTarget, tmp_path: Path) -> None:
    checkpoint = write(tmp_path, case.config, case.change, **case.shape)
    meant = trained_by(checkpoint, case.producer, case.target)

    read = read_as(checkpoint, case.consumer, LAYERS, case.target)

    assert isinstance(read, Reading), read
    found = differences(meant, read)
    assert tuple(d.fact for d in found) == case.wrong
    assert {d.manner for d in found} <= {"silent", "warns"}
    want, got = logits(meant, checkpoint, target), logits(read, checkpoint, target)
    assert first_difference(want, got) == case.step == min(d.first_step for d in found)


@pytest.mark.parametrize("case", [c for c in CASES if c.step == 0], ids=lambda case: case.name)
def test_what_stops_is_told_as_a_refusal(case: Case, tmp_path: Path) -> None:
    checkpoint = write(tmp_path, case.config, case.change, **case.shape)

    read = read_as(checkpoint, case.consumer, LAYERS, case.target)

    assert isinstance(read, Refusal)
    assert (read.fact,) == case.wrong
    assert read.reason


ID_LISTS = st.lists(st.integers(1, LAYERS - 2), min_size=3, max_size=3, unique=True).map(sorted)


@given(ids=ID_LISTS)
@example(ids=[2, 4, 5])
@example(ids=[1, 3, 4])
def test_ids_land_where_each_convention_puts_them(ids: list[int]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = write(Path(folder), {**BODY, **nested(*ids)})
        named = {(e, t): read_as(checkpoint, e, LAYERS, t) for e in (SGL, V1, V2) for t in ("llama", "deepseek")}
        points = {key: reading.points for key, reading in named.items() if isinstance(reading, Reading)}

    # in words of the engines' sources: one adds one, one adds one if the list begins with 1, one adds nothing
    after = tuple(i + 1 for i in ids)
    assert points[SGL, "llama"] == after
    assert points[SGL, "deepseek"] == (after if ids[0] == 1 else tuple(ids))
    assert points[V1, "llama"] == points[V1, "deepseek"] == tuple(ids)
    # the nested key is not read at all: two, half, three from the end
    assert points[V2, "llama"] == points[V2, "deepseek"] == (2, 4, 5)


@given(ids=ID_LISTS, order=st.permutations(range(3)))
@example(ids=[2, 4, 5], order=[2, 0, 1])
def test_the_order_of_ids_is_lost_where_they_are_sorted(ids: list[int], order: list[int]) -> None:
    mixed = [ids[place] for place in order]
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = write(Path(folder), {**BODY, "eagle_aux_hidden_state_layer_ids": mixed})
        llama, deepseek = (read_as(checkpoint, V1, LAYERS, kind) for kind in ("llama", "deepseek"))

    assert isinstance(llama, Reading)
    assert isinstance(deepseek, Reading)
    assert llama.points == tuple(ids)
    assert deepseek.points == tuple(mixed)


def test_speculators_flattened_by_hand_loses_its_ids_and_its_residual(target: OpenTarget, tmp_path: Path) -> None:
    flags = {"norm_before_residual": True, "eagle_aux_hidden_state_layer_ids": [1, 3, 6]}
    own = write(tmp_path / "own", speculators(**flags), plain_layers)
    by_hand = write(tmp_path / "flat", {**BODY, **flags}, plain_layers)
    meant = trained_by(own, "speculators")

    read = trained_by(by_hand, SGL)

    assert read.points == (2, 4, 5)
    assert {d.fact for d in differences(meant, read)} == {"points", "norm_before_residual"}
    assert first_difference(logits(meant, own, target), logits(read, by_hand, target)) == 1


@pytest.mark.parametrize("engine", [V1, V2, SGL])
def test_a_flag_without_its_tensors_runs_on_ones(engine: str, target: OpenTarget, tmp_path: Path) -> None:
    whole = write(tmp_path / "whole", {**BODY, "fc_norm": True})
    cut = write(tmp_path / "cut", {**BODY, "fc_norm": True}, without(*FC_NORMS))

    read = trained_by(cut, engine)

    assert {name: read.filled[name] for name in FC_NORMS} == dict.fromkeys(FC_NORMS, "ones")
    assert first_difference(logits(trained_by(whole, engine), whole, target), logits(read, cut, target)) == 1


def test_tensors_without_their_flag_are_dropped_or_refused(tmp_path: Path) -> None:
    checkpoint = write(tmp_path, BODY, fc_norm=True)

    assert dict(trained_by(checkpoint, SGL).dropped) == dict.fromkeys(FC_NORMS, "silent")
    assert isinstance(read_as(checkpoint, V2, LAYERS), Refusal)


def test_a_latent_draft_with_a_norm_before_fc_loses_it_in_sglang(target: OpenTarget, tmp_path: Path) -> None:
    config = {**EAGLE3_MLA, "norm_before_fc": True, "eagle_config": {}}
    checkpoint = write(tmp_path, config)
    meant = trained_by(checkpoint, "draftproof", "deepseek")

    read = trained_by(checkpoint, SGL, "deepseek")

    assert read.dropped == {"input_norm.weight": "warns"}
    assert {d.fact for d in differences(meant, read)} >= {"norm_before_fc", "dropped input_norm.weight"}
    assert first_difference(logits(meant, checkpoint, target), logits(read, checkpoint, target)) == 1


def test_the_converter_drops_a_map_that_has_no_marks(target: OpenTarget, tmp_path: Path) -> None:
    checkpoint = write(tmp_path, BODY, without("t2d"))
    meant = trained_by(checkpoint, SF)

    read = trained_by(checkpoint, "speculators-convert")

    assert read.dropped == {"d2t": "warns"}
    assert read.filled["d2t"] == "zeros"
    ids = torch.arange(97)[None]
    mine, theirs = (realise(r, checkpoint, target.module).to_target(ids) for r in (meant, read))
    assert torch.equal(theirs, ids)
    assert not torch.equal(mine, ids)


def test_legacy_norms_are_read_by_sglang_alone(tmp_path: Path) -> None:
    checkpoint = write(tmp_path, {**BODY, "use_aux_norm": True}, legacy_norms, fc_norm=True)

    read = trained_by(checkpoint, SGL)

    assert read.config.fc_norm
    assert [read.source[name] for name in FC_NORMS] == [f"aux_norm_{word}.weight" for word in ("low", "mid", "high")]


@pytest.mark.parametrize("engine", [SGL, V1])
def test_a_second_layer_applies_the_norm_that_its_engine_has(engine: str, target: OpenTarget, tmp_path: Path) -> None:
    both = {"layers.1.hidden_norm.weight": torch.full((96,), 0.5)}
    checkpoint = write(tmp_path, {**BODY, **TWO_LAYERS}, lambda tensors: tensors.update(both))
    meant = trained_by(checkpoint, V2)

    read = trained_by(checkpoint, engine)

    differ = engine == SGL
    assert [d.fact for d in differences(meant, read)] == ["later_norm"] * differ
    assert first_difference(logits(meant, checkpoint, target), logits(read, checkpoint, target)) == int(differ)


def test_a_scaled_embedding_is_hidden_by_the_norm_behind_it(target: OpenTarget, tmp_path: Path) -> None:
    checkpoint = write(tmp_path, BODY)
    rows = trained_by(checkpoint, SGL)

    scaled = read_as(checkpoint, SGL, LAYERS, "gemma4", [IMAGES])

    assert isinstance(scaled, Reading)
    assert [d.fact for d in differences(rows, scaled)] == ["embedding scale"]
    one, other = (logits(r, checkpoint, target) for r in (rows, scaled))
    # an RMS norm takes the factor out again, but for its epsilon: no choice of a token moves
    assert torch.equal(one.argmax(-1), other.argmax(-1))
    assert not torch.equal(one, other)


def test_a_target_that_an_engine_captures_otherwise_is_told_beside_its_points(tmp_path: Path) -> None:
    checkpoint = write(tmp_path, {**BODY, **nested(1, 3, 4)})
    meant = trained_by(checkpoint, SF, "gemma3")

    read, refused = (read_as(checkpoint, engine, LAYERS, "gemma3") for engine in (SGL, V1))

    assert isinstance(read, Reading)
    assert [d.fact for d in differences(meant, read)] == ["captures"]
    assert isinstance(refused, Refusal)
    assert refused.fact == "target"


@pytest.mark.parametrize("layers", [4, 5, 6])
@pytest.mark.parametrize("engine", ["safeailab", V1, V2])
def test_a_target_too_small_for_three_states_stops_the_engine(layers: int, engine: str, tmp_path: Path) -> None:
    checkpoint = write(tmp_path, {**BODY, **SQUARE})

    read = read_as(checkpoint, engine, layers)

    assert isinstance(read, Refusal)
    assert "states" in read.reason


def test_a_state_as_wide_as_the_draft_skips_its_fc(target: OpenTarget, tmp_path: Path) -> None:
    config = {**BODY, **nested(3), "num_aux_hidden_states": 1}
    checkpoint = write(tmp_path, config, num_aux_hidden_states=1)
    meant = trained_by(checkpoint, V1)

    read = trained_by(checkpoint, SGL)

    assert read.skips_fc
    assert not meant.skips_fc
    assert first_difference(logits(meant, checkpoint, target), logits(read, checkpoint, target)) == 1


def test_what_no_engine_misreads_is_as_intended_everywhere(tmp_path: Path) -> None:
    checkpoint = write(tmp_path, {**BODY, **SQUARE})
    meant = trained_by(checkpoint, SF)

    verdicts = {engine: judge(checkpoint, meant, engine, LAYERS, same_tables=True).outcome for engine in ENGINES}

    assert verdicts == dict.fromkeys(ENGINES, INTENDED)


@pytest.mark.parametrize("case", [c for c in CASES if c.step and c.consumer in ENGINES], ids=lambda case: case.name)
def test_the_edits_that_are_named_make_it_right(case: Case, tmp_path: Path) -> None:
    checkpoint = write(tmp_path, case.config, case.change, **case.shape)
    meant = trained_by(checkpoint, case.producer, case.target)

    verdict = judge(checkpoint, meant, case.consumer, LAYERS, case.target)

    assert verdict.outcome == WRONGLY
    config = json.loads(json.dumps(checkpoint.config))
    for key, value in verdict.edits:
        remove(config, key)
        if value is not None:
            put(config, key, value)
    mended = read_as(replace(checkpoint, config=config), case.consumer, LAYERS, case.target)
    assert isinstance(mended, Reading)
    assert (differences(meant, mended) == []) == bool(verdict.edits)
    has_no_word = any(words in case.name for words in ("begin with 1", "a head without a norm"))
    assert ("no edit" in verdict.remedy) == (not verdict.edits) == has_no_word


def test_every_row_of_the_table_is_complete() -> None:
    for name, dialect in DIALECTS.items():
        facts = {row.fact for row in dialect.rows}
        assert dialect.version, name
        assert {"layer ids", "missing", "embedding", "vocabulary map", "t2d"} <= facts, name
        assert all(row.source for row in dialect.rows), name
        assert all(row.manner in ("silent", "loud", "warns", "") for row in dialect.rows), name
        flags = {row.fact for row in dialect.rows if row.means in (READ, UNREAD)}
        assert {"fc_norm", "norm_before_fc", "norm_before_residual"} <= flags, name
