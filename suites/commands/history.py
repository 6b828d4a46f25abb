"""`draftproof history`: what was measured over nights, by pair and metric."""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from harness.runner import Exit
from reports import history as past
from reports import store
from suites.commands.compare import place
from suites.commands.desk import Answer, Desk, MissingCapability, NothingSelected


def history(
    desk: Desk,
    names: Sequence[str],
    runs: Path,
    pair: str = "",
    metric: str = "",
    moved: bool = False,
    packed: Path | None = None,
) -> Answer:
    """One row a series; one row a night where a single series is left. `packed`: also keep the records as Parquet."""
    for asked, library in ((moved, "ruptures"), (packed is not None, "pyarrow")):
        if asked and find_spec(library) is None:
            raise MissingCapability(f"{library} is not installed: pip install draftproof[history]")
    frames = store.load(*[place(name, runs) for name in names or [str(runs)]])
    if packed is not None:
        store.pack(frames, packed)
        desk.say(f"packed into {packed}")
    nights = past.nights(frames, pair, metric)
    if not len(nights):
        raise NothingSelected(
            "no record here measured that; `draftproof history` without --pair and --metric lists all"
        )
    series = past.summary(nights, moved)
    facts: dict[str, Any] = {"series": series.to_dict("records")}
    if len(series) == 1:
        facts["nights"] = nights[["run", "started", "value", "units"]].to_dict("records")
        title = f"{series['pair'].iloc[0]} {series['metric'].iloc[0]}, {series['unit'].iloc[0]}"
        rows = [(n["started"] or n["run"], f"{n['value']:.5g}", n["units"]) for n in facts["nights"]]
        desk.table(title, ("night", "value", "processes or prompts"), rows)
        for run in facts["series"][0].get("moved", ()):
            desk.say(f"a new level from {run} on")
    else:
        show(desk, facts["series"], moved)
    return Answer(Exit.PASSED, facts)


def show(desk: Desk, series: Sequence[dict[str, Any]], moved: bool) -> None:
    """One row a series."""
    head = ("pair", "metric", "unit", "nights", "level", "last", "change", *(["new levels from"] if moved else []))
    rows = []
    for one in series:
        row = (one["pair"], one["metric"], one["unit"], one["nights"], *(number(one[k]) for k in ("level", "last")))
        change = f"{one['change']:+.1%}" if one["change"] == one["change"] else ""
        rows.append((*row, change, *([", ".join(one["moved"])] if moved else [])))
    desk.table("Over the nights", head, rows)


def number(value: float) -> str:
    """Five digits; nothing for what is not known."""
    return f"{value:.5g}" if value == value else ""
