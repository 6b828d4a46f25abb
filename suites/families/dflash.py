"""D-Flash: tiny drafts with every feature beside any target, and drafts as they are published."""

import json
from collections.abc import Mapping
from typing import Any

from hypothesis import strategies as st

from suites.draws import FIXED_ROPES, SEEDS, Drawn, ropes, variant
from suites.scripted import TINY, Loop, tiny_target
from suites.teams import Team, team

SLIDING, FULL = "sliding_attention", "full_attention"
QWEN3 = {"model_type": "qwen3", "architectures": ["DFlashDraftModel"], "hidden_act": "silu"}


@st.composite
def dflash_drafts(draw: st.DrawFn, target: Drawn, kinds: tuple[str, ...] = FIXED_ROPES) -> Drawn:
    """A draft that fits a target: any layers slide, causal as they are, as stated or not at all."""
    t, flag, layers = target.keys, st.booleans(), draw(st.integers(1, 3))
    ids = draw(st.lists(st.integers(0, t["num_hidden_layers"] - 1), min_size=1, max_size=4, unique=True))
    groups = draw(st.sampled_from([1, 2, 4]))
    block: dict[str, Any] = {"target_layer_ids": ids, "mask_token_id": draw(st.integers(0, t["vocab_size"] - 1))}
    causal = draw(st.sampled_from([None, False, True]))
    config = {
        **QWEN3,
        "vocab_size": t["vocab_size"],
        "draft_vocab_size": draw(st.sampled_from([t["vocab_size"], 33, 64])),
        "hidden_size": t["hidden_size"],
        "intermediate_size": draw(st.sampled_from([48, 80])),
        "num_hidden_layers": layers,
        "num_attention_heads": groups * draw(st.integers(1, 2)),
        "num_key_value_heads": groups,
        "head_dim": draw(st.sampled_from([8, 16])),
        "max_position_embeddings": 64,
        "rms_norm_eps": draw(st.sampled_from([1e-6, 1e-2])),
        "rope_parameters": draw(ropes(kinds)),
        "attention_bias": draw(flag),
        "logit_scale": draw(st.sampled_from([1.0, 0.25])),
        "layer_types": draw(st.lists(st.sampled_from([FULL, SLIDING]), min_size=layers, max_size=layers)),
        "sliding_window": draw(st.integers(1, 9)),
        "dflash_config": block | ({} if causal is None else {"causal": causal}),
    }
    return Drawn(json.dumps(config), draw(SEEDS))


DFLASH = {
    **QWEN3,
    "vocab_size": 331,
    "hidden_size": 96,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-2,
    "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
    "tie_word_embeddings": False,
    "block_size": 4,
    "num_target_layers": 8,
    "dflash_config": {"mask_token_id": 330, "target_layer_ids": [1, 3, 5]},
}
"""the pinned draft beside `draws.LLAMA`, as the first trainer of such drafts writes it"""
MIXED = {"layer_types": [FULL, SLIDING], "sliding_window": 4, "use_sliding_window": True}
STRETCHED = {"rope_type": "linear", "factor": 3.0, "rope_theta": 100.0}
PINNED_DFLASH = variant(DFLASH)
EVERY_DFLASH_FLAG = variant(
    {**DFLASH, **MIXED},
    3,
    draft_vocab_size=97,
    attention_bias=True,
    logit_scale=0.5,
    rope_parameters=STRETCHED,
    dflash_config={"mask_token_id": 7, "target_layer_ids": [5, 0, 7, 2]},
)
"""a smaller vocabulary, a layer that slides and is causal, biases; ids in no order"""
BOTH_WAYS = variant({**DFLASH, **MIXED}, 4, dflash_config={**DFLASH["dflash_config"], "causal": False})
"""a layer that slides and sees its block in both directions"""
CAUSAL = variant({**DFLASH, **MIXED}, 5, is_causal=True)


def tiny_dflash(seed: int, vocab: int = 13, **changes: Any) -> Drawn:
    """A draft beside `tiny_target` that says any token; its layer ids are in no order."""
    block = {"mask_token_id": vocab - 1, "target_layer_ids": [2, 0, 1], **changes.pop("dflash_config", {})}
    sizes = {**TINY, "vocab_size": vocab, "layer_types": [FULL, SLIDING], "sliding_window": 5}
    return variant(DFLASH, seed, **{**sizes, **changes, "dflash_config": block})


# few words: a draft of random weights is right often enough for every count to occur
DFLASH_LOOP = Loop(tiny_target(6, vocab=5), tiny_dflash(10, vocab=5), (5, 1, 3))


def dflash_team(ranks: int, vocab: int, seed: int, own_embedding: bool = True, **changes: Any) -> Team:
    """A Llama and a draft that a number of ranks can share."""
    like = team(ranks, ranks, ranks, vocab, seed)
    names = ("hidden_size", "intermediate_size", "head_dim", "num_key_value_heads", "num_attention_heads")
    sizes = {name: like.draft.keys[name] for name in names}
    return Team(ranks, like.target, tiny_dflash(seed + 1, vocab, **{**sizes, **changes}), own_embedding)


# a shared table and padding; every bias; 4 ranks share 2 heads, and a vocabulary whose last rank has no row
TWO, THREE = dflash_team(2, 331, 1, False), dflash_team(3, 331, 3, attention_bias=True, draft_vocab_size=97)
FOUR = dflash_team(4, 130, 5, num_key_value_heads=2, is_causal=True)


def speculators(drawn: Drawn, non_causal: bool = False) -> dict[str, Any]:
    """The same facts as speculators spells them: a body of its own, ids of what enters a layer."""
    config = {key: value for key, value in drawn.keys.items() if key not in ("architectures", "num_target_layers")}
    block, size = config.pop("dflash_config"), config.pop("block_size")
    return {
        "architectures": ["DFlashDraftModel"],
        "speculators_model_type": "dflash",
        "speculators_version": "0.9.0",
        "draft_vocab_size": config.pop("draft_vocab_size", config["vocab_size"]),
        "block_size": size,
        "mask_token_id": block["mask_token_id"],
        "aux_hidden_state_layer_ids": [i + 1 for i in block["target_layer_ids"]],
        "sliding_window_non_causal": non_causal,
        "sample_from_anchor": False,
        "target_hidden_size": None,
        "speculators_config": {"algorithm": "dflash", "default_proposal_method": "greedy"},
        "transformer_layer_config": config,
    }


def _published(hidden: int, layers: int, ids: list[int], mask: int, size: int, **body: Any) -> dict[str, Any]:
    return {
        **QWEN3,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "head_dim": 128,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1_000_000,
        "rope_scaling": None,
        "block_size": size,
        "use_cache": True,
        "dtype": "bfloat16",
        "tie_word_embeddings": False,
        "dflash_config": {"mask_token_id": mask, "target_layer_ids": ids},
        **body,
    }


PUBLISHED_DRAFTS: Mapping[str, tuple[dict[str, Any], int, tuple[int, ...]]] = {
    "a draft of Qwen3-8B, full layers": (
        _published(
            4096,
            5,
            [1, 9, 17, 25, 33],
            151_669,
            16,
            vocab_size=151_936,
            intermediate_size=12_288,
            num_attention_heads=32,
            num_key_value_heads=8,
            num_target_layers=36,
        ),
        36,
        (2, 10, 18, 26, 34),
    ),
    "a draft of gemma-4-31B, layers that slide": (
        _published(
            5376,
            5,
            [1, 17, 29, 47, 58],
            4,
            16,
            vocab_size=262_144,
            intermediate_size=21_504,
            num_attention_heads=32,
            num_key_value_heads=16,
            num_target_layers=60,
            layer_types=[SLIDING] * 4 + [FULL],
            sliding_window=2048,
        ),
        60,
        (2, 18, 30, 48, 59),
    ),
}
"""configs of the published form at published sizes: (config.json, layers of the target, capture points)"""
