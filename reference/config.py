"""Reading a Hugging Face config without guessing: every key is read, known to be inert, or refused."""

from collections.abc import Mapping
from typing import Any

# keys that transformers and the trainers write and that change no number of a forward pass
INERT = frozenset(
    {
        "_name_or_path",
        "add_cross_attention",
        "architectures",
        "attention_dropout",
        "auto_map",
        "bos_token_id",
        "chunk_size_feed_forward",
        "dtype",
        "eos_token_id",
        "finetuning_task",
        "id2label",
        "initializer_range",
        "is_decoder",
        "is_encoder_decoder",
        "label2id",
        "model_type",
        "output_attentions",
        "output_hidden_states",
        "pad_token_id",
        "pretraining_tp",
        "problem_type",
        "return_dict",
        "tie_encoder_decoder",
        "tokenizer_class",
        "torch_dtype",
        "transformers_version",
        "use_cache",
        "target_model_type",
        "has_no_defaults_at_init",
        "speculators_version",
        "embed_requires_grad",
    }
)


class ConfigError(ValueError):
    """A config that cannot be read in one way only."""


class Keys:
    """A config whose keys are counted as they are read."""

    def __init__(self, config: Mapping[str, Any], path: str = "") -> None:
        self.config, self.path, self.read = dict(config), path, set(INERT)

    def get(self, key: str, default: Any = None) -> Any:
        """The value of `key`; None in the file means absent."""
        self.read.add(key)
        value = self.config.get(key)
        return default if value is None else value

    def need(self, key: str) -> Any:
        """The value of `key`, or ConfigError."""
        value = self.get(key)
        if value is None:
            raise ConfigError(f"config key {self.path + key!r} is missing")
        return value

    def count(self, key: str, default: int | None = None, least: int = 1) -> int:
        """A whole number of at least `least`; ConfigError where it is something else, or absent without a default."""
        value = self.need(key) if default is None else self.get(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ConfigError(f"config key {self.path + key!r} is {value!r}; a whole number from {least} is expected")
        return value

    def number(self, key: str, default: float) -> float:
        """A positive number."""
        value = self.get(key, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
            raise ConfigError(f"config key {self.path + key!r} is {value!r}; a positive number is expected")
        return value

    def flag(self, key: str, default: bool | None = False) -> Any:
        """true or false, `default` where absent; a word or a number has no truth here."""
        value = self.get(key, default)
        if value is not None and not isinstance(value, bool):
            raise ConfigError(f"config key {self.path + key!r} is {value!r}; true or false is expected")
        return value

    def names(self, key: str) -> list[str]:
        """A list of words, empty where absent."""
        value = self.get(key, [])
        if not isinstance(value, list | tuple) or not all(isinstance(name, str) for name in value):
            raise ConfigError(f"config key {self.path + key!r} is {value!r}; a list of words is expected")
        return list(value)

    def heads(self) -> tuple[int, int, int]:
        """Query heads, key/value heads and the width of a head."""
        heads = self.count("num_attention_heads")
        groups = self.count("num_key_value_heads", heads)
        if heads % groups:
            raise ConfigError(
                f"config key {self.path + 'num_attention_heads'!r} is {heads}, which is no multiple of "
                f"'num_key_value_heads', {groups}"
            )
        return heads, groups, self.count("head_dim", max(self.count("hidden_size") // heads, 1))

    def below(self, key: str) -> "Keys":
        """The mapping under `key`, as Keys of its own; its `finish` is the caller's duty."""
        value = self.get(key, {})
        if not isinstance(value, Mapping):
            raise ConfigError(f"config key {self.path + key!r} should be a mapping, got {type(value).__name__}")
        return Keys(value, f"{self.path}{key}.")

    def expect(self, key: str, *allowed: Any) -> None:
        """Absent, or one of `allowed`: the only values whose mathematics is written here."""
        value = self.get(key)
        if value is not None and value not in allowed:
            raise ConfigError(f"config key {self.path + key!r} is {value!r}; only {allowed} is supported")

    def rope(self) -> dict[str, Any]:
        """The keys that `Rope.from_hf` reads."""
        names = ("rope_parameters", "rope_scaling", "rope_theta", "partial_rotary_factor", "max_position_embeddings")
        return {name: self.get(name) for name in names}

    def finish(self) -> None:
        """Refuse what nobody read: it may change the mathematics."""
        unread = sorted(set(self.config) - self.read)
        if unread:
            names = ", ".join(repr(self.path + key) for key in unread)
            raise ConfigError(
                f"config keys {names} are not known and may change the mathematics; remove them or report them"
            )
