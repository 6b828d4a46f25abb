"""Several runs as one state: each check, case, planted change and verdict as its newest run left it.

A night that repeats what an earlier night asked replaces its answer; a run that asked something else stands beside it.
What was run on another machine replaces nothing, so no red answer of one machine hides behind a green one of another.
Run ids begin with their time, so the largest is the newest. Runs of the same files on one evening are processes of
one measurement, or the same question asked twice: they stand side by side, and a check that failed once stays red.
"""

from collections.abc import Callable, Hashable, Iterable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar

from harness.record import Case, Observation, Run, Sample
from reports.store import Records

Kept = TypeVar("Kept", bound=Observation)
EVENING = timedelta(hours=12)


def newest(records: Records) -> Records:
    """The records without what a later run on the same machine measured again."""
    machines = {run.run: machine(run) for run in records.runs}
    evenings = {run.run: evening(run) for run in records.runs}
    # the lines of one case share one object, and its id costs a hash
    cases = {id(s.case): s.case for s in records.samples} | {id(a.case): a.case for a in records.accepts}
    ids = {key: case.id for key, case in cases.items()}

    def kept(found: Iterable[Kept], question: Callable[[Kept], Hashable], beside: bool = False) -> list[Kept]:
        found = list(found)
        last: dict[Hashable, str] = {}
        keys = [(machines.get(one.run), question(one)) for one in found]
        for key, one in zip(keys, found, strict=True):
            last[key] = max(last.get(key, ""), one.run)
        pairs = {(one.run, last[key]) for key, one in zip(keys, found, strict=True)}
        together = {
            (run, end) for run, end in pairs if run == end or (beside and _is_one(evenings.get(run), evenings.get(end)))
        }
        return [one for key, one in zip(keys, found, strict=True) if (one.run, last[key]) in together]

    return records._replace(
        cases=kept(records.cases, lambda c: c.id, beside=True),
        checks=kept(records.checks, lambda c: (c.claim, c.pair), beside=True),
        samples=kept(records.samples, lambda s: (ids[id(s.case)], s.metric), beside=True),
        accepts=kept(records.accepts, lambda a: (ids[id(a.case)], a.dataset), beside=True),
        planted=kept(records.planted, lambda p: p.bug),
        verdicts=kept(records.verdicts, lambda v: (v.pair, v.metric, v.case_id)),
        certificates=kept(records.certificates, lambda c: c.family),
        audits=kept(records.audits, lambda a: (a.target, a.draft)),
    )


def joined(records: Records) -> list[Sample]:
    """Samples with the runs of one machine as processes of its newest run; each keeps its blocks together."""
    machines = {run.run: machine(run) for run in records.runs}
    last: dict[Hashable, str] = {}
    for s in records.samples:
        # a run that says nothing of its machine stands alone
        place = machines.get(s.run, s.run)
        last[place] = max(last.get(place, ""), s.run)
    numbers: dict[tuple[str, int], int] = {}
    cases: dict[int, Case] = {}
    found = []
    for s in records.samples:
        if id(s.case) not in cases:
            cases[id(s.case)] = replace(s.case, run=last[machines.get(s.run, s.run)])
        process = numbers.setdefault((s.run, s.process), len(numbers))
        found.append(replace(s, case=cases[id(s.case)], process=process))
    return found


def evening(run: Run) -> tuple[str, datetime] | None:
    """The files that ran and when; None where either is not known."""
    source = run.environment.get("source", {})
    if not source.get("commit"):
        return None
    try:
        start = datetime.fromisoformat(run.started)
    except ValueError:
        return None
    return f"{source['commit']} {source.get('diff_sha256')}", start.replace(tzinfo=start.tzinfo or UTC)


def _is_one(run: tuple[str, datetime] | None, last: tuple[str, datetime] | None) -> bool:
    """Whether two runs are of the same files and of one evening."""
    return run is not None and last is not None and run[0] == last[0] and last[1] - run[1] < EVENING


def machine(run: Run) -> tuple[Any, ...]:
    """What a run ran on, by name."""
    cpu, gpu = run.environment.get("cpu", {}), run.environment.get("gpu", {})
    return cpu.get("name"), tuple(sorted(str(device.get("name")) for device in gpu.get("devices", ())))
