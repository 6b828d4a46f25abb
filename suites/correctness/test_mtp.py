"""Claim: a next-token module is read in full from its target's folder or its own, and serves as it unrolls.

Born of SGLang #26468: `replace("mtp", "model")` in the middle of a name, tensors that no parameter took and no warning
named, `num_hidden_layers = 1` written into the config that the target shares, and a base class never initialized; of
SGLang #34906 and #30265, layer 61 hard-coded; and of vLLM, which reads a zero for the first embedding where SGLang and
transformers read the token.
"""

import copy
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from harness.checkpoints import SINGLE, CheckpointError, read_json, save_checkpoint, state_of
from harness.compare import bit_equal, hold
from harness.shapes import watch
from reference.config import ConfigError
from reference.drafts import next_token
from reference.drafts.deepseek_nextn import DeepseekNextnConfig
from reference.drafts.qwen3_moe_mtp import Qwen3MoeMtpConfig
from suites.catalog import PAIRS, OpenSpeculation, open_draft, open_speculation, open_target
from suites.draws import FIXED_ROPES, Drawn, random_tokens, variant
from suites.families.next_token import (
    DEEPSEEK,
    DEEPSEEK_TWO,
    DEEPSEEK_ZERO,
    QWEN3_MOE,
    next_token_pairs,
    next_token_weights,
    open_whole,
    write_alone,
    write_whole,
)

pytestmark = pytest.mark.correctness

PINNED = {"qwen3_moe_mtp": QWEN3_MOE, "deepseek_nextn": DEEPSEEK_TWO}
both = pytest.mark.parametrize("pair", PINNED)
of_qwen, of_deepseek = pytest.mark.pair("qwen3_moe_mtp"), pytest.mark.pair("deepseek_nextn")
TOKENS = random_tokens(331, 2, 7, 0)


@cache
def opened(pair: str) -> OpenSpeculation:
    """The pinned pair, for claims that leave it as it was."""
    return open_whole(PINNED[pair])


def says(speculation: OpenSpeculation) -> Tensor:
    """[B, T, V]  what the module proposes after a target that is always the same"""
    draft = speculation.draft
    return draft(TOKENS[:, 1:], speculation.target(TOKENS).hidden[:, :-1]).logits


def put(folder: Path, extra: Mapping[str, Tensor], drop: str = "nothing") -> Path:
    """More tensors in a folder, fewer whose name begins so."""
    kept = {name: t for name, t in load_file(folder / SINGLE).items() if not name.startswith(drop)}
    save_file({**kept, **extra}, folder / SINGLE, {"format": "pt"})
    return folder


@both
def test_target_and_module_account_for_every_tensor_of_one_folder(pair: str, tmp_path: Path) -> None:
    path, module = write_whole(PINNED[pair], tmp_path), set(next_token_weights(PINNED[pair]))

    speculation = open_speculation(path, path)

    target, draft = (
        {kind: {e.tensor for e in opened.ledger.entries if e.tensor and e.status == kind} for kind in kinds}
        for opened, kinds in ((speculation.target, ("loaded", "ignored")), (speculation.draft, ("loaded", "ignored")))
    )
    assert speculation.draft.pair.name == pair
    assert draft["loaded"] == target["ignored"] == module
    assert draft["ignored"] == target["loaded"] == set(load_file(path / SINGLE)) - module
    assert {e.reason for e in speculation.draft.ledger.entries if e.status == "ignored"} == {"the target's"}
    shared = {e.parameter for e in speculation.draft.ledger.entries if e.status == "shared"}
    assert shared == {"embed_tokens.weight", "lm_head.weight"}


@both
def test_a_folder_of_its_own_holds_the_same_module(pair: str, tmp_path: Path) -> None:
    whole, alone = write_whole(PINNED[pair], tmp_path / "whole"), write_alone(PINNED[pair], tmp_path / "alone")
    target = open_target(whole)
    tables = {
        "lm_head.weight": target.module.lm_head.weight,
        "model.embed_tokens.weight": target.module.embed_tokens.weight,
    }
    # a draft without the mark of a module would be a model that drafts alone
    beside = open_draft(put(alone, tables), target)

    here, there = (state_of(draft.module) for draft in (open_draft(whole, target), beside))

    assert here.keys() == there.keys()
    for name, tensor in here.items():
        bit_equal(name, there[name], tensor)


@both
def test_a_table_left_to_another_target_must_be_that_targets(pair: str, tmp_path: Path) -> None:
    whole, alone = write_whole(PINNED[pair], tmp_path / "whole"), write_alone(PINNED[pair], tmp_path / "alone")
    put(alone, {"lm_head.weight": torch.zeros(331, 96)})

    with pytest.raises(CheckpointError, match=r"'lm_head\.weight' is not that of the target"):
        open_draft(alone, open_target(whole))


@both
def test_reading_changes_no_config(pair: str) -> None:
    config = PINNED[pair].keys
    before, reader = copy.deepcopy(config), PAIRS[pair]
    target = PAIRS["qwen3_moe" if pair == "qwen3_moe_mtp" else "deepseek"]

    module = getattr(reader.page, reader.config).from_hf(config)

    assert config == before
    assert target.read_config(config).layers == before["num_hidden_layers"]
    assert module.layers == before.get("num_nextn_predict_layers", 1)


SPELT = {
    "as published": ("mtp.", "mtp."),
    "a model inside": ("mtp.layers.", "mtp.model.layers."),
    "the norm inside too": ("mtp.norm.", "mtp.model.norm."),
    "inside the model": ("mtp.", "model.mtp."),
}


@of_qwen
@pytest.mark.parametrize("case", SPELT)
def test_every_spelling_of_the_prefix_is_read(case: str, tmp_path: Path) -> None:
    old, new = SPELT[case]
    want = next_token_weights(QWEN3_MOE)
    path = write_whole(QWEN3_MOE, tmp_path)
    spelt = {new + n.removeprefix(old) if n.startswith(old) else n: t for n, t in want.items()}

    speculation = open_speculation(put(path, spelt, "mtp."), path)

    state = state_of(speculation.draft.module)
    for name, tensor in want.items():
        bit_equal(name, state[name.removeprefix("mtp.")], tensor)
    assert speculation.draft.ledger.count("loaded") == len(want)


UNKNOWN = (
    "mtp.layers.1.input_layernorm.weight",
    "mtp.layers.61.input_layernorm.weight",
    "mtp.layers.0.mlp.mtp_gate.weight",
    "mtp.layers.0.mlp.gate_proj.weight",
    "mtp.final_norm.weight",
    "mtp.mtp.norm.weight",
    "language_model.mtp.norm.weight",
)


@of_qwen
@pytest.mark.parametrize("name", UNKNOWN)
def test_a_name_that_nobody_reads_is_refused_by_name(name: str, tmp_path: Path) -> None:
    path = write_whole(QWEN3_MOE, tmp_path)
    put(path, {name: torch.ones(96)})

    with pytest.raises(CheckpointError, match=rf"tensor '{name}'"):
        open_draft(path)


@of_qwen
@pytest.mark.parametrize(
    "missing", ["mtp.fc.", "mtp.norm.", "mtp.layers.0.self_attn.q_norm.", "mtp.pre_fc_norm_hidden."]
)
def test_a_tensor_that_is_not_there_is_missed(missing: str, tmp_path: Path) -> None:
    path = put(write_whole(QWEN3_MOE, tmp_path), {}, missing)

    with pytest.raises(CheckpointError, match=rf"'{missing.removeprefix('mtp.')}weight' is missing"):
        open_draft(path)


COPIES = {
    "qwen3_moe_mtp": ("mtp.embed_tokens.weight", "mtp.lm_head.weight"),
    "deepseek_nextn": ("model.layers.2.embed_tokens.weight", "model.layers.2.shared_head.head.weight"),
}


@both
def test_copies_of_the_tables_are_read_and_compared(pair: str, tmp_path: Path) -> None:
    path = write_whole(PINNED[pair], tmp_path)
    tables = [load_file(path / SINGLE)[name] for name in ("model.embed_tokens.weight", "lm_head.weight")]
    none = says(open_speculation(path, path))
    equal = open_speculation(put(path, dict(zip(COPIES[pair], tables, strict=True))), path)
    head = {COPIES[pair][1]: tables[1] * 2}

    other = open_speculation(put(path, head), path)

    bit_equal("logits with equal copies", says(equal), none)
    checked = [e for e in equal.draft.ledger.entries if e.status == "checked"]
    assert {e.tensor for e in checked} == set(COPIES[pair])
    assert equal.draft.module.embed_tokens is equal.target.module.embed_tokens
    bit_equal("logits of a head of its own", says(other), none * 2)
    assert [e.tensor for e in other.draft.ledger.entries if e.status == "checked"] == [COPIES[pair][0]]


@of_deepseek
def test_a_later_layer_has_the_tables_of_the_first(tmp_path: Path) -> None:
    path = write_whole(DEEPSEEK_TWO, tmp_path)
    head = load_file(path / SINGLE)["lm_head.weight"]
    first, later = (f"model.layers.{i}.shared_head.head.weight" for i in (2, 3))
    whole = open_speculation(put(path, {first: head, later: head.clone()}), path)
    put(path, {later: head + 1})

    with pytest.raises(CheckpointError, match=rf"'{later}' differs from '{first}'"):
        open_speculation(path, path)

    reasons = {e.tensor: e.reason for e in whole.draft.ledger.entries}
    assert reasons[later] == "a copy of lm_head.weight"


@of_deepseek
def test_a_module_alone_counts_from_zero(tmp_path: Path) -> None:
    whole, prefix = write_whole(DEEPSEEK, tmp_path / "whole"), "model.layers.3."
    tensors = {f"model.layers.0.{n.removeprefix(prefix)}": t for n, t in next_token_weights(DEEPSEEK).items()}
    alone = {"architectures": ["DeepseekV3ForCausalLMNextN"], "num_hidden_layers": 1}
    save_checkpoint(tmp_path / "alone", {**DEEPSEEK.keys, **alone}, tensors)

    speculation = open_speculation(whole, tmp_path / "alone")

    bit_equal("logits", says(speculation), says(open_speculation(whole, whole)))


@of_deepseek
def test_the_first_embedding_is_zero_where_the_config_says_so(tmp_path: Path) -> None:
    path = write_whole(DEEPSEEK_ZERO, tmp_path)
    zeroing = open_speculation(path, path)
    config = read_json(path / "config.json")
    save_checkpoint(path, {**config, "nextn_zero_first_embedding": False}, load_file(path / SINGLE))
    reading = open_speculation(path, path)
    hidden, blank = reading.target(TOKENS).hidden[:, :-1], reading.draft.module.embed_tokens.weight.clone()

    zeroed, read = says(zeroing), says(reading)

    assert not torch.allclose(zeroed[:, 0], read[:, 0])
    for row, tokens in enumerate(TOKENS):
        # a table without the token that is read first; it stands nowhere else in the text
        assert int((tokens == tokens[1]).sum()) == 1
        reading.draft.module.embed_tokens.weight[tokens[1]] = 0.0
        bit_equal("logits", zeroed[row], reading.draft(TOKENS[:, 1:], hidden).logits[row])
        reading.draft.module.embed_tokens.weight.copy_(blank)


REFUSED: Mapping[str, tuple[type, dict[str, Any], str]] = {
    "two layers of Qwen3-MoE": (Qwen3MoeMtpConfig, {**QWEN3_MOE.keys, "num_nextn_predict_layers": 2}, "num_nextn"),
    "no layer of DeepSeek": (DeepseekNextnConfig, {**DEEPSEEK.keys, "num_nextn_predict_layers": 0}, "num_nextn"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_config_without_one_reading_is_refused(case: str) -> None:
    reader, config, named = REFUSED[case]

    with pytest.raises(ConfigError, match=named):
        reader.from_hf(config)  # type: ignore[attr-defined]


def taken(speculation: OpenSpeculation, text: Tensor, column: int, steps: int, wrong: int) -> Tensor:
    """The steps that serving takes at a column, after a cycle whose drafts were rejected `wrong` columns before.

    text  [B, T]
    ->    [K, B, V]
    """
    target, module, batch = speculation.target, speculation.draft.module, len(text)
    way = module.way(module, target.module, None, batch, text.shape[1] + steps + 1, steps)
    begin = 0
    for last, tokens in ((column - wrong, (text + 1) % target.config.vocab), (column, text)):
        # columns behind the last hold what was rejected
        read = torch.cat([text[:, : last + 1], tokens[:, last + 1 :]], 1)[:, : last + steps]
        following = torch.cat([text[:, 1 : last + 2], tokens[:, last + 2 :], tokens[:, :1]], 1)[:, : read.shape[1]]
        places = torch.arange(begin, read.shape[1]).repeat(batch, 1)
        out = type(target(read))(*(x[:, begin:] for x in target(read)))
        here = torch.full((batch,), last - begin)
        logits, feedback = way.start(out, read[:, begin:], following[:, begin:], places, here)
        said = [logits[:, 0]]
        for k in range(2, steps + 1):
            token = tokens[:, last + k : last + k + 1]
            logits, feedback = way.next(token, feedback, torch.full((batch,), last + 1), k)
            said.append(logits[:, 0])
        begin = last + 1
    return torch.stack(said)


@both
@given(data=st.data(), seed=st.integers(0, 99))
def test_unrolling_is_serving_one_step_at_a_time(pair: str, data: st.DataObject, seed: int) -> None:
    drawn = data.draw(st.one_of(st.just(PINNED[pair]), next_token_pairs(pair, max_layers=2, kinds=FIXED_ROPES)))
    held_to_unroll(drawn, data.draw(st.integers(1, 4)), data.draw(st.integers(1, 5)), seed)


@pytest.mark.parametrize("drawn", [QWEN3_MOE, DEEPSEEK, DEEPSEEK_TWO, DEEPSEEK_ZERO], ids=lambda d: str(d.seed))
def test_pinned_modules_serve_as_they_unroll(drawn: Drawn) -> None:
    held_to_unroll(drawn, 1, 4, 0)
    held_to_unroll(drawn, 3, 5, 1)


def held_to_unroll(drawn: Drawn, wrong: int, steps: int, seed: int) -> None:
    speculation, column = open_whole(drawn), 5
    text = random_tokens(drawn.keys["vocab_size"], 2, column + steps + 2, seed)
    want = speculation.draft.unroll(text, speculation.target(text), steps)

    got = taken(speculation, text, column, steps, wrong)

    hold("logits", got, want[:, :, column], depth=steps, width=drawn.keys["hidden_size"])


@both
@given(width=st.integers(1, 6), num_steps=st.integers(1, 5), seed=st.integers(0, 99))
@example(width=6, num_steps=3, seed=0)
@example(width=2, num_steps=5, seed=0)
def test_logits_are_nan_exactly_where_no_next_token_is_known(pair: str, width: int, num_steps: int, seed: int) -> None:
    speculation, text = opened(pair), random_tokens(331, 2, width, seed)

    steps = speculation.draft.unroll(text, speculation.target(text), num_steps)

    assert steps.shape == (num_steps, 2, width, 331)
    for k in range(num_steps):
        known = max(width - 1 - k, 0)
        assert not steps[k, :, :known].isnan().any()
        assert bool(steps[k, :, known:].isnan().all())


@both
def test_every_parameter_of_a_module_changes_its_logits(pair: str) -> None:
    # long enough for every expert to be chosen
    speculation, text = opened(pair), random_tokens(331, 4, 60, 1)
    module, hidden = speculation.draft.module, speculation.target(text).hidden
    before = [module(text, hidden, layer=i).logits for i in range(module.c.layers)]

    for name, value in state_of(module).items():
        saved = value.clone()
        value.mul_(torch.linspace(0.5, 2, value.numel()).view_as(value))
        after = [module(text, hidden, layer=i).logits for i in range(module.c.layers)]
        value.copy_(saved)
        assert any(not torch.equal(a, b) for a, b in zip(after, before, strict=True)), name


@pytest.mark.parametrize("drawn", [QWEN3_MOE, DEEPSEEK_TWO], ids=lambda d: d.keys["model_type"])
def test_every_call_keeps_its_shape_lines(drawn: Drawn) -> None:
    speculation, text = open_whole(drawn), random_tokens(331, 5, 7, 1)
    page = speculation.draft.pair.page

    with watch(next_token, page) as seen:
        speculation.draft.unroll(text, speculation.target(text), 3)
        for temperature in (0.0, 1.0):
            speculation.generate([row[: 1 + i] for i, row in enumerate(text)], 5, 3, temperature=temperature)

    calls = {name: count for name, count in seen.calls.items() if name.startswith(page.__name__)}
    assert calls
    assert all(calls.values())


@of_qwen
def test_a_dense_layer_of_the_target_leaves_the_module_its_experts() -> None:
    config = variant(QWEN3_MOE.keys, 1, decoder_sparse_step=2, mlp_only_layers=[0, 1]).keys

    facts = Qwen3MoeMtpConfig.from_hf(config)

    assert facts.is_sparse(0)
    assert not PAIRS["qwen3_moe"].read_config(config).is_sparse(0)
