"""Acceptance, prompt by prompt: the newest run of a case against the run before it."""

from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes

from harness.record import Accept
from reports import paired
from reports.arms import arms
from reports.drawing import GRID, SERIES, Plot, list_rows, plot
from reports.paired import Paired
from reports.panels import Panel, Section, panels, span
from reports.statistics import Arm
from reports.store import Records

DRAWN = 4
"""cases with plots; the table holds all"""


class Sides(NamedTuple):
    """One case and data set, answered twice."""

    label: str
    runs: tuple[str, str]
    old: Arm
    new: Arm
    found: Paired


def build(now: Records, every: Records) -> Section | None:
    """A row a case that two runs answered, the largest loss first; nothing where there is none."""
    found = sorted(sides(every), key=lambda s: s.found.difference.value)
    if not found:
        return None
    rows = tuple(
        (s.label, f"{s.found.difference.value:+.3f}", span(s.found.difference), f"{s.found.p:.2g}",
         str(s.found.difference.units), f"{s.runs[0][:10]} -> {s.runs[1][:10]}")
        for s in found
    )  # fmt: skip
    head = ("", "length changed by", "95 % interval", "p", "prompts", "runs")
    plots = [p for i, s in enumerate(found[:DRAWN], 1) for p in (dots(f"prompts-{i}", s), steps(f"steps-{i}", s))]
    note = "The newest run of a case minus the run before it, on the prompts that both answered."
    return panels(
        "prompts", "Acceptance, prompt by prompt", Panel("", head, rows, tuple(plots), "", note), link="Prompts"
    )


def sides(every: Records) -> list[Sides]:
    """Every case and data set that two runs answered."""
    groups: dict[tuple[str, str], dict[str, list[Accept]]] = {}
    ids = {id(a.case): a.case.id for a in every.accepts}
    for accept in every.accepts:
        if accept.num_draft_tokens:
            runs = groups.setdefault((ids[id(accept.case)], accept.dataset), {})
            runs.setdefault(accept.run, []).append(accept)
    found = []
    for runs in groups.values():
        if len(runs) > 1:
            before, last = sorted(runs)[-2:]
            ((old,), (new,)) = arms(runs[before]), arms(runs[last])
            compared = paired.compare(old.arm, new.arm)
            if compared is not None:
                found.append(Sides(f"{new.label}, {new.dataset}", (before, last), old.arm, new.arm, compared))
    return found


def dots(name: str, s: Sides) -> Plot:
    """One dot a prompt: how much longer its steps became, sorted."""
    shared = [n for n in s.old.steps if s.old.steps[n] and s.new.steps.get(n)]
    moved = np.sort([np.mean(s.new.steps[n]) - np.mean(s.old.steps[n]) for n in shared])

    def draw(axes: Axes) -> None:
        axes.plot(range(len(moved)), moved, "o", color=SERIES[0], markersize=3.5, alpha=0.8)
        axes.axhline(0, color=GRID, linewidth=1)
        difference = s.found.difference
        if difference.known:
            axes.axhspan(difference.low, difference.high, color=SERIES[1], alpha=0.18, linewidth=0)
        axes.axhline(difference.value, color=SERIES[1], linewidth=1.4)
        axes.set(xlabel="prompts, sorted", ylabel="change of length")
        axes.grid(axis="y")

    worse, better = int((moved < 0).sum()), int((moved > 0).sum())
    told = f"{worse} of {len(moved)} prompts lost, {better} gained, from {moved[0]:+.2f} to {moved[-1]:+.2f}"
    alt = f"Dot plot of the change of acceptance length by prompt for {s.label}: {told}."
    note = f"{worse} prompts lost, {better} gained. Line and band: the change over all steps with its 95 % interval."
    return plot(name, f"{s.label}: by prompt", alt, note, draw, 2.5)


def steps(name: str, s: Sides) -> Plot:
    """The change of the unconditional rate of each draft position, intervals that hold for all at once."""
    changes = s.found.positions

    def draw(axes: Axes) -> None:
        for i, one in enumerate(changes):
            axes.plot([one.low, one.high], [i, i], color=SERIES[0], linewidth=2)
            axes.plot([one.change], [i], "o", color=SERIES[0], markersize=5)
        axes.axvline(0, color=GRID, linewidth=1)
        list_rows(axes, [f"draft {i}" for i in range(1, len(changes) + 1)])
        axes.xaxis.set_major_formatter(lambda v, _: f"{100 * v:+.0f} %" if v else "0 %")
        axes.margins(x=0.15)
        axes.set(xlabel="change of the share of steps")

    told = "; ".join(
        f"draft {i} {one.change:+.1%}, {one.low:+.1%} to {one.high:+.1%}" for i, one in enumerate(changes, 1)
    )
    note = (
        "Share of all steps that accepted each draft. The intervals hold for all positions together, 95 times in 100."
    )
    return plot(name, f"{s.label}: by position", f"Change of rates by draft position. {told}.", note, draw,
                1.0 + 0.32 * len(changes))  # fmt: skip
