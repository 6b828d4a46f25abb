"""Skips are debts: what did not run tonight, and since when, from every record that is kept."""

from collections.abc import Iterable

from harness.record import Check, Debt
from reports.store import Records

What = tuple[str, str]


def debts(records: Records, tonight: Iterable[str]) -> list[Debt]:
    """One debt a claim and pair that skipped in tonight's runs, and ran in none of them.

    tonight   run ids; a run id begins with its time, so it orders the runs before
    """
    ran: dict[What, set[str]] = {}
    skipped: dict[What, dict[str, str]] = {}
    for check in records.checks:
        if check.status == "skipped":
            skipped.setdefault(what(check), {})[check.run] = check.reason
        else:
            ran.setdefault(what(check), set()).add(check.run)
    started = {run.run: run.started for run in records.runs}
    now, found = set(tonight), []
    for name, reasons in sorted(skipped.items()):
        if not now & reasons.keys() or now & ran.get(name, set()):
            continue
        last = max(ran.get(name, set()), default="")
        found.append(
            Debt(
                what=name[0],
                pair=name[1],
                reason=reasons[max(reasons)].removeprefix("Skipped: "),
                last_run=last,
                last=started.get(last, ""),
                nights=sum(run > last for run in reasons),
            )
        )
    return found


def what(check: Check) -> What:
    """A claim without its parameters, and its pair."""
    return check.claim.partition("[")[0], check.pair
