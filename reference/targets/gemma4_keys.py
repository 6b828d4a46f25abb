"""How Gemma 4 configs spell the facts of `reference/targets/gemma4.py`.

Files of the hub state the head of the full layers once (`global_head_dim`, `num_global_key_value_heads`); transformers
reads these and saves `per_layer_config` instead, one entry a full layer. Both are read, and they must agree where a
file has both. Defaults are those of transformers; `gemma4_unified_text` has its own. Every key is read, known to be
inert, or refused (ConfigError): nothing is dropped.
"""

from typing import Any

from reference.config import ConfigError, Keys
from reference.ops.rope import Rope

SLIDING, FULL = "sliding_attention", "full_attention"

# what a file that does not say means; the unified model has no per-layer inputs and no experts at all
DEFAULTS = {
    "gemma4_text": {"window": 512, "images": None, "width": 256, "vocab": 262_144},
    "gemma4_unified_text": {"window": 1024, "images": "vision", "width": 0, "vocab": 0},
}
DEFAULT_ROPES = {
    SLIDING: {"rope_type": "default", "rope_theta": 10_000.0},
    FULL: {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1_000_000.0},
}


def read_facts(config: dict[str, Any]) -> dict[str, Any]:
    """The fields of `Gemma4Config`; those of its two kinds of layers as mappings under "sliding" and "full"."""
    keys = Keys(config)
    default = DEFAULTS.get(str(keys.get("model_type", "gemma4_text")))
    if default is None:
        raise ConfigError(f"config key 'model_type' is {config['model_type']!r}; known are {sorted(DEFAULTS)}")
    keys.expect("hidden_activation", "gelu_pytorch_tanh")
    layer_types = _read_layer_types(keys)
    wide, cap = keys.flag("use_double_wide_mlp"), keys.get("final_logit_softcapping")
    facts = {
        "vocab": keys.count("vocab_size"),
        "hidden": keys.count("hidden_size"),
        "intermediate": keys.count("intermediate_size"),
        "layer_types": layer_types,
        "heads": keys.count("num_attention_heads"),
        **_read_kinds(keys, layer_types, default),
        "shared_layers": keys.count("num_kv_shared_layers", 0, least=0),
        "shared_widening": 2 if wide else 1,
        **_read_experts(keys),
        "per_layer_width": keys.count("hidden_size_per_layer_input", default["width"], least=0),
        "per_layer_vocab": keys.count("vocab_size_per_layer_input", default["vocab"], least=0),
        "softcap": None if cap is None else keys.number("final_logit_softcapping", 1.0),
        "eps": keys.number("rms_norm_eps", 1e-6),
        "attention_bias": keys.flag("attention_bias"),
        "tied_head": keys.flag("tie_word_embeddings", True),
    }
    keys.finish()
    return facts


def _read_layer_types(keys: Keys) -> tuple[str, ...]:
    """The kind of every layer; the last is full whatever the file says, as transformers and the engines have it."""
    layers = keys.count("num_hidden_layers")
    given = keys.names("layer_types") or [FULL if (i + 1) % 6 == 0 else SLIDING for i in range(layers)]
    unknown = sorted(set(given) - {SLIDING, FULL})
    if unknown or len(given) != layers:
        raise ConfigError(
            f"config key 'layer_types' names {unknown or len(given)} for {layers} layers; "
            f"one of {SLIDING!r} and {FULL!r} is expected for each"
        )
    return (*given[:-1], FULL)


def _read_kinds(keys: Keys, layer_types: tuple[str, ...], default: dict[str, Any]) -> dict[str, Any]:
    """What the sliding layers have in common, and what the full ones have."""
    k_eq_v, stated = keys.flag("attention_k_eq_v"), "use_bidirectional_attention" in keys.config
    images = keys.get("use_bidirectional_attention", None if stated else default["images"])
    if images not in (None, "vision"):
        raise ConfigError(f"config key 'use_bidirectional_attention' is {images!r}; null or 'vision' is expected")
    sliding = (keys.count("num_key_value_heads", 4), keys.count("head_dim", 256))
    full = _read_full_heads(keys, layer_types, sliding, k_eq_v)
    kinds = {
        "sliding": {
            "window": keys.count("sliding_window", default["window"]),
            "sees_image": images == "vision",
        },
        "full": {"k_eq_v": k_eq_v},
    }
    ropes, length = keys.get("rope_parameters", DEFAULT_ROPES), keys.get("max_position_embeddings")
    for kind, layer_type, (kv_heads, head_dim) in (("sliding", SLIDING, sliding), ("full", FULL, full)):
        if keys.count("num_attention_heads") % kv_heads:
            raise ConfigError(
                f"config key 'num_attention_heads' is {keys.count('num_attention_heads')}, which is no multiple of the "
                f"{kv_heads} key/value heads of {layer_type} layers"
            )
        rope = _read_rope(ropes, layer_type, head_dim, length)
        kinds[kind] |= {"kv_heads": kv_heads, "head_dim": head_dim, "rope": rope}
    return kinds


def _read_full_heads(
    keys: Keys, layer_types: tuple[str, ...], sliding: tuple[int, int], k_eq_v: bool
) -> tuple[int, int]:
    """Key/value heads and head width of the full layers, from either spelling."""
    # without shared projections transformers ignores the number of global heads
    stated = keys.count("num_global_key_value_heads", sliding[0]) if k_eq_v else sliding[0]
    keys.get("num_global_key_value_heads")
    hub = (stated, keys.count("global_head_dim", 512))
    if keys.get("per_layer_config") is None:
        return hub
    saved = keys.below("per_layer_config")
    # numbered "5" or "05"; a layer that is not listed has the heads of the config itself
    listed = {int(name): saved.below(name) for name in saved.config if name.isdecimal()}
    found: dict[str, set[tuple[int, int]]] = {SLIDING: set(), FULL: set()}
    for i, layer_type in enumerate(layer_types):
        entry = listed.get(i, Keys({}))
        found[layer_type].add((entry.count("num_key_value_heads", sliding[0]), entry.count("head_dim", sliding[1])))
        entry.finish()
    if len(listed) != len(saved.config) or set(listed) - set(range(len(layer_types))):
        raise ConfigError(
            f"config key 'per_layer_config' lists {sorted(saved.config)}; "
            f"numbers of the {len(layer_types)} layers are expected"
        )
    if len(found[FULL]) > 1 or found[SLIDING] - {sliding}:
        raise ConfigError(
            "config key 'per_layer_config' gives layers of one kind different heads (key/value heads, width): "
            f"sliding {sorted(found[SLIDING] | {sliding})}, full {sorted(found[FULL])}"
        )
    (ours,) = found[FULL]
    if (keys.get("global_head_dim"), keys.get("num_global_key_value_heads")) != (None, None) and ours != hub:
        raise ConfigError(
            f"config key 'per_layer_config' gives full layers (key/value heads, width) {ours}, "
            f"'num_global_key_value_heads' and 'global_head_dim' give {hub}; keep one of them"
        )
    return ours


def _read_rope(ropes: Any, layer_type: str, head_dim: int, length: Any) -> Rope:
    if not isinstance(ropes, dict) or not isinstance(ropes.get(layer_type), dict):
        raise ConfigError(f"config key 'rope_parameters' has no mapping under {layer_type!r}")
    given = ropes[layer_type]
    kind = given.get("rope_type", "default")
    if kind not in ("default", "linear", "proportional"):
        raise ConfigError(
            f"config key 'rope_parameters.{layer_type}.rope_type' is {kind!r}; "
            "'default', 'linear' or 'proportional' is expected"
        )
    if kind != "proportional" and given.get("partial_rotary_factor") not in (None, 1, 1.0):
        raise ConfigError(
            f"config key 'rope_parameters.{layer_type}.partial_rotary_factor' is {given['partial_rotary_factor']!r}; "
            f"transformers ignores it for rope_type {kind!r}: remove it, or say 'proportional'"
        )
    return Rope.from_hf({"rope_parameters": given, "max_position_embeddings": length}, head_dim)


def _read_experts(keys: Keys) -> dict[str, int]:
    names = ("num_experts", "top_k_experts", "moe_intermediate_size")
    if not keys.flag("enable_moe_block"):
        for name in names:
            keys.get(name)  # of a block that is off
        return {}
    experts, chosen, intermediate = (keys.count(name) for name in names)
    if chosen > experts:
        raise ConfigError(f"config key 'top_k_experts' is {chosen}, more than 'num_experts', {experts}")
    return {"experts": experts, "experts_per_token": chosen, "expert_intermediate": intermediate}
