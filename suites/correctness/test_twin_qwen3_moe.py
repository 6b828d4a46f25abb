"""Claim: the twin of Qwen3-MoE is its reference on one rank and on many, and speculates without changing a text.

Born of fused experts whose gate and up halves were swapped and whose sums depended on who came first, of SGLang #28343
(captures taken before the all-reduce are partial sums), and of batches that changed a token's experts: a row of verify
must choose the experts that decode chose, and give the same bits. A choice is no number near another: where rounding
may choose either of two experts, neither is wrong, so drawn texts are those whose choices are clear.
"""

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from harness.checkpoints import CheckpointError
from suites.catalog import open_target
from suites.correctness.test_twins import hold_to_reference
from suites.draws import Drawn, folders, variant
from suites.families.qwen3_moe import RAW, qwen3_moe_targets

pytestmark = [pytest.mark.correctness, pytest.mark.pair("qwen3_moe")]

ALL_CHOSEN = variant(RAW, 4, num_experts_per_tok=12)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@given(drawn=qwen3_moe_targets(every_expert=True), width=st.integers(1, 12))
@example(drawn=ALL_CHOSEN, width=12)
def test_in_half_precision_every_expert_is_the_references(device: str, drawn: Drawn, width: int) -> None:
    hold_to_reference(drawn, torch.bfloat16, 1, width, device)


SIZES = {"num_hidden_layers": 2, "mlp_only_layers": [1], "decoder_sparse_step": 1, "intermediate_size": 48}


def test_experts_that_ranks_do_not_divide_are_refused() -> None:
    refusal = pytest.raises(CheckpointError, match=r"tp_size=2.*7 intermediate features of an expert")
    with folders(variant(RAW, 1, **SIZES, moe_intermediate_size=7)) as (path, _), refusal:
        open_target(path, side="optimized", tp_size=2)
