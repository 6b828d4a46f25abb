"""How published D-Flash configs spell the facts of `reference/drafts/dflash.py`.

z-lab and SpecForge write a Qwen3 config with a `dflash_config` beside it; speculators nests the body and has keys of
its own. Every key is read, known to be inert, or refused (ConfigError): nothing is dropped.

Which layers are causal inside a block has two spellings and one default: `is_causal` or `dflash_config.causal` speak of
all layers; where neither stands, sliding layers are causal and others are not. speculators' `sliding_window_non_causal`
speaks of sliding layers alone, as its trainer does; vLLM 0.33.0 reads it as speaking of all of them, and takes its
absence for the opposite of the trainer's default, so a file with sliding layers must state it.
"""

from collections.abc import Sequence
from typing import Any

from reference.config import ConfigError, Keys
from reference.ops.rope import Rope

ID_KEYS = ("target_layer_ids", "aux_hidden_state_layer_ids", "eagle_aux_hidden_state_layer_ids")
FULL, SLIDING = "full_attention", "sliding_attention"

# what other members of the family add to the equations: (key of `dflash_config`, its value where it adds nothing)
EXTENSIONS = (
    ("projector_type", "dflash"),
    ("attention_sink_bias", False),
    ("attention_value_scale", 1.0),
    ("conv_kernel_size", 0),
    ("conv_group_size", 0),
    ("selector_rank", 0),
    ("selector_top_k", 0),
    ("output_multiplier", 1.0),
    ("final_logit_softcapping", 0),
    ("shift_label", False),
    ("pure_draft_prefix_len", 0),
    ("sample_from_anchor", False),
    ("use_aux_hidden_state", True),
)
# the same of top-level keys
TOP_EXTENSIONS = (
    ("hidden_act", "silu"),
    ("is_neox_style", True),
    ("rope_is_neox_style", True),
    ("use_gemma_norm", False),
    ("add_swa_attention_sink_bias", False),
    ("mlp_bias", False),
    ("sample_from_anchor", False),
)


def read_facts(config: dict[str, Any]) -> dict[str, Any]:
    """The fields of `DflashConfig` from a `config.json`."""
    trainer = config.get("speculators_model_type")
    if trainer is not None:
        config = _flatten(config)
    keys = Keys(config)
    block = keys.below("dflash_config")
    for section, extensions in ((keys, TOP_EXTENSIONS), (block, EXTENSIONS)):
        for key, value in extensions:
            section.expect(key, value)
    layers = keys.count("num_hidden_layers")
    windows = _read_windows(keys, block, layers)
    facts = {
        **_read_body(keys),
        "layers": layers,
        "windows": tuple(windows) if any(windows) else (),
        "causal": _read_causal(keys, block, layers, trainer is not None),
        "aux_states": _read_aux_states(keys, block),
        "mask_token": _read_mask_token(keys, block),
        "block_size": _either(keys, block, "block_size") or 0,
    }
    # how deep the target was, the trainer's name of the mask, and a tie to a table that is the target's
    for section, key in ((keys, "num_target_layers"), (block, "num_target_layers"), (block, "mask_token")):
        section.get(key)
    keys.flag("tie_word_embeddings")
    block.finish()
    keys.finish()
    return facts


def _flatten(config: dict[str, Any]) -> dict[str, Any]:
    """speculators nests the body's config; its own keys stand beside it and win."""
    inner = dict(Keys(config).below("transformer_layer_config").config)
    outer = {k: v for k, v in config.items() if k not in ("transformer_layer_config", "speculators_config")}
    kind = outer.pop("speculators_model_type")
    if kind != "dflash":
        raise ConfigError(f"speculators_model_type {kind!r} is not a D-Flash draft")
    return {**inner, **{k: v for k, v in outer.items() if v is not None}}


def _read_body(keys: Keys) -> dict[str, Any]:
    """What a draft shares with a Qwen3 decoder."""
    heads, kv_heads, head_dim = keys.heads()
    rope, vocab = keys.rope(), keys.count("vocab_size")
    draft_vocab = keys.count("draft_vocab_size", vocab)
    if draft_vocab > vocab:
        raise ConfigError(f"config key 'draft_vocab_size' is {draft_vocab}, more than 'vocab_size', {vocab}")
    if rope["rope_theta"] is None and "rope_theta" not in (rope["rope_parameters"] or {}):
        raise ConfigError("config key 'rope_theta' is missing: trainers would take 10000 for it, engines 1000000")
    return {
        "vocab": vocab,
        "draft_vocab": draft_vocab,
        "hidden": keys.count("hidden_size"),
        "intermediate": keys.count("intermediate_size"),
        "heads": heads,
        "kv_heads": kv_heads,
        "head_dim": head_dim,
        "rope": Rope.from_hf(rope, head_dim),
        "target_hidden": keys.count("target_hidden_size", 0, least=0),
        "eps": keys.number("rms_norm_eps", 1e-6),
        "bias": keys.flag("attention_bias"),
        "logit_scale": keys.number("logit_scale", 1.0),
    }


def _read_aux_states(keys: Keys, block: Keys) -> int:
    """How many states are fused; wherever the file says it, it must say the same."""
    given = [section.get(key) for section in (block, keys) for key in ID_KEYS]
    counts = {len(ids) for ids in given if isinstance(ids, list | tuple)}
    if not counts or 0 in counts:
        raise ConfigError(
            "config key 'dflash_config.target_layer_ids' (speculators: 'aux_hidden_state_layer_ids') is missing: "
            "which of the target's layers the context is made of cannot be guessed"
        )
    if len(counts) > 1:
        raise ConfigError(f"config disagrees with itself about the number of aux states: {sorted(counts)}")
    return counts.pop()


def _read_mask_token(keys: Keys, block: Keys) -> int:
    token, vocab = _either(keys, block, "mask_token_id"), keys.count("vocab_size")
    if token is None:
        raise ConfigError("config key 'dflash_config.mask_token_id' is missing: a block is made of that token")
    if token >= vocab:
        raise ConfigError(f"config key 'mask_token_id' is {token}; ids are 0..{vocab - 1}")
    return token


def _read_windows(keys: Keys, block: Keys, layers: int) -> list[int | None]:
    """Sliding window of each layer, the draft's own layers counted from 0."""
    kinds, size = _kinds(keys, block, layers), _either(keys, block, "sliding_window", "swa_window_size")
    for key in ("use_sliding_window", "max_window_layers"):
        # Qwen3's own way of saying what `layer_types` says
        keys.get(key)
    if SLIDING in kinds and size is None:
        raise ConfigError("config has sliding layers, 'sliding_window' is missing")
    return [size if kind == SLIDING else None for kind in kinds]


def _kinds(keys: Keys, block: Keys, layers: int) -> list[str]:
    kinds = keys.names("layer_types")
    if block.flag("use_swa") and SLIDING not in kinds:
        # all layers slide, and a list that says otherwise is the body's default
        return [SLIDING] * layers
    if not kinds and keys.get("sliding_window") is not None and keys.get("use_sliding_window", True):
        raise ConfigError("config key 'sliding_window' is given; list the layers that slide as 'layer_types'")
    kinds = kinds or [FULL] * layers
    if len(kinds) != layers:
        raise ConfigError(f"config key 'layer_types' lists {len(kinds)} layers, num_hidden_layers is {layers}")
    unknown = sorted(set(kinds) - {FULL, SLIDING})
    if unknown:
        raise ConfigError(f"config key 'layer_types' has {unknown}; {FULL} and {SLIDING} are known")
    return kinds


def _read_causal(keys: Keys, block: Keys, layers: int, is_speculators: bool) -> tuple[bool, ...]:
    """Of each layer: whether a token of the block sees the block up to itself alone."""
    stated = [flag for flag in (keys.flag("is_causal", None), block.flag("causal", None)) if flag is not None]
    non_causal = keys.flag("sliding_window_non_causal", None)
    if len(set(stated)) > 1:
        raise ConfigError("config keys 'is_causal' and 'dflash_config.causal' disagree; engines read one or the other")
    if stated:
        return (stated[0],) * layers
    # `use_swa` slides without being causal: the list alone makes a layer so
    slides = [kind == SLIDING for kind in keys.names("layer_types") or [FULL] * layers]
    if is_speculators and any(slides) and non_causal is None:
        raise ConfigError(
            "config key 'sliding_window_non_causal' is missing and layers slide: the trainer takes false for it, "
            "vLLM takes true; state it"
        )
    return tuple(slide and not non_causal for slide in slides)


def _either(keys: Keys, block: Keys, name: str, nested: str | None = None) -> int | None:
    """A whole number that stands at the top or in `dflash_config`; None where it stands nowhere."""
    top, inner = keys.get(name), block.get(nested or name)
    found: Sequence[int] = [
        section.count(key, least=0)
        for section, key, value in ((keys, name, top), (block, nested or name, inner))
        if value is not None
    ]
    if len(set(found)) > 1:
        raise ConfigError(f"config keys {name!r} and 'dflash_config.{nested or name}' disagree: {top} and {inner}")
    return found[0] if found else None
