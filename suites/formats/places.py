"""Where a checkpoint stands: the circumstances that rows of the table name, and the keys that all consumers share."""

from collections.abc import Mapping
from typing import Any

from harness.checkpoints import Checkpoint
from harness.pairs import Pair
from suites.formats.rows import (
    DEEPSEEK_TARGET,
    GEMMA3_TARGET,
    GEMMA4_TARGET,
    GPT_OSS_TARGET,
    KIND,
    MLA,
    NESTED_LAYOUT,
    NO_HEAD_SIZE,
    NO_Q_LORA,
    NO_T2D,
    OTHER_WIDTH,
    QWEN3,
    YARN_MLA,
)

PLACES = {
    "deepseek": DEEPSEEK_TARGET,
    "kimi_k25": DEEPSEEK_TARGET,
    "gpt_oss": GPT_OSS_TARGET,
    "gemma3": GEMMA3_TARGET,
    "gemma3_mm": GEMMA3_TARGET,
    "gemma4": GEMMA4_TARGET,
    "gemma4_mm": GEMMA4_TARGET,
    "gemma4_unified": GEMMA4_TARGET,
}
"""pair of a target -> the place that rows name; other targets have no rows of their own"""

BODY = frozenset(
    {
        *("architectures", "model_type", "hidden_act", "vocab_size", "draft_vocab_size", "hidden_size"),
        *("intermediate_size", "num_hidden_layers", "rms_norm_eps", "num_attention_heads", "num_key_value_heads"),
        *("head_dim", "rope_parameters", "rope_scaling", "rope_theta", "partial_rotary_factor"),
        *("max_position_embeddings", "layer_types", "sliding_window", "use_sliding_window", "target_hidden_size"),
        *("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "rope_interleave"),
        "latent_norm_eps",
    }
)
"""keys of a draft's body, which all consumers read alike; any other key is a fact with rows, or nothing"""


def places_of(checkpoint: Checkpoint, pair: Pair, target: str) -> tuple[str, ...]:
    config = flat(checkpoint.config)
    found = [PLACES[target]] if target in PLACES else []
    found += [NESTED_LAYOUT] if KIND in checkpoint.config else []
    found += [] if "t2d" in checkpoint.headers else [NO_T2D]
    found += [OTHER_WIDTH] if config.get("target_hidden_size") not in (None, config.get("hidden_size")) else []
    vocab = config.get("vocab_size")
    found += [] if config.get("draft_vocab_size") not in (None, vocab) else [NO_HEAD_SIZE]
    if pair.name == "eagle3_mla":
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
        kind = rope.get("rope_type", rope.get("type")) if isinstance(rope, Mapping) else None
        found += [YARN_MLA] if kind == "yarn" else []
        found += [NO_Q_LORA] if config.get("q_lora_rank") is None else []
        return (*found, MLA)
    is_qwen3 = config.get("model_type") == "qwen3" or "Qwen3" in str(config.get("architectures"))
    return (*found, QWEN3) if is_qwen3 else tuple(found)


def flat(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config without speculators' nesting: the inner body, then the outer facts."""
    if KIND not in config or not isinstance(config.get("transformer_layer_config"), Mapping):
        return dict(config)
    inner = config["transformer_layer_config"]
    outer = {k: v for k, v in config.items() if k not in ("transformer_layer_config", "architectures", "model_type")}
    return {**inner, **{k: v for k, v in outer.items() if v is not None}}


def find(config: Mapping[str, Any], key: str) -> Any:
    """The value at a dotted key; None where absent."""
    value: Any = config
    for part in key.split(".") if key else ():
        value = value.get(part) if isinstance(value, Mapping) else None
    return value if key else None
