"""Claim: the reference of Qwen3-MoE computes what transformers computes, whichever experts a token chooses.

Born of renormalisations that were dropped and of softmaxes over the chosen experts alone: `norm_topk_prob` is false by
default in transformers and true in what is published; of vLLM #43671 and SGLang #39286, where the text was right and
the captured states were not; and of layer rules that count from another end.
"""

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from harness import witness
from harness.compare import hold
from reference.config import ConfigError
from reference.outputs import TargetOutput
from reference.targets.qwen3_moe import Qwen3MoeConfig, Qwen3MoeTarget
from suites.catalog import OpenTarget, open_target
from suites.draws import FIXED_ROPES, Drawn, folders, random_tokens
from suites.families.qwen3_moe import NORMED, PINNED_NORMED, PINNED_RAW, PUBLISHED, TOTALS, qwen3_moe_targets
from suites.shells import count_parameters, without_memory

pytestmark = [pytest.mark.correctness, pytest.mark.pair("qwen3_moe")]


def hold_all(out: TargetOutput, outside: witness.WitnessOutput, target: OpenTarget) -> None:
    """Every capture point, the final hidden state and the logits."""
    size = {"depth": target.num_layers, "width": target.config.hidden}
    for c in range(target.num_layers + 1):
        hold(f"capture point {c}", out.aux[:, :, c], outside.aux[:, :, c], **size)
    hold("hidden", out.hidden, outside.hidden, **size)
    hold("logits", out.logits, outside.logits, **size)


@given(drawn=qwen3_moe_targets(), batch=st.integers(1, 3), width=st.integers(1, 40))
@example(drawn=PINNED_NORMED, batch=2, width=24)
@example(drawn=PINNED_RAW, batch=2, width=24)
def test_the_reference_equals_transformers_at_every_capture_point(drawn: Drawn, batch: int, width: int) -> None:
    tokens = random_tokens(drawn.keys["vocab_size"], batch, width, drawn.seed)
    with folders(drawn) as (path, _):
        target = open_target(path, dtype=torch.float64)
        outside = witness.load(path, dtype=torch.float64).run(tokens)

    out = target(tokens, capture=range(target.num_layers + 1))

    hold_all(out, outside, target)


@given(drawn=qwen3_moe_targets(kinds=FIXED_ROPES), width=st.integers(2, 24), cut=st.integers(1, 23))
@example(drawn=PINNED_NORMED, width=20, cut=9)
def test_two_passes_over_a_cache_equal_one(drawn: Drawn, width: int, cut: int) -> None:
    tokens = random_tokens(drawn.keys["vocab_size"], 2, width, drawn.seed)
    # positions need not start at zero
    places = torch.arange(width).expand(2, width) + 3
    with folders(drawn) as (path, _):
        target = open_target(path, dtype=torch.float64)
        outside = witness.load(path, dtype=torch.float64).run(tokens, places)

    cache, cut = target.module.new_cache(2, width + 5), min(cut, width - 1)
    parts = [
        target.module(tokens[:, at], places[:, at], range(target.num_layers + 1), cache)
        for at in (slice(cut), slice(cut, width))
    ]

    hold_all(TargetOutput(*(torch.cat(both, 1) for both in zip(*parts, strict=True))), outside, target)


REFUSED = {
    "another activation": ({"hidden_act": "gelu"}, "hidden_act"),
    "layers that slide": ({"use_sliding_window": True}, "use_sliding_window"),
    "experts that nobody counted": ({"num_experts": None}, "num_experts"),
    "more experts a token than there are": ({"num_experts_per_tok": 9}, "num_experts_per_tok"),
    "packed weights": ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_has_no_single_reading_is_refused_and_named(case: str) -> None:
    changes, named = REFUSED[case]

    with pytest.raises(ConfigError, match=named):
        Qwen3MoeConfig.from_hf({**NORMED, **changes})


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes_have_the_parameters_of_transformers(name: str) -> None:
    with without_memory():
        ours = Qwen3MoeTarget(Qwen3MoeConfig.from_hf(PUBLISHED[name]))
        theirs = witness.build(PUBLISHED[name])

    assert count_parameters(ours) == count_parameters(theirs) == TOTALS[name]


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_older_spelling_of_a_config_is_the_newer_one(name: str) -> None:
    shallow = {**PUBLISHED[name], "num_hidden_layers": 1}
    with without_memory():
        newer = witness.build(shallow).config.to_dict()

    assert Qwen3MoeConfig.from_hf(shallow) == Qwen3MoeConfig.from_hf(newer)
