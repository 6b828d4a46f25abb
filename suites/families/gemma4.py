"""Gemma 4 text targets: tiny real configs to draw from, pinned ones, and the published sizes.

Three sizes stand for what the published ones differ in: `dense` (31B, 12B), `experts` (26B-A4B) and `edge` (E2B, E4B:
an input of its own for every layer, shared keys and values, a wider block in the shared layers).
"""

import json
from collections.abc import Mapping
from typing import Any

from hypothesis import strategies as st

from suites.draws import SEEDS, VOCABS, Drawn

SIZES = ("dense", "experts", "edge")
SLIDING, FULL = "sliding_attention", "full_attention"


def drawn_of(config: Mapping[str, Any], seed: int = 3, **changes: Any) -> Drawn:
    """A config with changes, as a checkpoint still to be written."""
    return Drawn(json.dumps({**config, **changes}), seed)


@st.composite
def ropes(draw: st.DrawFn) -> dict[str, Any]:
    """`rope_parameters`: one rope a kind of layer."""
    theta = st.sampled_from([100.0, 10_000.0, 1_000_000.0])
    sliding = draw(st.sampled_from([{"rope_type": "default"}, {"rope_type": "linear", "factor": 3.0}]))
    full = draw(
        st.fixed_dictionaries(
            {"rope_type": st.just("proportional"), "partial_rotary_factor": st.sampled_from([0.25, 0.5, 1.0])},
            optional={"factor": st.just(2.0)},
        )
    )
    return {SLIDING: {**sliding, "rope_theta": draw(theta)}, FULL: {**full, "rope_theta": draw(theta)}}


@st.composite
def layouts(draw: st.DrawFn, share: bool) -> dict[str, Any]:
    """`layer_types`, and how many of the last layers share keys and values: each kind of those has a donor."""
    kinds = st.sampled_from([SLIDING, FULL])
    own = draw(st.lists(kinds, min_size=1, max_size=3))
    if not share:
        return {"layer_types": own + draw(st.lists(kinds, max_size=4))}
    own += draw(st.permutations([SLIDING, FULL]))
    shared = draw(st.lists(kinds, max_size=3))
    return {"layer_types": own + shared, "num_kv_shared_layers": len(shared)}


@st.composite
def gemma4_targets(draw: st.DrawFn, size: str = "dense", ranks: int = 1) -> Drawn:
    """A Gemma 4 text target of one size, spelled as on the hub.

    ranks   how many can share it
    """
    groups, flag = ranks * draw(st.sampled_from([1, 2, 4])), st.booleans()
    vocab = draw(st.sampled_from(VOCABS))
    layout = draw(layouts(share=size == "edge"))
    config = {
        "model_type": "gemma4_text",
        "architectures": ["Gemma4ForCausalLM"],
        "vocab_size": vocab,
        "hidden_size": draw(st.sampled_from([48, 96])),
        "intermediate_size": ranks * draw(st.sampled_from([48, 64])),
        "num_hidden_layers": len(layout["layer_types"]),
        **layout,
        "num_attention_heads": groups * draw(st.integers(1, 3)),
        "num_key_value_heads": groups,
        "head_dim": draw(st.sampled_from([8, 16])),
        "global_head_dim": draw(st.sampled_from([8, 16, 32])),
        "num_global_key_value_heads": draw(st.sampled_from([None, 1, groups])),
        "attention_k_eq_v": draw(flag),
        "sliding_window": draw(st.integers(1, 12)),
        "max_position_embeddings": 64,
        "rms_norm_eps": draw(st.sampled_from([1e-6, 1e-2])),
        "rope_parameters": draw(ropes()),
        "attention_bias": draw(flag),
        "tie_word_embeddings": draw(flag),
        "final_logit_softcapping": draw(st.sampled_from([None, 2.0, 30.0])),
        "use_bidirectional_attention": draw(st.sampled_from([None, "vision"])),
        "hidden_size_per_layer_input": 0,
        "vocab_size_per_layer_input": vocab,
        "hidden_activation": "gelu_pytorch_tanh",
    }
    if size == "experts":
        experts = ranks * draw(st.integers(2, 8))
        config |= {
            "enable_moe_block": True,
            "num_experts": experts,
            "top_k_experts": draw(st.integers(1, min(experts, 3))),
            "moe_intermediate_size": draw(st.sampled_from([16, 24])),
        }
    if size == "edge":
        config |= {"hidden_size_per_layer_input": draw(st.sampled_from([8, 12])), "use_double_wide_mlp": draw(flag)}
    return Drawn(json.dumps(config), draw(SEEDS))


DENSE = {
    "model_type": "gemma4_text",
    "architectures": ["Gemma4ForCausalLM"],
    "vocab_size": 331,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 8,
    "layer_types": [SLIDING, SLIDING, FULL, SLIDING, SLIDING, FULL, SLIDING, FULL],
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "global_head_dim": 16,
    "num_global_key_value_heads": 1,
    "attention_k_eq_v": True,
    "sliding_window": 5,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {
        SLIDING: {"rope_type": "default", "rope_theta": 100.0},
        FULL: {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1000.0},
    },
    "attention_bias": False,
    "tie_word_embeddings": True,
    "final_logit_softcapping": 30.0,
    "use_bidirectional_attention": "vision",
    "hidden_size_per_layer_input": 0,
    "vocab_size_per_layer_input": 331,
    "hidden_activation": "gelu_pytorch_tanh",
}
"""what the 31B is, small: one key/value head of double width on full layers, whose values come from the key weights"""

EXPERTS = {
    **DENSE,
    "enable_moe_block": True,
    "num_experts": 6,
    "top_k_experts": 2,
    "moe_intermediate_size": 24,
}
EDGE = {
    **DENSE,
    "attention_k_eq_v": False,
    "num_global_key_value_heads": None,
    "hidden_size_per_layer_input": 12,
    "num_kv_shared_layers": 3,
    "use_double_wide_mlp": True,
    "use_bidirectional_attention": None,
}
PINNED = {"dense": drawn_of(DENSE), "experts": drawn_of(EXPERTS), "edge": drawn_of(EDGE)}
EVERYTHING = {**EXPERTS, **EDGE, "attention_k_eq_v": True, "num_global_key_value_heads": 1}
"""all that a layer can hold at once, though no published size has it so"""


def tiny_gemma4(seed: int, vocab: int = 13, **changes: Any) -> Drawn:
    """Five layers with all that they can hold, the last two shared, beside `suites.scripted.tiny_draft`."""
    layers = {"layer_types": [SLIDING, SLIDING, FULL, SLIDING, FULL], "num_hidden_layers": 5, "num_kv_shared_layers": 2}
    few = {"vocab_size": vocab, "vocab_size_per_layer_input": vocab, "sliding_window": 4}
    return drawn_of({**EVERYTHING, **layers, **few}, seed, **changes)


def _published(**facts: Any) -> dict[str, Any]:
    """A published config: what all sizes have in common, then its own facts."""
    layers, every = facts["num_hidden_layers"], facts.pop("full_every", 6)
    return {
        "model_type": "gemma4_text",
        "architectures": ["Gemma4ForCausalLM"],
        "vocab_size": 262_144,
        "vocab_size_per_layer_input": 262_144,
        "head_dim": 256,
        "global_head_dim": 512,
        "layer_types": [FULL if (i + 1) % every == 0 else SLIDING for i in range(layers)],
        "final_logit_softcapping": 30.0,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
        **facts,
    }


def _edge(**facts: Any) -> dict[str, Any]:
    return _published(
        num_attention_heads=8,
        sliding_window=512,
        hidden_size_per_layer_input=256,
        max_position_embeddings=131_072,
        **facts,
    )


def _large(**facts: Any) -> dict[str, Any]:
    return _published(
        sliding_window=1024,
        max_position_embeddings=262_144,
        attention_k_eq_v=True,
        use_bidirectional_attention="vision",
        hidden_size_per_layer_input=0,
        **facts,
    )


PUBLISHED = {
    "gemma-4-E2B": _edge(
        hidden_size=1536,
        num_hidden_layers=35,
        full_every=5,
        num_key_value_heads=1,
        intermediate_size=6144,
        num_kv_shared_layers=20,
        use_double_wide_mlp=True,
    ),
    "gemma-4-E4B": _edge(
        hidden_size=2560,
        num_hidden_layers=42,
        num_key_value_heads=2,
        intermediate_size=10_240,
        num_kv_shared_layers=18,
    ),
    "gemma-4-12B": _large(
        hidden_size=3840,
        num_hidden_layers=48,
        num_attention_heads=16,
        num_key_value_heads=8,
        num_global_key_value_heads=1,
        intermediate_size=15_360,
    ),
    "gemma-4-26B-A4B": _large(
        hidden_size=2816,
        num_hidden_layers=30,
        num_attention_heads=16,
        num_key_value_heads=8,
        num_global_key_value_heads=2,
        intermediate_size=2112,
        enable_moe_block=True,
        num_experts=128,
        top_k_experts=8,
        moe_intermediate_size=704,
    ),
    "gemma-4-31B": _large(
        hidden_size=5376,
        num_hidden_layers=60,
        num_attention_heads=32,
        num_key_value_heads=16,
        num_global_key_value_heads=4,
        intermediate_size=21_504,
    ),
}
"""the text models of the published checkpoints, by name"""

TOTALS = {
    "gemma-4-E2B": 4.63,
    "gemma-4-E4B": 7.46,
    "gemma-4-12B": 11.91,
    "gemma-4-26B-A4B": 25.23,
    "gemma-4-31B": 30.70,
}
"""billions of parameters of these, per-layer tables included, towers not"""
