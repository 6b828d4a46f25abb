"""Facts of decoding that stand beside the weights: what a target never says, and where its texts end.

`generation_config.json` states them; where it does not, the target's own config does. Whatever else stands there
(temperatures, penalties) is a wish of whoever saved it, which a caller states anew.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.checkpoints import CONFIG, CheckpointError, read_json

GENERATION = "generation_config.json"


@dataclass(frozen=True)
class Voice:
    """Ids that decoding treats otherwise than the rest; logits know nothing of them."""

    suppressed: tuple[int, ...] = ()
    ends: tuple[int, ...] = ()


def read_voice(folder: Path, keys: dict[str, Any], config: Any) -> Voice:
    """What a checkpoint folder says.

    keys    of its config.json
    config  as its page reads them; one that has `suppressed` says what is never said where nothing else does
    errors: CheckpointError for what is not ids
    """
    file = folder / GENERATION
    said = read_json(file) if file.exists() else {}
    suppressed = _ids(file, said, "suppress_tokens")
    ends = _ids(file, said, "eos_token_id")
    if suppressed is None:
        suppressed = tuple(getattr(config, "suppressed", ()))
    if ends is None:
        ends = _ids(folder / CONFIG, keys, "eos_token_id") or ()
    return Voice(suppressed, ends)


def _ids(file: Path, said: dict[str, Any], key: str) -> tuple[int, ...] | None:
    """One id or several; None where nothing is said."""
    value = said.get(key)
    if value is None:
        return None
    ids = value if isinstance(value, list) else [value]
    if not all(type(token) is int and token >= 0 for token in ids):
        raise CheckpointError(f"{file}: key {key!r} is {value!r}; token ids are expected, whole numbers from 0")
    return tuple(ids)
