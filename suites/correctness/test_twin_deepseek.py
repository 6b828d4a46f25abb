"""Claim: the twin of DeepSeek is its reference on one rank and on many, and speculates without changing a text.

Born of SGLang #28343 and #25454, where this family lost acceptance to captures that were partial sums or of the wrong
layer, of engines that hold two attentions, one for prompts and one absorbed for decoding, whose bits differ, and of
latents cut over ranks like heads. The twin has one attention, the absorbed one, and the reference has the other. A
choice of experts is no number near another: where rounding may choose either of two, neither is wrong, so drawn texts
are those whose choices are clear.
"""

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from harness.checkpoints import CheckpointError, state_of
from harness.compare import bit_equal
from suites.catalog import open_target
from suites.correctness.test_twins import hold_to_reference
from suites.draws import Drawn, folders, variant
from suites.families.deepseek import (
    PINNED_SIGMOID,
    SIGMOID,
    deepseek_targets,
)

pytestmark = [pytest.mark.correctness, pytest.mark.pair("deepseek")]

ALL_CHOSEN = variant(SIGMOID, 4, num_experts_per_tok=8, n_group=1, topk_group=1)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@given(drawn=deepseek_targets(max_layers=3, every_expert=True), width=st.integers(1, 12))
@example(drawn=ALL_CHOSEN, width=12)
def test_in_half_precision_every_expert_is_the_references(device: str, drawn: Drawn, width: int) -> None:
    hold_to_reference(drawn, torch.bfloat16, 1, width, device)


def test_the_bias_that_chooses_keeps_its_precision() -> None:
    name = "layers.2.mlp.gate.e_score_correction_bias"
    with folders(PINNED_SIGMOID) as (path, _):
        want = state_of(open_target(path).module)[name]
        module = open_target(path, side="optimized", dtype=torch.bfloat16).module

    bit_equal(name, module.unpack()[name], want)


FEW = {"num_hidden_layers": 2, "first_k_dense_replace": 1}


REFUSED = {
    "3 heads": {"num_attention_heads": 3, "num_key_value_heads": 3},
    "7 intermediate features of an expert": {"moe_intermediate_size": 7, "n_shared_experts": 2},
}


@pytest.mark.parametrize("refusal", REFUSED)
def test_what_ranks_do_not_divide_is_refused(refusal: str) -> None:
    drawn = variant(SIGMOID, 1, **FEW, **REFUSED[refusal])

    with folders(drawn) as (path, _), pytest.raises(CheckpointError, match=rf"tp_size=2.*{refusal}"):
        open_target(path, side="optimized", tp_size=2)


def test_a_cache_holds_one_latent_a_slot_and_no_heads() -> None:
    with folders(PINNED_SIGMOID) as (path, _):
        module = open_target(path, side="optimized", tp_size=2).modules[1]

    cache = module.new_cache(3, 50)

    c = module.c
    assert [tuple(t.shape) for t in cache.tensors()] == [(3, 64, 1, c.kv_rank + c.rope_dim)] * c.layers
