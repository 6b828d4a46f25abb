"""A checkpoint in another dialect: the same facts, said so that its consumer reads them as they were meant.

Nothing here decides what a consumer can express. What is written is read back by the rows of the dialect, and where
the reading is not what was meant, or is a refusal, nothing is written and the error names every fact that differs.
"""

import os
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from harness.checkpoints import Checkpoint, CheckpointError, Header, save_checkpoint
from harness.conventions import AFTER, BEFORE, STATED_KEY, LayerIdsError, spell
from suites.dialects import DIALECTS, DRAFTPROOF
from suites.formats.effect import differences
from suites.formats.places import find, flat, places_of
from suites.formats.reading import Reading, Refusal, read_as
from suites.formats.rows import (
    FIRST_ID,
    FLAGS,
    KIND,
    LAST_ID,
    NEEDED,
    NESTED,
    NESTED_LAYOUT,
    NO_T2D,
    NOISE,
    READ,
    TOP,
    TRANSLATED,
    Dialect,
    Row,
)

GOVERNED = (
    *(row.key for dialect in DIALECTS.values() for row in dialect.rows if row.fact in (*FLAGS, "layer ids")),
    *("num_aux_hidden_states", "num_aux_layers", STATED_KEY, "speculators_config", "speculators_version", KIND),
)
"""keys whose meaning depends on who reads them: each dialect writes its own"""

BODY_FACTS = ("layers", "target_hidden", "head_dim", "rope theta", "tied_head", "qkv_bias", "o_bias", "mlp_bias")
"""facts whose key is the same for all: they stay where they stand"""

OUTER = (
    *("architectures", KIND, "speculators_config", "draft_vocab_size", "target_hidden_size", "norm_before_residual"),
    *("norm_before_fc", "fc_norm", "norm_output", TOP, "torch_dtype", "dtype", "transformers_version"),
)
"""keys that stand beside the body in speculators' layout"""

SPECULATORS_CONFIG: dict[str, Any] = {
    "algorithm": "eagle3",
    "default_proposal_method": "greedy",
    "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": 3}],
    "verifier": {"architectures": [], "name_or_path": None},
}
"""as speculators saves a draft whose target it was not told; engines know the layout by this key"""


MOST_TOKENS = 2**28
"""of a vocabulary whose map is written out"""


class DialectError(CheckpointError):
    """A dialect that has no words for a fact of a draft."""


@dataclass(frozen=True)
class Written:
    """A checkpoint in a dialect, not yet on disk."""

    config: dict[str, Any]
    tensors: Mapping[str, str]
    """its name of a tensor -> the tensor of the source"""
    derived: Mapping[str, Tensor]
    """tensors that follow from others and the dialect stores"""


def write_as(
    meant: Reading, checkpoint: Checkpoint, dialect: str, num_layers: int,
    target: str = "llama", in_place: bool = False,
) -> Written:  # fmt: skip
    """The same draft in a dialect; errors: DialectError naming what its consumer would read otherwise.

    in_place   a layout of others that the consumer translates is kept; else it is written in its own
    """
    if checkpoint.blocks is not None:
        raise DialectError(f"{checkpoint.path}: weights in eight bits with scales have no place in EAGLE-3's dialects")
    unknown = [name for name, what in meant.filled.items() if what == NOISE]
    if unknown:
        raise DialectError(f"{checkpoint.path}: {unknown[0]!r} is missing: nothing is known of what to write")
    book = DIALECTS[dialect]
    where = places_of(checkpoint, meant.pair, target)
    kept = in_place and any(row.means == TRANSLATED for row in book.about("layout"))
    places = tuple(p for p in where if p != NO_T2D and (kept or p != NESTED_LAYOUT))
    tensors, derived = _tensors(meant, checkpoint, book, places)
    said = f"{checkpoint.path}: cannot be written as {dialect}"
    try:
        config = _config(meant, checkpoint, book, places, num_layers)
    except LayerIdsError as error:
        raise DialectError(f"{said}: {error}") from error
    written = Written(config, tensors, derived)
    read = read_as(_as_checkpoint(written, checkpoint), dialect, num_layers, target)
    if isinstance(read, Refusal):
        raise DialectError(f"{said}: it would be refused there: {read.fact}: {read.reason}")
    wrong = differences(meant, read)
    # an embedding of its own that consumers replace by the target's is kept in the file and told by the audit
    wrong = [d for d in wrong if d.fact != "embedding"]
    if wrong:
        raise DialectError(f"{said}: it would be read with " + "; ".join(map(str, wrong)))
    return written


def convert(
    checkpoint: Checkpoint, out: str | os.PathLike[str], dialect: str, meant: Reading, num_layers: int,
    target: str = "llama",
) -> Written:  # fmt: skip
    """Write a checkpoint folder in a dialect; errors: DialectError, CheckpointError where `out` is in use."""
    folder = Path(out)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CheckpointError(f"{folder}: is not an empty folder; name another one")
    written = write_as(meant, checkpoint, dialect, num_layers, target)
    data = {name: checkpoint.read(tensor) for name, tensor in written.tensors.items()}
    save_checkpoint(folder, written.config, dict(sorted({**data, **written.derived}.items())))
    return written


def _as_checkpoint(written: Written, source: Checkpoint) -> Checkpoint:
    headers = {name: source.headers[tensor] for name, tensor in written.tensors.items()}
    made = {name: Header(source.path, tuple(value.shape), value.dtype) for name, value in written.derived.items()}
    return replace(source, config=written.config, headers={**headers, **made})


def _tensors(
    meant: Reading, checkpoint: Checkpoint, book: Dialect, places: tuple[str, ...]
) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Names as the dialect spells them; t2d where it is stored, and only there."""
    rows = book.about("name", places)
    table = [(row.absent, row.key) for row in ([row for row in rows if row.where] or rows) if row.absent and row.key]
    tensors = {_spelled(ours, table): tensor for ours, tensor in meant.source.items() if ours != "t2d"}
    derived: dict[str, Tensor] = {}
    if "d2t" in meant.source and book.about("t2d")[0].means == "written":
        if meant.config.vocab > MOST_TOKENS:
            raise DialectError(f"{checkpoint.path}: a vocabulary of {meant.config.vocab} tokens has no map")
        d2t = checkpoint.read(meant.source["d2t"]).long()
        marks = torch.zeros(meant.config.vocab, dtype=torch.bool)
        marks[(d2t + torch.arange(len(d2t))).clamp(0, meant.config.vocab - 1)] = True
        derived["t2d"] = marks
    return tensors, derived


def _spelled(ours: str, table: list[tuple[str, str]]) -> str:
    return next((theirs + ours[len(mine) :] for mine, theirs in table if ours.startswith(mine)), ours)


def _config(
    meant: Reading, checkpoint: Checkpoint, book: Dialect, places: tuple[str, ...], num_layers: int
) -> dict[str, Any]:
    """The body as it stands, and every governed fact in the words of the dialect."""
    config = deepcopy(flat(checkpoint.config))
    kept = {FLAGS[fact][0] for fact in BODY_FACTS}
    for key in GOVERNED:
        if key not in kept:
            remove(config, key)
    needed = any(row.means == NEEDED and row.key == KIND for row in book.about("layout", places))
    nested = needed or NESTED_LAYOUT in places
    for fact in FLAGS:
        row = next((row for row in book.about(fact, places) if row.means == READ), None)
        if row is None or not row.key or fact in BODY_FACTS or (fact == "later_norm" and meant.config.layers == 1):
            continue
        value = getattr(meant.config, fact, row.absent)
        if value != row.absent or (nested and isinstance(value, bool)):
            put(config, row.key, value)
    _fix_body(config, meant)
    if meant.config.use_aux_hidden_state:
        _write_points(config, meant, book, places, num_layers)
    config["architectures"] = [book.about("architecture", places)[0].absent]
    return dict(sorted((_nest(config) if nested else config).items()))


def _fix_body(config: dict[str, Any], meant: Reading) -> None:
    """Facts of the body that the weights contradict: what was trained is what is written."""
    theta = meant.config.rope.theta
    for place in ("", "rope_parameters."):
        stated = find(config, place + "rope_theta")
        if stated is not None and stated != theta:
            put(config, place + "rope_theta", theta)
    if find(config, "rope_theta") is None and find(config, "rope_parameters.rope_theta") is None and theta != 10_000.0:
        put(config, "rope_theta", theta)
    if hasattr(meant.config, "head_dim") and meant.config.head_dim * meant.config.heads != meant.config.hidden:
        config["head_dim"] = meant.config.head_dim


def _write_points(
    config: dict[str, Any], meant: Reading, book: Dialect, places: tuple[str, ...], num_layers: int
) -> None:
    row = next((row for row in book.about("layer ids", places) if row.key), None)
    if row is not None:
        convention, ids = _ids(row, meant.points, num_layers, book.name)
        put(config, row.key, list(ids))
        if book.name == DRAFTPROOF:
            put(config, STATED_KEY, convention)
        if row.key == NESTED:
            put(config, "eagle_config.use_aux_hidden_state", True)
    count = next((row for row in book.about("aux states", places) if row.key and "layer_ids" not in row.key), None)
    if count is not None and len(meant.points) != count.absent:
        put(config, count.key, len(meant.points))


def _ids(row: Row, points: tuple[int, ...], num_layers: int, dialect: str) -> tuple[str, tuple[int, ...]]:
    """The spelling that this consumer reads back; errors: LayerIdsError where it has none."""
    if dialect == DRAFTPROOF:
        # states with a word what it writes; the first capture point of all is no layer's output
        word = BEFORE if 0 in points else AFTER
    elif row.means == FIRST_ID:
        word = AFTER if points[0] == 2 else BEFORE
    elif row.means == LAST_ID:
        word = BEFORE if num_layers in points else AFTER
    else:
        word = row.means
    return word, spell(points, word, num_layers)


def _nest(config: dict[str, Any]) -> dict[str, Any]:
    """speculators' layout: the body under one key, its own facts beside it."""
    config |= {KIND: "eagle3", "speculators_config": deepcopy(SPECULATORS_CONFIG)}
    outer = {key: config.pop(key) for key in OUTER if key in config}
    config.pop("eagle_config", None)
    outer["transformer_layer_config"] = dict(sorted(config.items()))
    return outer


def put(config: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key."""
    *path, last = key.split(".")
    for part in path:
        config = config.setdefault(part, {})
    config[last] = value


def remove(config: dict[str, Any], key: str) -> None:
    """Take a dotted key away, and a mapping that is empty without it."""
    head, _, rest = key.partition(".")
    if rest and isinstance(config.get(head), dict):
        remove(config[head], rest)
        if not config[head]:
            del config[head]
    elif not rest:
        config.pop(head, None)
