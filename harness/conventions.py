"""Which of the target's states a draft reads: layer ids -> capture points.

Capture point c in 0..L is the residual stream after c layers have run: 0 is the embedding's output, L the last
layer's output before the final norm.  Checkpoints spell a capture point in one of two ways:

    after_layer    c = i + 1    legal ids 0..L-1    "the output of layer i"
    before_layer   c = i        legal ids 0..L      "what enters layer i"

No published key says which.  A checkpoint states it by `eagle_config.layer_ids`, by a format that documents it
(speculators: before_layer; D-Flash's `target_layer_ids`: after_layer), or by having no ids at all, which means the
default triple of capture points (2, L // 2, L - 3).  Where one reading alone is legal it is taken, and the ledger says
so.  Where both are legal nothing is guessed: the first id, the largest id and the target's family mean nothing here.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from harness.checkpoints import CheckpointError

AFTER, BEFORE, DEFAULT = "after_layer", "before_layer", "default"
CONVENTIONS = (AFTER, BEFORE)
SHIFT = {AFTER: 1, BEFORE: 0}

STATED_KEY = "eagle_config.layer_ids"
ID_KEYS = (
    "eagle_config.eagle_aux_hidden_state_layer_ids",
    "eagle_aux_hidden_state_layer_ids",
    "aux_hidden_state_layer_ids",
)
DFLASH_KEYS = ("dflash_config.target_layer_ids", "target_layer_ids")
COUNT_KEYS = (
    "num_aux_hidden_states",
    "num_aux_layers",
    "eagle_config.num_aux_hidden_states",
    "eagle_config.num_aux_layers",
)


class LayerIdsError(CheckpointError):
    """Layer ids that contradict themselves, their target or another fact of the checkpoint."""


class AmbiguousLayerIds(CheckpointError):
    """Layer ids with two legal readings and no word about which is meant."""


@dataclass(frozen=True)
class LayerIds:
    """The answer: what to capture, and who said so."""

    ids: tuple[int, ...]
    """as written in the checkpoint, in its order; empty where it has none"""
    points: tuple[int, ...]
    """capture points, in the order of the ids"""
    convention: str
    """`after_layer`, `before_layer` or `default`"""
    stated_by: str
    """the key or argument that settles the convention"""
    text: str
    """one sentence for the ledger"""


@dataclass(frozen=True)
class Stated:
    """Ids found in a config, with the key they stand under."""

    key: str
    ids: tuple[int, ...]


def default_points(num_layers: int) -> tuple[int, ...]:
    """The triple that every trainer means when a checkpoint has no ids."""
    return (2, num_layers // 2, num_layers - 3)


def to_points(ids: Iterable[int], convention: str) -> tuple[int, ...]:
    """Capture points of ids under a convention, in their order; legality is `resolve`'s business."""
    return tuple(i + SHIFT[convention] for i in ids)


def is_legal(ids: Iterable[int], convention: str, num_layers: int) -> bool:
    """Whether every id names a capture point that can be spelled this way."""
    return all(SHIFT[convention] <= c <= num_layers for c in to_points(ids, convention))


def spell(points: Iterable[int], convention: str, num_layers: int) -> tuple[int, ...]:
    """Write capture points as ids of a convention; LayerIdsError where it has no word for one of them."""
    _check_word(convention, "layer_ids", "the argument")
    points = tuple(points)
    for c in points:
        if not SHIFT[convention] <= c <= num_layers:
            legal = f"{SHIFT[convention]}..{num_layers}"
            raise LayerIdsError(
                f"capture point {c} has no {convention} id in a target of {num_layers} layers ({legal})"
            )
    return tuple(c - SHIFT[convention] for c in points)


def resolve(
    config: Mapping[str, Any],
    num_layers: int,
    *,
    file: str = "config.json",
    layer_ids: str | None = None,
    fc_width: int | None = None,
    target_hidden: int | None = None,
) -> LayerIds:
    """Read a draft's layer ids against a target of `num_layers` layers.

    layer_ids      the caller's word: "after_layer", "before_layer" or None for "as stated"
    fc_width       columns of `fc.weight`, held to the number of ids times `target_hidden`
    """
    if layer_ids is not None:
        _check_word(layer_ids, "the argument layer_ids", file)
    for key in ("eagle_config", "dflash_config"):
        if config.get(key) is not None and not isinstance(config[key], Mapping):
            raise LayerIdsError(f"{file}: {key} is {config[key]!r}; expected an object")
    if _find(config, "eagle_config.use_aux_hidden_state") is False:
        raise LayerIdsError(
            f"{file}: eagle_config.use_aux_hidden_state is false: this draft reads the target's final hidden state "
            f"and has no capture points; set it to true if `fc` reads aux hidden states"
        )
    words = _stated_conventions(config, file)
    if layer_ids is not None:
        words.append(("layer_ids=", layer_ids))
    dflash, given = _ids_under(config, DFLASH_KEYS, file), _ids_under(config, ID_KEYS, file)
    if given is None and dflash is None:
        _agree(words, file)
        answer = _default(num_layers, file)
    elif given is None and dflash is not None:
        _agree([(dflash.key, AFTER), *words], file)
        answer = _read(dflash, AFTER, dflash.key, num_layers, file)
    else:
        assert given is not None
        answer = _settle(given, words, dflash, num_layers, file)
    _check_counts(config, answer, file)
    _check_width(answer, fc_width, target_hidden, file)
    return answer


def _settle(given: Stated, words: list[tuple[str, str]], dflash: Stated | None, num_layers: int, file: str) -> LayerIds:
    """Choose the reading of ids whose key says nothing about it."""
    _agree(words, file)
    if words:
        answer = _read(given, words[0][1], words[0][0], num_layers, file)
    elif dflash is not None and to_points(given.ids, BEFORE) == to_points(dflash.ids, AFTER):
        answer = _read(given, BEFORE, dflash.key, num_layers, file)
    elif dflash is not None:
        answer = _read(given, AFTER, dflash.key, num_layers, file)
    else:
        answer = _only_reading(given, num_layers, file)
    if dflash is not None and answer.points != _read(dflash, AFTER, dflash.key, num_layers, file).points:
        raise LayerIdsError(
            f"{file}: {given.key} {list(given.ids)} and {dflash.key} {list(dflash.ids)} name different capture points: "
            f"{answer.points} and {to_points(dflash.ids, AFTER)}; remove the one that the draft was not trained with"
        )
    return answer


def _only_reading(given: Stated, num_layers: int, file: str) -> LayerIds:
    _check_ids(given, BEFORE, num_layers, file)  # the wider range: illegal here is illegal in both
    if not is_legal(given.ids, AFTER, num_layers):
        return _read(given, BEFORE, "only legal reading", num_layers, file)
    raise AmbiguousLayerIds(
        f"{file}: {given.key} {list(given.ids)} can be read as after_layer, capture points "
        f"{to_points(given.ids, AFTER)}, or as before_layer, capture points {to_points(given.ids, BEFORE)}, and "
        f'nothing states which; pass layer_ids="after_layer" or layer_ids="before_layer", or write it as {STATED_KEY} '
        f"(`draftproof audit` measures both)"
    )


def _read(given: Stated, convention: str, stated_by: str, num_layers: int, file: str) -> LayerIds:
    _check_ids(given, convention, num_layers, file)
    points = to_points(given.ids, convention)
    text = f"{given.key} {list(given.ids)} read as {convention} ({stated_by}): capture points {points}"
    return LayerIds(given.ids, points, convention, stated_by, text)


def _default(num_layers: int, file: str) -> LayerIds:
    points = default_points(num_layers)
    if len(set(points)) < len(points) or min(points) < 0 or max(points) > num_layers:
        raise LayerIdsError(
            f"{file}: states no layer ids, and the default triple {points} of a target of {num_layers} layers is not "
            f"three distinct capture points in 0..{num_layers}; write {ID_KEYS[0]} and {STATED_KEY}"
        )
    text = f"no layer ids: default capture points {points} of {num_layers} layers"
    return LayerIds((), points, DEFAULT, "no layer ids", text)


def _stated_conventions(config: Mapping[str, Any], file: str) -> list[tuple[str, str]]:
    """Everything in the checkpoint that says how its ids are meant, as (key, convention)."""
    words = []
    stated = _find(config, STATED_KEY)
    if stated is not None:
        _check_word(stated, STATED_KEY, file)
        words.append((STATED_KEY, stated))
    if _find(config, "speculators_model_type") is not None:
        words.append(("speculators_model_type", BEFORE))
    return words


def _check_word(word: object, key: str, file: str) -> None:
    if word not in CONVENTIONS:
        raise LayerIdsError(f"{file}: {key} is {word!r}; it names a convention, one of {', '.join(CONVENTIONS)}")


def _agree(words: Sequence[tuple[str, str]], file: str) -> None:
    for key, word in words[1:]:
        if word != words[0][1]:
            raise LayerIdsError(
                f"{file}: {words[0][0]} states {words[0][1]} and {key} states {word}; "
                f"drop the argument or correct the config"
            )


def _ids_under(config: Mapping[str, Any], keys: Sequence[str], file: str) -> Stated | None:
    """The ids that stand under any of `keys`; LayerIdsError where two of them differ."""
    found = [Stated(key, _tuple(_find(config, key), key, file)) for key in keys if _find(config, key) is not None]
    for other in found[1:]:
        if other.ids != found[0].ids:
            raise LayerIdsError(
                f"{file}: {found[0].key} {list(found[0].ids)} and {other.key} {list(other.ids)} disagree; "
                f"engines read one or the other, so the draft has two meanings"
            )
    return found[0] if found else None


def _tuple(value: Any, key: str, file: str) -> tuple[int, ...]:
    if not isinstance(value, list | tuple) or not value:
        raise LayerIdsError(f"{file}: {key} is {value!r}; expected a list of layer ids (or no key at all)")
    for i in value:
        if not isinstance(i, int) or isinstance(i, bool):
            raise LayerIdsError(f"{file}: {key} {value!r} holds {i!r}, which is not an integer")
    return tuple(value)


def _check_ids(given: Stated, convention: str, num_layers: int, file: str) -> None:
    where = f"{file}: {given.key} {list(given.ids)}"
    last = num_layers - SHIFT[convention]
    for place, i in enumerate(given.ids):
        if i in given.ids[:place]:
            raise LayerIdsError(f"{where} names layer id {i} twice; every aux hidden state has its own")
        if not 0 <= i <= last:
            raise LayerIdsError(
                f"{where}: id {i} is out of range, {convention} ids of a target of {num_layers} layers are 0..{last}"
            )


def _check_counts(config: Mapping[str, Any], answer: LayerIds, file: str) -> None:
    for key in COUNT_KEYS:
        count = _find(config, key)
        if count is None:
            continue
        if not isinstance(count, int) or isinstance(count, bool) or count != len(answer.points):
            raise LayerIdsError(
                f"{file}: {key} is {count!r}, but there are {len(answer.points)} aux states: {answer.text}"
            )


def _check_width(answer: LayerIds, fc_width: int | None, target_hidden: int | None, file: str) -> None:
    if fc_width is None:
        return
    if target_hidden is None:
        raise TypeError("fc_width is judged against target_hidden: pass both")
    if fc_width != len(answer.points) * target_hidden:
        raise LayerIdsError(
            f"{file}: fc.weight reads {fc_width} features, but {len(answer.points)} aux states of width "
            f"{target_hidden} are {len(answer.points) * target_hidden}: {answer.text}"
        )


def _find(config: Mapping[str, Any], key: str) -> Any:
    """The value at a dotted key, None where it is absent or null."""
    value: Any = config
    for part in key.split("."):
        if not isinstance(value, Mapping):
            return None
        value = value.get(part)
    return value
