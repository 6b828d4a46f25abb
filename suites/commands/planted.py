"""`draftproof planted`: put every known bug into the code that runs, and see whether its claim turns red.

Each claim must be green without a bug, else its red says nothing. Claims run in worker processes that import once and
then run many bugs; bugs of one claim stay in one process, which remembers what the claim said without them.
"""

import multiprocessing
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import cache
from typing import Any, NamedTuple

from harness.planting import Bug, planted
from harness.record import Planted, Recorder
from harness.runner import Exit, Outcome, run
from suites.commands.desk import Answer, Desk, NothingSelected, UsageFault

PINNED = ("--profile=pinned",)


class Verdict(NamedTuple):
    """What became of one bug."""

    bug: str
    outcome: str
    """caught, survived, quiet, loud, unproven, or not run"""
    why: str
    seconds: float

    @property
    def is_right(self) -> bool:
        """A bug that was caught, a harmless change that stayed green, or one that cannot run here."""
        return self.outcome in ("caught", "quiet", "not run")


def select(names: Sequence[str] = ()) -> list[Bug]:
    """The bugs of these names, all when there are none."""
    from suites.planted import BUGS

    known = {bug.name: bug for bug in BUGS}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise UsageFault(f"no planted bug is named {unknown[0]!r}; `draftproof list bugs` names them")
    return [known[name] for name in names] if names else list(known.values())


def score(desk: Desk, begin: Callable[[], Recorder], bugs: Sequence[Bug], jobs: int = 2) -> Answer:
    """Plant each bug and record who caught it; GATE_FAILED where one survives."""
    if not bugs:
        raise NothingSelected("no bug is selected")
    if jobs < 1:
        raise UsageFault(f"--jobs is {jobs}; at least 1 is needed")
    recorder = begin()
    verdicts = list(judge_all(desk, bugs, jobs))
    by_name = {bug.name: bug for bug in bugs}
    for verdict in verdicts:
        if verdict.outcome != "not run":
            recorder.append(_record(by_name[verdict.bug], verdict))
    wrong = [verdict for verdict in verdicts if not verdict.is_right]
    show(desk, bugs, verdicts)
    facts = {
        "run": recorder.run_id,
        "records": str(recorder.path),
        "caught": sum(v.outcome == "caught" for v in verdicts),
        "bugs": sum(not bug.harmless for bug in bugs),
        "quiet": sum(v.outcome == "quiet" for v in verdicts),
        "harmless": sum(bug.harmless for bug in bugs),
        "not_run": [v.bug for v in verdicts if v.outcome == "not run"],
        "wrong": [{"bug": v.bug, "outcome": v.outcome, "why": v.why} for v in wrong],
    }
    ran = any(verdict.outcome != "not run" for verdict in verdicts)
    return Answer(Exit.GATE_FAILED if wrong else Exit.PASSED if ran else Exit.CAPABILITY_MISSING, facts)


def judge_all(desk: Desk, bugs: Sequence[Bug], jobs: int) -> Iterable[Verdict]:
    """Verdicts as they come; a fresh process for each worker, so that a bug meets no half-changed module."""
    claims: dict[str, list[str]] = {}
    for bug in bugs:
        claims.setdefault(bug.claim, []).append(bug.name)
    with desk.progress() as progress, ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        bar = progress.add_task("planted bugs", total=len(bugs))
        for done in as_completed([pool.submit(judge_claim, names) for names in claims.values()]):
            progress.advance(bar, len(done.result()))
            yield from done.result()


def judge_claim(names: Sequence[str]) -> list[Verdict]:
    """All bugs of one claim, in this process."""
    return [judge(bug) for bug in select(names)]


def judge(bug: Bug) -> Verdict:
    """Its claim without the bug, then with it."""
    start = time.monotonic()
    without = unharmed(bug.claim)
    if not without.is_green:
        skipped = without.exit == Exit.CAPABILITY_MISSING
        why = without.results[0].message if skipped else _why_not_green(without)
        return Verdict(bug.name, "not run" if skipped else "unproven", why, time.monotonic() - start)
    with planted(bug) as bed:
        outcome = claim(bug.claim)
    seconds = time.monotonic() - start
    if not bed.reached:
        return Verdict(bug.name, "survived", "the claim never reached it", seconds)
    if outcome.is_red:
        return Verdict(bug.name, "loud" if bug.harmless else "caught", outcome.first_failure, seconds)
    if outcome.is_green:
        return Verdict(bug.name, "quiet" if bug.harmless else "survived", "the claim stayed green", seconds)
    return Verdict(bug.name, "unproven", _why_not_green(outcome), seconds)


def claim(name: str) -> Outcome:
    """One claim on its pinned examples, in this process."""
    return run([name], options=PINNED, in_process=True)


@cache
def unharmed(name: str) -> Outcome:
    """The same before any bug, once a process."""
    return claim(name)


def _why_not_green(outcome: Outcome) -> str:
    last = (outcome.text.strip().splitlines() or [""])[-1]
    return f"the claim ended with {outcome.exit.name.lower()}: {outcome.first_failure or last}"


def _record(bug: Bug, verdict: Verdict) -> Planted:
    is_red = verdict.outcome in ("caught", "loud")
    return Planted(
        bug=bug.name,
        origin=bug.origin,
        claim=bug.claim,
        caught=is_red,
        caught_by=bug.claim if is_red else "",
        harmless=bug.harmless,
        duration_s=verdict.seconds,
        extra={"outcome": verdict.outcome, "why": verdict.why[:500]},
    )


def show(desk: Desk, bugs: Sequence[Bug], verdicts: Sequence[Verdict]) -> None:
    """The score, what went wrong first."""
    by_name = {verdict.bug: verdict for verdict in verdicts}
    ordered = sorted(bugs, key=lambda bug: by_name[bug.name].is_right)
    rows: list[tuple[Any, ...]] = []
    for bug in ordered:
        verdict = by_name[bug.name]
        why = "" if verdict.outcome in ("caught", "quiet") else verdict.why[:200]
        rows.append((bug.name, verdict.outcome, bug.claim.rpartition("/")[2], f"{verdict.seconds:.1f}", why))
    desk.table("Planted bugs", ("bug", "outcome", "claim", "s", ""), rows)
    caught = sum(v.outcome == "caught" for v in verdicts)
    quiet = sum(v.outcome == "quiet" for v in verdicts)
    harmless = sum(bug.harmless for bug in bugs)
    desk.say(f"{caught} of {len(bugs) - harmless} bugs caught, {quiet} of {harmless} harmless changes stayed green")
