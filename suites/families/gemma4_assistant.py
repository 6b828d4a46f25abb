"""Gemma 4 assistants: tiny real configs beside tiny real targets, and the published sizes.

transformers writes an assistant's checkpoint, but for the order of its vocabulary: it leaves that at zeros, where a
trained one has a permutation.
"""

import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from suites.draws import SEEDS, Drawn, write_target
from suites.families.gemma4 import DENSE, EDGE, EXPERTS, FULL, SLIDING, drawn_of, gemma4_targets

ORDERING = "masked_embedding.token_ordering"
ARCHITECTURES = {
    "gemma4_assistant": "Gemma4AssistantForCausalLM",
    "gemma4_unified_assistant": "Gemma4UnifiedAssistantForCausalLM",
}
UNIFIED_ASSISTANT = "gemma4_unified_assistant"


class Couple(NamedTuple):
    """A target and an assistant beside it."""

    target: Drawn
    draft: Drawn


def beside(target: Drawn, seed: int = 5, model_type: str = "gemma4_assistant", **changes: Any) -> Couple:
    """An assistant that fits a target, of text or with towers around it.

    changes   of its own facts, or of its body's under "text_config"
    """
    t = target.keys.get("text_config", target.keys)
    kept = ("vocab_size", "head_dim", "global_head_dim", "num_key_value_heads", "num_global_key_value_heads")
    kept += ("attention_k_eq_v", "num_attention_heads", "sliding_window", "rope_parameters", "rms_norm_eps")
    text = {
        "model_type": model_type.replace("assistant", "text"),
        **{name: t.get(name) for name in kept},
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "layer_types": [SLIDING, SLIDING, FULL],
        "num_kv_shared_layers": 3,
        "hidden_size_per_layer_input": 0,
        "vocab_size_per_layer_input": 0,
        "max_position_embeddings": 64,
        **changes.pop("text_config", {}),
    }
    if model_type == UNIFIED_ASSISTANT:
        del text["hidden_size_per_layer_input"], text["vocab_size_per_layer_input"]
    config = {
        "model_type": model_type,
        "architectures": [ARCHITECTURES[model_type]],
        "backbone_hidden_size": t["hidden_size"],
        "tie_word_embeddings": True,
        **changes,
        "text_config": text,
    }
    return Couple(target, Drawn(json.dumps(config), seed))


WITH_BOTH = {"layer_types": [SLIDING, FULL, SLIDING, FULL, SLIDING, FULL], "num_hidden_layers": 6}
"""two layers of each kind that have keys of their own: the last of a kind is not the only one"""
ORDERED = {"use_ordered_embeddings": True, "num_centroids": 13, "centroid_intermediate_top_k": 4}
LONG_SIGHT = {"sliding_window": 32}
CAPPED = {"final_logit_softcapping": 2.0}
PINNED = {
    "dense": beside(drawn_of(DENSE, **WITH_BOTH)),
    "ordered": beside(drawn_of(EDGE, vocab_size=130, vocab_size_per_layer_input=130), **ORDERED),
    "unified": beside(drawn_of(DENSE, **WITH_BOTH, **LONG_SIGHT), model_type=UNIFIED_ASSISTANT, text_config=CAPPED),
    "experts": beside(drawn_of(EXPERTS, **WITH_BOTH), text_config={"attention_bias": True}, tie_word_embeddings=False),
}
"""a dense head in a narrow window; clusters beside shared layers; a wide window and a softcap; biases, a head apart"""


def shared_by(ranks: int, config: Mapping[str, Any], **changes: Any) -> Couple:
    """Four layers of a size and an assistant that so many ranks can share."""
    layers = {"layer_types": [SLIDING, FULL, SLIDING, FULL], "num_hidden_layers": 4}
    shared = {"num_kv_shared_layers": 2 if config.get("num_kv_shared_layers") else 0, "intermediate_size": 48}
    words = {"vocab_size": 130, "vocab_size_per_layer_input": 130}
    return beside(drawn_of({**config, **layers, **shared, **words}, ranks), **changes)


def _keeps_both_kinds(target: Drawn) -> bool:
    """Whether layers of both kinds have keys of their own; the last layer is full whatever the file says."""
    layer_types = [*target.keys["layer_types"][:-1], FULL]
    own = layer_types[: len(layer_types) - target.keys.get("num_kv_shared_layers", 0)]
    return {SLIDING, FULL} <= set(own)


@st.composite
def couples(draw: st.DrawFn, ranks: int = 1) -> Couple:
    """A target of any size that has both kinds of layers, and an assistant of any flags.

    ranks   how many can share both
    """
    target = draw(
        st.sampled_from(["dense", "experts", "edge"])
        .flatmap(lambda size: gemma4_targets(size, ranks))
        .filter(_keeps_both_kinds)
    )
    vocab, flag = target.keys["vocab_size"], st.booleans()
    clusters = draw(st.sampled_from([n for n in range(2, 14) if vocab % n == 0] or [1]))
    ordered = {
        "use_ordered_embeddings": draw(flag),
        "num_centroids": clusters,
        "centroid_intermediate_top_k": draw(st.integers(1, clusters)),
    }
    layers = draw(st.lists(st.sampled_from([SLIDING, FULL]), max_size=3))
    text = {
        "hidden_size": draw(st.sampled_from([32, 48])),
        "intermediate_size": ranks * draw(st.sampled_from([16, 48])),
        "layer_types": [*layers, FULL],
        "num_hidden_layers": len(layers) + 1,
        "num_kv_shared_layers": len(layers) + 1,
        "num_attention_heads": target.keys["num_attention_heads"] * draw(st.integers(1, 2)),
        "sliding_window": draw(st.integers(1, 12)),
        "attention_bias": draw(flag),
        "final_logit_softcapping": draw(st.sampled_from([None, 5.0])),
    }
    model_type, tied = draw(st.sampled_from(sorted(ARCHITECTURES))), draw(flag)
    return beside(target, draw(SEEDS), model_type, text_config=text, tie_word_embeddings=tied, **ordered)


def write_assistant(drawn: Drawn, folder: Path) -> Path:
    """Have transformers write the checkpoint, and give an ordered vocabulary its order."""
    write_target(drawn, folder)
    if drawn.keys.get("use_ordered_embeddings"):
        file = folder / "model.safetensors"
        tensors = load_file(file)
        generator = torch.Generator().manual_seed(drawn.seed)
        tensors[ORDERING] = torch.randperm(len(tensors[ORDERING]), generator=generator)
        save_file(tensors, file, {"format": "pt"})
    return folder


@contextmanager
def folders(couple: Couple) -> Iterator[tuple[Path, Path]]:
    """Both checkpoints on disk for the time of one example: (target, draft)."""
    with tempfile.TemporaryDirectory() as root:
        yield write_target(couple.target, Path(root, "target")), write_assistant(couple.draft, Path(root, "draft"))


def _published(width: int, heads: int, kv_heads: int, full_kv_heads: int, **facts: Any) -> dict[str, Any]:
    """A published config: four layers of width 1024."""
    model_type = facts.pop("model_type", "gemma4_assistant")
    text = {
        "model_type": model_type.replace("assistant", "text"),
        "vocab_size": 262_144,
        "hidden_size": 1024,
        "intermediate_size": 8192,
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 4,
        "layer_types": [SLIDING, SLIDING, SLIDING, FULL],
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "num_global_key_value_heads": full_kv_heads,
        "attention_k_eq_v": True,
        "head_dim": 256,
        "global_head_dim": 512,
        "sliding_window": 1024,
        "hidden_size_per_layer_input": 0,
        "vocab_size_per_layer_input": 0,
        "max_position_embeddings": 262_144,
    }
    return {
        "model_type": model_type,
        "architectures": [ARCHITECTURES[model_type]],
        "backbone_hidden_size": width,
        "tie_word_embeddings": True,
        **facts,
        "text_config": text,
    }


PUBLISHED = {
    "gemma-4-31B-assistant": _published(5376, 32, 16, 4),
    "gemma-4-12B-assistant": _published(
        3840,
        16,
        8,
        1,
        model_type=UNIFIED_ASSISTANT,
        use_ordered_embeddings=True,
        num_centroids=2048,
        centroid_intermediate_top_k=32,
    ),
}
"""the published checkpoints, by name; key/value heads of the sliding layers are those of their targets"""
