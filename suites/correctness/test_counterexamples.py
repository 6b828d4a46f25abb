"""Claim: a failure leaves one file that runs it again, here or on another implementation, and says what it was given.

Born of Liger-Kernel #1313: a real NaN sat for months among failures that were called flaky, since nobody could run the
one that failed again.
"""

import contextlib
import io
import json
import runpy
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st
from hypothesis.errors import DidNotReproduce

from harness.planting import planted
from harness.record import Check, read
from harness.runner import ROOT, Exit, Outcome, Result, run
from suites import replay
from suites.commands import replay as command
from suites.commands.desk import Desk, UsageFault
from suites.commands.explain import Options
from suites.commands.explain import explain as explain_command
from suites.draws import Drawn
from suites.explain.cases import EXPECTED
from suites.explain.dump import read_dump, write_dump
from suites.explain.failures import explained
from suites.planted import BUGS
from suites.replay import Counterexample, CounterexampleError
from suites.scripted import tiny_draft, tiny_target

pytestmark = pytest.mark.correctness

SEARCH = settings(phases=[Phase.generate, Phase.shrink], max_examples=50, derandomize=True, database=None)
"""whatever the profile"""
LIMIT = {"now": 100}
"""what numbers stay under, until it is repaired"""
NOT_YET = "suites/correctness/test_made_up.py::test_small"
MADE_UP = """
import pytest
from hypothesis import example, given, strategies as st
pytestmark = [pytest.mark.correctness, pytest.mark.pair("no model")]
@given(number=st.integers(0, 1000))
def test_small(number): assert number < 100
"""
WIDE = Counterexample(
    claim="suites/correctness/test_x.py::test_y",
    pair="llama-eagle3",
    profile="ci",
    reason="capture point 1: at [0, 3, 5] ...",
    given={
        "loop": {"type": "Loop", "target": replay.plain(tiny_target(5)), "draft": replay.plain(tiny_draft(6))},
        "width": 9,
    },
    versions=replay.versions(),
)


@SEARCH
@given(number=st.integers(0, 1000), drawn=st.builds(Drawn, st.just("{}"), st.integers(0, 3)))
def small(number: int, drawn: Drawn) -> None:
    """A property that fails from LIMIT on."""
    assert number < LIMIT["now"]


def failure(prove: Callable[[], None]) -> BaseException:
    """What a property ends with."""
    with pytest.raises(AssertionError) as caught:
        prove()
    return caught.value


def item(prove: Any) -> Any:
    """A collected claim."""
    return SimpleNamespace(obj=prove, module=SimpleNamespace(given=given))


def kept(prove: Callable[[], None]) -> Counterexample:
    """The counterexample of a property that fails."""
    error = failure(prove)
    version, blob = replay.blob_of(error)
    facts = {"given": replay.given(error, Path(__file__)), "blob": blob, "hypothesis": version}
    return replace(WIDE, **facts)


def again(prove: Any, found: Counterexample, monkeypatch: pytest.MonkeyPatch) -> BaseException | None:
    """What the property ends with when it is given the counterexample alone."""
    monkeypatch.setattr(prove, "_hypothesis_internal_use_reproduce_failure", None)
    replay.arm(item(prove), found)
    try:
        prove()
    except (AssertionError, DidNotReproduce) as error:
        return error
    return None


def test_a_blob_fails_again_and_no_longer_once_it_is_repaired(monkeypatch: pytest.MonkeyPatch) -> None:
    found = kept(small)

    before = again(small, found, monkeypatch)
    monkeypatch.setitem(LIMIT, "now", 1001)
    after = again(small, found, monkeypatch)

    assert found.given == {"number": 100, "drawn": {"type": "Drawn", "config": "{}", "seed": 0}}
    assert isinstance(before, AssertionError)
    assert isinstance(after, DidNotReproduce)


def test_a_property_that_is_built_when_it_runs_takes_the_blob_too() -> None:
    def build(draw: Any) -> None:
        SEARCH(draw(number=st.integers(0, 1000))(lambda **case: small.hypothesis.inner_test(case["number"], None)))()

    found, told = kept(lambda: build(given)), item(build)
    replay.arm(told, found)

    assert found.blob
    assert found.given == {"case": {"number": 100}}
    assert isinstance(failure(lambda: build(told.module.given)), AssertionError)


plains = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@given(values=st.dictionaries(st.text(max_size=4), plains, max_size=4), blob=st.text(max_size=9))
@example(values={"a": [{"type": "Tensor", "shape": [2, 3], "dtype": "float32"}]}, blob="AXic")
def test_a_file_holds_what_was_kept(
    values: dict[str, Any], blob: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder, found = tmp_path_factory.mktemp("kept"), replace(WIDE, given=values, blob=blob)

    file = replay.write(folder, found)

    assert json.loads(json.dumps(replay.read(file).given)) == json.loads(json.dumps(values))
    assert replace(replay.read(file), given={}) == replace(found, given={})
    assert list(folder.iterdir()) == [file]


def test_values_are_told_by_what_makes_them_again() -> None:
    target = tiny_target(5)

    told = replay.plain({"target": target, "sizes": (1, 2), "x": torch.zeros(2, 3)})

    assert told["x"] == {"type": "Tensor", "shape": [2, 3], "dtype": "float32"}
    assert list(replay.drawn(told)) == [(target.keys, 5)]
    assert replay.said(told["target"]) == "Drawn(llama, seed 5)"


FAULTS = {
    "no JSON": ("{", "cannot be read as JSON"),
    "another format": ('{"format": "mine"}', "is no counterexample"),
    "a list": ("[]", "is no counterexample"),
    "no claim": (json.dumps({"format": replay.FORMAT}), "'claim' is missing"),
    "a blob of numbers": (
        json.dumps({"format": replay.FORMAT, "claim": "a", "pair": "", "profile": "ci", "reason": "", "blob": 3}),
        "'blob' a text",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_file_that_is_no_counterexample_is_refused_in_words(fault: str, tmp_path: Path) -> None:
    text, words = FAULTS[fault]
    (tmp_path / "cx.json").write_text(text)

    with pytest.raises(CounterexampleError, match=words):
        replay.read(tmp_path / "cx.json")


def ended(code: Exit, message: str = "") -> Outcome:
    status = {Exit.PASSED: "passed", Exit.GATE_FAILED: "failed"}[code]
    return Outcome(code, (Result("t", status, message, 0.1),), "", 0.1)


ENDS = {
    "it fails": (ended(Exit.GATE_FAILED, "AssertionError: too wide"), Exit.GATE_FAILED),
    "it passes": (ended(Exit.GATE_FAILED, "DidNotReproduce: Expected the test to raise an error"), Exit.PASSED),
    "it passes, nothing was drawn": (ended(Exit.PASSED), Exit.PASSED),
    "other draws": (
        ended(Exit.GATE_FAILED, "DidNotReproduce: The shape of the test data has changed"),
        Exit.INCONCLUSIVE,
    ),
    "another hypothesis": (
        ended(Exit.GATE_FAILED, "InvalidArgument: from a different version of Hypothesis"),
        Exit.INCONCLUSIVE,
    ),
}


@pytest.mark.parametrize("end", ENDS)
def test_the_exit_code_says_whether_it_still_fails(end: str) -> None:
    outcome, code = ENDS[end]

    assert command.judged(WIDE, outcome, [])[0] == code


def test_passing_elsewhere_is_no_proof() -> None:
    other = replace(WIDE, versions={**replay.versions(), "torch": "1.0"})

    differing = list(command.changed(other))

    assert differing == ["torch"]
    assert command.judged(other, ended(Exit.PASSED), differing)[0] == Exit.INCONCLUSIVE
    assert command.judged(other, ended(Exit.GATE_FAILED, "AssertionError"), differing)[0] == Exit.GATE_FAILED


@SEARCH
@given(number=st.integers(0, 1000))
def five_hundred(number: int) -> None:
    """A property whose counterexample is not the one that another draw would find."""
    assert number < 500


def test_a_file_runs_its_claim_again_and_a_failed_check_names_its_own(tmp_path: Path) -> None:
    for name in ("conftest.py", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path / name)
    claims = tmp_path / "suites" / "correctness"
    (tmp_path / "suites" / "selftest").mkdir(parents=True)
    claims.mkdir()
    (claims / "test_made_up.py").write_text(MADE_UP)
    records = tmp_path / "records" / "records.jsonl"
    file = replay.write(tmp_path, replace(kept(five_hundred), claim=NOT_YET, pair="no model"))

    options = ["-n0", f"--replay={file}", f"--records={records}"]
    outcome = run([NOT_YET], options=options, root=tmp_path)

    (check,) = (line for line in read(records) if isinstance(line, Check))
    left = replay.read(records.parent / check.extra["counterexample"])
    assert command.judged(WIDE, outcome, [])[0] == Exit.GATE_FAILED
    assert (check.status, check.claim, check.extra["given"]) == ("failed", NOT_YET, "number=500")
    assert (left.claim, left.given, left.blob) == (NOT_YET, {"number": 500}, replay.read(file).blob)


def test_a_case_is_for_others_to_run_and_their_dump_is_explained(tmp_path: Path) -> None:
    file, case, desk = replay.write(tmp_path, WIDE), tmp_path / "case", Desk(True)

    written = command.replay(desk, file, case, script=True)
    (tmp_path / "script.py").write_text(written.facts["script"])
    dump = read_dump(case / EXPECTED)
    ours = {name: value for name, value in dump.tensors.items() if not name.startswith("hidden")}
    late = ours | {"aux": torch.stack([dump.tensors[f"hidden.{c - 1}"] for c in (3, 1, 2)], 2)}
    shifted = write_dump(tmp_path / "late.safetensors", replace(dump, tensors={"aux": late["aux"]}))

    assert dump.tokens.shape == (2, 9)
    assert explain_command(desk, Options(case=case, ours=case / EXPECTED)).exit == Exit.PASSED
    found = explain_command(desk, Options(case=case, ours=shifted))
    assert (found.exit, found.facts["explained_by"]) == (Exit.GATE_FAILED, ["draft's capture shift: -1"])
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said), torch.no_grad():
        patch.setattr(sys, "argv", ["script", str(case)])
        runpy.run_path(str(tmp_path / "script.py"), run_name="__main__")
    errors = [float(line.split()[-1]) for line in said.getvalue().splitlines()]
    assert len(errors) == 4
    assert max(errors) < 1e-5
    assert "import suites" not in written.facts["script"]
    assert "reference" not in written.facts["script"]


def test_a_failure_says_which_fact_of_its_pair_explains_it() -> None:
    bug = next(bug for bug in BUGS if bug.name == "residual form flipped")

    with planted(bug):
        facts = explained(WIDE)

    assert facts["explained_by"] == ["draft's norm_before_residual: on"]
    assert facts["explanation"].startswith("explained by: draft's norm_before_residual: on, error ")
    assert explained(WIDE) == {}


def test_what_names_no_checkpoint_is_no_case(tmp_path: Path) -> None:
    file = replay.write(tmp_path, replace(WIDE, given={"number": 3}, pair=""))

    with pytest.raises(CounterexampleError, match="was given no checkpoint"):
        command.replay(Desk(True), file, tmp_path / "case")
    with pytest.raises(UsageFault, match="is not empty"):
        command.replay(Desk(True), file, tmp_path)
