"""Claim: a capture point has two spellings and one meaning, and no third reading is ever guessed.

Born of SGLang #25454: +1 was applied to ids that already named what enters a layer; kimi-k2.5-eagle3-mla lost 0.10
tokens of acceptance length and nothing raised. Its repair looks at the first id, another engine at the largest; vLLM
sorts the ids and drops doubles, so that `fc` reads the right states in the wrong columns.
"""

from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor, nn

from harness import witness
from harness.compare import bit_equal, hold
from harness.conventions import AmbiguousLayerIds, LayerIdsError, default_points, resolve
from harness.strategies import LayerSpec, ambiguous_layer_specs, layer_specs
from suites.catalog import OpenDraft, OpenTarget
from suites.draws import EAGLE3, LLAMA, Drawn, eagle3_weights, random_tokens, variant
from suites.stand import stand, stand_as

pytestmark = [pytest.mark.correctness, pytest.mark.pair("eagle3")]

LAYERS = LLAMA["num_hidden_layers"]
IDS = "eagle_aux_hidden_state_layer_ids"
POINTS = st.lists(st.integers(1, LAYERS), min_size=1, max_size=4, unique=True)


def spelled(points: list[int], convention: str) -> Drawn:
    """The pinned draft with its capture points written in a convention, by a rule stated here once more."""
    shift = {"after_layer": 1, "before_layer": 0}[convention]
    return variant(eagle_config={"layer_ids": convention, IDS: [c - shift for c in points]})


def unrolled(draft: OpenDraft, target: OpenTarget, seed: int = 0) -> Tensor:
    tokens = random_tokens(LLAMA["vocab_size"], 2, 6, seed)
    return draft.unroll(tokens, target(tokens, capture=draft.capture_points), 3).nan_to_num()


@given(points=POINTS, seed=st.integers(0, 99))
@example(points=[2, 4, 5], seed=0)
@example(points=[8, 1, 7, 2], seed=1)
def test_both_spellings_meet(target: OpenTarget, points: list[int], seed: int) -> None:
    after, before = (stand(spelled(points, word), target) for word in ("after_layer", "before_layer"))

    assert after.capture_points == before.capture_points == tuple(points)
    bit_equal("draft logits", unrolled(after, target, seed), unrolled(before, target, seed))


@given(points=st.permutations(range(LAYERS + 1)), seed=st.integers(0, 99))
@example(points=[8, 0, 3, 5, 1, 2, 4, 6, 7], seed=0)
def test_states_are_handed_over_in_the_order_asked(target: OpenTarget, points: list[int], seed: int) -> None:
    tokens = random_tokens(LLAMA["vocab_size"], 2, 6, seed)

    together = target(tokens, capture=points).aux

    for place, c in enumerate(points):
        bit_equal(f"capture point {c}", together[:, :, place], target(tokens, capture=(c,)).aux[:, :, 0])


def test_the_ends_are_the_embedding_and_what_the_final_norm_reads(target: OpenTarget) -> None:
    tokens = random_tokens(LLAMA["vocab_size"], 2, 6, 0)
    draft = stand(spelled([0, 8, 4], "before_layer"), target)

    out = target(tokens, capture=draft.capture_points)

    assert draft.capture_points == (0, 8, 4)
    bit_equal("capture point 0", out.aux[:, :, 0], target.module.embed_tokens.weight[tokens])
    bit_equal("capture point L", target.module.norm(out.aux[:, :, 1]), out.hidden)


@given(order=st.permutations([0, 1, 2]), seed=st.integers(0, 99))
@example(order=[2, 0, 1], seed=0)
@example(order=[1, 0, 2], seed=1)
def test_unsorted_ids_permute_the_columns_of_fc(wide_target: OpenTarget, order: list[int], seed: int) -> None:
    points, plain = [2, 4, 6], spelled([2, 4, 6], "after_layer")
    tensors = eagle3_weights(plain)
    columns = tensors["fc.weight"].unflatten(1, (3, -1))
    moved = spelled([points[i] for i in order], "after_layer")

    permuted = stand_as(moved.keys, {**tensors, "fc.weight": columns[:, order].flatten(1).contiguous()}, wide_target)

    assert permuted.capture_points == tuple(points[i] for i in order)
    width = columns[0].numel()
    straight = unrolled(stand(plain, wide_target), wide_target, seed)
    hold("logits", unrolled(permuted, wide_target, seed), straight, depth=3, width=width)


class Seen:
    """What stands before and after every layer of an outside model, read by hooks of this file."""

    def __init__(self, outside: witness.Witness) -> None:
        self.outside = outside
        self.before: dict[int, Tensor] = {}
        self.after: dict[int, Tensor] = {}

    def run(self, tokens: Tensor) -> None:
        parts: list[nn.Module] = [*self.outside.layers, self.outside.decoder.norm]
        hooks = [part.register_forward_pre_hook(self._enter(i)) for i, part in enumerate(parts)]
        hooks += [part.register_forward_hook(self._leave(i)) for i, part in enumerate(parts)]
        self.outside.run(tokens)
        for hook in hooks:
            hook.remove()

    def _enter(self, i: int) -> Any:
        return lambda module, args: self.before.update({i: args[0]})

    def _leave(self, i: int) -> Any:
        return lambda module, args, output: self.after.update({i: output[0] if isinstance(output, tuple) else output})


@given(seed=st.integers(0, 99))
@example(seed=0)
def test_both_conventions_name_what_hooks_on_transformers_see(
    wide_target: OpenTarget, target_folder: Any, seed: int
) -> None:
    tokens = random_tokens(LLAMA["vocab_size"], 2, 6, seed)
    seen = Seen(witness.load(target_folder, dtype=torch.float64))
    seen.run(tokens)
    last = {"after_layer": LAYERS - 1, "before_layer": LAYERS}
    size = {"depth": LAYERS, "width": LLAMA["hidden_size"]}

    for word, states in (("after_layer", seen.after), ("before_layer", seen.before)):
        ids = list(range(last[word] + 1))
        points = resolve({"eagle_config": {"layer_ids": word, IDS: ids}}, LAYERS).points
        aux = wide_target(tokens, capture=points).aux
        for place, i in enumerate(ids):
            hold(f"{word} id {i}", aux[:, :, place], states[i], **size)


@given(spec=layer_specs())
@example(spec=LayerSpec(61, (1, 29, 57), "after_layer"))
@example(spec=LayerSpec(61, (2, 30, 58), "before_layer"))
@example(spec=LayerSpec(8, (8, 0), "before_layer"))
def test_stated_ids_are_read_as_stated(spec: LayerSpec) -> None:
    shift = {"after_layer": 1, "before_layer": 0}[spec.convention]
    points = tuple(i + shift for i in spec.ids)

    in_file = resolve({"eagle_config": {"layer_ids": spec.convention, IDS: list(spec.ids)}}, spec.num_layers)
    by_caller = resolve({IDS: list(spec.ids)}, spec.num_layers, layer_ids=spec.convention)

    assert in_file.points == by_caller.points == points
    assert in_file.ids == by_caller.ids == spec.ids


@given(spec=ambiguous_layer_specs())
@example(spec=LayerSpec(61, (1, 29, 57), "after_layer"))
@example(spec=LayerSpec(61, (2, 30, 58), "before_layer"))
@example(spec=LayerSpec(7, (6, 2), "after_layer"))
def test_ids_that_nothing_explains_are_refused_with_both_readings(spec: LayerSpec) -> None:
    with pytest.raises(AmbiguousLayerIds) as caught:
        resolve({"eagle_config": {IDS: list(spec.ids)}}, spec.num_layers, file="the/config.json")

    readings = [tuple(spec.ids), tuple(i + 1 for i in spec.ids)]
    words = ["the/config.json", IDS, "after_layer", "before_layer", *map(str, readings)]
    assert [word for word in words if word not in str(caught.value)] == []


@given(num_layers=st.integers(7, 64), first=st.integers(0, 6))
@example(num_layers=8, first=0)
def test_an_id_of_the_last_capture_point_has_one_legal_reading(num_layers: int, first: int) -> None:
    answer = resolve({"eagle_config": {IDS: [first, num_layers]}}, num_layers)

    assert answer.points == (first, num_layers)
    assert answer.convention == "before_layer"
    assert "only legal reading" in answer.text


@given(num_layers=st.integers(7, 96))
@example(num_layers=7)
@example(num_layers=61)
def test_no_ids_mean_the_default_triple(num_layers: int) -> None:
    points = (2, num_layers // 2, num_layers - 3)

    assert default_points(num_layers) == points
    # a word about ids that are not there changes nothing
    for config in ({}, {"eagle_config": {}}, {"eagle_config": {"layer_ids": "after_layer"}}):
        assert resolve(config, num_layers).points == points


def test_a_draft_without_ids_reads_the_default_triple_of_its_target(target: OpenTarget) -> None:
    draft = stand_as({**EAGLE3, "eagle_config": {}}, eagle3_weights(variant()), target)

    assert draft.capture_points == (2, 4, 5)
    assert any("default" in note for note in draft.ledger.notes)
    bit_equal("logits", unrolled(draft, target), unrolled(stand(spelled([2, 4, 5], "after_layer"), target), target))


def speculators(ids: list[int]) -> dict[str, Any]:
    """The pinned draft's config in the nested layout of speculators."""
    outer = {"draft_vocab_size": EAGLE3["draft_vocab_size"], "architectures": ["Eagle3Speculator"], IDS: ids}
    inner = {k: v for k, v in EAGLE3.items() if k not in ("eagle_config", "draft_vocab_size")}
    return {"speculators_model_type": "eagle3", "transformer_layer_config": inner, **outer}


@given(points=st.lists(st.integers(0, LAYERS), min_size=1, max_size=4, unique=True))
@example(points=[2, 4, 5])
@example(points=[1, 3, 5])
def test_ids_of_speculators_name_what_enters_a_layer(target: OpenTarget, points: list[int]) -> None:
    drawn = spelled(points, "before_layer")

    draft = stand_as(speculators(points), eagle3_weights(drawn), target)

    assert draft.capture_points == tuple(points)
    bit_equal("logits", unrolled(draft, target), unrolled(stand(drawn, target), target))


@pytest.mark.parametrize(
    ("config", "points"),
    [
        ({"dflash_config": {"target_layer_ids": [1, 3, 5]}}, (2, 4, 6)),
        ({"target_layer_ids": [1, 3, 5]}, (2, 4, 6)),
        # a config of eagle beside it has nothing to say about ids, and does not take them away
        ({"dflash_config": {"target_layer_ids": [1, 3, 5]}, "eagle_config": {"use_aux_hidden_state": True}}, (2, 4, 6)),
        ({"dflash_config": {"target_layer_ids": [1, 3]}, "eagle_config": {IDS: [2, 4]}}, (2, 4)),
        ({"dflash_config": {"target_layer_ids": [1, 3]}, "eagle_config": {IDS: [1, 3]}}, (2, 4)),
        ({IDS: [1, 3, 5], "eagle_config": {IDS: [1, 3, 5], "layer_ids": "after_layer"}}, (2, 4, 6)),
        ({"eagle_config": {IDS: [7, 0], "layer_ids": "after_layer"}, "num_aux_hidden_states": 2}, (8, 1)),
    ],
)
def test_formats_that_document_their_ids(config: dict[str, Any], points: tuple[int, ...]) -> None:
    assert resolve(config, LAYERS).points == points


STATED = {"layer_ids": "after_layer", IDS: [1, 3, 5]}


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({IDS: [2, 4, 6], "eagle_config": STATED}, ("eagle_config." + IDS, "[1, 3, 5]", "[2, 4, 6]")),
        ({"aux_hidden_state_layer_ids": [1, 3], "eagle_config": STATED}, ("[1, 3, 5]", "[1, 3]")),
        ({"num_aux_hidden_states": 4, "eagle_config": STATED}, ("num_aux_hidden_states", "4", "3")),
        ({"num_aux_layers": 2}, ("num_aux_layers", "2", "3")),
        ({"eagle_config": {**STATED, IDS: [1, 5, 8]}}, ("8", "0..7")),
        ({"eagle_config": {**STATED, IDS: [1, 5, 1]}}, ("1", "twice")),
        ({"speculators_model_type": "eagle3", "eagle_config": STATED}, ("after_layer", "before_layer")),
        ({"dflash_config": {"target_layer_ids": [1, 3]}, "eagle_config": {IDS: [0, 2]}}, ("(1, 3)", "(2, 4)")),
        ({"eagle_config": {"use_aux_hidden_state": False}}, ("use_aux_hidden_state",)),
    ],
)
def test_a_config_that_contradicts_itself_is_refused(config: dict[str, Any], words: tuple[str, ...]) -> None:
    with pytest.raises(LayerIdsError) as caught:
        resolve(config, LAYERS, file="the/config.json")

    assert [word for word in ("the/config.json", *words) if word not in str(caught.value)] == []


@given(spec=layer_specs(), wrong=st.integers(1, 6), hidden=st.sampled_from([48, 96]))
@example(spec=LayerSpec(8, (1, 3), "after_layer"), wrong=3, hidden=96)
def test_the_width_of_fc_counts_the_states(spec: LayerSpec, wrong: int, hidden: int) -> None:
    config = {"eagle_config": {"layer_ids": spec.convention, IDS: list(spec.ids)}}
    states = len(spec.ids)

    resolve(config, spec.num_layers, fc_width=states * hidden, target_hidden=hidden)

    with pytest.raises(LayerIdsError, match=f"{(states + wrong) * hidden} features.*{states * hidden}"):
        resolve(config, spec.num_layers, fc_width=(states + wrong) * hidden, target_hidden=hidden)
