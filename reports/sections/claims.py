"""Claims by pairs: the share of the error budget that each used."""

import math
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

from markupsafe import Markup

from harness.record import Check
from reports.panels import Section, claim_of, counted, sentence_of, share
from reports.sparks import spark
from reports.store import Records

ALL = "all"
"""the column of what is held to no pair"""
# the first of these that occurs names a cell
SEVERITY = ("failed", "error", "passed", "skipped")


class Cell(NamedTuple):
    """All checks of one claim on one pair."""

    status: str
    text: str
    heat: float
    """share of the error budget, cut at 1"""
    more: str
    """how many checks, where one cell holds several"""
    title: str
    nights: Markup = Markup("")
    """sparkline of the share of the budget, where several runs held this cell"""


class Table(NamedTuple):
    pairs: list[str]
    rows: list[tuple[str, list[Cell | None]]]
    """claim, one cell a pair"""


def build(now: Records, every: Records) -> Section:
    """The table, and every sentence behind it."""
    facts = {"table": with_nights(table(now), every), "sentences": table(now, sentence_of)}
    return Section("claims", "Claims", facts, template="claims.html")


def with_nights(found: Table, every: Records) -> Table:
    """The table with the largest share that each run used, as a sparkline a cell."""
    used: dict[tuple[str, str], dict[str, float]] = {}
    for check in every.checks:
        if check.used is not None and math.isfinite(check.used):
            runs = used.setdefault((claim_of(check.claim), check.pair or ALL), {})
            runs[check.run] = max(runs.get(check.run, 0.0), 100 * check.used)
    lines = {
        key: spark([runs[run] for run in sorted(runs)], f"{key[0]} on {key[1]}, share of the budget", " %")
        for key, runs in used.items()
    }
    rows = [
        (claim, [cell and cell._replace(nights=lines.get((claim, pair), Markup("")))
                 for pair, cell in zip(found.pairs, cells, strict=True)])
        for claim, cells in found.rows
    ]  # fmt: skip
    return Table(found.pairs, rows)


def table(records: Records, row_of: Callable[[str], str] = claim_of) -> Table:
    """Claims (or what `row_of` makes of a check's name) by pairs; what is held to no pair has the column "all"."""
    pairs = sorted({check.pair for check in records.checks})
    claims = sorted({row_of(check.claim) for check in records.checks})
    cells: dict[tuple[str, str], list[Check]] = {}
    for check in records.checks:
        cells.setdefault((row_of(check.claim), check.pair), []).append(check)
    rows = [(claim, [_cell(cells.get((claim, pair), [])) for pair in pairs]) for claim in claims]
    return Table([pair or ALL for pair in pairs], rows)


def _cell(checks: list[Check]) -> Cell | None:
    if not checks:
        return None
    statuses = Counter(check.status for check in checks)
    status = next(kind for kind in SEVERITY if statuses[kind])
    title = ", ".join(f"{number} {kind}" for kind, number in statuses.items())
    more = counted(len(checks), "check") if len(checks) > 1 else ""
    if status == "skipped":
        return Cell(status, "skipped", 0.0, more, f"{title}: {checks[0].reason}")
    used = max((check.used for check in checks if check.used is not None), default=None)
    text = share(used)
    if status != "passed":
        text = status if used is None else f"{status}, {text}"
    elif statuses["skipped"]:
        more += f", {statuses['skipped']} skipped"
    return Cell(status, text, min(1.0, used or 0.0), more, title)
