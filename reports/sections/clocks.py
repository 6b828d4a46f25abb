"""Clocks: what the GPU ran at during every timed visit, and where it was slowed down."""

from collections import Counter
from typing import Any

from matplotlib.axes import Axes

from harness.record import Sample
from reports.drawing import SERIES, Plot, plot
from reports.panels import Panel, Section, counted, panels
from reports.store import Records

STRIPS = {"sm_mhz": "SM MHz", "power_w": "power W", "temperature_c": "degrees C"}
DRAWN = 400
"""visits of a strip, the last of a run"""


def build(now: Records, every: Records) -> Section | None:
    """A strip a run that read a GPU; nothing where none did."""
    visits: dict[str, list[dict[str, Any]]] = {}
    for sample in now.samples:
        told = told_of(sample)
        if told.get("available") and sample.metric in ("cycle", "decode", "op_time"):
            visits.setdefault(sample.run, []).append(told)
    if not visits:
        return None
    shown = [_panel(f"clocks-{i}", run, visits[run]) for i, run in enumerate(sorted(visits, reverse=True), 1)]
    return panels("clocks", "Clocks and throttling", *shown, link="Clocks")


def told_of(sample: Sample) -> dict[str, Any]:
    """The telemetry of a visit, wherever its writer put it."""
    return dict(sample.telemetry.get("gpu") or sample.telemetry)


def _panel(name: str, run: str, visits: list[dict[str, Any]]) -> Panel:
    """Words about all visits, a strip of the last ones."""
    slowed = [v for v in visits if v.get("throttled")]
    invalid = sum(v.get("valid") is False for v in visits)
    reasons = Counter(reason for v in slowed for reason in v.get("throttle_reasons", ()))
    words = ", ".join(f"{reason} in {counted(n, 'visit')}" for reason, n in sorted(reasons.items()))
    note = f"{counted(len(visits), 'timed visit')}; slowed down in {len(slowed)}{f' ({words})' if words else ''}"
    note += f"; {counted(invalid, 'visit')} slowed in every try and left out of the figures." if invalid else "."
    drawn = visits[-DRAWN:]
    strips = [strip for strip in STRIPS if any(v.get(strip) for v in drawn)]
    return Panel("", (), (), (_strips(name, drawn, strips),) if strips else (), f"Run {run}", note)


def _strips(name: str, visits: list[dict[str, Any]], strips: list[str]) -> Plot:
    """A row a quantity: the range of each visit, its median as a dot, throttled visits marked below."""

    def draw(rows: Any) -> None:
        for axes, strip in zip([rows] if isinstance(rows, Axes) else rows, strips, strict=True):
            seen = [(i, v[strip]) for i, v in enumerate(visits) if v.get(strip)]
            axes.vlines([i for i, _ in seen], [s["low"] for _, s in seen], [s["high"] for _, s in seen],
                        color=SERIES[0], linewidth=1)  # fmt: skip
            axes.plot([i for i, _ in seen], [s["median"] for _, s in seen], ".", color=SERIES[0], markersize=3)
            slowed = [i for i, v in enumerate(visits) if v.get("throttled")]
            axes.plot(slowed, [axes.get_ylim()[0]] * len(slowed), "^", color=SERIES[1], markersize=5, clip_on=False)
            axes.set(ylabel=STRIPS[strip])
            axes.grid(axis="y")
        axes.set(xlabel="timed visit")

    ranges = "; ".join(
        f"{STRIPS[s]} {min(v[s]['low'] for v in visits if v.get(s)):.0f} to "
        f"{max(v[s]['high'] for v in visits if v.get(s)):.0f}"
        for s in strips
    )
    slowed = sum(bool(v.get("throttled")) for v in visits)
    alt = f"Strips over {len(visits)} timed visits. {ranges}; slowed down in {slowed}."
    note = "A line from the lowest to the highest reading of a visit, a dot at the median; triangles: slowed down."
    return plot(name, "Over the visits", alt, note, draw, 0.6 + 1.1 * len(strips), wide=True, rows=len(strips))
