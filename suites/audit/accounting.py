"""Every tensor and every parameter of a checkpoint, from headers: what is loaded, shared, ignored, missing or wrong.

The openers of `suites/catalog.py` stop at the first fault. Here nothing stops at a fault: what can be said is said, and
each fault is one line with its remedy. Only what has no readable config or header is an error (`CheckpointError`).
Of a target no data is read at all; of a draft its vocabulary map, and two tables where they are said to be one.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from harness import checkpoints
from harness.checkpoints import (
    CONFIG,
    INDEX,
    Checkpoint,
    CheckpointError,
    Entry,
    Plan,
    match,
    read_headers,
    read_json,
    rename,
)
from harness.pairs import Pair
from harness.scales import ScaleError, match_scales, read_scales
from harness.sharding import ShardError, shard_map, split_dim
from reference.config import ConfigError
from reference.drafts.eagle3_keys import check_vocab_map
from suites.algorithms import find_pair
from suites.catalog import PAIRS, TIED
from suites.dialects import DIALECTS, ENGINES
from suites.formats.rows import REFUSED
from suites.shells import wanted_of

RANKS = (1, 2, 4, 8)

TARGET_GAPS = (
    ("*norm*", "vllm", "refuses to start"),
    ("*", "vllm", "uninitialised memory, in silence"),
    ("*", "sglang", "uninitialised memory, in silence"),
)
"""what engines leave where a target's tensor is missing: (pattern, engine, what); vLLM's default_loader.py:543-552"""


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong, and what follows from it."""

    kind: str
    """config, file, unknown, double, shape, missing, map, tied, dtype or split"""
    name: str
    text: str


@dataclass(frozen=True)
class Shard:
    """What the first rank holds of one parameter, which no other rank holds more of."""

    parameter: str
    """of the first of `count` like ones"""
    count: int
    split: str
    """vocab, column, row, heads or replicated"""
    shapes: Mapping[int, tuple[int, ...] | str]
    """ranks -> its shape there, or what does not divide"""
    itemsize: int

    def bytes_at(self, ranks: int) -> int:
        """Of all like ones on a rank; errors: ShardError where it cannot be split so."""
        shape = self.shapes[ranks]
        if isinstance(shape, str):
            raise ShardError(f"{self.parameter}: {shape}")
        return self.count * prod(shape) * self.itemsize


@dataclass(frozen=True)
class Account:
    """What a checkpoint holds, all of it."""

    path: Path
    pair: str
    kind: str
    entries: tuple[Entry, ...]
    faults: tuple[Fault, ...]
    num_bytes: int
    splits: Mapping[int, int | str] = field(default_factory=dict)
    """ranks -> bytes that each of them would hold of what is there, or why it cannot be split so"""
    notes: tuple[str, ...] = ()
    shards: tuple["Shard", ...] = ()
    """how each parameter is split, those of like layers once"""

    def count(self, status: str) -> int:
        return sum(entry.status == status for entry in self.entries)


def open_headers(path: str | Path) -> tuple[Checkpoint, list[Fault]]:
    """A folder as far as it can be read; errors: CheckpointError where a config or a header cannot be read."""
    folder = Path(path)
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder; a checkpoint is a folder with {CONFIG} and safetensors")
    told: list[str] = []
    config = read_json(folder / CONFIG)
    headers = read_headers(folder, told)
    faults = [Fault("file", "", text) for text in told]
    blocks, scales = None, {}
    try:
        blocks, config = read_scales(config, folder / CONFIG)
        scales = dict(match_scales(blocks, headers))
    except ScaleError as error:
        faults.append(Fault("config", "quantization_config", str(error)))
    return Checkpoint(folder, config, headers, blocks, scales), faults


def account(path: str | Path, kind: str, headers_only: bool = False, shared_by: str = "") -> Account:
    """The account of a folder as a "target" or as a "draft".

    headers_only   of a target that is not here but for its config and, at best, its index
    shared_by      what gives a draft the tables that it lacks, for the account
    errors: CheckpointError
    """
    if headers_only and not any(Path(path).glob("*.safetensors")):
        return _names_only(Path(path), kind)
    checkpoint, faults = open_headers(path)
    pair = PAIRS[find_pair(checkpoint, kind)]
    kind_read = "target" if pair.name == "standalone" else kind
    pair = PAIRS[find_pair(checkpoint, "target")] if pair.name == "standalone" else pair
    size = sum(prod(h.shape) * h.dtype.itemsize for h in checkpoint.headers.values())
    try:
        config = _config(pair, checkpoint)
        wanted = wanted_of(pair, config, len(checkpoint.headers))
    except (ConfigError, ValueError, TypeError) as error:
        faults.append(Fault("config", CONFIG, f"{checkpoint.path / CONFIG}: {error}"))
        entries = [_entry(checkpoint, name, "", "unread", "the config cannot be read") for name in checkpoint.headers]
        return Account(checkpoint.path, pair.name, kind_read, tuple(entries), tuple(faults), size)
    todo, misfits = match(checkpoint, wanted, getattr(config, "names", pair.page.CHECKPOINT_NAMES),
                          _ignored(pair, config), getattr(config, "optional", ()))  # fmt: skip
    faults += [Fault(m.kind, m.tensor or m.parameter, m.text) for m in misfits]
    faults += _gaps(pair, [m.parameter for m in misfits if m.kind == "missing"])
    faults += _dtypes(checkpoint, todo)
    entries = list(_entries(todo, misfits, getattr(config, "optional", ()), shared_by))
    faults += _map(todo, config) + _tied(todo)
    shards = _shards(todo, pair, config)
    splits = _splits(shards)
    faults += [Fault("split", "", text) for ranks, text in splits.items() if ranks == 1 and isinstance(text, str)]
    told = (tuple(entries), tuple(faults), size, splits)
    return Account(checkpoint.path, pair.name, kind_read, *told, shards=shards)


def _names_only(folder: Path, kind: str) -> Account:
    """A target whose weights are elsewhere: its config says what is wanted, its index which names there are."""
    checkpoint, index = Checkpoint(folder, read_json(folder / CONFIG), {}), folder / INDEX
    pair = PAIRS[find_pair(checkpoint, kind)]
    places = read_json(index).get("weight_map") if index.exists() else {}
    if not isinstance(places, dict):
        raise CheckpointError(f"{index}: 'weight_map' should map tensor names to file names")
    try:
        config = _config(pair, checkpoint)
        wanted = wanted_of(pair, config, len(places))
    except (ConfigError, ValueError, TypeError) as error:
        return Account(folder, pair.name, kind, (), (Fault("config", CONFIG, f"{folder / CONFIG}: {error}"),), 0)
    if not index.exists():
        note = "no weights and no index: the config alone was read"
        return Account(folder, pair.name, kind, (), (), 0, notes=(note,))
    excuses, table = _ignored(pair, config), getattr(config, "names", pair.page.CHECKPOINT_NAMES)
    entries, faults, seen = [], [], set()
    for tensor in places:
        ours = rename(tensor, table)
        why = next((reason for pattern, reason in excuses if fnmatchcase(ours, pattern)), None)
        status = "named" if ours in wanted else "ignored" if why else "unknown"
        entries.append(Entry(tensor, ours if status == "named" else "", status, why or ""))
        if status == "unknown" and not tensor.endswith("_scale_inv"):
            faults.append(Fault("unknown", tensor, f"{index}: tensor {tensor!r} belongs to no parameter"))
        seen.add(ours)
    lacking = [name for name in wanted if name not in seen]
    faults += [Fault("missing", name, f"{index}: no tensor is {name!r}") for name in lacking]
    faults += _gaps(pair, lacking)
    note = "shapes are not in an index: only names were held to the config"
    return Account(folder, pair.name, kind, tuple(entries), tuple(faults), 0, notes=(note,))


def _config(pair: Pair, checkpoint: Checkpoint) -> Any:
    """The config; both meanings of `norm_output` have the same parameters."""
    try:
        return pair.read_config(checkpoint.config)
    except ConfigError as error:
        if "norm_output" not in str(error):
            raise
        return pair.read_config(checkpoint.config, norm_output="feedback")


def _ignored(pair: Pair, config: Any) -> list[tuple[str, str]]:
    tied = [("*lm_head.weight", TIED)] if config.tied_head else []
    return [*getattr(pair.page, "IGNORED", ()), *getattr(config, "ignored", ()), *tied, *checkpoints.NOT_WEIGHTS]


def _entry(checkpoint: Checkpoint, tensor: str, parameter: str, status: str, reason: str = "") -> Entry:
    header = checkpoint.headers[tensor]
    return Entry(tensor, parameter, status, reason, header.shape, str(header.dtype))


def _entries(todo: Plan, misfits: Sequence[Any], optional: Iterable[str], shared_by: str) -> Iterable[Entry]:
    """One line a tensor and one a parameter without a tensor."""
    for ours, tensor in todo.source.items():
        yield _entry(todo.checkpoint, tensor, ours, "loaded")
    for tensor, reason in todo.ignored.items():
        yield _entry(todo.checkpoint, tensor, "", "ignored", reason)
    for weight, scale in todo.checkpoint.scales.items():
        yield _entry(todo.checkpoint, scale, "", "applied", f"scales {weight}")
    for misfit in misfits:
        if misfit.tensor:
            yield _entry(todo.checkpoint, misfit.tensor, misfit.parameter, misfit.kind)
        else:
            yield Entry("", misfit.parameter, "missing", "", todo.wanted[misfit.parameter])
    told = todo.source.keys() | {misfit.parameter for misfit in misfits}
    for name in optional:
        if name in todo.wanted and name not in told:
            derived = name in ("d2t", "t2d")
            why = "from the other map" if derived else f"the target's{', ' + shared_by if shared_by else ''}"
            yield Entry("", name, "derived" if derived else "shared", why, todo.wanted[name])


def _gaps(pair: Pair, missing: Sequence[str]) -> list[Fault]:
    """What engines leave where tensors are missing; one line an engine and kind of gap."""
    found: Counter[tuple[str, str]] = Counter()
    example: dict[tuple[str, str], str] = {}
    for name in missing:
        for engine, what in _left(pair, name):
            found[engine, what] += 1
            example.setdefault((engine, what), name)
    return [
        Fault("gap", example[key], f"{key[0]} leaves {example[key]!r} at: {key[1]} ({count} such)")
        for key, count in found.items()
    ]


def _left(pair: Pair, name: str) -> Iterable[tuple[str, str]]:
    if pair.kind == "draft" and pair.name in ("eagle3", "eagle3_mla"):
        for engine in ENGINES:
            rows = DIALECTS[engine].about("missing")
            row = next((row for row in rows if fnmatchcase(name, row.key)), None)
            if row is not None:
                yield engine, "nothing, it refuses to start" if row.means == REFUSED else f"{row.means}, {row.manner}"
    elif pair.kind == "target":
        for engine in ("vllm", "sglang"):
            yield (
                engine,
                next(what for pattern, who, what in TARGET_GAPS if who == engine and fnmatchcase(name, pattern)),
            )


def _dtypes(checkpoint: Checkpoint, todo: Plan) -> list[Fault]:
    """Weights that are no floating-point numbers, and maps that are."""
    faults = []
    for ours, tensor in todo.source.items():
        dtype = checkpoint.headers[tensor].dtype
        is_map = ours in ("d2t", "t2d", "token_ordering") or ours.endswith("token_ordering")
        if not is_map and not dtype.is_floating_point:
            faults.append(Fault("dtype", tensor, f"tensor {tensor!r} is {dtype}; a weight is a floating-point number"))
        if is_map and dtype.is_floating_point:
            faults.append(Fault("dtype", tensor, f"tensor {tensor!r} is {dtype}; a map is of whole numbers"))
    return faults


def _map(todo: Plan, config: Any) -> list[Fault]:
    """The vocabulary map: offsets, sorted, inside the vocabulary, the inverse of t2d."""
    if "d2t" not in todo.wanted:
        return []
    if "d2t" not in todo.source:
        if config.draft_vocab == config.vocab:
            return []
        return [Fault("map", "d2t", "tensor 'd2t' is missing: engines take draft ids for target ids, in silence")]
    d2t = todo.checkpoint.read(todo.source["d2t"])
    t2d = todo.checkpoint.read(todo.source["t2d"]) if "t2d" in todo.source else None
    if d2t.is_floating_point() or d2t.dtype == torch.bool:
        return [Fault("map", "d2t", f"tensor 'd2t' is {d2t.dtype}; offsets are int64")]
    return [Fault("map", "d2t", text) for text in map_faults(d2t.long(), t2d, config.vocab)]


def map_faults(d2t: Tensor, t2d: Tensor | None, vocab: int) -> list[str]:
    """What is wrong with a map read as offsets, and whether it is sound as absolute ids.

    d2t  [Vd]
    t2d  [V]
    """
    faults = list(check_vocab_map(d2t, t2d, vocab))
    absolute = d2t - torch.arange(len(d2t))
    if faults and not check_vocab_map(absolute, t2d, vocab):
        faults = [f"{faults[0]}; as absolute target ids it is sound: subtract its own index from each"]
    elif not faults and t2d is None and len(d2t) > 1 and not check_vocab_map(absolute, t2d, vocab):
        faults = ["d2t is legal as offsets and as absolute ids, and there is no t2d to tell; engines take offsets"]
    return faults


def _tied(todo: Plan) -> list[Fault]:
    """Heads that a tied config leaves unread and that are not the embedding; sizes alone are compared in headers."""
    faults = []
    for tensor, reason in todo.ignored.items():
        table = next((name for ours, name in todo.source.items() if ours.endswith("embed_tokens.weight")), None)
        if reason != TIED or table is None:
            continue
        mine, theirs = todo.checkpoint.headers[tensor], todo.checkpoint.headers[table]
        if mine.shape != theirs.shape:
            text = f"tensor {tensor!r} is {list(mine.shape)}, the embedding that it is tied to {list(theirs.shape)}"
            faults.append(Fault("tied", tensor, text))
    return faults


def _shards(todo: Plan, pair: Pair, config: Any) -> tuple[Shard, ...]:
    """Every parameter by the plan of the page; like ones, which differ in the number of their layer, once."""
    plan, config = pair.page.TP_PLAN, getattr(config, "text", config)
    groups: Counter[tuple[str, str, tuple[int, ...], int]] = Counter()
    example: dict[Any, str] = {}
    for ours, tensor in todo.source.items():
        header, parts = todo.checkpoint.headers[tensor], ours.split(".")
        pattern = ".".join("0" if part.isdigit() else part for part in parts)
        key = (pattern, parts[-2] if len(parts) > 1 else "", header.shape, header.dtype.itemsize)
        groups[key] += 1
        example.setdefault(key, ours)

    def held(kind: str, leaf: str, shape: tuple[int, ...], ranks: int) -> tuple[int, ...] | str:
        if kind == "replicated":
            return shape
        dim = split_dim(kind, torch.empty(shape, device="meta"))
        heads = getattr(config, "kv_heads" if leaf in ("k_proj", "v_proj") else "heads", None)
        heads = heads if isinstance(heads, int) and shape[dim] % heads == 0 else shape[dim]
        try:
            rows = shard_map(kind, shape[dim], ranks, heads=heads if kind == "heads" else None)[0]
        except ShardError as error:
            return str(error)
        return (*shape[:dim], len(rows), *shape[dim + 1 :])

    found = []
    for key, count in groups.items():
        pattern, leaf, shape, size = key
        kind = next((kind for known, kind in plan.items() if fnmatchcase(pattern, known)), "replicated")
        shapes = {ranks: held(kind, leaf, shape, ranks) for ranks in RANKS}
        found.append(Shard(example[key], count, kind, shapes, size))
    return tuple(found)


def _splits(shards: Sequence[Shard]) -> dict[int, int | str]:
    """Ranks -> bytes a rank, or what does not divide."""
    found: dict[int, int | str] = {}
    for ranks in RANKS:
        try:
            found[ranks] = sum(shard.bytes_at(ranks) for shard in shards)
        except ShardError as error:
            found[ranks] = str(error)
    return found


def join_faults(target: Any, draft: Any, files: tuple[Path, Path]) -> list[Fault]:
    """Where a draft and a target do not fit; both are configs, `files` their folders."""
    faults = []
    if draft.vocab != target.vocab:
        text = f"{files[1]}: reads {draft.vocab} tokens, the target {files[0]} has {target.vocab}"
        faults.append(Fault("join", "vocab_size", text))
    if draft.aux_width and getattr(draft, "reads", "") == "aux" and draft.aux_width != target.hidden:
        text = f"{files[1]}: reads states of width {draft.aux_width}, the target's are {target.hidden} wide"
        faults.append(Fault("join", "target_hidden_size", text))
    return faults


def config_of(checkpoint: Checkpoint, kind: str) -> Any:
    """The config of a pair as far as sizes go; errors: CheckpointError."""
    pair = PAIRS[find_pair(checkpoint, kind)]
    pair = PAIRS[find_pair(checkpoint, "target")] if pair.name == "standalone" else pair
    try:
        return _config(pair, checkpoint)
    except (ConfigError, ValueError, TypeError) as error:
        raise CheckpointError(f"{checkpoint.path / CONFIG}: {error}") from error
