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
