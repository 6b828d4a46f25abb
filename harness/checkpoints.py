"""Checkpoints in and out: what stands on disk, under which name it is wanted, and an account of every tensor.

A checkpoint is a Hugging Face folder: `config.json` and safetensors, one file or several with an index.
Headers are read without data, so opening a terabyte costs kilobytes. Every name is changed by anchored prefix
alone. Loading is strict and ends in a ledger: each tensor of the file is loaded, checked against another, or
ignored for a stated reason, exactly once; each parameter of the model is written exactly once.
"""

import json
import os
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from harness.scales import BlockScales, ScaleError, match_scales, read_scales

CONFIG, SINGLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
MAX_HEADER = 100_000_000
"""bytes; the limit of the safetensors format itself"""

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}

# tensors that trainers leave in a checkpoint and no forward pass reads: (pattern of our name, why)
NOT_WEIGHTS = (
    ("*rotary_emb.inv_freq", "recomputed from the config"),
    ("*rotary_emb.cos_cached", "recomputed from the config"),
    ("*rotary_emb.sin_cached", "recomputed from the config"),
)


class CheckpointError(ValueError):
    """A checkpoint that cannot be opened, read or loaded in full; names the file, the tensor and the remedy."""


@dataclass(frozen=True)
class Header:
    """One tensor on disk, without its data."""

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Checkpoint:
    """An opened folder: its config and the headers of all its tensors."""

    path: Path
    config: dict[str, Any]
    """without how its weights are packed"""
    headers: Mapping[str, Header]
    blocks: BlockScales | None = None
    scales: Mapping[str, str] = field(default_factory=dict)
    """weight in eight bits -> the tensor that scales it"""

    def read(self, name: str) -> Tensor:
        """The data of one tensor, on the CPU, in its dtype on disk; float32 where eight bits are scaled."""
        if self.blocks is not None and name in self.scales:
            return self.blocks.expand(self._read(name), self._read(self.scales[name]))
        return self._read(name)

    def _read(self, name: str) -> Tensor:
        header = self.headers[name]
        try:
            with safe_open(header.file, framework="pt") as file:
                return file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{header.file}: tensor {name!r} cannot be read ({error}); fetch the file again"
            ) from error


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Open a checkpoint folder, or the Hub id of one that the local cache holds or the network can give.

    errors: CheckpointError when anything is missing, cut short, malformed or points outside the folder
    """
    folder = _folder(path)
    config, headers = read_json(folder / CONFIG), read_headers(folder)
    try:
        blocks, config = read_scales(config, folder / CONFIG)
        return Checkpoint(folder, config, headers, blocks, match_scales(blocks, headers))
    except ScaleError as error:
        raise CheckpointError(str(error)) from error


def _folder(path: str | os.PathLike[str]) -> Path:
    folder = Path(path)
    if folder.is_dir():
        return folder
    text = os.fspath(path)
    if folder.exists() or text.count("/") != 1 or text.startswith(("/", ".", "~")):
        raise CheckpointError(
            f"{folder}: no such folder; a checkpoint is a folder with {CONFIG} and safetensors, or a Hub id"
        )
    # imported here: a folder on disk must not pay for the network client
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(text, allow_patterns=["*.json", "*.safetensors"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(f"{text}: neither a folder here nor a Hub id that can be fetched ({error})") from error


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from a file; errors: CheckpointError."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{file}: missing; a checkpoint folder needs it") from error
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise CheckpointError(f"{file}: not readable as JSON ({error}); fetch the file again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{file}: holds a JSON {type(value).__name__}, an object is expected")
    return value


def read_headers(folder: Path) -> dict[str, Header]:
    """Names, shapes and dtypes of every tensor of a folder, without data; errors: CheckpointError."""
    index = folder / INDEX
    if index.exists():
        places = read_json(index).get("weight_map")
        if not isinstance(places, dict) or not all(isinstance(f, str) for f in places.values()):
            raise CheckpointError(f"{index}: 'weight_map' should map tensor names to file names")
        files = sorted({_inside(folder, name, index) for name in places.values()})
    elif (folder / SINGLE).exists():
        places, files = None, [folder / SINGLE]
    else:
        others = sorted(p.name for p in folder.glob("*.bin")) + sorted(p.name for p in folder.glob("*.pt"))
        hint = f" ({', '.join(others)} are pickles and are never opened; convert them to safetensors)" if others else ""
        raise CheckpointError(f"{folder}: neither {SINGLE} nor {INDEX} is here{hint}")
    headers: dict[str, Header] = {}
    for file in files:
        for name, header in _read_file_headers(file).items():
            if name in headers:
                raise CheckpointError(
                    f"{file}: tensor {name!r} also stands in {headers[name].file.name}; keep one of them"
                )
            headers[name] = header
    if places is not None:
        _check_index(index, places, headers)
    return headers


def _inside(folder: Path, name: str, index: Path) -> Path:
    """A file named by an index, refused when it leaves the folder."""
    if Path(name).name != name:
        raise CheckpointError(f"{index}: names the file {name!r}, which is not a plain file name beside the index")
    if not (folder / name).is_file():
        raise CheckpointError(f"{index}: names the file {name!r}, which is missing; fetch it")
    return folder / name


def _check_index(index: Path, places: Mapping[str, str], headers: Mapping[str, Header]) -> None:
    missing = sorted(set(places) - set(headers))
    extra = sorted(set(headers) - set(places))
    moved = sorted(n for n in set(places) & set(headers) if headers[n].file.name != places[n])
    for names, what in (
        (missing, "lists but no file holds"),
        (extra, "does not list but a file holds"),
        (moved, "places wrongly"),
    ):
        if names:
            raise CheckpointError(f"{index}: {what} tensor {names[0]!r} ({len(names)} such); write the index again")


def _read_file_headers(file: Path) -> dict[str, Header]:
    """The header of one safetensors file, checked against the size of the file."""
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > min(MAX_HEADER, size - 8):
                raise CheckpointError(
                    f"{file}: cut short or not safetensors (header of {length} bytes in a file of {size})"
                )
            entries = json.loads(stream.read(length))
    except FileNotFoundError as error:
        raise CheckpointError(f"{file}: missing") from error
    except (OSError, struct.error, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise CheckpointError(f"{file}: not a safetensors file ({error}); fetch it again") from error
    if not isinstance(entries, dict):
        raise CheckpointError(f"{file}: its header is a JSON {type(entries).__name__}, an object is expected")
    headers = {}
    for name, entry in entries.items():
        if name == "__metadata__":
            continue
        try:
            start, end = (int(n) for n in entry["data_offsets"])
            shape, dtype = tuple(int(n) for n in entry["shape"]), DTYPES[entry["dtype"]]
            numel = torch.Size(shape).numel()
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{file}: tensor {name!r} has a malformed header ({error!r})") from error
        if any(n < 0 for n in shape) or not 0 <= start <= end or end - start != numel * dtype.itemsize:
            raise CheckpointError(f"{file}: tensor {name!r} claims {list(shape)} {dtype} in bytes {start}..{end}")
        if 8 + length + end > size:
            raise CheckpointError(
                f"{file}: cut short: tensor {name!r} ends at byte {8 + length + end}, the file at {size}"
            )
        headers[name] = Header(file, shape, dtype)
    return headers


def rename(name: str, table: Sequence[tuple[str, str]]) -> str:
    """Change a published name into ours: each anchored prefix of the table at most once, in the order of the table."""
    for theirs, ours in table:
        if name.startswith(theirs):
            name = ours + name[len(theirs) :]
    return name


@dataclass(frozen=True)
class Entry:
    """What became of one tensor, or where one parameter came from."""

    tensor: str
    """name in the checkpoint; "" for what no file holds"""
    parameter: str
    """our name; "" when nothing was written"""
    status: str
    """loaded, applied, checked, shared, derived or ignored"""
    reason: str = ""
    shape: tuple[int, ...] = ()
    dtype: str = ""


@dataclass
class Ledger:
    """The account of one load: every tensor and every parameter exactly once."""

    path: Path
    entries: list[Entry] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def count(self, status: str) -> int:
        return sum(entry.status == status for entry in self.entries)

    def __str__(self) -> str:
        words = ("loaded", "applied", "shared", "derived", "checked", "ignored")
        return f"{self.path}: " + ", ".join(f"{self.count(word)} {word}" for word in words if self.count(word))


@dataclass(frozen=True)
class Plan:
    """Which tensor of a checkpoint becomes which parameter, settled from headers alone."""

    checkpoint: Checkpoint
    wanted: Mapping[str, tuple[int, ...]]
    source: Mapping[str, str]
    """our name -> name in the checkpoint"""
    ignored: Mapping[str, str]
    """name in the checkpoint -> why"""


def plan(
    checkpoint: Checkpoint,
    wanted: Mapping[str, tuple[int, ...]],
    names: Sequence[tuple[str, str]],
    ignore: Iterable[tuple[str, str]] = (),
    optional: Iterable[str] = (),
) -> Plan:
    """Match a checkpoint's tensors to the parameters of a model.

    wanted    our parameter names and shapes
    names     published prefixes and ours
    ignore    (pattern of our name, reason) of tensors that may be there and are not read
    optional  our names that may be absent: the caller fills them from elsewhere and says so
    errors: CheckpointError for unknown, missing, doubled or wrongly shaped tensors
    """
    excuses = (*ignore, *NOT_WEIGHTS)
    source: dict[str, str] = {}
    ignored: dict[str, str] = {}
    scales = set(checkpoint.scales.values())
    for tensor, header in checkpoint.headers.items():
        if tensor in scales:
            continue
        ours = rename(tensor, names)
        reason = next((why for pattern, why in excuses if fnmatchcase(ours, pattern)), None)
        if ours not in wanted and reason is not None:
            ignored[tensor] = reason
        elif ours not in wanted:
            raise CheckpointError(
                f"{header.file}: tensor {tensor!r} ({ours!r} here) belongs to no parameter that the config asks for; "
                "remove it, or set the config key that gives it a place"
            )
        elif ours in source:
            raise CheckpointError(f"{header.file}: tensors {source[ours]!r} and {tensor!r} are both {ours!r}; keep one")
        elif header.shape != tuple(wanted[ours]):
            raise CheckpointError(
                f"{header.file}: tensor {tensor!r} is {list(header.shape)}, the config asks for {list(wanted[ours])}"
            )
        else:
            source[ours] = tensor
    missing = [name for name in wanted if name not in source and name not in set(optional)]
    if missing:
        raise CheckpointError(
            f"{checkpoint.path}: tensor {missing[0]!r} is missing ({len(missing)} in all: {', '.join(missing[:4])}); "
            "save the checkpoint in full, or correct the config key that asks for it"
        )
    return Plan(checkpoint, wanted, source, ignored)


def load(todo: Plan, write: Callable[[str, Tensor], None]) -> Ledger:
    """Carry out a plan: hand each tensor, in full and as it is read, to `write(our name, tensor)` once."""
    ledger = Ledger(todo.checkpoint.path)

    def note(tensor: str, parameter: str, status: str, reason: str = "") -> None:
        header = todo.checkpoint.headers[tensor]
        ledger.entries.append(Entry(tensor, parameter, status, reason, header.shape, str(header.dtype)))

    for ours, tensor in todo.source.items():
        write(ours, todo.checkpoint.read(tensor))
        note(tensor, ours, "loaded")
    for tensor, reason in todo.ignored.items():
        note(tensor, "", "ignored", reason)
    for weight, scale in todo.checkpoint.scales.items():
        ignored = todo.ignored.get(weight)
        note(scale, "", "ignored" if ignored else "applied", ignored or f"scales {weight}")
    return ledger


def state_of(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name; a tied parameter appears once, under its first name."""
    named = [*module.named_parameters(), *module.named_buffers()]
    return dict(named)


def blank(module: nn.Module) -> None:
    """Make every unwritten value visible: NaN, or the smallest integer."""
    with torch.no_grad():
        for value in state_of(module).values():
            if value.is_floating_point():
                value.fill_(float("nan"))
            elif value.dtype != torch.bool:
                value.fill_(torch.iinfo(value.dtype).min)


def writer(module: nn.Module) -> Callable[[str, Tensor], None]:
    """A `write` for `load` that fills a plain module's parameters, each exactly once."""
    state, written = state_of(module), set()

    def write(name: str, tensor: Tensor) -> None:
        if name in written:
            raise CheckpointError(f"parameter {name!r} is written twice")
        written.add(name)
        with torch.no_grad():
            state[name].copy_(tensor)

    return write


def save_checkpoint(
    path: str | os.PathLike[str], config: Mapping[str, Any], tensors: Mapping[str, Tensor], max_shard: int | None = None
) -> None:
    """Write a folder in the published format; `max_shard` bytes a file, one file when None."""
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(json.dumps(dict(config), indent=2) + "\n", encoding="utf-8")
    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    if max_shard is None:
        save_file(whole, folder / SINGLE, metadata={"format": "pt"})
        return
    groups: list[dict[str, Tensor]] = [{}]
    for name, tensor in whole.items():
        held = sum(t.nbytes for t in groups[-1].values())
        if groups[-1] and held + tensor.nbytes > max_shard:
            groups.append({})
        groups[-1][name] = tensor
    places: dict[str, str] = {}
    for number, group in enumerate(groups, 1):
        file = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        save_file(group, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(group, file)
    total = sum(tensor.nbytes for tensor in whole.values())
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
