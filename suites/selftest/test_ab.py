"""Claim: an A/B runs each commit in processes of its own that take turns, and says which records are whose.

Born of nightly figures that were compared across days, where the machine is a third difference.
"""

import json
import subprocess
from pathlib import Path

import pytest

from harness.runner import Exit
from suites.benchmarks import ab
from suites.commands.bench import Options
from suites.commands.desk import Desk, UsageFault

pytestmark = pytest.mark.correctness

CLI = """
import pathlib, sys
folder = pathlib.Path(sys.argv[sys.argv.index("--runs") + 1])
run = folder / f"run{len(list(folder.glob('*')))}"
run.mkdir(parents=True)
(run / "records.jsonl").write_text("SAID " + " ".join(sys.argv[1:3]))
sys.exit(CODE)
"""


def git(root: Path, *arguments: str) -> None:
    who = ["-c", "user.name=n", "-c", "user.email=e@example.org"]
    subprocess.run(["git", "-C", str(root), *who, *arguments], check=True, capture_output=True)


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """Two commits of a command that writes what it is."""
    root = tmp_path / "repository"
    (root / "suites").mkdir(parents=True)
    (root / "suites" / "__init__.py").touch()
    git(root, "init", "--quiet")
    for said, code in (("old", 0), ("new", 0)):
        (root / "suites" / "cli.py").write_text(CLI.replace("SAID", said).replace("CODE", str(code)))
        git(root, "add", ".")
        git(root, "commit", "--quiet", "-m", said)
    return root


@pytest.mark.parametrize(("processes", "turns"), [(1, "ab"), (2, "abba"), (3, "abbaba"), (4, "abbabaab")])
def test_sides_take_turns_there_and_back(processes: int, turns: str) -> None:
    assert ab.order(processes) == turns


def test_each_side_runs_its_own_commit(repository: Path, tmp_path: Path) -> None:
    done = ab.race(Desk(is_json=True), "HEAD~1", ["bench", "decode"], tmp_path / "runs", 2, repository)

    said = {side: [Path(record).read_text() for record in done.facts[side]] for side in "ab"}
    assert done.exit == Exit.PASSED
    assert done.facts["order"] == "abba"
    assert said == {"a": ["old bench decode"] * 2, "b": ["new bench decode"] * 2}
    assert json.dumps(done.facts)
    left = subprocess.run(
        ["git", "-C", str(repository), "worktree", "list"], capture_output=True, text=True, check=True
    )
    assert len(left.stdout.splitlines()) == 1


def test_a_process_that_fails_ends_the_race_with_its_code(
    repository: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (repository / "suites" / "cli.py").write_text('import sys; print("broken here"); sys.exit(3)')
    git(repository, "commit", "--quiet", "-a", "-m", "broken")

    done = ab.race(Desk(is_json=True), "HEAD~1", ["bench", "decode"], tmp_path / "runs", 2, repository)

    assert done.exit == Exit.MACHINE_FAILED
    assert "broken here" in capsys.readouterr().err


def test_a_revision_that_is_none_is_refused_by_name(repository: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageFault, match="'nothing' names no commit"):
        ab.race(Desk(is_json=True), "nothing", [], tmp_path, 1, repository)
    with pytest.raises(UsageFault, match="at least one process"):
        ab.race(Desk(is_json=True), "HEAD", [], tmp_path, 0, repository)


def test_options_are_a_command_line() -> None:
    said = Options(pairs=("llama-eagle3",), dtypes=("float32",), big=False, shapes=("Qwen3-30B-A3B-mtp",)).arguments

    assert said[:2] == ["--pair", "llama-eagle3"]
    assert said[-1] == "--no-big"
    assert said[said.index("--shape") :][:2] == ["--shape", "Qwen3-30B-A3B-mtp"]
