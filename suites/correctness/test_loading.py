"""Claim: loading is a bijection: every tensor goes to one place, every parameter comes from one place.

Born of loaders that return nothing, so that no check of completeness runs, and that pass over names they do not know:
ROCm/ATOM #755 (one tensor dropped, acceptance 0 %), SGLang #35797 (a draft's weights dropped, acceptance length 1.0),
vLLM #27737 (a draft's own head replaced by the target's). A norm that stays at one changes no shape and raises nothing.
"""

import re
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from harness import checkpoints
from harness.checkpoints import SINGLE, CheckpointError, save_checkpoint, state_of
from harness.compare import bit_equal
from reference.drafts.eagle3 import CHECKPOINT_NAMES, Eagle3Config
from suites.catalog import OpenDraft, OpenTarget, open_draft, open_target
from suites.draws import (
    EAGLE3,
    EVERY_FLAG,
    LLAMA,
    PINNED_DRAFT,
    PINNED_TARGET,
    SEEDS,
    Drawn,
    eagle3_drafts,
    eagle3_weights,
    folders,
    llama_targets,
    random_tokens,
    variant,
    write_draft,
    write_target,
)
from suites.stand import stand, stand_as

pytestmark = [pytest.mark.correctness, pytest.mark.pair("eagle3")]

# the names that checkpoints give to one parameter, written out once more: (published prefix, ours)
SPELLINGS: dict[str, tuple[tuple[str, str], ...]] = {
    "midlayer": (("midlayer.", "layers.0."),),
    "layers": (),
    "model": (("model.", ""),),
    "model and midlayer": (("model.midlayer.", "layers.0."), ("model.", "")),
    "aux_norm": (("aux_norm_low.", "fc_norm.0."), ("aux_norm_mid.", "fc_norm.1."), ("aux_norm_high.", "fc_norm.2.")),
}
THREE_NORMS = variant(fc_norm=True)
SMALL_TARGET = variant(LLAMA, 1, num_hidden_layers=2)
TIED_TARGET = variant(LLAMA, 3, num_hidden_layers=2, tie_word_embeddings=True)


def ours(drawn: Drawn) -> dict[str, Tensor]:
    """A drawn draft's tensors under our names."""
    return {re.sub(r"^midlayer\.", "layers.0.", name): tensor for name, tensor in eagle3_weights(drawn).items()}


def spelled(tensors: Mapping[str, Tensor], table: tuple[tuple[str, str], ...]) -> dict[str, Tensor]:
    """Our names in a published spelling: the first prefix that fits is put in place."""

    def spell(name: str) -> str:
        return next((theirs + name[len(mine) :] for theirs, mine in table if name.startswith(mine)), name)

    return {spell(name): tensor for name, tensor in tensors.items()}


def hold_state(got: nn.Module, want: Mapping[str, Tensor]) -> None:
    state = state_of(got)
    assert state.keys() == want.keys()
    for name, tensor in want.items():
        bit_equal(name, state[name], tensor)


def logits_of(draft: OpenDraft, target: OpenTarget) -> Tensor:
    tokens = random_tokens(draft.facts.config.vocab, 2, 7, 0)
    out = target(tokens, capture=draft.capture_points)
    return draft.unroll(tokens, out, 3).nan_to_num(nan=-1.0)


@pytest.mark.parametrize("side", ["reference", "optimized"])
@given(drawn=llama_targets(max_layers=3))
@example(drawn=SMALL_TARGET)
@example(drawn=TIED_TARGET)
def test_the_ledger_of_a_target_has_every_tensor_and_every_parameter_once(side: str, drawn: Drawn) -> None:
    with folders(drawn) as (path, _):
        target = open_target(path, side=side)
        parameters = state_of(open_target(path).module)
        stored = load_file(path / SINGLE)

    entries = target.ledger.entries
    assert sorted(entry.tensor for entry in entries if entry.tensor) == sorted(stored)
    assert sorted(entry.parameter for entry in entries if entry.parameter) == sorted(parameters)
    for entry in entries:
        bit_equal(entry.tensor, parameters[entry.parameter], stored[entry.tensor])


@pytest.mark.parametrize("side", ["reference", "optimized"])
@given(drawn=eagle3_drafts(PINNED_TARGET), own_embedding=st.booleans())
@example(drawn=PINNED_DRAFT, own_embedding=False)
@example(drawn=EVERY_FLAG, own_embedding=True)
def test_the_ledger_of_a_draft_has_every_tensor_and_every_parameter_once(
    side: str, target_folder: Path, target: OpenTarget, drawn: Drawn, own_embedding: bool
) -> None:
    beside = open_target(target_folder, side=side)

    entries = stand(drawn, beside, own_embedding).ledger.entries

    stored, parameters = eagle3_weights(drawn, own_embedding), state_of(stand(drawn, target, own_embedding).module)
    assert sorted(entry.tensor for entry in entries if entry.tensor) == sorted(stored)
    assert sorted(entry.parameter for entry in entries if entry.parameter) == sorted(parameters)
    for entry in [entry for entry in entries if entry.status == "loaded"]:
        bit_equal(entry.tensor, parameters[entry.parameter], stored[entry.tensor])


@given(spelling=st.sampled_from(sorted(SPELLINGS)), max_shard=st.sampled_from([None, 1, 20_000, 70_000]), seed=SEEDS)
@example(spelling="midlayer", max_shard=None, seed=0)
@example(spelling="model", max_shard=1, seed=1)
@example(spelling="model and midlayer", max_shard=20_000, seed=2)
@example(spelling="aux_norm", max_shard=70_000, seed=3)
def test_spelling_order_and_shards_change_no_bit(
    target: OpenTarget, spelling: str, max_shard: int | None, seed: int
) -> None:
    tensors = ours(THREE_NORMS)
    order = torch.randperm(len(tensors), generator=torch.Generator().manual_seed(seed)).tolist()
    names = list(tensors)
    shuffled = spelled({names[i]: tensors[names[i]] for i in order}, SPELLINGS[spelling])

    draft = stand_as(THREE_NORMS.keys, shuffled, target, max_shard)

    hold_state(draft.module, tensors)
    bit_equal("logits", logits_of(draft, target), logits_of(stand(THREE_NORMS, target), target))


PARTS = st.sampled_from(["mlp", "model", "midlayer", "aux_norm_low", "mtp", "weight"])


@given(
    start=st.sampled_from([theirs for theirs, _ in CHECKPOINT_NAMES] + ["layers.0.", "mtp."]),
    tail=st.lists(PARTS, min_size=1, max_size=4).map(lambda parts: ".".join(["x", *parts])),
)
@example(start="midlayer.", tail="x.midlayer.model.weight")
@example(start="layers.0.", tail="x.midlayer.weight")
def test_a_prefix_is_renamed_only_where_a_name_begins(start: str, tail: str) -> None:
    want = {"mtp.": "mtp.", "layers.0.": "layers.0.", **dict(CHECKPOINT_NAMES)}[start] + tail

    assert checkpoints.rename(start + tail, CHECKPOINT_NAMES) == want
    assert checkpoints.rename("x." + start + tail, CHECKPOINT_NAMES) == "x." + start + tail


Fault = Callable[[dict[str, Tensor], str], str]


def drop(tensors: dict[str, Tensor], name: str) -> str:
    del tensors[name]
    return f"{name!r} is missing"


def double(tensors: dict[str, Tensor], name: str) -> str:
    tensors["model." + name] = tensors[name].clone()
    return f"{'model.' + name!r}"


def widen(tensors: dict[str, Tensor], name: str) -> str:
    tensors[name] = torch.cat([tensors[name], tensors[name][:1]])
    return f"{name!r} is {list(tensors[name].shape)}"


def flatten(tensors: dict[str, Tensor], name: str) -> str:
    # the same number of bytes in another shape
    tensors[name] = tensors[name][None].contiguous()
    return f"{name!r} is {list(tensors[name].shape)}"


def stranger(tensors: dict[str, Tensor], name: str) -> str:
    tensors[name + "_scale"] = torch.ones(1)
    return f"{name + '_scale'!r}"


@pytest.mark.parametrize("fault", [drop, double, widen, flatten, stranger])
def test_one_wrong_tensor_of_a_draft_is_a_typed_error(fault: Fault, target: OpenTarget) -> None:
    sound = ours(EVERY_FLAG)
    # may be absent: the target has an embedding to share, and d2t alone says what t2d says
    optional = {"embed_tokens.weight", "t2d"} if fault is drop else set()

    for name in sorted(sound.keys() - optional):
        tensors = dict(sound)
        words = fault(tensors, name)
        with pytest.raises(CheckpointError, match=re.escape(words)):
            stand_as(EVERY_FLAG.keys, tensors, target)


@pytest.mark.parametrize("fault", [drop, double, widen, flatten, stranger])
def test_one_wrong_tensor_of_a_target_is_a_typed_error(fault: Fault, tmp_path: Path) -> None:
    path = write_target(SMALL_TARGET, tmp_path)
    sound = {name.removeprefix("model."): tensor for name, tensor in load_file(path / SINGLE).items()}

    for name in sorted(sound):
        tensors = dict(sound)
        words = fault(tensors, name)
        save_file(tensors, path / SINGLE)
        with pytest.raises(CheckpointError, match=re.escape(words)) as caught:
            open_target(path)
        assert str(path) in str(caught.value)


@pytest.mark.parametrize("flag", ["attention_bias", "mlp_bias", "bias", "fc_norm", "norm_before_fc"])
def test_tensors_whose_flag_is_off_are_not_dropped_in_silence(flag: str, target: OpenTarget) -> None:
    config = {**EVERY_FLAG.keys, flag: False}
    extra = sorted(ours(EVERY_FLAG).keys() - ours(variant(config)).keys())

    with pytest.raises(CheckpointError) as caught:
        stand_as(config, ours(EVERY_FLAG), target)

    assert extra
    assert any(repr(name) in str(caught.value) for name in extra)


@given(drawn=eagle3_drafts(PINNED_TARGET))
@example(drawn=EVERY_FLAG)
def test_a_draft_survives_load_save_load(target: OpenTarget, drawn: Drawn) -> None:
    first = stand(drawn, target)

    second = stand_as(first.checkpoint.config, state_of(first.module), target, max_shard=30_000)

    hold_state(second.module, state_of(first.module))
    bit_equal("logits", logits_of(second, target), logits_of(first, target))
    assert second.facts == first.facts


@given(drawn=llama_targets(max_layers=3), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
@example(drawn=TIED_TARGET, dtype=torch.bfloat16)
def test_a_target_survives_load_save_load(drawn: Drawn, dtype: torch.dtype) -> None:
    tokens = random_tokens(drawn.keys["vocab_size"], 2, 6, drawn.seed)
    with folders(drawn) as (path, copy):
        first = open_target(path, dtype=dtype)
        save_checkpoint(copy, first.checkpoint.config, state_of(first.module), max_shard=40_000)
        second = open_target(copy, dtype=dtype)

    hold_state(second.module, state_of(first.module))
    bit_equal("logits", second(tokens).logits, first(tokens).logits)


def influential(module: nn.Module, run: Callable[[], Tensor]) -> set[str]:
    """Names of the parameters that the result of `run` depends on."""
    base, found = run(), set()
    for name, parameter in module.named_parameters():
        kept = parameter.clone()
        parameter.add_(torch.randn(kept.shape, generator=torch.Generator().manual_seed(1)), alpha=0.5)
        found |= set() if torch.equal(run(), base) else {name}
        parameter.copy_(kept)
    return found


def dormant(config: Eagle3Config) -> set[str]:
    """What checkpoints hold and the equations do not read: the final norm, where neither head nor feedback has it."""
    return set() if config.norm_before_head or config.feedback_normed else {"norm.weight"}


@given(drawn=eagle3_drafts(PINNED_TARGET))
@example(drawn=EVERY_FLAG)
@example(drawn=variant(num_hidden_layers=2, eagle_config={"later_norm": "hidden_norm"}))
@example(drawn=variant(eagle_config={"eagle_aux_hidden_state_layer_ids": [3]}))
def test_every_parameter_of_a_draft_changes_its_logits(target: OpenTarget, drawn: Drawn) -> None:
    draft = stand(drawn, target)
    names = {name for name, _ in draft.module.named_parameters()}
    tokens = random_tokens(target.config.vocab, 1, 6, drawn.seed)
    out = target(tokens, capture=draft.capture_points)

    found = influential(draft.module, lambda: draft.unroll(tokens, out, 3).nan_to_num())

    assert found == names - dormant(draft.facts.config)


@given(drawn=llama_targets(max_layers=2))
@example(drawn=SMALL_TARGET)
@example(drawn=TIED_TARGET)
def test_every_parameter_of_a_target_changes_its_logits(drawn: Drawn) -> None:
    tokens = random_tokens(drawn.keys["vocab_size"], 2, 6, drawn.seed)
    with folders(drawn) as (path, _):
        target = open_target(path)

    assert influential(target.module, lambda: target(tokens).logits) == set(state_of(target.module))


@given(drawn=eagle3_drafts(PINNED_TARGET))
@example(drawn=PINNED_DRAFT)
def test_own_tables_survive_and_the_target_keeps_its_own(target: OpenTarget, drawn: Drawn) -> None:
    before = {name: tensor.clone() for name, tensor in state_of(target.module).items()}

    draft = stand(drawn, target)

    stored = ours(drawn)
    assert (draft.facts.own_embedding, draft.facts.own_head) == (True, True)
    bit_equal("embedding", draft.module.embed_tokens.weight, stored["embed_tokens.weight"])
    bit_equal("head", draft.module.lm_head.weight, stored["lm_head.weight"])
    hold_state(target.module, before)


def test_absent_tables_are_the_target_s(target: OpenTarget) -> None:
    config = {**EAGLE3, "draft_vocab_size": EAGLE3["vocab_size"]}
    tensors = ours(variant(config))
    before = {name: tensor.clone() for name, tensor in state_of(target.module).items()}
    del tensors["embed_tokens.weight"], tensors["lm_head.weight"]

    draft = stand_as(config, tensors, target)

    assert (draft.facts.own_embedding, draft.facts.own_head) == (False, False)
    # the table itself, not a copy of it: a copy would be another layout under tensor parallel
    assert draft.module.embed_tokens.weight is target.module.embed_tokens.weight
    assert draft.module.lm_head.weight is target.module.lm_head.weight
    hold_state(target.module, before)


def test_an_opened_draft_needs_its_files_no_more(target: OpenTarget) -> None:
    with tempfile.TemporaryDirectory() as folder:
        draft = open_draft(write_draft(PINNED_DRAFT, Path(folder)), target)
        here = logits_of(draft, target)

    bit_equal("logits", logits_of(draft, target), here)
