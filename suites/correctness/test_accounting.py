"""Claim: an account has every tensor and every fault of a checkpoint, from headers alone, and runs nothing it reads.

Born of loaders that answer the first fault or none: vLLM 0.33's drafts start without `fc.weight`, SGLang's drop what
they do not know, a missing norm stays at ones. And of files that lie: lengths beyond the file, bytes that two tensors
share, an index that points out of its folder, pickles.
"""

import contextlib
import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from harness.checkpoints import CONFIG, INDEX, SINGLE, CheckpointError, open_checkpoint
from suites.audit.accounting import Account, account, map_faults
from suites.catalog import PAIRS, OpenTarget, open_draft, open_target
from suites.commands.audit import Options, audit
from suites.commands.desk import Desk
from suites.damage import Damage, both, config, damaged, header, index, tensors, write
from suites.dialects import DIALECTS
from suites.draws import EAGLE3, PINNED_TARGET, Drawn, eagle3_drafts, llama_targets, write_draft, write_target
from suites.families.kimi_k25 import PUBLISHED
from suites.formats.reading import Reading, Refusal, read_as
from suites.formats.writing import GOVERNED, put
from suites.shells import wanted_of

pytestmark = [pytest.mark.correctness, pytest.mark.pair("eagle3")]

ROOT = Path(__file__).parents[2]
MOST_BYTES = 500 * 2**20
MOST_SECONDS = 10.0


def kinds(one: Account) -> set[str]:
    return {fault.kind for fault in one.faults}


@given(drawn=eagle3_drafts(PINNED_TARGET), own=st.booleans())
@example(drawn=Drawn(json.dumps(EAGLE3), 2), own=False)
def test_a_sound_draft_has_an_account_without_fault(
    drawn: Drawn, own: bool, target: OpenTarget, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = write_draft(drawn, tmp_path_factory.mktemp("sound"), own)

    one, ledger = account(folder, "draft"), open_draft(folder, target).ledger

    # the strict opener is the witness: the same tensors, to the same places
    assert one.faults == ()
    told = {(entry.tensor, entry.parameter) for entry in one.entries}
    assert told == {(entry.tensor, entry.parameter) for entry in ledger.entries}


@given(drawn=llama_targets(max_layers=3))
@example(drawn=PINNED_TARGET)
def test_a_sound_target_has_an_account_without_fault(drawn: Drawn, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = write_target(drawn, tmp_path_factory.mktemp("sound"))

    one = account(folder, "target")

    assert one.faults == ()
    assert one.count("loaded") == len(open_target(folder).ledger.entries)
    assert one.num_bytes == one.splits[1] - padding(folder)


def padding(folder: Path) -> int:
    """Bytes of the zero rows that a vocabulary's shards end in."""
    checkpoint = open_checkpoint(folder)
    tables = [h for n, h in checkpoint.headers.items() if "embed_tokens" in n or "lm_head" in n]
    return sum((-h.shape[0] % 64) * h.shape[1] * h.dtype.itemsize for h in tables)


def extra(held: dict[str, Tensor]) -> None:
    held["fc.weight_scale"] = torch.ones(1)


def twice(held: dict[str, Tensor]) -> None:
    held["layers.0.mlp.up_proj.weight"] = held["midlayer.mlp.up_proj.weight"].clone()


def narrow(held: dict[str, Tensor]) -> None:
    held["norm.weight"] = held["norm.weight"][1:].clone()


def absolute(held: dict[str, Tensor]) -> None:
    held["d2t"] += torch.arange(len(held["d2t"]))


def whole_numbers(held: dict[str, Tensor]) -> None:
    held["norm.weight"] = held["norm.weight"].to(torch.int32)


def gone(*names: str) -> Damage:
    return tensors(lambda held: [held.pop(name) for name in names])


FAULTS: tuple[tuple[str, Damage, set[str], tuple[str, ...]], ...] = (
    ("unknown", tensors(extra), {"unknown"}, ("fc.weight_scale",)),
    ("doubled", tensors(twice), {"double"}, ("up_proj",)),
    ("shape", tensors(narrow), {"shape"}, ("[95]", "[96]")),
    ("missing norm", gone("norm.weight"), {"missing", "gap"}, ("vllm-v1 leaves 'norm.weight' at: ones, silent",)),
    ("missing matrix", gone("fc.weight"), {"missing", "gap"}, ("uninitialised memory", "tensorrt-llm")),
    ("missing head", gone("lm_head.weight"), {"missing", "gap"}, ("vllm-v2 leaves 'lm_head.weight' at: the target's",)),
    ("no map", gone("d2t", "t2d"), {"map"}, ("draft ids for target ids",)),
    ("absolute map", tensors(absolute), {"map"}, ("absolute target ids", "subtract")),
    ("marks of another map", tensors(lambda held: held["t2d"].logical_not_()), {"map"}, ("t2d",)),
    ("numbers", tensors(whole_numbers), {"dtype"}, ("int32",)),
    ("config", config(residual_scale=2.0), {"config"}, ("residual_scale",)),
    ("index promises", index(lambda i: i["weight_map"].update(new=i["weight_map"]["fc.weight"])), {"file"},
     ("'new'",)),
    ("all at once", both(tensors(extra), tensors(narrow), gone("fc.weight"), tensors(absolute)),
     {"unknown", "shape", "missing", "gap", "map"}, ("fc.weight_scale", "[95]", "absolute")),
)  # fmt: skip


@pytest.mark.parametrize(("damage", "want", "words"), [f[1:] for f in FAULTS], ids=[f[0] for f in FAULTS])
def test_every_fault_is_told_and_none_stops_the_account(
    damage: Damage, want: set[str], words: tuple[str, ...], draft_folder: Path, tmp_path: Path
) -> None:
    folder = damaged(draft_folder, tmp_path, damage)

    one = account(folder, "draft")

    assert kinds(one) == want
    text = " | ".join(fault.text for fault in one.faults)
    assert [word for word in words if word not in text] == []
    stored = set(open_checkpoint(folder).headers) if want != {"file"} else set()
    assert stored <= {entry.tensor for entry in one.entries}


@given(vocab=st.integers(8, 90), seed=st.integers(0, 99))
@example(vocab=40, seed=0)
def test_a_map_is_sound_in_one_of_its_two_readings(vocab: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randperm(vocab, generator=generator)[: vocab // 2].sort().values
    marks = torch.zeros(vocab, dtype=torch.bool).index_fill_(0, ids, True)
    offsets = ids - torch.arange(len(ids))

    assert map_faults(offsets, marks, vocab) == []
    assert "as absolute target ids it is sound" in map_faults(ids, marks, vocab)[0]
    assert map_faults(offsets, ~marks, vocab) != []
    assert map_faults(offsets.flip(0), marks, vocab) != []


class Boom:
    """An object whose pickle runs a command when it is loaded."""

    def __init__(self, at: Path) -> None:
        self.at = at

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.at),)


def sharing(entries: dict[str, Any]) -> None:
    entries["norm.weight"]["data_offsets"] = entries["midlayer.hidden_norm.weight"]["data_offsets"]


def double_key(folder: Path) -> None:
    raw = (folder / SINGLE).read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    text = raw[8 : 8 + length].decode()
    again = text.rstrip()[:-1] + ', "norm.weight": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}'
    (folder / SINGLE).write_bytes(struct.pack("<Q", len(again)) + again.encode() + raw[8 + length :])


HOSTILE: tuple[tuple[str, Damage, str], ...] = (
    ("cut", lambda folder: os.truncate(folder / SINGLE, 5000), "cut short"),
    ("config cut", write(CONFIG, '{"model_type": '), "JSON"),
    ("header of eight exbibytes", write(SINGLE, struct.pack("<Q", 2**63 - 1) + b"{}"), "cut short"),
    ("a shape beyond all memory", header(lambda e: e["fc.weight"].update(shape=[2**40, 2**40])), "fc.weight"),
    ("bytes of two tensors", header(sharing), "share bytes"),
    ("a tensor twice in a header", double_key, "twice"),
    (
        "out of the folder",
        index(lambda i: i["weight_map"].update({"fc.weight": "../draft/model.safetensors"})),
        "plain",
    ),
    ("an absolute path", index(lambda i: i["weight_map"].update({"fc.weight": "/etc/passwd"})), "plain"),
    ("brackets", write(CONFIG, "[" * 1_000_000), "JSON"),
)


@pytest.mark.parametrize(("damage", "word"), [h[1:] for h in HOSTILE], ids=[h[0] for h in HOSTILE])
def test_what_cannot_be_read_is_a_typed_error(damage: Damage, word: str, draft_folder: Path, tmp_path: Path) -> None:
    folder = damaged(draft_folder, tmp_path, damage)

    with pytest.raises(CheckpointError, match=word):
        account(folder, "draft")


@pytest.mark.parametrize("name", ["pytorch_model.bin", SINGLE, CONFIG])
def test_a_pickle_is_never_loaded(name: str, draft_folder: Path, tmp_path: Path) -> None:
    def plant(folder: Path) -> None:
        (folder / SINGLE).unlink()
        (folder / name).write_bytes(pickle.dumps(Boom(tmp_path / "ran")))

    folder = damaged(draft_folder, tmp_path, plant)

    with pytest.raises(CheckpointError):
        account(folder, "draft")

    assert not (tmp_path / "ran").exists()


def sparse(folder: Path, keys: dict[str, Any]) -> int:
    """A checkpoint of a published size whose data is holes in files; its size in bytes."""
    pair = PAIRS["kimi_k25"]
    wanted, total, places = wanted_of(pair, pair.read_config(keys)), 0, {}
    folder.mkdir()
    names = sorted(wanted)
    for number in range(61):
        file, at, entries = f"model-{number:05d}.safetensors", 0, {}
        for name in names[number::61]:
            size = 2 * prod(wanted[name])
            entries[name] = {"dtype": "BF16", "shape": wanted[name], "data_offsets": [at, at + size]}
            places[name], at = file, at + size
        text = json.dumps(entries).encode()
        total += at
        (folder / file).write_bytes(struct.pack("<Q", len(text)) + text)
        os.truncate(folder / file, 8 + len(text) + at)
    (folder / CONFIG).write_text(json.dumps(keys))
    (folder / INDEX).write_text(json.dumps({"weight_map": places}))
    return total


MEASURED = """
import json, sys, time
from suites.audit.accounting import account
one, names = (account(folder, "target", headers_only=True) for folder in sys.argv[1:])
# the peak of this program alone: the counter of resource.getrusage starts at the parent's
(peak,) = [line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")]
told = [len(one.entries), len(names.entries), len(one.faults + names.faults), one.num_bytes, one.splits[8]]
print(json.dumps([*told, int(peak) * 1024, time.process_time()]))
"""


def test_two_terabytes_of_experts_cost_seconds_and_megabytes(profile: str, tmp_path: Path) -> None:
    # every layer but the first is like the others: a few stand for all, except at night
    keys = {**PUBLISHED["Kimi-K2.5"], "text_config": dict(PUBLISHED["Kimi-K2.5"]["text_config"])}
    assert (keys["text_config"]["num_hidden_layers"], keys["text_config"]["n_routed_experts"]) == (61, 384)
    layers = keys["text_config"]["num_hidden_layers"] = 61 if profile == "nightly" else 2
    total = sparse(tmp_path / "target", keys)
    (tmp_path / "index").mkdir()
    for name in (CONFIG, INDEX):
        shutil.copy(tmp_path / "target" / name, tmp_path / "index")

    command = [sys.executable, "-c", MEASURED, str(tmp_path / "target"), str(tmp_path / "index")]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)

    entries, names, faults, num_bytes, eighth, memory, seconds = json.loads(ran.stdout.splitlines()[-1])
    assert (entries, faults, num_bytes) == (names, 0, total)
    assert entries > (layers - 1) * 3 * 384
    # what is split is an eighth, and what every rank holds is little beside it
    assert total // 8 < eighth < total // 6
    assert memory < MOST_BYTES
    assert seconds < MOST_SECONDS


AUDITS: tuple[tuple[str, Damage, int], ...] = (
    ("wrong in one engine", lambda folder: None, 1),
    ("a tensor missing", gone("fc.weight"), 1),
    ("no convention", config(eagle_config={"layer_ids": None}), 1),
    ("no weights", lambda folder: (folder / SINGLE).unlink(), 2),
)


@pytest.mark.parametrize(("damage", "code"), [a[1:] for a in AUDITS], ids=[a[0] for a in AUDITS])
def test_an_audit_ends_as_its_findings_say(
    damage: Damage, code: int, target_folder: Path, draft_folder: Path, tmp_path: Path
) -> None:
    folder = damaged(draft_folder, tmp_path, damage)
    asked = Options(target_folder, folder)

    assert ended(lambda: audit(Desk(True), asked).exit) == code


def test_an_audit_of_one_engine_that_reads_it_right_passes(target_folder: Path, draft_folder: Path) -> None:
    found = audit(Desk(True), Options(target_folder, draft_folder, engines=("tensorrt-llm",)))
    right = audit(Desk(True), Options(target_folder, draft_folder, engines=("sglang",)))

    (wrong,) = found.facts["engines"]["verdicts"]
    assert (found.exit, wrong["outcome"], wrong["differences"][0]["fact"]) == (1, "wrongly", "points")
    assert right.exit == 1  # its own embedding is no copy of the target's, and SGLang would replace it
    assert [d["fact"] for d in right.facts["engines"]["verdicts"][0]["differences"]] == ["embedding"]


def ended(work: Callable[[], int]) -> int:
    try:
        return int(work())
    except CheckpointError:
        return 2


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)
KEYS = sorted({*EAGLE3, *GOVERNED} - {""})


@given(key=st.sampled_from(KEYS), value=JUNK, dialect=st.sampled_from(sorted(DIALECTS)))
@example(key="num_hidden_layers", value=10**9, dialect="vllm-v1")
@example(key="num_aux_hidden_states", value=10**12, dialect="sglang")
@example(key="eagle_config", value=[1], dialect="tensorrt-llm")
@example(key="eagle_config.eagle_aux_hidden_state_layer_ids", value=[2**70, True, -1], dialect="sglang")
@example(key="architectures", value=7, dialect="specforge")
@example(key="speculators_model_type", value={}, dialect="speculators")
@example(key="rope_parameters", value=[], dialect="safeailab")
def test_any_value_of_any_key_is_read_refused_or_accounted_for(
    key: str, value: Any, dialect: str, draft_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    def change(folder: Path) -> None:
        keys = json.loads((folder / CONFIG).read_text())
        put(keys, key, value)
        (folder / CONFIG).write_text(json.dumps(keys))

    folder = damaged(draft_folder, tmp_path_factory.mktemp("junk"), change)

    with contextlib.suppress(CheckpointError):
        one = account(folder, "draft")
        assert {entry.tensor for entry in one.entries if entry.tensor} == set(open_checkpoint(folder).headers)
        reading = read_as(open_checkpoint(folder), dialect, 8)
        assert isinstance(reading, Reading | Refusal)
