"""Qwen3-MoE: tiny configs with every feature, and the size as it is published."""

import json
from collections.abc import Mapping
from typing import Any

from hypothesis import strategies as st

from suites.draws import ALL_ROPES, ROPES, SEEDS, VOCABS, Drawn, ropes, variant
from suites.scripted import TINY, tiny_draft
from suites.teams import Team

MODEL = {"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "hidden_act": "silu"}


@st.composite
def qwen3_moe_targets(
    draw: st.DrawFn,
    min_layers: int = 1,
    max_layers: int = 5,
    kinds: tuple[str, ...] = ALL_ROPES,
    ranks: int = 1,
    every_expert: bool = False,
) -> Drawn:
    """A target: layers dense and with experts in any order, weights of experts as they are or renormalised.

    ranks         how many can share it
    every_expert  nobody has to choose, so no rounding can choose otherwise
    """
    groups, layers, flag = ranks * draw(st.integers(1, 2)), draw(st.integers(min_layers, max_layers)), st.booleans()
    experts = draw(st.integers(1, 12))
    config = {
        **MODEL,
        "vocab_size": draw(st.sampled_from(VOCABS)),
        "hidden_size": draw(st.sampled_from([48, 96])),
        "intermediate_size": ranks * draw(st.sampled_from([20, 48])),
        "moe_intermediate_size": ranks * draw(st.sampled_from([8, 20])),
        "num_hidden_layers": layers,
        "num_attention_heads": groups * draw(st.integers(1, 3)),
        "num_key_value_heads": groups,
        "head_dim": draw(st.sampled_from([8, 16])),
        "num_experts": experts,
        "num_experts_per_tok": experts if every_expert else draw(st.integers(1, experts)),
        "norm_topk_prob": draw(flag),
        "decoder_sparse_step": draw(st.sampled_from([1, 1, 2, 3])),
        "mlp_only_layers": sorted(draw(st.sets(st.integers(0, layers - 1), max_size=2))),
        "max_position_embeddings": 32,
        "rms_norm_eps": draw(st.sampled_from([1e-6, 1e-2])),
        "rope_parameters": draw(ropes(kinds)),
        "attention_bias": draw(flag),
        "tie_word_embeddings": draw(flag),
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    return Drawn(json.dumps(config), draw(SEEDS))


NORMED = {
    **MODEL,
    "vocab_size": 331,
    "hidden_size": 96,
    "intermediate_size": 80,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 7,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [2],
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-2,
    "rope_parameters": {**ROPES[3], "rope_theta": 10_000.0},
    "attention_bias": True,
    "tie_word_embeddings": False,
}
"""the pinned target whose chosen experts share a weight of one; one layer is dense"""
RAW = {
    **NORMED,
    "num_experts": 12,
    "norm_topk_prob": False,
    "decoder_sparse_step": 2,
    "mlp_only_layers": [3],
    "attention_bias": False,
}
"""the pinned target whose experts keep the weights of all; experts in layers 1 and 5 alone, and two digits of them"""

PINNED_NORMED, PINNED_RAW = variant(NORMED, 1), variant(RAW, 2)


def tiny_qwen3_moe(seed: int, vocab: int = 13, **changes: Any) -> Drawn:
    """Three layers, the middle one dense, beside `suites.scripted.tiny_draft`."""
    few = {"num_hidden_layers": 3, "mlp_only_layers": [1], "num_experts": 5, "num_experts_per_tok": 2}
    return variant(NORMED, seed, **{**TINY, **few, "vocab_size": vocab, **changes})


MIXTURE = Team(2, tiny_qwen3_moe(3, 331, num_key_value_heads=4), tiny_draft(4, 331))
"""a couple that two ranks share, or four"""

PUBLISHED: Mapping[str, dict[str, Any]] = {
    "Qwen3-30B-A3B": {
        "architectures": ["Qwen3MoeForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 151_643,
        "decoder_sparse_step": 1,
        "eos_token_id": 151_645,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 2048,
        "initializer_range": 0.02,
        "intermediate_size": 6144,
        "max_position_embeddings": 40_960,
        "max_window_layers": 48,
        "mlp_only_layers": [],
        "model_type": "qwen3_moe",
        "moe_intermediate_size": 768,
        "norm_topk_prob": True,
        "num_attention_heads": 32,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 48,
        "num_key_value_heads": 4,
        "output_router_logits": False,
        "rms_norm_eps": 1e-6,
        "rope_scaling": None,
        "rope_theta": 1_000_000.0,
        "router_aux_loss_coef": 0.001,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": 151_936,
    }
}
"""`config.json` of the published size, as the hub has it"""
TOTALS = {"Qwen3-30B-A3B": 30_532_122_624}
"""parameters, counted by hand from the sizes above"""
