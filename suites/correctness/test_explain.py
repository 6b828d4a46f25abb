"""Claim: an error is explained by the one edit that makes it vanish, else by the first place where it is not rounding.

Born of SGLang #25454 and vLLM #43671: acceptance fell, and it took people weeks to find that layer ids were read one
off, which is one edit of a config and seconds of arithmetic; and of #27540, where the layer that was wrong was looked
for by eye.
"""

import json
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from harness.checkpoints import SINGLE
from harness.compare import bit_equal
from harness.runner import Exit
from suites.catalog import open_target
from suites.commands.desk import Desk, UsageFault
from suites.commands.explain import Options
from suites.commands.explain import explain as explain_command
from suites.commands.layers import layers, side_of
from suites.couples import COUPLES
from suites.draws import random_tokens
from suites.explain.cases import EXPECTED, Folders, read_case, write_case
from suites.explain.dump import FORMAT, Dump, DumpError, read_dump, write_dump
from suites.explain.expected import EDITS, PLACES, STAGES, Expected
from suites.explain.failures import explain_pair, injected, write_pair
from suites.explain.ladder import climb
from suites.explain.search import Explanation, rungs
from suites.explain.states import walk
from suites.explain.telling import tell
from suites.planted import BUGS

pytestmark = pytest.mark.correctness

BY_NAME = {bug.name: bug for bug in BUGS}
SHARE = 0.8
"""of the bugs that one edit can express, those that must be named"""
SHOWN = ("after_layer ids not shifted", "gemma3 twin: window one longer", "mask_hidden not fused")
"""what is asked of every profile; a night asks all of them"""
LADDERS = ("llama-eagle3", "gemma3-eagle3", "gemma4-eagle3", "deepseek-eagle3", "qwen3_moe-eagle3")
TEXT = random_tokens(9, 2, 12, seed=3)


def rows(every: tuple[Expected, ...], profile: str) -> tuple[Expected, ...]:
    """All of them in a night."""
    return {"nightly": every}.get(profile, tuple(row for row in every if row.bug in SHOWN))


def explained(row: Expected) -> Explanation:
    """What is said of a planted bug on its stage."""
    couple, bug = STAGES[row.stage], BY_NAME[row.bug]
    with tempfile.TemporaryDirectory() as folder:
        pair = write_pair(couple, Path(folder))
        tokens = random_tokens(couple.target.keys["vocab_size"], 2, 18, seed=5)
        return explain_pair(pair, tokens, side_of(bug), bug)


def test_bugs_that_one_edit_can_express_are_named(profile: str) -> None:
    asked = rows(EDITS, profile)

    said = {row: explained(row) for row in asked}

    missed = [row.bug for row in asked if not any(trial.name.startswith(row.says) for trial in said[row].by)]
    assert len(EDITS) >= 40
    assert len(missed) <= (1 - SHARE) * len(asked), missed


def test_what_no_edit_expresses_is_placed(profile: str) -> None:
    asked = rows(PLACES, profile)

    said = {row: explained(row) for row in asked}

    assert {row.bug: [trial.name for trial in said[row].by] for row in asked} == {row.bug: [] for row in asked}
    assert {row.bug: said[row].before.first.name for row in asked} == {row.bug: row.says for row in asked}


class Damaged(NamedTuple):
    """A couple in two folders, the second with norms of some layers multiplied."""

    whole: Folders
    broken: Folders


@contextmanager
def damaged(name: str, factors: dict[int, float]) -> Iterator[Damaged]:
    """factors: layer -> what its norm behind attention is multiplied by."""
    with tempfile.TemporaryDirectory() as root:
        whole = write_pair(COUPLES[name], Path(root, "whole"))
        shutil.copytree(whole.target, Path(root, "broken"))
        file = Path(root, "broken") / SINGLE
        tensors = load_file(file)
        for layer, factor in factors.items():
            norm = next(n for n in tensors if n.endswith(f"layers.{layer}.post_attention_layernorm.weight"))
            tensors[norm] *= factor
        save_file(tensors, file, {"format": "pt"})
        yield Damaged(whole, replace(whole, target=Path(root, "broken")))


@given(name=st.sampled_from(LADDERS), layer=st.integers(0, 2), side=st.sampled_from(["reference", "optimized"]))
@example(name="llama-eagle3", layer=1, side="optimized")
@example(name="gemma4-eagle3", layer=2, side="optimized")
@example(name="gemma3-eagle3", layer=0, side="reference")
def test_a_wrong_layer_is_the_only_place_beyond_its_budget(name: str, layer: int, side: str) -> None:
    with damaged(name, {layer: 1.5}) as pair:
        reference, _ = pair.whole.open()
        made = walk(reference, TEXT)
        given = {c: made[f"hidden.{c}"] for c in range(reference.num_layers + 1)}
        target = open_target(pair.broken.target, side=side)
        handed, own = tell(target, None, TEXT, given=given), tell(target, None, TEXT)

    injected, told = climb(handed, reference, None, made), climb(own, reference)

    assert [rung.name for rung in injected.rungs if rung.used > 1] == [f"hidden.{layer + 1}"]
    assert [rung.name for rung in told.rungs if rung.used > 1] == [f"hidden.{layer + 1}"]


def test_of_two_wrong_layers_the_first_is_named_however_small() -> None:
    with damaged("llama-eagle3", {0: 1.01, 2: 4.0}) as pair:
        reference, _ = pair.whole.open()
        dump = tell(open_target(pair.broken.target, side="optimized"), None, TEXT)

    ladder = climb(dump, reference)

    assert [rung.name for rung in ladder.rungs if rung.used > 1] == ["hidden.1", "hidden.3"]
    assert ladder.first is not None
    assert ladder.first.name == "hidden.1"


@pytest.mark.parametrize("name", ["llama-eagle3", "deepseek-eagle3-mla"])
def test_the_twin_is_within_its_budget_at_every_place(name: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        ladder = injected(write_pair(COUPLES[name], Path(folder)), TEXT)

    assert ladder.first is None
    assert {"hidden.0", "final", "aux", "fused", "logits.3", "feedback.3"} <= {rung.name for rung in ladder.rungs}


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pair in a folder, with what the reference expects of a text."""
    folder = tmp_path_factory.mktemp("case")
    return write_case(folder, write_pair(COUPLES["llama-eagle3"], folder), TEXT, {})


def test_a_dump_comes_back_as_it_was_written(case: Path, tmp_path: Path) -> None:
    dump = read_dump(case / EXPECTED)

    again = read_dump(write_dump(tmp_path / "again.safetensors", dump))

    assert again.tensors.keys() == dump.tensors.keys()
    assert (again.dtype, again.by, again.num_steps) == (torch.float32, "draftproof reference llama", 3)
    bit_equal("tokens", again.tokens, TEXT)
    for name, tensor in dump.tensors.items():
        bit_equal(name, again.tensors[name], tensor)


FAULTS = {
    "no safetensors": ({}, None, "cannot be read as safetensors"),
    "another format": ({}, {"format": "mine"}, "'format' is 'mine'"),
    "no tokens": ({"final": torch.zeros(1, 2, 3)}, {}, "'tokens' is missing"),
    "an unknown name": ({"tokens": TEXT, "states.1": torch.zeros(2, 12, 3)}, {}, "'states.1' is not known"),
    "another text": ({"tokens": TEXT, "hidden.1": torch.zeros(2, 11, 3)}, {}, "'hidden.1' is float32 [2, 11, 3]"),
    "whole numbers": ({"tokens": TEXT, "final": torch.zeros(2, 12, 3).long()}, {}, "'final' is int64"),
    "tokens in one row": ({"tokens": TEXT[0]}, {}, "'tokens' is int64 [12]"),
    "an unknown arithmetic": ({"tokens": TEXT}, {"dtype": "int3"}, "'dtype' is 'int3'"),
    "a map of floats": ({"tokens": TEXT, "map": torch.zeros(3)}, {}, "'map' is float32 [3]"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_file_that_is_no_dump_is_refused_in_words(fault: str, tmp_path: Path) -> None:
    tensors, facts, words = FAULTS[fault]
    file = tmp_path / "dump.safetensors"
    if facts is None:
        file.write_text("no header")
    else:
        save_file(tensors, file, {"format": FORMAT, **facts})

    with pytest.raises(DumpError, match=re.escape(words)):
        read_dump(file)


MISFITS = {
    "a capture point too high": ({"hidden.9": torch.zeros(2, 12, 48)}, "'hidden.9': capture points of this target"),
    "another width": (
        {"hidden.1": torch.zeros(2, 12, 40)},
        "'hidden.1' is [2, 12, 40], the checkpoint makes [2, 12, 48]",
    ),
    "a draft that nobody gave": ({"fused": torch.zeros(2, 12, 48)}, "'fused' tells of a draft; pass --draft"),
}


@pytest.mark.parametrize("misfit", MISFITS)
def test_a_dump_of_another_model_is_refused_in_words(misfit: str, case: Path) -> None:
    tensors, words = MISFITS[misfit]

    with pytest.raises(DumpError, match=re.escape(words)):
        climb(Dump(TEXT, tensors), read_case(case).open()[0])


def test_numbers_that_are_not_there_are_no_agreement(case: Path) -> None:
    dump, pair = read_dump(case / EXPECTED), read_case(case).open()
    silent = {**dump.tensors, "logits.2": torch.full_like(dump.tensors["logits.2"], float("nan"))}
    partly = {**dump.tensors, "logits.2": dump.tensors["logits.2"].clone()}
    partly["logits.2"][0] = float("nan")
    partly["hidden.2"] = dump.tensors["hidden.2"].clone()
    partly["hidden.2"][0, 3, 1] = float("nan")

    nothing = climb(replace(dump, tensors=silent), *pair)

    assert nothing.first.name == "logits.2"
    assert json.dumps(rungs(nothing), allow_nan=False).count("Infinity") == 2
    assert climb(replace(dump, tensors=partly), *pair).first.name == "hidden.2"


def test_commands_end_with_what_they_found(case: Path, tmp_path: Path) -> None:
    desk, ours = Desk(True), tmp_path / "ours.safetensors"
    right = explain_command(desk, Options(case=case, ours=case / EXPECTED))
    dump = read_dump(case / EXPECTED)
    shifted = {**dump.tensors, "hidden.2": dump.tensors["hidden.2"] * 1.5}
    asked = Options(case=case, ours=write_dump(ours, replace(dump, tensors=shifted)))

    assert (right.exit, right.facts["first_wrong"]) == (Exit.PASSED, "")
    assert (layers(desk, asked).exit, layers(desk, asked).facts["first_wrong"]) == (Exit.GATE_FAILED, "hidden.2")
    with pytest.raises(UsageFault, match="--ours"):
        explain_command(desk, Options(case=case))
    with pytest.raises(UsageFault, match="--target"):
        explain_command(desk, Options(ours=ours))
    with pytest.raises(UsageFault, match="no planted bug is named"):
        layers(desk, Options(), "no such bug")


def test_the_first_wrong_layer_of_a_planted_bug_is_told() -> None:
    found = layers(Desk(True), Options(), "gemma3 twin: window one longer")

    assert (found.exit, found.facts["first_wrong"]) == (Exit.GATE_FAILED, "hidden.1")
    # a full layer between two sliding ones reads what it should have read, and is right
    assert [rung["name"] for rung in found.facts["ladder"] if rung["used"] > 1][:2] == ["hidden.1", "hidden.3"]
