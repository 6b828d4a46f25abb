"""What did not run, why, and since when; a skip is a debt, not a pass."""

from collections import Counter
from typing import NamedTuple

from reports.panels import Section, sentence_of
from reports.sections.rig import gpu_of, has_gpu
from reports.store import Records

SHOWN = 60
"""lines of the table; the others are counted"""


class Owed(NamedTuple):
    """One line of the ledger: something that did not run."""

    what: str
    times: int
    """0: all of it"""
    why: str
    since: str = ""
    """when it last ran, where nights are kept"""


def build(now: Records, every: Records) -> Section:
    """One line a reason."""
    found = debts(now)
    facts = {"debts": found[:SHOWN], "unshown": len(found[SHOWN:]), "dated": any(owed.since for owed in found)}
    return Section("ledger", "What did not run, and why", facts, "Not run", "ledger.html")


def debts(records: Records) -> list[Owed]:
    """Skips, red gates, steps of a night that were left out, and what was never asked."""
    found = [*_steps(records), *_skips(records)]
    red = Counter((case.pair, case.gate) for case in records.cases if case.gate != "passed")
    for (pair, gate), count in red.items():
        why = "its correctness gate failed" if gate == "failed" else "its correctness gate was not run"
        found.append(Owed(f"numbers of {pair}", count, f"{why}: no number from a gate that is not green"))
    if not records.planted:
        found.append(Owed("planted bugs", 0, "not part of this run; draftproof planted"))
    if not records.accepts:
        found.append(Owed("acceptance length", 0, "not part of this run; draftproof bench acceptance"))
    if not any(s.metric == "decode" for s in records.samples):
        found.append(Owed("speed", 0, "not part of this run; draftproof bench decode"))
    for reason in dict.fromkeys(g.get("reason") or "not recorded" for g in map(gpu_of, records.runs) if not has_gpu(g)):
        found.append(Owed("everything on a GPU", 0, f"no GPU: not measured ({reason})"))
    return found


def _steps(records: Records) -> list[Owed]:
    """Steps of the newest night that were skipped or broke."""
    last = max((step.run for step in records.steps), default="")
    return [
        Owed(f"step {step.name} of the night", 0, f"{step.status}: {step.reason}")
        for step in records.steps
        if step.run == last and step.status in ("skipped", "error")
    ]


def _skips(records: Records) -> list[Owed]:
    """Claims that were skipped; a night knows since when."""
    last = max((debt.run for debt in records.debts), default="")
    known = {(sentence_of(d.what), d.pair): d for d in records.debts if d.run == last}
    skipped: dict[tuple[str, str], list[str]] = {}
    for check in records.checks:
        if check.status == "skipped":
            since = known.get((sentence_of(check.claim), check.pair))
            words = "" if since is None else f"{since.last or 'never'}, {since.nights} nights without"
            reason = check.reason.removeprefix("Skipped: ")
            skipped.setdefault((sentence_of(check.claim), reason), []).append(words)
    return [
        Owed(f"claim {claim}", len(said), reason, "; ".join(dict.fromkeys(filter(None, said))))
        for (claim, reason), said in skipped.items()
    ]
