"""A night: what it is asked, what it knows so far, and its steps one after the other, each a line of its record.

A night that is killed goes on with `--resume`: steps that ended are believed, the one under way is done again.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from time import monotonic
from typing import Any, NamedTuple

from harness.environment import ROOT
from harness.record import Recorder, RecordError, Run, Step, read
from harness.runner import Exit
from reports.gates import GATES
from suites.bisect.measuring import command
from suites.bisect.probing import Site
from suites.commands.desk import Desk
from suites.nightly.lock import Held

TINY_GATES = Path(__file__).with_name("tiny.toml")
END = "night"
"""the last step: how all of it ended"""
SEVERITY = (
    Exit.GATE_FAILED,
    Exit.MACHINE_FAILED,
    Exit.CAPABILITY_MISSING,
    Exit.USAGE,
    Exit.INCONCLUSIVE,
    Exit.NOTHING_SELECTED,
    Exit.PASSED,
)
"""the gravest first: a proven fault, then whatever left questions open"""


@dataclass(frozen=True)
class Plan:
    """How much a night does."""

    profile: str
    """of the record; `tiny` is no evidence about a machine"""
    check: tuple[str, ...]
    """the line of `check`"""
    gate: tuple[str, ...]
    """the line of `check` that opens the gate of a tree before it is timed"""
    bench: tuple[str, ...]
    processes: int
    """of bench, a side"""
    gates: Path = GATES
    needs_certificate: bool = True
    """no verdict on a night that could not have seen a change"""


FULL = Plan(
    profile="nightly",
    check=("--profile=nightly",),
    gate=("--profile=quick",),
    bench=("all",),
    processes=10,
)
TINY = Plan(
    profile="tiny",
    check=("llama-eagle3", "--profile=pinned", "-k", "test_twin and not test_twin_ and not test_twins"),
    gate=("llama-eagle3", "--profile=pinned", "-k", "test_twin and not test_twin_ and not test_twins"),
    bench=("decode", "--pair=llama-eagle3", "--no-big", "--blocks=1", "--dtype=float32", "--num-prompts=4"),
    processes=3,
    gates=TINY_GATES,
    needs_certificate=False,
)


class Found(NamedTuple):
    """How a step ended."""

    exit: Exit
    reason: str
    facts: Mapping[str, Any] = {}
    """what later steps need, as plain values"""
    runs: tuple[str, ...] = ()
    is_skipped: bool = False

    @property
    def status(self) -> str:
        if self.is_skipped:
            return "skipped"
        return "passed" if self.exit == Exit.PASSED else "failed"


@dataclass
class Night:
    """Everything that steps share."""

    plan: Plan
    repository: Path
    head: str
    green: str
    """the commit of the last night that passed, empty where there is none"""
    runs: Path
    out: Path
    """the page; summary and JUnit lie beside it"""
    require: tuple[str, ...]
    desk: Desk
    recorder: Recorder
    device: str = "cpu"
    facts: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    """of the steps that ended"""
    ids: list[str] = field(default_factory=list)
    """runs that the night wrote"""

    def call(
        self, *words: str, environment: Mapping[str, str] | None = None, hours: float = 24.0
    ) -> tuple[Exit, dict[str, Any], str]:
        """One command line of draftproof, in a process of its own."""
        site = Site("head", ROOT, Path(sys.executable), environment or {})
        code, facts, said = command(site, words, self.runs, 3600 * hours)
        return Exit(code) if code in set(Exit) else Exit.MACHINE_FAILED, facts, said


Work = Callable[[Night], Found]


def spend(night: Night, steps: Sequence[tuple[str, Work]], held: Held, done: Mapping[str, Step]) -> Exit:
    """Every step that is not done yet; the exit code of the gravest."""
    codes = []
    for name, work in steps:
        step = done.get(name) or take(night, name, work, held)
        night.facts[name] = step.extra.get("facts", {})
        night.ids += [run for run in step.runs if run not in night.ids]
        night.desk.say(f"{name}: {step.status}{f'; {step.reason}' if step.reason else ''}")
        if step.status != "skipped":
            codes.append(Exit(step.exit))
        if name == "doctor" and step.status != "passed":
            break
    return min(codes, key=SEVERITY.index, default=Exit.MACHINE_FAILED)


def take(night: Night, name: str, work: Work, held: Held) -> Step:
    """One step, recorded."""
    started, start = datetime.now(UTC).isoformat(timespec="seconds"), monotonic()
    if held.is_late and name != "report":
        found = Found(Exit.INCONCLUSIVE, f"the deadline {held.owner.deadline} is over", is_skipped=True)
        status = found.status
    else:
        try:
            found = work(night)
            status = found.status
        except Exception as error:
            # one broken step must not cost the page of the others
            found, status = Found(Exit.MACHINE_FAILED, f"{type(error).__name__}: {error}"), "error"
    step = Step(
        name=name,
        status=status,
        exit=int(found.exit),
        started=started,
        duration_s=monotonic() - start,
        reason=found.reason,
        runs=found.runs,
        extra={"facts": found.facts},
    )
    night.recorder.append(step)
    return step


def ended(file: Path, head: str) -> dict[str, Step]:
    """The steps of a killed night over this commit that need not be done again."""
    lines = read(file)
    steps = [line for line in lines if isinstance(line, Step)]
    of = {run.environment.get("source", {}).get("commit") for run in lines if isinstance(run, Run)}
    if of != {head}:
        raise RecordError(f"{file}: a night of {', '.join(map(str, of))}; check that commit out to go on with it")
    return {step.name: step for step in steps if step.status != "error" and step.name not in ("report", END)}
