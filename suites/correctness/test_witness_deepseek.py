"""Claim: the reference of DeepSeek V2 and V3 computes what transformers computes, and its two attentions are one.

Born of SGLang #25454 and #28343, where this family lost acceptance to captures of the wrong layer and to partial sums;
of vLLM, whose attention module rewrites the shared rope config while it applies yarn's factor; and of ports that took
that factor once instead of twice, turned halves for neighbours, or let the routing bias weigh what it only chooses.
"""

from pathlib import Path

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.torch import load_file

from harness import witness
from harness.checkpoints import SINGLE, CheckpointError, save_checkpoint
from harness.compare import bit_equal, hold
from reference.config import ConfigError
from reference.ops.mla import absorbed, written
from reference.outputs import TargetOutput
from reference.targets.deepseek import DeepseekConfig, DeepseekTarget
from suites.catalog import OpenTarget, open_target
from suites.draws import FIXED_ROPES, Drawn, folders, random_tokens
from suites.families.deepseek import (
    LITE,
    PINNED_LIMITED,
    PINNED_LITE,
    PINNED_SIGMOID,
    PUBLISHED,
    SIGMOID,
    deepseek_targets,
)
from suites.shells import count_parameters, without_memory

pytestmark = [pytest.mark.correctness, pytest.mark.pair("deepseek")]


def hold_all(out: TargetOutput, outside: witness.WitnessOutput | TargetOutput, target: OpenTarget) -> None:
    """Every capture point, the final hidden state and the logits."""
    size = {"depth": target.num_layers, "width": target.config.hidden}
    for c in range(target.num_layers + 1):
        hold(f"capture point {c}", out.aux[:, :, c], outside.aux[:, :, c], **size)
    hold("hidden", out.hidden, outside.hidden, **size)
    hold("logits", out.logits, outside.logits, **size)


@given(drawn=deepseek_targets(), batch=st.integers(1, 3), width=st.integers(1, 40))
@example(drawn=PINNED_LITE, batch=2, width=24)
@example(drawn=PINNED_LIMITED, batch=2, width=24)
@example(drawn=PINNED_SIGMOID, batch=2, width=24)
def test_the_reference_equals_transformers_at_every_capture_point(drawn: Drawn, batch: int, width: int) -> None:
    tokens = random_tokens(drawn.keys["vocab_size"], batch, width, drawn.seed)
    with folders(drawn) as (path, _):
        target = open_target(path, dtype=torch.float64)
        outside = witness.load(path, dtype=torch.float64).run(tokens)

    out = target(tokens, capture=range(target.num_layers + 1))

    hold_all(out, outside, target)


@given(drawn=deepseek_targets(kinds=FIXED_ROPES), width=st.integers(2, 24), cut=st.integers(1, 23))
@example(drawn=PINNED_SIGMOID, width=20, cut=9)
def test_two_passes_over_a_cache_of_latents_equal_one(drawn: Drawn, width: int, cut: int) -> None:
    tokens = random_tokens(drawn.keys["vocab_size"], 2, width, drawn.seed)
    columns = torch.arange(width).expand(2, width) + 3
    with folders(drawn) as (path, _):
        target = open_target(path, dtype=torch.float64)
        outside = witness.load(path, dtype=torch.float64).run(tokens, columns)

    cache, cut = target.module.new_cache(2, width + 5), min(cut, width - 1)
    parts = [
        target.module(tokens[:, at], columns[:, at], range(target.num_layers + 1), cache)
        for at in (slice(cut), slice(cut, width))
    ]

    hold_all(TargetOutput(*(torch.cat(both, 1) for both in zip(*parts, strict=True))), outside, target)
    held = {tuple(t.shape[2:]) for pair in zip(cache.keys, cache.values, strict=True) for t in pair}
    assert held == {(1, target.config.kv_rank), (1, target.config.rope_dim)}


@given(drawn=deepseek_targets(kinds=FIXED_ROPES), width=st.integers(1, 24), cached=st.booleans())
@example(drawn=PINNED_SIGMOID, width=20, cached=True)
def test_attention_absorbed_is_attention_as_written(drawn: Drawn, width: int, cached: bool) -> None:
    tokens = random_tokens(drawn.keys["vocab_size"], 2, width, drawn.seed)
    with folders(drawn) as (path, _):
        target = open_target(path, dtype=torch.float64)
    outs = []

    for form in (written, absorbed):
        for layer in target.module.layers:
            layer.self_attn.attend = form
        cache = target.module.new_cache(2, width + 2) if cached else None
        outs.append(target.module(tokens, None, range(target.num_layers + 1), cache))

    hold_all(outs[1], outs[0], target)


@given(
    heads=st.integers(1, 4),
    dims=st.tuples(*[st.integers(1, 9)] * 4),
    sizes=st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(0, 6)),
    seed=st.integers(0, 2**20),
)
@example(heads=3, dims=(5, 2, 4, 7), sizes=(2, 4, 3), seed=0)
def test_both_forms_read_any_slots(
    heads: int, dims: tuple[int, int, int, int], sizes: tuple[int, int, int], seed: int
) -> None:
    (nope, rope, value, rank), (batch, new, held) = dims, sizes
    generator = torch.Generator().manual_seed(seed)
    draw = {"generator": generator, "dtype": torch.float64}
    q_nope, q_rope = (torch.randn(batch, new, heads, d, **draw) for d in (nope, rope))
    latent, turned = (torch.randn(batch, new + held, d, **draw) for d in (rank, rope))
    up = torch.randn(heads, nope + value, rank, **draw)
    visible = torch.rand(batch, new, new + held, **draw) < 0.5
    visible[..., 0] = True

    as_written, as_absorbed = (form(q_nope, q_rope, latent, turned, up, visible, 0.3) for form in (written, absorbed))

    hold("mixed values", as_absorbed, as_written, depth=1, width=rank * (nope + value))


def test_the_epsilon_of_the_latents_is_a_fact_of_its_own(tmp_path: Path) -> None:
    path = witness.create(SIGMOID, tmp_path / "stated", seed=5)
    tokens = random_tokens(331, 2, 9, 0)
    tensors = load_file(path / SINGLE)
    save_checkpoint(tmp_path / "engines", {**SIGMOID, "latent_norm_eps": SIGMOID["rms_norm_eps"]}, tensors)

    stated, engines = (open_target(tmp_path / name, dtype=torch.float64) for name in ("stated", "engines"))

    assert (stated.config.latent_norm_eps, engines.config.latent_norm_eps) == (1e-6, 1e-2)
    outside = witness.load(path, dtype=torch.float64).run(tokens)
    hold("logits", stated(tokens).logits, outside.logits, depth=7, width=96)
    assert not torch.allclose(engines(tokens).logits, outside.logits)


def with_next_layer(tensors: dict[str, torch.Tensor], layers: int) -> dict[str, torch.Tensor]:
    """The tensors and, behind the last layer, a copy of it with what a next-token layer has besides."""
    last, beyond = f"model.layers.{layers - 1}.", f"model.layers.{layers}."
    copied = {beyond + name.removeprefix(last): t.clone() for name, t in tensors.items() if name.startswith(last)}
    hidden = tensors["model.norm.weight"]
    table = tensors["model.embed_tokens.weight"]
    extra = {
        "enorm.weight": hidden.clone(),
        "hnorm.weight": hidden.clone(),
        "eh_proj.weight": torch.zeros(len(hidden), 2 * len(hidden)),
        "embed_tokens.weight": table.clone(),
        "shared_head.norm.weight": hidden.clone(),
        "shared_head.head.weight": table.clone(),
    }
    return {**tensors, **copied, **{beyond + name: t for name, t in extra.items()}}


def test_the_next_token_layer_is_accounted_for_and_left_alone(tmp_path: Path) -> None:
    path = witness.create(SIGMOID, tmp_path / "bare", seed=6)
    tensors = load_file(path / SINGLE)
    save_checkpoint(tmp_path / "full", SIGMOID, with_next_layer(tensors, 7))
    tokens = random_tokens(331, 2, 9, 0)

    bare, full = open_target(path), open_target(tmp_path / "full")

    bit_equal("logits", full(tokens).logits, bare(tokens).logits)
    ignored = [entry for entry in full.ledger.entries if entry.status == "ignored"]
    assert ignored
    assert all(entry.tensor.startswith("model.layers.7.") for entry in ignored)
    assert full.ledger.count("loaded") == bare.ledger.count("loaded") == len(tensors)


def test_a_next_token_layer_that_the_config_denies_is_refused(tmp_path: Path) -> None:
    path = witness.create(SIGMOID, tmp_path / "bare", seed=6)
    tensors = with_next_layer(load_file(path / SINGLE), 7)
    save_checkpoint(tmp_path / "full", {**SIGMOID, "num_nextn_predict_layers": 0}, tensors)

    with pytest.raises(CheckpointError, match=r"model\.layers\.7\."):
        open_target(tmp_path / "full")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_bias_that_chooses_keeps_its_precision(dtype: torch.dtype, tmp_path: Path) -> None:
    path = witness.create(SIGMOID, tmp_path, seed=7)
    name = "layers.2.mlp.gate.e_score_correction_bias"

    module = open_target(path, dtype=dtype).module

    bit_equal(name, module.state_dict()[name], load_file(path / SINGLE)[f"model.{name}"])
    assert module.layers[2].mlp.gate.weight.dtype == dtype


REFUSED = {
    "a router of another kind": ({"scoring_func": "sigmoid"}, "scoring_func"),
    "a choice of another kind": ({"topk_method": "noaux_tc"}, "topk_method"),
    "what readers multiply differently": ({"norm_topk_prob": True}, "norm_topk_prob"),
    "experts on some layers only": ({"moe_layer_freq": 2}, "moe_layer_freq"),
    "key/value heads that latents do not have": ({"num_key_value_heads": 2}, "num_key_value_heads"),
    "groups of unequal size": ({"topk_method": "group_limited_greedy", "n_group": 3}, "n_group"),
    "more experts than groups leave": (
        {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 1},
        "num_experts_per_tok",
    ),
    "packed weights": ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_has_no_single_reading_is_refused_and_named(case: str) -> None:
    changes, named = REFUSED[case]

    with pytest.raises(ConfigError, match=named):
        DeepseekConfig.from_hf({**LITE, **changes})


def test_the_query_rank_must_be_stated() -> None:
    config = {key: value for key, value in LITE.items() if key != "q_lora_rank"}

    with pytest.raises(ConfigError, match="q_lora_rank"):
        DeepseekConfig.from_hf(config)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes_have_the_parameters_of_transformers(name: str) -> None:
    with without_memory():
        ours = DeepseekTarget(DeepseekConfig.from_hf(PUBLISHED[name]))
        theirs = witness.build(PUBLISHED[name])

    assert count_parameters(ours) == count_parameters(theirs)


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_older_spelling_of_a_config_is_the_newer_one(name: str) -> None:
    shallow = {**PUBLISHED[name], "num_hidden_layers": 1}
    with without_memory():
        newer = witness.build(shallow).config.to_dict()

    assert DeepseekConfig.from_hf(shallow) == DeepseekConfig.from_hf(newer)
