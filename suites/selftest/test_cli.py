"""Claim: every command ends with the code that its result means, and `--json` leaves nothing else on stdout."""

import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from harness.planting import Bug
from harness.record import Check, Run, read
from harness.runner import ROOT, Exit, Result, to_exit
from suites import cli, demo
from suites.commands import bench, planted
from suites.commands.check import check
from suites.commands.desk import Answer, Desk, answer
from suites.commands.runs import begin

pytestmark = pytest.mark.correctness

COUNTING = "suites/selftest/test_acceptance.py"
CLAIMS = """
import pytest
pytestmark = [pytest.mark.correctness, pytest.mark.pair("llama")]
def test_that_holds(): pass
def test_that_does_not(): assert 1 + 1 == 3, "arithmetic"
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A checkout with two claims of its own and our rules."""
    for name in ("conftest.py", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path / name)
    for name in ("correctness", "selftest"):
        (tmp_path / "suites" / name).mkdir(parents=True)
    (tmp_path / "suites" / "correctness" / "test_made_up.py").write_text(CLAIMS)
    return tmp_path


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, Any]]:
    """Exit code and result of a command line that ends with --json."""
    code = cli.run([*arguments, "--json"])
    return code, json.loads(capsys.readouterr().out)


def apart(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A command line in a process of its own, with the package of another folder."""
    code = "import sys; from suites import cli; code = cli.run(sys.argv[1:]); print('torch' in sys.modules); exit(code)"
    path = os.pathsep.join([str(root), str(ROOT)])
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, cwd=root, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)


def test_help_costs_less_than_a_second_and_loads_no_torch() -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = apart(ROOT, "--help")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)

    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "False")
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1


def test_help_names_every_command_and_no_other(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["--help"]) == 0

    listed = capsys.readouterr().out.partition("Commands:")[2].splitlines()
    names = [line.split()[0] for line in listed if line.startswith("  ") and line[2] != " "]
    assert names == ["demo", "list", "check", "audit", "convert", "bench", "probe", "report", "compare", "history",
                     "planted", "doctor", "nightly", "zoo", "baseline", "bisect", "explain", "replay",
                     "engine"]  # fmt: skip


def test_outside_a_checkout_it_says_so_in_one_line(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "suites" / "commands", tmp_path / "suites" / "commands")
    for name in ("cli.py", "__init__.py"):
        shutil.copy(ROOT / "suites" / name, tmp_path / "suites" / name)

    done = apart(tmp_path, "list", "suites")

    assert done.returncode == Exit.USAGE
    assert done.stderr.count("\n") == 1
    assert "no checkout of draftproof" in done.stderr


@pytest.mark.parametrize("kind", ["pairs", "speculations", "bugs", "dialects", "suites"])
def test_lists_are_tables_for_people_and_rows_for_machines(capsys: pytest.CaptureFixture[str], kind: str) -> None:
    code, found = said(capsys, "list", kind)

    assert (code, found["exit"]) == (0, 0)
    assert all(row.values() for row in found[kind][:1])


@pytest.mark.parametrize(
    ("keyword", "code", "statuses"),
    [
        ("test_that_holds", Exit.PASSED, {"passed": 1}),
        ("test_that_does_not", Exit.GATE_FAILED, {"failed": 1}),
        ("test_that_is_not_there", Exit.NOTHING_SELECTED, {}),
    ],
)
def test_check_ends_as_its_claims_do(
    project: Path, tmp_path: Path, keyword: str, code: Exit, statuses: dict[str, int]
) -> None:
    found = check(Desk(True), lambda: begin(tmp_path / "runs", "pinned"), ["llama"], "pinned", (), keyword, project)

    assert (found.exit, found.facts["statuses"]) == (code, statuses)
    run, *checks = read(found.facts["records"])
    assert isinstance(run, Run)
    assert [(type(c), c.run, c.pair) for c in checks] == [(Check, run.run, "llama")] * sum(statuses.values())
    assert [f["reason"] for f in found.facts["failures"]] == ["AssertionError: arithmetic"] * (code == Exit.GATE_FAILED)


def test_claims_that_were_all_skipped_prove_nothing() -> None:
    assert to_exit(0, [Result("claim", "skipped", "needs a GPU", 0.0)]) == Exit.CAPABILITY_MISSING


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["check", "nosuch"], "llama-eagle3"),
        (["check", "--require", "tpu"], "multi_gpu"),
        (["report", "nosuch"], "nosuch"),
        (["bench", "acceptance", "--zoo", "nosuch"], "zoo train"),
        (["bench", "decode", "--blocks", "0"], "at least 1"),
        (["bench", "decode", "--dtype", "float7"], "bfloat16"),
        (["planted", "--bug", "nosuch"], "list bugs"),
        (["zoo", "show", "--zoo", "nosuch"], "zoo train"),
    ],
)
def test_what_cannot_be_opened_is_one_line_and_makes_no_run(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, arguments: list[str], word: str
) -> None:
    runs = ["--runs", str(tmp_path / "runs")] * (arguments[0] != "zoo")

    code, found = said(capsys, *arguments, *runs)

    assert (code, found["exit"]) == (Exit.USAGE, Exit.USAGE)
    assert word in found["error"]
    assert not (tmp_path / "runs").exists()


ZOO_PAIR = ("--target", str(cli.ZOO / "llama"), "--draft", str(cli.ZOO / "llama-eagle3"))


def test_an_audit_judges_the_engines_that_it_is_asked_about(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    runs = ("--runs", str(tmp_path))
    code, found = said(capsys, "audit", *ZOO_PAIR, "--engine", "sglang", "--no-identify", *runs)
    other, wrong = said(capsys, "audit", *ZOO_PAIR, "--engine", "vllm-v1", "--headers-only", *runs)

    assert (code, found["faults"]) == (0, [])
    assert {entry["status"] for entry in found["accounting"]["draft"]["tensors"]} == {"loaded", "shared"}
    (verdict,) = wrong["engines"]["verdicts"]
    assert (other, verdict["outcome"], wrong["faults"]) == (1, "wrongly", ["engines"])
    assert list(verdict["edits"]) == ["eagle_aux_hidden_state_layer_ids"]


def test_a_conversion_ends_in_a_draft_or_in_a_refusal(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    ways = ["--layers", "8", "--to"]
    source, out = str(cli.ZOO / "llama-eagle3"), str(tmp_path / "out")

    assert said(capsys, "convert", source, out, *ways, "vllm-v1")[0] == 0
    again = ["--written-by", "vllm-v1", "--engine", "vllm-v1", "--no-identify", "--runs", str(tmp_path / "runs")]
    assert said(capsys, "audit", *ZOO_PAIR[:3], out, *again)[0] == 0
    assert said(capsys, "convert", source, out, *ways, "vllm-v1")[0] == 2
    for dialect in ("safeailab", "nosuch"):
        code, found = said(capsys, "convert", source, str(tmp_path / dialect), *ways, dialect)
        assert (code, dialect in found["error"]) == (2, True)
        assert not (tmp_path / dialect).exists()


@pytest.mark.parametrize("arguments", [["nosuch"], ["check", "--profile", "nosuch"], ["bench"], ["list", "nosuch"]])
def test_a_wrong_command_line_is_usage(arguments: list[str]) -> None:
    assert cli.run(arguments) == Exit.USAGE


def test_a_folder_that_cannot_be_written_is_the_machine(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")

    code, found = said(capsys, "check", "--runs", str(file))

    assert code == Exit.MACHINE_FAILED
    assert str(file) in found["error"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ZeroDivisionError("ours"), MemoryError("all of it")])
def test_what_nobody_foresaw_concludes_nothing(capsys: pytest.CaptureFixture[str], error: BaseException) -> None:
    def work(desk: Desk) -> Answer:
        raise error

    assert answer(True, work) == Exit.MACHINE_FAILED
    assert json.loads(capsys.readouterr().out)["exit"] == Exit.MACHINE_FAILED


def test_a_stray_print_and_an_endless_number_do_not_spoil_the_json(capsys: pytest.CaptureFixture[str]) -> None:
    def work(desk: Desk) -> Answer:
        sys.stdout.write("a library speaks\n")
        desk.table("[title]", ("[a]",), [("[b]",)])
        return Answer(Exit.PASSED, {"ratios": [1.0, float("nan"), float("inf")]})

    assert answer(True, work) == 0

    out, err = capsys.readouterr()
    assert json.loads(out) == {"exit": 0, "ratios": [1.0, None, None]}
    assert all(word in err for word in ("a library speaks", "[title]", "[a]", "[b]"))


@pytest.mark.parametrize(
    ("errors", "code"),
    [([24.0, 7.0], Exit.PASSED), ([24.0, 0.4], Exit.INCONCLUSIVE), ([24.0, -5.0], Exit.GATE_FAILED)],
)
def test_capture_points_that_cannot_be_told_apart_are_inconclusive(errors: list[float], code: Exit) -> None:
    assert bench.verdict(errors) == code


def test_the_worst_gate_gives_the_code() -> None:
    assert demo.worst([Exit.PASSED, Exit.INCONCLUSIVE, Exit.GATE_FAILED]) == Exit.GATE_FAILED
    assert demo.worst([Exit.PASSED, Exit.CAPABILITY_MISSING]) == Exit.CAPABILITY_MISSING
    assert set(demo.SEVERITY) | {Exit.USAGE} == set(Exit)


@pytest.mark.skipif(torch.cuda.device_count() > 1, reason="this machine has all that can be required")
def test_a_capability_that_is_required_and_missing_has_its_own_code(capsys: pytest.CaptureFixture[str]) -> None:
    code, found = said(capsys, "doctor", "--require", "multi_gpu")

    assert code == Exit.CAPABILITY_MISSING
    assert "multi_gpu needs 2" in found["error"]


def test_doctor_knows_the_machine(capsys: pytest.CaptureFixture[str]) -> None:
    code, found = said(capsys, "doctor")

    assert code == 0
    assert found["environment"]["versions"]["torch"] == torch.__version__
    assert all(found["cannot_run"].values())


def off_by_one(emitted: Any) -> Any:
    return lambda accepted: accepted


def unchanged(function: Any) -> Any:
    return function


@pytest.mark.parametrize(
    ("at", "make", "harmless", "outcome"),
    [
        ("harness.acceptance.emitted", off_by_one, False, "caught"),
        ("harness.acceptance.emitted", off_by_one, True, "loud"),
        ("harness.acceptance.emitted", unchanged, True, "quiet"),
        ("harness.acceptance.emitted", unchanged, False, "survived"),
        ("harness.record.new_run_id", unchanged, False, "survived"),
    ],
)
def test_a_bug_is_caught_only_by_a_claim_that_turns_red(at: str, make: Any, harmless: bool, outcome: str) -> None:
    found = planted.judge(Bug("made up", "here", at, make, COUNTING, harmless))

    assert found.outcome == outcome
    assert found.is_right == (outcome in ("caught", "quiet"))


def test_a_claim_that_is_red_by_itself_proves_nothing() -> None:
    bug = Bug("made up", "here", "harness.acceptance.emitted", off_by_one, f"{COUNTING}::test_nosuch")

    assert planted.judge(bug).outcome == "unproven"
