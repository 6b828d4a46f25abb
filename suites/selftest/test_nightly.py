"""Claim: a night does its steps in order, once, under a lock, and what did not run is owed until it runs.

Born of vLLM #41281: acceptance claims that were skipped on every machine, while the regression that they were
written for reached production.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from harness import pinning
from harness.record import Check, Recorder, RecordError, Run, Step, read
from harness.runner import ROOT, Exit
from reports.store import gather
from suites.bisect import interleaved
from suites.bisect.commits import git, sha_of
from suites.bisect.probing import Site
from suites.bisect.worktrees import INSTRUMENTS
from suites.commands import runs as kept
from suites.commands.desk import Desk
from suites.commands.nightly import last_green
from suites.commands.runs import RECORDS, begin
from suites.nightly import lock, steps
from suites.nightly.debts import debts
from suites.nightly.lock import Busy, hold
from suites.nightly.night import TINY, Found, Night, ended, spend

pytestmark = pytest.mark.correctness

HOLDER = """
import sys, time
from pathlib import Path
from suites.nightly.lock import hold
with hold(float(sys.argv[2]), folder=Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def holder(folder: Path, hours: float = 1.0) -> subprocess.Popen[str]:
    """Another process that has the lock."""
    command = [sys.executable, "-S", "-c", HOLDER, str(folder), str(hours)]
    path = os.pathsep.join([str(ROOT), *(p for p in sys.path if p.endswith("site-packages"))])
    process = subprocess.Popen(command, env={"PYTHONPATH": path}, stdout=subprocess.PIPE, text=True)
    assert process.stdout
    assert process.stdout.readline() == "held\n"
    return process


def test_the_gpus_have_one_owner_at_a_time(tmp_path: Path) -> None:
    process = holder(tmp_path)
    try:
        with pytest.raises(Busy, match=rf"pid {process.pid} on .*until "), hold(1.0, folder=tmp_path):
            pass
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.communicate()

    # the system took the lock back; its note tells whose it was
    with hold(1.0, folder=tmp_path) as held:
        assert held.taken_over
        assert held.taken_over.pid == process.pid
        assert json.loads((tmp_path / f"{lock.NAME}.owner.json").read_text())["pid"] == os.getpid()
    with hold(1.0, folder=tmp_path) as held:
        assert held.taken_over is None


def test_who_is_late_is_named_and_not_pushed_aside(tmp_path: Path) -> None:
    process = holder(tmp_path, hours=0.0)
    try:
        time.sleep(1.1)
        with pytest.raises(Busy, match="which is over"), hold(1.0, folder=tmp_path):
            pass
    finally:
        process.kill()
        process.communicate()


def night(folder: Path, recorder: Recorder) -> Night:
    return Night(TINY, folder, "h" * 40, "g" * 40, folder, folder / "page.html", (), Desk(), recorder)


OWNER = lock.Owner("a", 1, "here", "2026-01-01T00:00:00+00:00", (datetime.now(UTC) + timedelta(hours=9)).isoformat())
HELD = lock.Held(OWNER, None)


def test_a_night_that_was_killed_goes_on_and_repeats_no_step(tmp_path: Path) -> None:
    done: list[str] = []

    def work(name: str, exit_: Exit = Exit.PASSED) -> Found:
        done.append(name)
        if name == "b" and done.count("b") == 1:
            raise KeyboardInterrupt
        return Found(exit_, "" if exit_ == Exit.PASSED else "red", {"saw": name})

    table = (("a", lambda n: work("a", Exit.GATE_FAILED)), ("b", lambda n: work("b")),
             ("report", lambda n: work(f"report {n.facts['a']['saw']}")))  # fmt: skip
    with Recorder(tmp_path / RECORDS) as recorder:
        recorder.append(Run(started="", environment={"source": {"commit": "h" * 40}}))
    with Recorder(tmp_path / RECORDS, recorder.run_id) as recorder, pytest.raises(KeyboardInterrupt):
        spend(night(tmp_path, recorder), table, HELD, {})

    with Recorder(tmp_path / RECORDS, recorder.run_id) as again:
        code = spend(night(tmp_path, again), table, HELD, ended(tmp_path / RECORDS, "h" * 40))

    assert done == ["a", "b", "b", "report a"]
    assert code == Exit.GATE_FAILED
    with pytest.raises(RecordError, match="check that commit out"):
        ended(tmp_path / RECORDS, "i" * 40)


def test_a_broken_step_does_not_cost_the_page(tmp_path: Path) -> None:
    def breaks(n: Night) -> Found:
        raise ValueError("no such thing")

    with Recorder(tmp_path / RECORDS) as recorder:
        table = (("again", breaks), ("report", lambda n: Found(Exit.PASSED, "")))
        assert spend(night(tmp_path, recorder), table, HELD, {}) == Exit.MACHINE_FAILED

    found = [line for line in read(tmp_path / RECORDS) if isinstance(line, Step)]
    assert [(step.name, step.status) for step in found] == [("again", "error"), ("report", "passed")]


def test_past_the_deadline_only_the_page_is_written(tmp_path: Path) -> None:
    late = lock.Held(replace(OWNER, deadline="2026-01-01T00:00:00+00:00"), None)
    with Recorder(tmp_path / RECORDS) as recorder:
        table = (("speed", lambda n: Found(Exit.PASSED, "")), ("report", lambda n: Found(Exit.PASSED, "")))
        spend(night(tmp_path, recorder), table, late, {})

    found = [line for line in read(tmp_path / RECORDS) if isinstance(line, Step)]
    assert [step.status for step in found] == ["skipped", "passed"]


def test_the_steps_are_the_ones_that_were_promised() -> None:
    names = [name for name, _ in steps.STEPS]

    assert names == ["doctor", "correctness", "certificate", "speed", "compare", "again", "bisect", "report"]
    assert all(name in (steps.__doc__ or "") for name in names)


def test_pairs_with_red_claims_are_not_timed(tmp_path: Path) -> None:
    with Recorder(tmp_path / RECORDS) as recorder:
        tonight = night(tmp_path, recorder)
        tonight.facts["correctness"] = {"failures": []}
        assert "--pair=llama-eagle3" in steps.bench_line(tonight)
        tonight.facts["correctness"] = {"failures": [{"pair": "eagle3", "claim": "t.py::test_x[1]"}]}
        assert steps.bench_line(tonight) == []
        tonight.facts["again"] = {"lost": []}
        assert list(steps.red(tonight)) == [("--claim", "t.py::test_x[1]")]


def nights(folder: Path, *statuses: str) -> list[str]:
    """Runs one after the other in which one claim of one pair ended so."""
    ids = []
    for number, status in enumerate(statuses):
        reason = "" if status == "passed" else "Skipped: needs 1 NVIDIA GPU(s)"
        # ids begin with their time
        run = f"{number:026d}"
        with Recorder(folder / run / RECORDS, run) as recorder:
            recorder.append(Run(started=f"2026-01-{number + 1:02d}T00:00:00Z"))
            recorder.append(Check(claim="t.py::test_graph[a]", pair="p", status=status, reason=reason))
        ids.append(run)
    return ids


def test_a_debt_says_since_when_a_claim_has_not_run(tmp_path: Path) -> None:
    ids = nights(tmp_path, "skipped", "passed", "skipped", "skipped")

    (debt,) = debts(gather(tmp_path), ids[-1:])

    assert (debt.what, debt.pair, debt.nights) == ("t.py::test_graph", "p", 2)
    assert (debt.last_run, debt.last) == (ids[1], "2026-01-02T00:00:00Z")
    assert debts(gather(tmp_path), ids[1:2]) == []
    assert debts(gather(tmp_path), ids[:1])[0].reason == "needs 1 NVIDIA GPU(s)"


def test_the_last_green_night_gives_the_commit_to_hold_against(tmp_path: Path) -> None:
    for number, (commit, status) in enumerate([("aa", "passed"), ("bb", "failed"), ("cc", "passed")]):
        with Recorder(tmp_path / str(number) / RECORDS) as recorder:
            recorder.append(Run(started="", environment={"source": {"commit": commit}}))
            recorder.append(Step(name="night", status=status, reason="red" if status == "failed" else ""))

    assert last_green(tmp_path, head="dd") == "cc"
    assert last_green(tmp_path, head="cc") == "aa"
    assert last_green(tmp_path / "none", head="dd") == ""


def test_claims_are_believed_over_the_very_same_files_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = {"commit": "a" * 40, "dirty": False, "diff_sha256": None, "reason": ""}
    monkeypatch.setattr(kept, "describe", lambda: {"source": here, "versions": {"draftproof": "1"}})
    monkeypatch.setattr(kept, "source", lambda: here)
    with begin(tmp_path) as held:
        held.append(Check(claim="t.py::test_x", pair="p", status="passed"))

    with begin(tmp_path, believe=str(tmp_path / held.run_id)) as recorder:
        pass
    checks = [line for line in read(recorder.path) if isinstance(line, Check)]
    assert [(check.claim, check.run, check.extra["held_in"]) for check in checks] == [
        ("t.py::test_x", recorder.run_id, held.run_id)
    ]
    monkeypatch.setattr(kept, "source", lambda: {**here, "dirty": True, "diff_sha256": "b"})
    with pytest.raises(RecordError, match="other files"):
        begin(tmp_path, believe=str(tmp_path / held.run_id))


@pytest.mark.parametrize(
    ("environment", "num_gpus", "seen"),
    [
        ({"DRAFTPROOF_GPUS": "each", "PYTEST_XDIST_WORKER": "gw2"}, 4, "2"),
        ({"DRAFTPROOF_GPUS": "each", "PYTEST_XDIST_WORKER": "gw5"}, 4, "1"),
        ({"DRAFTPROOF_GPUS": "each", "PYTEST_XDIST_WORKER": "gw1", "CUDA_VISIBLE_DEVICES": "6, 7"}, 8, "7"),
        ({"DRAFTPROOF_GPUS": "all", "PYTEST_XDIST_WORKER": "gw1"}, 4, None),
        ({"PYTEST_XDIST_WORKER": "gw1"}, 4, None),
        ({"DRAFTPROOF_GPUS": "each", "PYTEST_XDIST_WORKER": "gw1"}, 0, None),
    ],
)
def test_each_worker_has_a_gpu_of_its_own(environment: dict[str, str], num_gpus: int, seen: str | None) -> None:
    pinning.pin(environment, num_gpus)

    assert environment.get("CUDA_VISIBLE_DEVICES") == seen


def test_claims_of_several_gpus_run_where_all_are_seen_and_nowhere_else() -> None:
    for way, left_out in (("each", [True, False]), ("all", [False, True]), ("", [False, False])):
        assert [pinning.is_left_out(several, {"DRAFTPROOF_GPUS": way}) for several in (True, False)] == left_out


def test_two_commits_take_turns_under_the_instruments_of_the_second(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    git(tmp_path, "init", "--quiet", "--initial-branch=main")
    for word in ("old", "new"):
        for name in (*INSTRUMENTS, "optimized"):
            place = tmp_path / name if "." in name else tmp_path / name / "page.py"
            place.parent.mkdir(exist_ok=True)
            place.write_text("" if place.suffix == ".toml" else word)
        git(tmp_path, "add", "--all")
        git(tmp_path, "-c", "user.name=a", "-c", "user.email=a@example.org", "commit", "--quiet", "--message", word)
    seen, gates = [], []

    def gated(site: Site, claims: Sequence[str], bench: Sequence[str], *rest: object) -> list[str]:
        gates.append(site.name)
        return [*bench, site.name]

    def measure(site: Site, bench: Sequence[str], runs: Path, timeout: float) -> str:
        assert bench == ["decode", site.name]
        seen.append((runs.name, *((site.tree / room / "page.py").read_text() for room in ("optimized", "suites"))))
        return ""

    monkeypatch.setattr(interleaved, "gated", gated)
    monkeypatch.setattr(interleaved, "measure", measure)
    sides = sha_of(tmp_path, "HEAD~1"), sha_of(tmp_path, "HEAD")

    interleaved.race(tmp_path, sides, ["decode"], tmp_path / "runs", processes=2)
    interleaved.race(tmp_path, (sides[1], sides[1]), ["decode"], tmp_path / "runs", processes=1)

    assert seen == [("a", "old", "new"), ("b", "new", "new"), ("b", "new", "new"), ("a", "old", "new"),
                    ("a", "new", "new"), ("b", "new", "new")]  # fmt: skip
    # one commit has one gate
    assert gates == [*sides, sides[1]]
