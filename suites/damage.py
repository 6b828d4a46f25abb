"""Ways to break a checkpoint folder: each takes the folder and changes files in it."""

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from harness.checkpoints import CONFIG, INDEX, SINGLE, save_checkpoint

Damage = Callable[[Path], Any]
IDS = "eagle_aux_hidden_state_layer_ids"


def write(file: str, text: str | bytes) -> Damage:
    """Put something else in the place of a file."""
    return lambda folder: (folder / file).write_bytes(text.encode() if isinstance(text, str) else text)


def config(**changes: Any) -> Damage:
    """Change keys of config.json; None takes a key away; `eagle_config` is merged."""

    def damage(folder: Path) -> None:
        keys = json.loads((folder / CONFIG).read_text())
        nested = {**keys.get("eagle_config", {}), **changes.get("eagle_config", {})}
        eagle = {k: v for k, v in nested.items() if v is not None}
        merged = {**keys, **changes, "eagle_config": eagle or None}
        (folder / CONFIG).write_text(json.dumps({k: v for k, v in merged.items() if v is not None}))

    return damage


def ids(*values: Any, **changes: Any) -> Damage:
    """Write other layer ids, and other keys beside them."""
    return config(eagle_config={IDS: list(values), **changes})


def tensors(change: Callable[[dict[str, Tensor]], Any]) -> Damage:
    """Change the tensors of a single file."""

    def damage(folder: Path) -> None:
        held = load_file(folder / SINGLE)
        change(held)
        save_file(held, folder / SINGLE)

    return damage


def index(change: Callable[[dict[str, Any]], Any]) -> Damage:
    """Split the weights over several files and change the index."""

    def damage(folder: Path) -> None:
        save_checkpoint(folder, json.loads((folder / CONFIG).read_text()), load_file(folder / SINGLE), max_shard=40_000)
        (folder / SINGLE).unlink()
        written = json.loads((folder / INDEX).read_text())
        change(written)
        (folder / INDEX).write_text(json.dumps(written))

    return damage


def header(change: Callable[[dict[str, Any]], Any]) -> Damage:
    """Change the header of the weights and leave the data as they are."""

    def damage(folder: Path) -> None:
        raw = (folder / SINGLE).read_bytes()
        (length,) = struct.unpack("<Q", raw[:8])
        entries = json.loads(raw[8 : 8 + length])
        text = json.dumps(change(entries) or entries).encode()
        (folder / SINGLE).write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])

    return damage


def both(*damages: Damage) -> Damage:
    """One after the other."""
    return lambda folder: [damage(folder) for damage in damages]


def damaged(folder: Path, into: Path, damage: Damage) -> Path:
    """A copy of a sound folder, broken."""
    copy = Path(shutil.copytree(folder, into / "damaged", dirs_exist_ok=True))
    damage(copy)
    return copy


def write_key(key: str, value: Any) -> Damage:
    """Put any value under a key of config.json, null included."""

    def damage(folder: Path) -> None:
        keys = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps({**keys, key: value}))

    return damage


def written_as(key: str, text: str) -> Damage:
    """Put any text, legal as JSON or not, where the value of a key of config.json stands."""

    def damage(folder: Path) -> None:
        keys = {**json.loads((folder / CONFIG).read_text()), key: "<here>"}
        (folder / CONFIG).write_text(json.dumps(keys).replace('"<here>"', text))

    return damage


def replaced(file: str, make: Callable[[Path], Any]) -> Damage:
    """Put something that is no file in the place of one."""

    def damage(folder: Path) -> None:
        (folder / file).unlink()
        make(folder / file)

    return damage


def pipe(file: str) -> Damage:
    """A pipe, of which a reader waits for a writer."""
    return replaced(file, os.mkfifo)
