"""What a later run is compared with: certified, and promoted by a person through a file that is reviewed.

Nothing becomes a baseline because it is new, or because it is faster. `certify` says how quiet a machine was when one
commit raced against itself; `promote` copies the numbers of a run into one record file, with the reason why, and
refuses a run that failed, was throttled, came from an uncommitted tree, or that no certificate covers.
"""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from harness.record import Certificate, Observation, Recorder, RecordError, Run, Verdict
from reports.gates import Family, Gates
from reports.noise import processes_needed
from reports.regressions import NOT_AGAIN, ONCE, TIMED
from reports.store import Records

FEWEST_PROMPTS = 2
"""that are needed for an interval; what they show is said by the smallest visible change"""


class Refused(RecordError):
    """A run that must not become a baseline; the message says all reasons."""


def certify(verdicts: Sequence[Verdict], gates: Gates) -> list[Certificate]:
    """A certificate a family, from the verdicts of a commit compared with itself."""
    families = {gate.family.name: gate.family for gate in gates.gates}
    names = dict.fromkeys(verdict.family for verdict in verdicts)
    return [_certificate(families[name], [v for v in verdicts if v.family == name], gates) for name in names]


def _certificate(family: Family, found: Sequence[Verdict], gates: Gates) -> Certificate:
    reasons = [
        f"{v.pair} {v.metric}: {v.verdict}, though nothing changed; {v.reasons[0]}"
        for v in found
        if v.verdict in ("WORSE", "BETTER", "INVALID") or v.reasons[0].startswith((ONCE, NOT_AGAIN))
    ]
    for v in found:
        gate = gates.of(v.metric.split(" ")[0])
        if gate and v.verdict != "INVALID" and (v.visible is None or v.visible > gate.see):
            told = "no change" if v.visible is None else f"nothing below {v.visible:.3g}"
            reasons.append(f"{v.pair} {v.metric}: {told} would have been seen, {gate.see:g} must be")
    known = [v for v in found if v.visible is not None]
    widest = max(known, key=lambda v: v.visible or 0.0, default=None)
    return Certificate(
        family=family.name,
        status="failed" if reasons else "passed",
        compared=tuple(sorted({run for v in found for side in v.sides for run in side})),
        metrics=len(found),
        # prompts, of an acceptance
        processes=min((v.extra.get("units", 0) for v in found), default=0),
        needed=processes_needed(len(found), family.alpha) if found[0].method == TIMED else FEWEST_PROMPTS,
        visible=widest.visible if widest and len(known) == len(found) else None,
        metric=f"{widest.pair} {widest.metric}" if widest and len(known) == len(found) else "",
        reasons=tuple(reasons),
    )


def one_commit(runs: Sequence[Run]) -> str:
    """The commit that all runs share; RecordError where they are not of one clean commit."""
    commits = {str(_source(run).get("commit")) for run in runs}
    if len(commits) != 1 or commits == {"None"} or any(_source(run).get("dirty") is not False for run in runs):
        raise RecordError(
            f"a certificate compares one clean commit with itself; these are {', '.join(sorted(commits))}"
        )
    return commits.pop()


def refusals(records: Records, certificates: Sequence[Certificate], gates: Gates) -> list[str]:
    """Every reason why a run must not become a baseline."""
    names = {run.run for run in records.runs} | {o.run for o in (*records.samples, *records.accepts)}
    bad = [c for c in records.checks if c.status in ("failed", "error")]
    loose = [p for p in records.planted if p.caught == p.harmless]
    throttled = [s for s in records.samples if (s.telemetry.get("throttled") or 0.0) > gates.throttled]
    dirty = [run.run for run in records.runs if not _is_clean(run)]
    known = {run.run for run in records.runs}
    found = [
        (not (records.samples or records.accepts), "it measured nothing"),
        (bad, f"failed: {len(bad)} claims, {bad[0].claim if bad else ''} first"),
        (loose, f"failed: the planted change {loose[0].bug if loose else ''} had the wrong outcome"),
        (throttled, f"throttled: the device was slowed down in {len(throttled)} visits"),
        (dirty, f"dirty: {', '.join(dirty)} did not run on a committed tree"),
        (names - known, f"dirty: nothing says where {', '.join(sorted(names - known))} comes from"),
    ]
    said = [why for is_so, why in found if is_so]
    return said + [f"uncertified: {why}" for why in _uncovered(records, names, certificates, gates)]


def _uncovered(records: Records, names: set[str], certificates: Sequence[Certificate], gates: Gates) -> list[str]:
    """Families of metrics that no passed certificate over all of these runs covers."""
    metrics = {s.metric for s in records.samples if s.better != "none"}
    metrics |= {"acceptance_length"} if records.accepts else set()
    families = {gate.family.name for gate in map(gates.of, sorted(metrics)) if gate}
    return [
        f"no passed certificate of {family} names all of its runs"
        for family in sorted(families)
        if not any(c.family == family and c.status == "passed" and names <= set(c.compared) for c in certificates)
    ]


def promote(
    records: Records, certificates: Sequence[Certificate], gates: Gates, out: Path, reason: str, promoted: str
) -> Path:
    """Write the numbers of a run as a baseline to review; Refused with every reason against it.

    promoted   when, UTC
    """
    if not reason.strip():
        raise Refused("a baseline needs a reason that a reviewer can read")
    if against := refusals(records, certificates, gates):
        raise Refused("; ".join(against))
    draft = out.with_name(out.name + ".new")
    draft.unlink(missing_ok=True)
    for run in records.runs:
        facts = {**run.extra, "promoted": {"at": promoted, "reason": reason}}
        numbers: list[Observation] = [replace(run, extra=facts)]
        for kind in (records.samples, records.accepts):
            numbers += [o for o in kind if o.run == run.run]
        with Recorder(draft, run.run) as recorder:
            recorder.append(*numbers)
    for certificate in certificates:
        with Recorder(draft, certificate.run) as recorder:
            recorder.append(certificate)
    os.replace(draft, out)
    return out


def _is_clean(run: Run) -> bool:
    return bool(_source(run).get("commit")) and _source(run).get("dirty") is False


def _source(run: Run) -> Any:
    return run.environment.get("source", {})
