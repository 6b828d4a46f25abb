"""A line of the table of dialects, and the words that its columns are written in."""

from collections.abc import Iterable
from typing import Any, NamedTuple

READ, UNREAD, FIXED = "read", "unread", "fixed"
SILENT, LOUD, WARNS = "silent", "loud", "warns"

ASCENDING, ONCE, LISTED = "ascending", "ascending, once each", "as listed"
FIRST_ID = "before_layer, after_layer where the first id is 1"
LAST_ID = "after_layer, before_layer where the largest id is L"
TRANSLATED, NEEDED = "translated", "needed"
ANY = "any"
OWN, TARGETS = "its own", "the target's"
DROPPED, REFUSED = "dropped", "refused"
ONES, ZEROS, NOISE = "ones", "zeros", "uninitialised memory"
OFFSET = "target id = i + d2t[i]"

NESTED = "eagle_config.eagle_aux_hidden_state_layer_ids"
TOP = "eagle_aux_hidden_state_layer_ids"
KIND = "speculators_model_type"

MLA, QWEN3, NESTED_LAYOUT = "latent attention", "qwen3 body", "speculators layout"
DEEPSEEK_TARGET, GPT_OSS_TARGET = "deepseek or kimi target", "gpt-oss target"
GEMMA3_TARGET, GEMMA4_TARGET, IMAGES = "gemma 3 target", "gemma 4 target", "images in the prompt"
NO_HEAD_SIZE, NO_T2D, YARN_MLA = "no draft_vocab_size", "no t2d in the file", "latent attention with yarn"
OTHER_WIDTH, NO_Q_LORA = "a draft of another width than its target", "latent attention without q-LoRA"


class Row(NamedTuple):
    """What one consumer makes of one fact."""

    fact: str
    key: str
    """of the config, or a pattern of tensor names; empty where nothing in the checkpoint says it"""
    absent: Any
    """what holds where the key is absent or unread"""
    means: str
    manner: str
    """silent, loud or warns: what a user sees when this differs from what was meant"""
    source: str
    where: str = ""


class Dialect(NamedTuple):
    """One consumer or producer."""

    name: str
    title: str
    version: str
    role: str
    """trainer, engine or converter"""
    rows: tuple[Row, ...]

    def about(self, fact: str, places: Iterable[str] = ()) -> tuple[Row, ...]:
        """The rows of a fact that hold in these places, narrower ones first."""
        held = [row for row in self.rows if row.fact == fact and row.where in ("", *places)]
        return tuple(sorted(held, key=lambda row: not row.where))


# field of Eagle3Config -> (the key that most files spell it with, what it is without one)
FLAGS: dict[str, tuple[str, Any]] = {
    "use_aux_hidden_state": ("eagle_config.use_aux_hidden_state", True),
    "fc_norm": ("fc_norm", False),
    "norm_before_fc": ("norm_before_fc", False),
    "norm_before_residual": ("norm_before_residual", False),
    "norm_before_head": ("", True),
    "feedback_normed": ("norm_output", False),
    "fc_bias": ("bias", False),
    "qkv_bias": ("attention_bias", False),
    "o_bias": ("attention_bias", False),
    "mlp_bias": ("mlp_bias", False),
    "logit_scale": ("logit_scale", 1.0),
    "tied_head": ("tie_word_embeddings", False),
    "layers": ("num_hidden_layers", 1),
    "target_hidden": ("target_hidden_size", 0),
    "head_dim": ("head_dim", "hidden_size / heads"),
    "rope theta": ("rope_theta", 10_000.0),
    "later_norm": ("", "input_layernorm"),
}


def read(source: str, *facts: str, where: str = "") -> tuple[Row, ...]:
    return tuple(Row(fact, *FLAGS[fact], READ, SILENT, source, where) for fact in facts)


def unread(source: str, *facts: str, where: str = "") -> tuple[Row, ...]:
    return tuple(Row(fact, *FLAGS[fact], UNREAD, SILENT, source, where) for fact in facts)


def names(source: str, *pairs: tuple[str, str], where: str = "") -> tuple[Row, ...]:
    """Prefixes that are accepted, the one that is written first."""
    return tuple(Row("name", theirs, ours, READ, SILENT, source, where) for theirs, ours in pairs)


def tensors(source: str, fact: str, manner: str, means: str, *patterns: str, where: str = "") -> tuple[Row, ...]:
    return tuple(Row(fact, pattern, "", means, manner, source, where) for pattern in patterns)


ROTARY = tuple(f"*rotary_emb.{name}" for name in ("inv_freq", "cos_cached", "sin_cached"))
MIDLAYER, LAYERS = ("midlayer.", "layers.0."), ("layers.0.", "layers.0.")
LEGACY = tuple((f"aux_norm_{word}.", f"fc_norm.{i}.") for i, word in enumerate(("low", "mid", "high")))
BIASES = ("fc_bias", "qkv_bias", "o_bias", "mlp_bias")
ARCH, ONE = "architectures", "LlamaForCausalLMEagle3"
LATENT = "Eagle3DeepseekV2ForCausalLM"
VOCAB_MAP = Row("vocabulary map", "d2t", "", OFFSET, SILENT, "traineagle3/cnets.py:671-676")
