"""EAGLE-3 with latent attention: tiny drafts with every feature beside any target, and drafts as they are published."""

import json
from collections.abc import Mapping
from typing import Any

from hypothesis import strategies as st

from suites.draws import EAGLE3, EVERY_FLAG, FIXED_ROPES, Drawn, eagle3_drafts, variant
from suites.families.deepseek import STRETCHED, latent_ropes, tiny_deepseek
from suites.scripted import POINTS, Loop
from suites.teams import Team

LATENT = {"architectures": ["Eagle3DeepseekV2ForCausalLM"], "model_type": "kimi_k2"}
HEADS_ALONE = ("head_dim", "sliding_window", "layer_types")
"""keys of drafts whose heads have keys of their own"""


@st.composite
def eagle3_mla_drafts(draw: st.DrawFn, target: Drawn, kinds: tuple[str, ...] = FIXED_ROPES) -> Drawn:
    """A draft that fits a target: EAGLE-3's flags, latents of any width, with q-LoRA and without."""
    drawn, heads = draw(eagle3_drafts(target, kinds)), draw(st.integers(1, 4))
    config = {key: value for key, value in drawn.keys.items() if key not in HEADS_ALONE}
    config |= {
        **LATENT,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "q_lora_rank": draw(st.sampled_from([24, None])),
        "kv_lora_rank": draw(st.sampled_from([16, 32])),
        "qk_nope_head_dim": draw(st.sampled_from([8, 16])),
        "qk_rope_head_dim": draw(st.sampled_from([4, 8])),
        "v_head_dim": draw(st.sampled_from([8, 12, 16])),
        "rope_interleave": draw(st.booleans()),
        "rope_parameters": draw(latent_ropes(kinds)),
    }
    if draw(st.booleans()):
        config["latent_norm_eps"] = draw(st.sampled_from([1e-6, 1e-2]))
    return Drawn(json.dumps(config), drawn.seed)


def latent(config: Mapping[str, Any], heads: int = 4, **changes: Any) -> dict[str, Any]:
    """A config of EAGLE-3 with latents in the place of keys and values."""
    kept = {key: value for key, value in config.items() if key not in HEADS_ALONE}
    return {
        **kept,
        **LATENT,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "q_lora_rank": 24,
        "kv_lora_rank": 32,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 12,
        "rms_norm_eps": 1e-2,
        "rope_parameters": {**STRETCHED, "rope_theta": 50_000.0, "mscale": 1.0, "mscale_all_dim": 0.707},
        **changes,
    }


EAGLE3_MLA = latent(EAGLE3)
"""the pinned draft beside `draws.LLAMA`, whose eps and rope are others"""
RICH_MLA = latent(
    EVERY_FLAG.keys,
    3,
    q_lora_rank=None,
    rope_interleave=False,
    latent_norm_eps=1e-6,
    rope_parameters={"rope_type": "default", "rope_theta": 100.0},
)
"""every flag at once, two layers, no q-LoRA, halves that turn"""
PINNED_MLA, EVERY_MLA_FLAG = variant(EAGLE3_MLA), variant(RICH_MLA, 3)
TWO_LAYERS = variant(
    EAGLE3_MLA, 4, num_hidden_layers=2, eagle_config={"later_norm": "hidden_norm", "norm_before_head": False}
)


def tiny_mla_draft(seed: int, vocab: int = 13, heads: int = 4, **changes: Any) -> Drawn:
    """A draft beside `tiny_deepseek` that says any token; its layer ids are in no order."""
    eagle = {**POINTS, **changes.pop("eagle_config", {})}
    sizes = {"hidden_size": 48, "intermediate_size": 48, "vocab_size": vocab, "draft_vocab_size": vocab}
    return variant(latent(EAGLE3, heads), seed, **{**sizes, **changes, "eagle_config": eagle})


# few words: a draft of random weights is right often enough for every count to occur
LATENT_LOOP = Loop(tiny_deepseek(6, vocab=5), tiny_mla_draft(10, vocab=5), (5, 1, 3))


def mla_team(ranks: int, vocab: int, seed: int, own_embedding: bool = True, **flags: Any) -> Team:
    """A target with latents and a draft with latents that a number of ranks can share."""
    heads = {"num_attention_heads": ranks, "num_key_value_heads": ranks}
    sizes = {"intermediate_size": 24 * ranks, "moe_intermediate_size": 8 * ranks}
    target = tiny_deepseek(seed, vocab, **heads, **sizes)
    draft = tiny_mla_draft(seed + 1, vocab, ranks, intermediate_size=24 * ranks, **flags)
    return Team(ranks, target, draft, own_embedding)


@st.composite
def mla_teams(draw: st.DrawFn) -> Team:
    """Two to four ranks, with q-LoRA and without, any biases."""
    flag, size, vocab = st.booleans(), draw(st.sampled_from([2, 3, 4])), draw(st.sampled_from([97, 130, 192, 331]))
    flags = {"norm_before_residual": draw(flag), "attention_bias": draw(flag), "bias": draw(flag)}
    flags |= {"fc_norm": draw(flag), "q_lora_rank": draw(st.sampled_from([24, None]))}
    return mla_team(size, vocab, draw(st.integers(0, 2**20)), draw(flag), **flags)


# a shared table and padding; every bias; 4 ranks, and a vocabulary whose last rank has no row
TWO, THREE = mla_team(2, 331, 1, False), mla_team(3, 331, 3, attention_bias=True, mlp_bias=True, bias=True)
FOUR = mla_team(4, 130, 5, q_lora_rank=None, fc_norm=True)


def _published(ids: list[int], beta_fast: float, **facts: Any) -> dict[str, Any]:
    """What drafts of Kimi K2.5 have in common."""
    return {
        **LATENT,
        "hidden_size": 7168,
        "intermediate_size": 18_432,
        "num_hidden_layers": 1,
        "num_attention_heads": 64,
        "num_key_value_heads": 64,
        "q_lora_rank": 1536,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "vocab_size": 163_840,
        "draft_vocab_size": 163_840,
        "torch_dtype": "bfloat16",
        "rope_theta": 50_000.0,
        "rope_scaling": {
            "type": "yarn",
            "factor": 64.0,
            "original_max_position_embeddings": 4096,
            "beta_fast": beta_fast,
            "beta_slow": 1.0,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
        },
        "eagle_config": {"eagle_aux_hidden_state_layer_ids": ids, "use_aux_hidden_state": True, **facts},
    }


SWITCHES = {"use_input_layernorm_in_first_layer": True, "use_last_layernorm": True, "use_mtp_layernorm": False}
PUBLISHED_DRAFTS: Mapping[str, tuple[dict[str, Any], str]] = {
    "lightseekorg/kimi-k2.5-eagle3-mla": (_published([1, 29, 57], 1.0, **SWITCHES), "after_layer"),
    "k-l-lambda/Kimi-K2.5-Eagle3": (_published([2, 30, 58], 32.0), "before_layer"),
}
"""`config.json` of drafts of Kimi K2.5 (61 layers) and how their ids are meant, which no key says"""
