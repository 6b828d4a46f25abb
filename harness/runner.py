"""Runs claims and says how they ended, in the exit codes of the command line.

    pytest          ours
    0 all passed    0, or 6 if every selected claim was skipped: nothing was proven here
    1 failures      1
    2 interrupted   1 where a claim could not even be collected, else 3
    3 internal      3
    4 usage         2
    5 none found    5
    time-out or a killed process: 3

A claim runs in a process of its own, except where something planted in this process must reach it (`in_process`).
"""

import contextlib
import io
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).resolve().parent.parent


class Exit(IntEnum):
    """Exit codes, the same in every command."""

    PASSED = 0
    GATE_FAILED = 1
    USAGE = 2
    MACHINE_FAILED = 3
    INCONCLUSIVE = 4
    NOTHING_SELECTED = 5
    CAPABILITY_MISSING = 6


@dataclass(frozen=True)
class Result:
    """One test of a claim."""

    name: str
    status: str
    """passed, failed, error or skipped"""
    message: str
    seconds: float


@dataclass(frozen=True)
class Outcome:
    """How a run of claims ended."""

    exit: Exit
    results: tuple[Result, ...]
    text: str
    """what pytest printed"""
    seconds: float

    @property
    def is_green(self) -> bool:
        """At least one claim ran, and none failed."""
        return self.exit == Exit.PASSED

    @property
    def is_red(self) -> bool:
        """A claim said no; a machine that failed, or nothing selected, is neither red nor green."""
        return self.exit == Exit.GATE_FAILED

    @property
    def first_failure(self) -> str:
        """Name and message of the first test that did not pass; empty if there is none."""
        return next((f"{r.name}: {r.message}" for r in self.results if r.status in ("failed", "error")), "")

    def num(self, status: str) -> int:
        """How many tests ended so."""
        return sum(result.status == status for result in self.results)


def run(
    claims: Sequence[str],
    *,
    options: Sequence[str] = (),
    in_process: bool = False,
    environment: Mapping[str, str] | None = None,
    timeout: float = 600.0,
    root: Path = ROOT,
    python: str = sys.executable,
) -> Outcome:
    """Run pytest node ids (none: the test paths of the project).

    python        the interpreter of a process of its own
    options       further pytest options: ("-m", "correctness"), ("--hypothesis-profile", "ci")
    environment   set in addition for the process; not with in_process
    timeout       seconds before a process is given up; a claim in this process has pytest's own limits only
    """
    if in_process and environment:
        raise ValueError("a claim in this process sees this process's environment")
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        # the cache would tie one run to another
        arguments = [*claims, *options, "-p", "no:cacheprovider", f"--junitxml={report}", f"--rootdir={root}"]
        start = time.monotonic()
        code, text = _here(arguments, root) if in_process else _apart(python, arguments, environment, timeout, root)
        seconds = time.monotonic() - start
        results = read_report(report)
    return Outcome(to_exit(code, results), results, text, seconds)


def to_exit(code: int | None, results: Sequence[Result]) -> Exit:
    """Our exit code for pytest's; None: it was given up."""
    statuses = {result.status for result in results}
    if code == pytest.ExitCode.OK:
        return Exit.CAPABILITY_MISSING if statuses == {"skipped"} else Exit.PASSED
    if code == pytest.ExitCode.TESTS_FAILED:
        return Exit.GATE_FAILED
    if code == pytest.ExitCode.INTERRUPTED:
        return Exit.GATE_FAILED if statuses & {"error", "failed"} else Exit.MACHINE_FAILED
    if code == pytest.ExitCode.USAGE_ERROR:
        return Exit.USAGE
    if code == pytest.ExitCode.NO_TESTS_COLLECTED:
        return Exit.NOTHING_SELECTED
    return Exit.MACHINE_FAILED


def read_report(path: Path) -> tuple[Result, ...]:
    """The tests of a junit report; none if pytest did not come to write it."""
    if not path.is_file():
        return ()
    results = []
    for case in ElementTree.parse(path).getroot().iter("testcase"):
        name = f"{case.get('classname', '')}::{case.get('name', '')}".lstrip(":")
        status, message = "passed", ""
        for tag, word in (("error", "error"), ("failure", "failed"), ("skipped", "skipped")):
            if (found := case.find(tag)) is not None:
                status, message = word, found.get("message") or ""
                break
        results.append(Result(name, status, message, float(case.get("time") or 0.0)))
    return tuple(results)


def _apart(
    python: str, arguments: Sequence[str], environment: Mapping[str, str] | None, timeout: float, root: Path
) -> tuple[int | None, str]:
    command = [python, "-m", "pytest", *arguments]
    try:
        done = subprocess.run(
            command,
            cwd=root,
            env={**os.environ, **(environment or {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=timeout,
            check=False,
        )
    except subprocess.TimeoutExpired as late:
        said = late.stdout or b""
        text = said if isinstance(said, str) else said.decode(errors="replace")
        return None, f"{text}\ngiven up after {timeout} s"
    return done.returncode, done.stdout


def _here(arguments: Sequence[str], root: Path) -> tuple[int, str]:
    said = io.StringIO()
    before = Path.cwd()
    # this process may have imported plugins before pytest could rewrite their assertions; it is no fault of a claim
    quiet = ["-W", "ignore::pytest.PytestAssertRewriteWarning", "-n0"]
    # at its end it would collect the garbage of all that this process holds, a second each time
    quiet += ["-p", "no:unraisableexception"]
    # pytest names the running test in this variable and takes it away at the end: an outer test wants it back
    running = os.environ.get("PYTEST_CURRENT_TEST")
    try:
        os.chdir(root)
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            code = int(pytest.main([*arguments, *quiet]))
    finally:
        os.chdir(before)
        if running is not None:
            os.environ["PYTEST_CURRENT_TEST"] = running
    return code, said.getvalue()
