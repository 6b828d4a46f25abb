"""Claim: every exit code of the design is reached, and a code means the same in every command.

The lines below run here. What takes longer is reached by the claims that ELSEWHERE names, one a command and code.
All numbers are made up.
"""

import ast
import json
from pathlib import Path

import click
import numpy as np
import pytest
import typer

from harness.record import Case, Recorder, Run, Sample
from harness.runner import ROOT, Exit
from suites import cli
from suites.selftest.made_up_nights import RUNS

pytestmark = pytest.mark.correctness

# {0} is a folder with the records of `store`
LINES = (
    (Exit.PASSED, "list suites"),
    (Exit.PASSED, "report {0}/a.jsonl -o {0}/page.html --md {0}/page.md --junit {0}/page.xml"),
    (Exit.PASSED, "history {0}/a.jsonl {0}/same.jsonl"),
    (Exit.PASSED, "compare {0}/a.jsonl {0}/same.jsonl"),
    (Exit.GATE_FAILED, "compare {0}/a.jsonl {0}/slow.jsonl --again {0}/b.jsonl {0}/slow2.jsonl"),
    (Exit.GATE_FAILED, "baseline promote {0}/a.jsonl --as x --reason r"),
    (Exit.USAGE, "report {0}/nosuch"),
    (Exit.USAGE, "compare baseline:nosuch {0}/a.jsonl"),
    (Exit.USAGE, "history {0}/torn.jsonl"),
    (Exit.USAGE, "planted --bug nosuch"),
    (Exit.USAGE, "list nosuch"),
    (Exit.MACHINE_FAILED, "report {0}/a.jsonl -o {0}/a.jsonl/page.html"),
    (Exit.MACHINE_FAILED, "check --runs {0}/a.jsonl"),
    (Exit.INCONCLUSIVE, "compare {0}/a.jsonl {0}/slow.jsonl"),
    (Exit.NOTHING_SELECTED, "compare {0}/empty.jsonl {0}/a.jsonl"),
    (Exit.NOTHING_SELECTED, "history {0}/a.jsonl --metric nosuch"),
    (Exit.CAPABILITY_MISSING, "history {0}/a.jsonl --moved"),
)
CLI, PLANTING, HISTORY = (f"suites/selftest/test_{name}.py" for name in ("cli", "planting", "history"))
ENGINES = "suites/correctness/test_engine_metrics.py"
ELSEWHERE = {
    "check": {
        Exit.PASSED: f"{CLI}::test_check_ends_as_its_claims_do",
        Exit.GATE_FAILED: f"{CLI}::test_check_ends_as_its_claims_do",
        Exit.NOTHING_SELECTED: f"{CLI}::test_check_ends_as_its_claims_do",
        Exit.CAPABILITY_MISSING: f"{CLI}::test_claims_that_were_all_skipped_prove_nothing",
    },
    "audit": {
        Exit.PASSED: f"{CLI}::test_an_audit_judges_the_engines_that_it_is_asked_about",
        Exit.GATE_FAILED: f"{CLI}::test_an_audit_judges_the_engines_that_it_is_asked_about",
    },
    "convert": {
        Exit.PASSED: f"{CLI}::test_a_conversion_ends_in_a_draft_or_in_a_refusal",
        Exit.USAGE: f"{CLI}::test_a_conversion_ends_in_a_draft_or_in_a_refusal",
    },
    "bench": {
        Exit.PASSED: f"{CLI}::test_capture_points_that_cannot_be_told_apart_are_inconclusive",
        Exit.GATE_FAILED: f"{CLI}::test_capture_points_that_cannot_be_told_apart_are_inconclusive",
        Exit.USAGE: f"{CLI}::test_what_cannot_be_opened_is_one_line_and_makes_no_run",
        Exit.INCONCLUSIVE: f"{CLI}::test_capture_points_that_cannot_be_told_apart_are_inconclusive",
    },
    "compare": {
        Exit.PASSED: f"{HISTORY}::test_compare_ends_with_the_code_of_its_verdict",
        Exit.MACHINE_FAILED: f"{HISTORY}::test_only_gates_that_can_stop_something_decide_the_code",
    },
    "probe": {
        Exit.PASSED: f"{ENGINES}::test_a_probe_tells_the_twin_from_another_draft",
        Exit.GATE_FAILED: f"{ENGINES}::test_a_probe_tells_the_twin_from_another_draft",
        Exit.USAGE: f"{ENGINES}::test_how_a_probe_ends",
        Exit.MACHINE_FAILED: f"{ENGINES}::test_how_a_probe_ends",
        Exit.INCONCLUSIVE: f"{ENGINES}::test_how_a_probe_ends",
        Exit.CAPABILITY_MISSING: f"{ENGINES}::test_how_a_probe_ends",
    },
    "demo": {Exit.GATE_FAILED: f"{CLI}::test_the_worst_gate_gives_the_code"},
    "doctor": {
        Exit.PASSED: f"{CLI}::test_doctor_knows_the_machine",
        Exit.CAPABILITY_MISSING: f"{CLI}::test_a_capability_that_is_required_and_missing_has_its_own_code",
    },
    "any": {
        Exit.USAGE: f"{CLI}::test_a_wrong_command_line_is_usage",
        Exit.MACHINE_FAILED: f"{CLI}::test_what_nobody_foresaw_concludes_nothing",
    },
}


def speeds(path: Path, run: str, factor: float | None) -> None:
    """A record of eight processes of nearly one speed; None: of nothing."""
    case, rng = Case(pair="p", gate="passed", num_draft_tokens=1), np.random.default_rng(int(run[-2:]))
    environment = {"source": {"commit": "c" * 40, "dirty": False}, "cpu": {"name": "c"}, "gpu": {}}
    with Recorder(path, run) as recorder:
        recorder.append(Run(started="2026-01-02", environment=environment))
        for process in range(8 if factor else 0):
            value = 100.0 * (factor or 0) * float(np.exp(rng.normal(0, 0.001)))
            recorder.append(
                Sample(case=case, metric="decode", unit="tokens/s", better="up", values=(value,), process=process)
            )


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Records of two equal sides, of a slower one, each measured twice; of nothing; and one that is no record."""
    folder = tmp_path_factory.mktemp("store")
    factors = {"a": 1.0, "b": 1.0, "same": 1.0, "slow": 0.9, "slow2": 0.9, "empty": None}
    for run, (name, factor) in zip(RUNS, factors.items(), strict=False):
        speeds(folder / f"{name}.jsonl", run, factor)
    (folder / "torn.jsonl").write_text("this is no record\n")
    return folder


@pytest.mark.parametrize(("code", "line"), LINES, ids=[f"{code}-{line.split()[0]}" for code, line in LINES])
def test_a_line_ends_with_its_code_and_says_so_in_json(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, store: Path, code: Exit, line: str
) -> None:
    monkeypatch.setattr("suites.commands.history.find_spec", lambda name: None)
    keeps = line.startswith(("compare", "baseline", "planted"))
    runs = ["--runs", str(store / "runs")] if keeps else []

    ended = cli.run([*line.format(store).split(), *runs, "--json"])

    out = capsys.readouterr().out
    assert ended == code
    # a wrong command line has no command that could write JSON
    assert out == "" if line == "list nosuch" else json.loads(out)["exit"] == code


def test_every_code_of_the_design_is_reached() -> None:
    listed = {line.split()[0]: line.split()[1] for line in cli.__doc__.splitlines() if line.strip()[:1].isdigit()}

    assert {code for code, _ in LINES} == set(Exit)
    assert set(listed) | {"4", "5", "6"} == {str(int(code)) for code in Exit}


def names_in(file: str) -> set[str]:
    """The names of the tests in a file."""
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("command", ELSEWHERE)
def test_what_is_reached_elsewhere_is_there(command: str) -> None:
    for node in ELSEWHERE[command].values():
        file, _, name = node.partition("::")
        assert name in names_in(file), node


def commands() -> list[tuple[str, ...]]:
    """Every command and subcommand."""
    found, waiting = [], [((), typer.main.get_command(cli.app))]
    while waiting:
        names, command = waiting.pop()
        if isinstance(command, click.Group) or hasattr(command, "commands"):
            waiting += [((*names, name), one) for name, one in command.commands.items()]
        else:
            found.append(names)
    return sorted(found)


def test_every_command_refuses_an_option_that_it_does_not_have(capsys: pytest.CaptureFixture[str]) -> None:
    found = commands()

    assert len(found) >= 15
    assert {" ".join(names): cli.run([*names, "--no-such-option"]) for names in found} == {
        " ".join(names): Exit.USAGE for names in found
    }
    assert "no-such-option" in capsys.readouterr().err
