"""Claim: a folder made to harm is refused by a typed error, in moments, before anything in it runs or leads outside.

Born of the pickles that checkpoints were (`torch.load` runs what they say), of indexes whose names are paths, and of
sizes that a config claims and a reader builds before it looks at the file: 10^9 layers cost hours, 2^62 features a
RuntimeError of the allocator. Whoever audits a draft has it from a stranger.
"""

import contextlib
import json
import os
import pickle
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from harness.checkpoints import CONFIG, INDEX, SINGLE, CheckpointError
from harness.headers import read_json
from suites.benchmarks.prompts import TOKENIZER, Prompt, encode
from suites.catalog import OpenTarget, open_draft, open_target
from suites.commands.audit import Options, audit, convert
from suites.commands.desk import Desk
from suites.damage import Damage, damaged, header, index, pipe, replaced, write, write_key, written_as

pytestmark = [pytest.mark.correctness, pytest.mark.pair("eagle3")]

SECONDS = 20.0
"""far above what any of these takes, far below what the least of them takes where it is not refused"""
GENERATION = "generation_config.json"


class Harmful:
    """A pickle that leaves a trace when it is opened."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return Path.touch, (self.trace,)


def pickled(file: str) -> Damage:
    """A pickle in the place of the weights."""

    def damage(folder: Path) -> None:
        (folder / SINGLE).unlink()
        (folder / file).write_bytes(pickle.dumps(Harmful(folder.parent / "trace")))

    return damage


def outside(file: str) -> Damage:
    """The file moved out of the folder, and a link to it in its place."""

    def damage(folder: Path) -> None:
        elsewhere = folder.parent / f"elsewhere-{file}"
        (folder / file).rename(elsewhere)
        (folder / file).symlink_to(elsewhere)

    return damage


def shard_outside(folder: Path) -> None:
    """One shard of several is a link out of the folder."""
    index(lambda i: None)(folder)
    outside(min(folder.glob("model-*")).name)(folder)


def places(name: Any) -> Damage:
    """An index that says one tensor lies in the file `name`."""
    return index(lambda i: i["weight_map"].update({"norm.weight": name}))


def entry(**changes: Any) -> Damage:
    """Another header of one tensor that targets and drafts have."""
    return header(lambda entries: entries[NORM[NORM[1] in entries]].update(changes))


NORM = ("norm.weight", "model.norm.weight")
DEEP = 100_000

# what is wrong with the weights, and with the config: (name, damage)
WEIGHTS: tuple[tuple[str, Damage], ...] = (
    ("a header of 2^60 bytes", write(SINGLE, struct.pack("<Q", 2**60) + b"{}")),
    ("a header of DEEP brackets", write(SINGLE, struct.pack("<Q", DEEP) + b"[" * DEEP)),
    ("a link outside", outside(SINGLE)),
    ("a shard outside", shard_outside),
    ("a link to itself", replaced(SINGLE, lambda file: file.symlink_to(file))),
    ("a folder", replaced(SINGLE, Path.mkdir)),
    ("a pipe", pipe(SINGLE)),
    ("an absolute path", places("/etc/passwd")),
    ("a path upwards", places("../elsewhere.safetensors")),
    ("the folder above", places("..")),
    ("a name that ends early", places("a\0.safetensors")),
    ("a name that is too long", places("a" * 5000)),
    ("a name that is no text", places("\ud800")),
    ("an index that is a list", write(INDEX, "[]")),
    ("an index with a key twice", write(INDEX, '{"weight_map": {"a": "x", "a": "../y"}}')),
    ("a pickle", pickled("pytorch_model.bin")),
    ("a pickle named as weights", pickled(SINGLE)),
    ("bytes of two", entry(data_offsets=[0, 384])),
    ("bytes before the first", entry(data_offsets=[-384, 0])),
    ("bytes from a fraction on", entry(data_offsets=[0.5, 384])),
    ("bytes from 10^5000 on", entry(data_offsets=[10**4200, 10**4200 + 384])),
    ("2^124 numbers", entry(shape=[2**62, 2**62])),
    ("none of 2^70 numbers", entry(shape=[0, 2**70])),
    ("a size in words", entry(shape=["96"])),
    ("a size that is true", entry(shape=[True, 96])),
    ("a dtype that is a list", entry(dtype=["F32"])),
)
CONFIGS: tuple[tuple[str, Damage], ...] = (
    ("a link outside", outside(CONFIG)),
    ("a pipe", pipe(CONFIG)),
    ("a folder", replaced(CONFIG, Path.mkdir)),
    ("a list", write(CONFIG, "[1]")),
    ("no UTF-8", write(CONFIG, b"\xff\xfe{\x00}\x00")),
    ("DEEP brackets", write(CONFIG, '{"a": ' + "[" * DEEP)),
    ("a key twice", written_as("hidden_size", '96, "hidden_size": 7')),
    ("not a number", written_as("rms_norm_eps", "NaN")),
    ("an infinite number", written_as("num_hidden_layers", "Infinity")),
    ("a number beyond floats", written_as("rms_norm_eps", "1e999")),
    ("a number of 6000 digits", written_as("hidden_size", "9" * 6000)),
)
SIZES = (
    "num_hidden_layers",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "head_dim",
    "draft_vocab_size",
    "num_aux_hidden_states",
)


def openers(kind: str, folder: Path, target: OpenTarget, draft: Path) -> dict[str, Callable[[], Any]]:
    """Everything that opens a target, or a draft."""
    desk, out = Desk(is_json=True), folder.parent / "out"
    desk.table = lambda *told: None  # type: ignore[method-assign]
    if kind == "draft":
        return {
            "open": lambda: open_draft(folder, target),
            "audit": lambda: audit(desk, Options(target.checkpoint.path, folder)),
            "convert": lambda: convert(desk, folder, out, "specforge", None, None, 8),
        }
    return {
        "open": lambda: open_target(folder),
        "audit": lambda: audit(desk, Options(folder, draft)),
        "headers": lambda: audit(desk, Options(folder, draft, headers_only=True)),
    }


def refused(opener: Callable[[], Any], folder: Path) -> None:
    """A typed error that names the folder, in moments, and nothing ran."""
    began = time.monotonic()
    with pytest.raises(CheckpointError) as caught:
        opener()

    assert str(folder) in str(caught.value)
    assert time.monotonic() - began < SECONDS
    assert not (folder.parent / "trace").exists()


@pytest.mark.parametrize("kind", ["target", "draft"])
@pytest.mark.parametrize("damage", [damage for _, damage in WEIGHTS], ids=[name for name, _ in WEIGHTS])
def test_weights_made_to_harm_are_refused(
    damage: Damage, kind: str, target: OpenTarget, target_folder: Path, draft_folder: Path, tmp_path: Path
) -> None:
    folder = damaged({"target": target_folder, "draft": draft_folder}[kind], tmp_path, damage)

    found = openers(kind, folder, target, draft_folder)
    if not any(folder.glob("*.safetensors")):
        found.pop("headers", None)  # whose weights are elsewhere, and that is no fault
    for opener in found.values():
        refused(opener, folder)


@pytest.mark.parametrize("kind", ["target", "draft"])
@pytest.mark.parametrize("damage", [damage for _, damage in CONFIGS], ids=[name for name, _ in CONFIGS])
def test_a_config_made_to_harm_is_refused(
    damage: Damage, kind: str, target: OpenTarget, target_folder: Path, draft_folder: Path, tmp_path: Path
) -> None:
    folder = damaged({"target": target_folder, "draft": draft_folder}[kind], tmp_path, damage)

    for opener in openers(kind, folder, target, draft_folder).values():
        refused(opener, folder)


@given(kind=st.sampled_from(["target", "draft"]), key=st.sampled_from(SIZES), power=st.integers(17, 80))
@example(kind="draft", key="num_hidden_layers", power=30)
@example(kind="target", key="num_hidden_layers", power=17)
@example(kind="draft", key="hidden_size", power=40)
@example(kind="draft", key="num_attention_heads", power=20)
@example(kind="target", key="intermediate_size", power=62)
@example(kind="target", key="vocab_size", power=70)
def test_a_size_that_the_file_cannot_hold_is_told_before_it_is_built(
    kind: str,
    key: str,
    power: int,
    target: OpenTarget,
    target_folder: Path,
    draft_folder: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    root = tmp_path_factory.mktemp("size")
    folder = damaged({"target": target_folder, "draft": draft_folder}[kind], root, write_key(key, 2**power))
    opening, *judging = openers(kind, folder, target, draft_folder).values()

    refused(opening, folder)
    for opener in judging:
        began = time.monotonic()
        # an audit tells faults in its answer; a conversion may not need the size
        with contextlib.suppress(CheckpointError):
            opener()
        assert time.monotonic() - began < SECONDS


def test_a_generation_config_outside_is_not_followed(target_folder: Path, tmp_path: Path) -> None:
    folder = damaged(target_folder, tmp_path, outside(GENERATION))

    refused(lambda: open_target(folder), folder)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"model": 3}', '{"version": "1.0", "model": {"type": "nosuch"}}'])
def test_a_tokenizer_made_to_harm_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / TOKENIZER).write_text(text)

    with pytest.raises(CheckpointError, match=TOKENIZER):
        encode([Prompt("1", "", "a")], "prompts", tmp_path, 8)


def test_the_links_of_a_hub_cache_are_followed(draft_folder: Path, target: OpenTarget, tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "0123", tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(draft_folder.iterdir()):
        (blobs / str(number)).write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(Path("../../blobs") / str(number))

    assert open_draft(snapshot, target).facts == open_draft(draft_folder, target).facts


def test_a_json_file_larger_than_any_header_is_not_read(tmp_path: Path) -> None:
    file = tmp_path / CONFIG
    with file.open("wb") as stream:
        os.truncate(stream.fileno(), 2**40)  # a hole: no byte of it is on the disk

    with pytest.raises(CheckpointError, match=str(2**40)):
        read_json(file)


def test_what_is_sound_is_not_refused(
    target: OpenTarget, target_folder: Path, draft_folder: Path, tmp_path: Path
) -> None:
    for kind, sound in (("target", target_folder), ("draft", draft_folder)):
        folder = damaged(sound, tmp_path / kind, lambda path: None)
        for opener in openers(kind, folder, target, draft_folder).values():
            opener()
    assert json.loads((tmp_path / "draft" / "out" / CONFIG).read_text())
