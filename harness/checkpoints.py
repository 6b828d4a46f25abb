"""Checkpoints in and out: what stands on disk, under which name it is wanted, and an account of every tensor.

A checkpoint is a Hugging Face folder: `config.json` and safetensors, one file or several with an index.
Headers are read without data, so opening a terabyte costs kilobytes. Every name is changed by anchored prefix
alone. Loading is strict and ends in a ledger: each tensor of the file is loaded, checked against another, or
ignored for a stated reason, exactly once; each parameter of the model is written exactly once.
"""

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from harness.headers import CONFIG, INDEX, SINGLE, CheckpointError, Header, read_headers, read_json
from harness.scales import BlockScales, ScaleError, match_scales, read_scales

__all__ = (
    "CONFIG",
    "INDEX",
    "NOT_WEIGHTS",
    "SINGLE",
    "Checkpoint",
    "CheckpointError",
    "Entry",
    "Header",
    "Ledger",
    "Misfit",
    "Plan",
    "blank",
    "load",
    "match",
    "open_checkpoint",
    "plan",
    "read_headers",
    "read_json",
    "rename",
    "save_checkpoint",
    "state_of",
    "writer",
)

# tensors that trainers leave in a checkpoint and no forward pass reads: (pattern of our name, why)
NOT_WEIGHTS = (
    ("*rotary_emb.inv_freq", "recomputed from the config"),
    ("*rotary_emb.cos_cached", "recomputed from the config"),
    ("*rotary_emb.sin_cached", "recomputed from the config"),
)


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


def rename(name: str, table: Sequence[tuple[str, str]]) -> str:
    """Change a published name into ours: each anchored prefix of the table at most once, in the order of the table."""
    for theirs, ours in table:
        if name.startswith(theirs):
            name = ours + name[len(theirs) :]
    return name


@dataclass(frozen=True, slots=True)
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
    todo, misfits = match(checkpoint, wanted, names, ignore, optional)
    lacking = [misfit.parameter for misfit in misfits if misfit.kind == "missing"]
    if misfits and misfits[0].kind == "missing":
        raise CheckpointError(
            f"{checkpoint.path}: tensor {lacking[0]!r} is missing ({len(lacking)} in all: {', '.join(lacking[:4])}); "
            "save the checkpoint in full, or correct the config key that asks for it"
        )
    if misfits:
        raise CheckpointError(misfits[0].text)
    return todo


@dataclass(frozen=True)
class Misfit:
    """One tensor or parameter that has no counterpart as the config asks for it."""

    kind: str
    """unknown, double, shape or missing"""
    tensor: str
    parameter: str
    text: str


def match(
    checkpoint: Checkpoint,
    wanted: Mapping[str, tuple[int, ...]],
    names: Sequence[tuple[str, str]],
    ignore: Iterable[tuple[str, str]] = (),
    optional: Iterable[str] = (),
) -> tuple[Plan, list[Misfit]]:
    """What `plan` would carry out, and everything that it would refuse, as far as it can be told; arguments: `plan`."""
    excuses, may_lack = (*ignore, *NOT_WEIGHTS), set(optional)
    source: dict[str, str] = {}
    ignored: dict[str, str] = {}
    misfits: list[Misfit] = []
    scales = set(checkpoint.scales.values())
    for tensor, header in checkpoint.headers.items():
        if tensor in scales:
            continue
        ours = rename(tensor, names)
        if ours not in wanted:
            reason = next((why for pattern, why in excuses if fnmatchcase(ours, pattern)), None)
            if reason is not None:
                ignored[tensor] = reason
                continue
            text = (
                f"tensor {tensor!r} ({ours!r} here) belongs to no parameter that the config asks for; "
                "remove it, or set the config key that gives it a place"
            )
            misfits.append(Misfit("unknown", tensor, "", f"{header.file}: {text}"))
        elif ours in source:
            text = f"{header.file}: tensors {source[ours]!r} and {tensor!r} are both {ours!r}; keep one"
            misfits.append(Misfit("double", tensor, ours, text))
        elif header.shape != tuple(wanted[ours]):
            text = f"tensor {tensor!r} is {list(header.shape)}, the config asks for {list(wanted[ours])}"
            misfits.append(Misfit("shape", tensor, ours, f"{header.file}: {text}"))
        else:
            source[ours] = tensor
    # a tensor of the wrong shape is there, and told already
    there = {misfit.parameter for misfit in misfits} | source.keys()
    for name in wanted:
        if name not in there and name not in may_lack:
            misfits.append(Misfit("missing", "", name, f"{checkpoint.path}: tensor {name!r} is missing"))
    return Plan(checkpoint, wanted, source, ignored), misfits


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
