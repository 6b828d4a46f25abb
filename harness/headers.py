"""The headers of a checkpoint folder: names, shapes and dtypes of every tensor, and not one byte of their data."""

import json
import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

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


class CheckpointError(ValueError):
    """A checkpoint that cannot be opened, read or loaded in full; names the file, the tensor and the remedy."""


@dataclass(frozen=True, slots=True)
class Header:
    """One tensor on disk, without its data."""

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from a file; errors: CheckpointError."""
    try:
        if held_file(file).stat().st_size > MAX_HEADER:
            raise CheckpointError(f"{file}: {file.stat().st_size} bytes are no {file.name}; fetch the file again")
        value = _parsed(file.read_text(encoding="utf-8"))
    except CheckpointError:
        raise
    except FileNotFoundError as error:
        raise CheckpointError(f"{file}: missing; a checkpoint folder needs it") from error
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: not readable as JSON ({error}); fetch the file again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{file}: holds a JSON {type(value).__name__}, an object is expected")
    return value


def read_headers(folder: Path, faults: list[str] | None = None) -> dict[str, Header]:
    """Names, shapes and dtypes of every tensor of a folder, without data; errors: CheckpointError.

    faults   takes what is wrong between readable files (a tensor twice, an index that errs) instead of an error
    """
    index = folder / INDEX
    if index.exists():
        places = read_json(index).get("weight_map")
        if not isinstance(places, dict) or not all(isinstance(f, str) for f in places.values()):
            raise CheckpointError(f"{index}: 'weight_map' should map tensor names to file names")
        files = [_inside(folder, name, index) for name in sorted(set(places.values()))]
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
                text = f"{file}: tensor {name!r} also stands in {headers[name].file.name}; keep one of them"
                _tell(faults, text)
            headers[name] = header
    if places is not None:
        _check_index(index, places, headers, faults)
    return headers


def _tell(faults: list[str] | None, text: str) -> None:
    if faults is None:
        raise CheckpointError(text)
    faults.append(text)


def _inside(folder: Path, name: str, index: Path) -> Path:
    """A file named by an index, refused when it leaves the folder."""
    if Path(name).name != name:
        raise CheckpointError(f"{index}: names the file {name!r}, which is not a plain file name beside the index")
    # a name that no file system takes is as absent as any other
    if not os.path.isfile(folder / name):
        raise CheckpointError(f"{index}: names the file {name!r}, which is missing; fetch it")
    return folder / name


def _check_index(
    index: Path, places: Mapping[str, str], headers: Mapping[str, Header], faults: list[str] | None
) -> None:
    missing = sorted(set(places) - set(headers))
    extra = sorted(set(headers) - set(places))
    moved = sorted(n for n in set(places) & set(headers) if headers[n].file.name != places[n])
    for names, what in (
        (missing, "lists but no file holds"),
        (extra, "does not list but a file holds"),
        (moved, "places wrongly"),
    ):
        if names:
            _tell(faults, f"{index}: {what} tensor {names[0]!r} ({len(names)} such); write the index again")


def _read_file_headers(file: Path) -> dict[str, Header]:
    """The header of one safetensors file, checked against the size of the file."""
    try:
        size = held_file(file).stat().st_size
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > min(MAX_HEADER, size - 8):
                raise CheckpointError(
                    f"{file}: cut short or not safetensors (header of {length} bytes in a file of {size})"
                )
            entries = _parsed(stream.read(length))
    except CheckpointError:
        raise
    except FileNotFoundError as error:
        raise CheckpointError(f"{file}: missing") from error
    except (OSError, struct.error, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: not a safetensors file ({error}); fetch it again") from error
    if not isinstance(entries, dict):
        raise CheckpointError(f"{file}: its header is a JSON {type(entries).__name__}, an object is expected")
    headers, ends = {}, []
    for name, entry in entries.items():
        if name == "__metadata__":
            continue
        try:
            start, end = map(_whole, entry["data_offsets"])
            shape, dtype = tuple(map(_whole, entry["shape"])), DTYPES[entry["dtype"]]
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
        ends.append((start, end, name))
    ends = sorted(extent for extent in ends if extent[1] > extent[0])
    for (_, end, first), (start, _, second) in pairwise(ends):
        if start < end:
            raise CheckpointError(f"{file}: tensors {first!r} and {second!r} share bytes; fetch it again")
    return headers


def held_file(file: Path) -> Path:
    """The same file, if it may be read; errors: CheckpointError for a link out of its folder and for what is no file.

    A link into the `blobs` of a Hub cache is none: there `NAME/snapshots/REVISION/config.json` leads to `NAME/blobs/`.
    """
    folder, real = Path(os.path.realpath(file.parent)), Path(os.path.realpath(file))
    blobs = Path(os.path.realpath(folder.parent.parent / "blobs"))
    is_cached = folder.parent.name == "snapshots" and real.parent == blobs
    if not real.is_relative_to(folder) and not is_cached:
        raise CheckpointError(f"{file}: a link to {real}, which is outside the folder; put the file itself here")
    if real.exists() and not real.is_file():
        raise CheckpointError(f"{file}: is no file (a folder, a pipe or a device)")
    return file


def _parsed(text: str | bytes) -> Any:
    """JSON as its standard has it; errors: ValueError, RecursionError."""
    return json.loads(text, object_pairs_hook=_each_once, parse_constant=_number, parse_float=_number)


def _number(word: str) -> float:
    """A finite number; Python would read NaN and Infinity, which JSON does not have, and make 1e999 infinite."""
    if not math.isfinite(value := float(word)):
        raise ValueError(f"{word} is no number")
    return value


def _whole(value: Any) -> int:
    """A whole number, not what merely stands for one; errors: TypeError."""
    if type(value) is not int:
        raise TypeError(f"{value!r} is no whole number")
    return value


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; ValueError where a key stands twice, of which readers see only one."""
    value: dict[str, Any] = {}
    for key, item in pairs:
        if key in value:
            raise ValueError(f"the key {key!r} stands twice")
        value[key] = item
    return value
