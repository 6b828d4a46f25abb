"""DeepSeek V2 and V3: tiny configs with every feature, and the sizes as they are published."""

import json
from collections.abc import Mapping
from typing import Any

from hypothesis import strategies as st

from suites.draws import ROPES, SEEDS, VOCABS, Drawn, variant
from suites.scripted import TINY as FEW
from suites.scripted import tiny_draft
from suites.teams import Team

SECOND, THIRD = "deepseek_v2", "deepseek_v3"
ARCHITECTURES = {SECOND: "DeepseekV2ForCausalLM", THIRD: "DeepseekV3ForCausalLM"}
STRETCHED = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
}
# of yarn: cos and sin grow by the ratio of the two, the softmax factor by the square of the second
MSCALES = (
    {},
    {"mscale": 1.0, "mscale_all_dim": 1.0},
    {"mscale": 0.707, "mscale_all_dim": 0.707},
    {"mscale": 2.0},
    {"mscale": 1.0, "mscale_all_dim": 0.5},
)
GROUPS = ((4, 1, 1, 3), (6, 1, 1, 2), (6, 3, 1, 2), (8, 4, 2, 3), (8, 2, 2, 2), (9, 3, 2, 5))
"""experts, groups, groups that are kept, experts a token"""


@st.composite
def latent_ropes(draw: st.DrawFn, kinds: tuple[str, ...]) -> dict[str, Any]:
    """`rope_parameters` of a config, yarn more often than the rest."""
    rope = draw(st.sampled_from([r for r in (*ROPES, STRETCHED, STRETCHED) if r["rope_type"] in kinds]))
    scales = draw(st.sampled_from(MSCALES)) if rope["rope_type"] == "yarn" else {}
    return {**rope, **scales, "rope_theta": draw(st.sampled_from([100.0, 10_000.0, 50_000.0]))}


@st.composite
def deepseek_targets(
    draw: st.DrawFn,
    models: tuple[str, ...] = (SECOND, THIRD),
    max_layers: int = 5,
    kinds: tuple[str, ...] = ("default", "linear", "dynamic", "llama3", "yarn"),
    query_ranks: tuple[int | None, ...] = (None, 24),
    ranks: int = 1,
    every_expert: bool = False,
) -> Drawn:
    """A target: with q-LoRA and without, any groups, all layers dense to none.

    ranks         how many can share it, where they are no more than two or four
    every_expert  nobody has to choose, so no rounding can choose otherwise
    """
    model, flag, layers = draw(st.sampled_from(models)), st.booleans(), draw(st.integers(1, max_layers))
    heads = ranks * draw(st.integers(1, 4))
    experts, groups, kept, chosen = (4, 1, 1, 4) if every_expert else draw(st.sampled_from(GROUPS))
    config = {
        "model_type": model,
        "architectures": [ARCHITECTURES[model]],
        "vocab_size": draw(st.sampled_from(VOCABS)),
        "hidden_size": draw(st.sampled_from([48, 96])),
        "intermediate_size": draw(st.sampled_from([48, 80])),
        "moe_intermediate_size": draw(st.sampled_from([16, 40])),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "q_lora_rank": draw(st.sampled_from(query_ranks)),
        "kv_lora_rank": draw(st.sampled_from([16, 32])),
        "qk_nope_head_dim": draw(st.sampled_from([8, 16])),
        "qk_rope_head_dim": draw(st.sampled_from([4, 8])),
        "v_head_dim": draw(st.sampled_from([8, 12, 16])),
        "n_routed_experts": experts,
        "num_experts_per_tok": chosen,
        "n_shared_experts": draw(st.integers(1, 2)),
        "n_group": groups,
        "topk_group": kept,
        "routed_scaling_factor": draw(st.sampled_from([1.0, 2.5])),
        "norm_topk_prob": model == THIRD and draw(flag),
        "first_k_dense_replace": draw(st.integers(0, layers)),
        "max_position_embeddings": 32,
        "rms_norm_eps": draw(st.sampled_from([1e-6, 1e-2])),
        "rope_parameters": draw(latent_ropes(kinds)),
        "attention_bias": draw(flag),
        "tie_word_embeddings": draw(flag),
        "hidden_act": "silu",
    }
    if model == SECOND:
        config["topk_method"] = draw(st.sampled_from(["greedy", "group_limited_greedy"]))
    else:
        config["rope_interleave"] = draw(flag)
    return Drawn(json.dumps(config), draw(SEEDS))


TINY = {
    "vocab_size": 331,
    "hidden_size": 96,
    "intermediate_size": 80,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 7,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_shared_experts": 2,
    "first_k_dense_replace": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-2,
    "attention_bias": True,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
}
LITE = {
    **TINY,
    "model_type": SECOND,
    "architectures": [ARCHITECTURES[SECOND]],
    "q_lora_rank": None,
    "topk_method": "greedy",
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 1.0,
    "norm_topk_prob": False,
    "rope_parameters": {**STRETCHED, "rope_theta": 10_000.0, "mscale": 0.707, "mscale_all_dim": 0.707},
}
"""the pinned target without q-LoRA, its experts chosen one by one"""
LIMITED = {
    **LITE,
    "q_lora_rank": 24,
    "topk_method": "group_limited_greedy",
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 16.0,
}
"""the pinned V2 with q-LoRA, its experts chosen by group"""
SIGMOID = {
    **LIMITED,
    "model_type": THIRD,
    "architectures": [ARCHITECTURES[THIRD]],
    "routed_scaling_factor": 2.5,
    "norm_topk_prob": True,
    "num_nextn_predict_layers": 1,
    "rope_parameters": {**STRETCHED, "rope_theta": 10_000.0, "mscale": 1.0, "mscale_all_dim": 1.0},
}
del SIGMOID["topk_method"]
"""the pinned V3: a bias that chooses, groups by their best two, weights renormalised and scaled"""

PINNED_LITE, PINNED_LIMITED, PINNED_SIGMOID = (
    Drawn(json.dumps(config), seed) for config, seed in ((LITE, 1), (LIMITED, 2), (SIGMOID, 3))
)
PINNED = {"lite": PINNED_LITE, "limited": PINNED_LIMITED, "sigmoid": PINNED_SIGMOID}


def tiny_deepseek(seed: int, vocab: int = 13, **changes: Any) -> Drawn:
    """Three layers, the first one dense, beside `suites.scripted.tiny_draft`."""
    few = {**FEW, "num_key_value_heads": 4, "num_hidden_layers": 3, "first_k_dense_replace": 1}
    few.pop("head_dim")
    return variant(SIGMOID, seed, **{**few, "vocab_size": vocab, **changes})


LATENTS = Team(2, tiny_deepseek(3, 331), tiny_draft(4, 331))
"""a couple that two ranks share, or four"""


def _published(model: str, **facts: Any) -> dict[str, Any]:
    """A config as the hub has it, without how its weights are packed."""
    return {
        "architectures": [ARCHITECTURES[model]],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekConfig"},
        "bos_token_id": 0,
        "eos_token_id": 1,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "kv_lora_rank": 512,
        "max_position_embeddings": 163_840,
        "model_type": model,
        "moe_layer_freq": 1,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10_000,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "v_head_dim": 128,
        **facts,
    }


def _stretched(mscale: float) -> dict[str, Any]:
    return {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": mscale,
        "mscale_all_dim": mscale,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    }


PUBLISHED: Mapping[str, dict[str, Any]] = {
    "DeepSeek-V2-Lite": _published(
        SECOND,
        aux_loss_alpha=0.001,
        first_k_dense_replace=1,
        hidden_size=2048,
        intermediate_size=10_944,
        moe_intermediate_size=1408,
        n_group=1,
        n_routed_experts=64,
        n_shared_experts=2,
        norm_topk_prob=False,
        num_attention_heads=16,
        num_experts_per_tok=6,
        num_hidden_layers=27,
        num_key_value_heads=16,
        q_lora_rank=None,
        rope_scaling=_stretched(0.707),
        routed_scaling_factor=1.0,
        scoring_func="softmax",
        seq_aux=True,
        topk_group=1,
        topk_method="greedy",
        vocab_size=102_400,
    ),
    "DeepSeek-V2": _published(
        SECOND,
        aux_loss_alpha=0.001,
        first_k_dense_replace=1,
        hidden_size=5120,
        intermediate_size=12_288,
        moe_intermediate_size=1536,
        n_group=8,
        n_routed_experts=160,
        n_shared_experts=2,
        norm_topk_prob=False,
        num_attention_heads=128,
        num_experts_per_tok=6,
        num_hidden_layers=60,
        num_key_value_heads=128,
        q_lora_rank=1536,
        rope_scaling=_stretched(0.707),
        routed_scaling_factor=16.0,
        scoring_func="softmax",
        seq_aux=True,
        topk_group=3,
        topk_method="group_limited_greedy",
        vocab_size=102_400,
    ),
    "DeepSeek-V3": _published(
        THIRD,
        ep_size=1,
        first_k_dense_replace=3,
        hidden_size=7168,
        intermediate_size=18_432,
        moe_intermediate_size=2048,
        n_group=8,
        n_routed_experts=256,
        n_shared_experts=1,
        norm_topk_prob=True,
        num_attention_heads=128,
        num_experts_per_tok=8,
        num_hidden_layers=61,
        num_key_value_heads=128,
        num_nextn_predict_layers=1,
        q_lora_rank=1536,
        rope_scaling=_stretched(1.0),
        routed_scaling_factor=2.5,
        scoring_func="sigmoid",
        topk_group=4,
        topk_method="noaux_tc",
        vocab_size=129_280,
    ),
}
"""`config.json` of each published size, as the hub spells it. V3's sizes are transformers' defaults too; V2-Lite's
are those of deepseek-ai/DeepSeek-Coder-V2-Lite-Base; V2's give the 236 B of its paper (arXiv 2405.04434)."""
