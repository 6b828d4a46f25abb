"""Failures: what went wrong, on what input, why, where first, and the line that runs it again."""

import math
import shlex
from collections.abc import Sequence
from typing import Any, NamedTuple

from matplotlib.axes import Axes

from harness.record import Check
from reports.drawing import DASHES, INK, SERIES, Plot, plain_log, plot
from reports.panels import Section, place_of, share
from reports.store import Records

SHOWN, DRAWN, TICKS = 50, 12, 10
"""failures that get a card, ladders that are drawn, names below a ladder"""
LEAST = 1e-4
"""share of a budget below which all bars are equally low"""


class Card(NamedTuple):
    """One failure."""

    check: Check
    worst: str
    given: str
    """the failing example"""
    replay: str
    explanation: str
    ladder: Plot | None = None


def build(now: Records, every: Records) -> Section:
    """A card a failure."""
    found = failures(now)
    facts = {"cards": found[:SHOWN], "unshown": len(found[SHOWN:]), "any": bool(now.checks), "share": share,
             "place_of": place_of}  # fmt: skip
    return Section("failures", "Failures", facts, template="failures.html")


def failures(records: Records) -> list[Card]:
    """Each check that failed or broke."""
    red = [check for check in records.checks if check.status in ("failed", "error")]
    return [
        Card(
            check,
            _worst(check),
            str(check.extra.get("given") or ""),
            replay(check),
            str(check.extra.get("explanation") or ""),
            ladder(f"ladder-{i}", check.extra.get("ladder") or ()) if i <= DRAWN else None,
        )
        for i, check in enumerate(red, 1)
    ]


def replay(check: Check) -> str:
    """The line that runs this very example again; the claim where no example was kept."""
    kept = check.extra.get("counterexample")
    return f"draftproof replay {shlex.quote(str(kept))}" if kept else check.replay


def ladder(name: str, rungs: Sequence[Any]) -> Plot | None:
    """Share of the budget at each place on the way, on a logarithmic axis; None where nothing was told."""
    used = [(str(rung["name"]), float(rung["used"])) for rung in rungs if rung.get("used") is not None]
    if not used:
        return None
    finite = [u for _, u in used if math.isfinite(u)]
    top = max([10.0, *(10 * u for u in finite)])
    first = next((i for i, (_, u) in enumerate(used) if u > 1), None)

    def draw(axes: Axes) -> None:
        heights = [min(max(u, LEAST), top) for _, u in used]
        colors = [SERIES[1] if u > 1 else SERIES[0] for _, u in used]
        axes.bar(range(len(used)), heights, 0.8, bottom=0, color=colors, linewidth=0)
        axes.set(yscale="log", ylim=(LEAST / 2, top))
        plain_log(axes.yaxis)
        axes.axhline(1, color=INK, linewidth=1, linestyle=DASHES[1])
        step = -(-len(used) // TICKS)
        # the first place beyond its budget has its name, whatever the step
        at = sorted({*range(0, len(used), step), *([] if first is None else [first])})
        at = [i for i in at if first is None or i == first or abs(i - first) >= step / 2]
        axes.set_xticks(at, [used[i][0] for i in at], rotation=35, ha="right")
        axes.set(ylabel="share of the budget")
        axes.grid(axis="y")
        axes.set_axisbelow(True)

    told = "; ".join(f"{place} {share(u)}" for place, u in used)
    note = "Each place on the way from tokens to logits. Dashed: the budget. " + (
        "Every place is within it." if first is None else f"The first one beyond it: {used[first][0]}."
    )
    return plot(
        name, "Where the error begins", f"Bars of the share of the error budget by place. {told}.", note, draw, 2.6
    )


def _worst(check: Check) -> str:
    if check.worst is None:
        return ""
    tensor, index = check.worst
    return f"{tensor}[{', '.join(map(str, index))}]" if index else tensor
