"""History: which numbers moved over the nights, where, and what changed in the machine at that time."""

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from harness.record import Run
from reports import history, store
from reports.drawing import DASHES, MUTED, SERIES, Plot, plot
from reports.panels import Panel, Section, counted, panels
from reports.sections.comparable import FACTS
from reports.sparks import spark
from reports.store import Records

DRAWN, LISTED, NIGHTS, CHANGES = 6, 30, 120, 20
"""series with a plot, series with a row, nights of a plot, changes of the machine in the table"""
WATCHED = ("GPU", "driver", "processor", "system")
VERSIONS = ("torch", "triton", "transformers", "cuda")


def build(now: Records, every: Records) -> Section | None:
    """The series that lost most, a row for some more, one line for the rest; nothing where there was one night."""
    frames = store.frames([*every.runs, *(s for s in every.samples if s.better != "none"), *every.accepts])
    nights = history.nights(frames)
    kept = nights.groupby(history.SERIES)["run"].transform("nunique") > 1 if len(nights) else []
    if not np.any(kept):
        return None
    points = find_spec("ruptures") is not None
    series = ranked(history.summary(nights[kept], points))
    changes = changed(every.runs)
    plots = [
        p for i, row in enumerate(series[:DRAWN], 1) if (p := trace(f"trace-{i}", row, nights, changes)) is not None
    ]
    note = "Most suspicious first: new levels, then the last night's loss in units of the spread between nights."
    if not points:
        note += " New levels are looked for where ruptures is installed (pip install draftproof[history])."
    rest = series[LISTED:]
    most = max((abs(row["change"]) for row in rest if np.isfinite(row["change"])), default=0.0)
    more = f"{len(rest)} further series: the last night is within {most:.1%} of the level of each." if rest else ""
    head = ("", "unit", "nights", "level", "last", "change", "last nights", "new levels from")
    table = Panel("", head, tuple(map(_row, series[:LISTED])), tuple(plots), "Series", note, folded=True)
    return panels("history", "History", table, *([Panel(note=more)] if more else []), *_machine(changes), row="Series")


def ranked(series: pd.DataFrame) -> list[dict[str, Any]]:
    """Series that moved first, then by how far the last night fell, in spreads of a night."""
    found = []
    for row in series.to_dict("records"):
        recent = np.asarray(row["recent"], float)
        spread = 1.4826 * float(np.median(np.abs(np.diff(recent)))) / np.sqrt(2)
        loss = (row["last"] - row["level"]) * {"up": -1, "down": 1}.get(row["better"], 0)
        # nights that are equal to the last digit have no spread, and any change is a change
        row["loss"] = loss / spread if spread > 0 else float(np.sign(loss)) * np.inf if loss else 0.0
        found.append({str(name): value for name, value in row.items()} | {"moved": tuple(row.get("moved", ()))})
    return sorted(found, key=lambda row: (not row["moved"], -row["loss"], row["pair"], row["metric"], row["case"]))


def changed(runs: Sequence[Run]) -> list[tuple[str, str, str]]:
    """(run, when, what) of every change of machine, driver or library, oldest first."""
    found, last = [], dict[str, str]()
    for run in sorted(runs, key=lambda run: run.run):
        versions = run.environment.get("versions", {})
        facts = {name: FACTS[name](run.environment) for name in WATCHED}
        facts |= {name: versions.get(name) for name in VERSIONS}
        told = {name: str(value) for name, value in facts.items() if value is not None}
        words = [f"{name} {last[name]} -> {value}" for name, value in told.items() if last.get(name, value) != value]
        if words:
            found.append((run.run, run.started, "; ".join(words)))
        last |= told
    return found


def trace(name: str, row: dict[str, Any], nights: pd.DataFrame, changes: Sequence[tuple[str, str, str]]) -> Plot | None:
    """One series over its last nights, the median of each level, and lines where the machine changed."""
    mine = nights[
        (nights["pair"] == row["pair"]) & (nights["case"] == row["case"]) & (nights["metric"] == row["metric"])
    ]
    runs, values = mine["run"].tolist()[-NIGHTS:], mine["value"].to_numpy(float)[-NIGHTS:]
    if len(values) < 3:
        return None
    starts = sorted({0, *(runs.index(run) for run in row["moved"] if run in runs)})
    # a change belongs to the first night that has it
    breaks = sorted({int(np.searchsorted(runs, run)) for run, _, _ in changes if runs[0] < run <= runs[-1]})
    dates = [when[:10] or run[:10] for when, run in zip(mine["started"].tolist()[-NIGHTS:], runs, strict=True)]

    def draw(axes: Axes) -> None:
        axes.plot(range(len(values)), values, ".-", color=SERIES[0], linewidth=0.8, markersize=3)
        for start, end in zip(starts, [*starts[1:], len(values)], strict=True):
            axes.plot([start, end - 1], [np.median(values[start:end])] * 2, color=SERIES[1], linewidth=2)
        for at in breaks:
            axes.axvline(at - 0.5, color=MUTED, linewidth=0.9, linestyle=DASHES[1])
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        axes.xaxis.set_major_formatter(lambda x, _: dates[int(x)] if 0 <= x < len(dates) else "")
        axes.set(ylabel=row["unit"])
        axes.grid(axis="y")

    told = f"{row['pair']} {row['metric']} over {len(values)} nights, in {row['unit']}: from {values.min():.4g} to " \
           f"{values.max():.4g}, last {values[-1]:.4g}; {counted(len(starts), 'level')}, " \
           f"{counted(len(breaks), 'change')} of the machine"  # fmt: skip
    note = f"Level {row['level']:.4g}, last night {row['last']:.4g} {row['unit']}. Thick: the median of a level; " \
           "dashed: machine, driver or library changed."  # fmt: skip
    return plot(name, f"{row['pair']}: {row['metric']}", f"Line plot of {told}.", note, draw, 2.2)


def _row(row: dict[str, Any]) -> tuple[str, ...]:
    change = f"{row['change']:+.1%}" if np.isfinite(row["change"]) else "not known"
    label = f"{row['pair']}: {row['metric']}"
    return (label, row["unit"], str(row["nights"]), f"{row['level']:.4g}", f"{row['last']:.4g}", change,
            spark(row["recent"], label, f" {row['unit']}"), ", ".join(run[:10] for run in row["moved"]))  # fmt: skip


def _machine(changes: Sequence[tuple[str, str, str]]) -> list[Panel]:
    """What changed between nights, newest first."""
    if not changes:
        return []
    rows = tuple((when or run, words) for run, when, words in reversed(changes[-CHANGES:]))
    note = f"The newest {CHANGES} of {len(changes)}." if len(changes) > CHANGES else ""
    return [
        Panel("", ("From the run of", "What changed"), rows, (), "Machine, drivers and libraries", note, words=True)
    ]
