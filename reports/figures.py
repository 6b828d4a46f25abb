"""The kinds of plots that several sections draw."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from reports.drawing import (
    DASHES,
    GRID,
    INK,
    MARKERS,
    MUTED,
    SERIES,
    SHEET,
    Plot,
    legend,
    legend_lines,
    list_rows,
    plot,
    shortened,
)
from reports.statistics import Interval


class Curve(NamedTuple):
    """One line of a plot."""

    label: str
    x: Sequence[float]
    y: Sequence[Interval]


def curves(name: str, title: str, lines: Sequence[Curve], x: str, y: str, note: str, zero: bool = False) -> Plot:
    """Lines with bands for their intervals."""

    def draw(axes: Axes) -> None:
        for i, line in enumerate(lines):
            value, low, high = (np.array([getattr(p, part) for p in line.y]) for part in ("value", "low", "high"))
            color = SERIES[i % len(SERIES)]
            axes.fill_between(line.x, low, high, color=color, alpha=0.14, linewidth=0)
            axes.plot(line.x, value, color=color, marker=MARKERS[i % 6], linestyle=DASHES[i % 6], label=line.label)
        if zero:
            axes.set_ylim(bottom=0)
        axes.set(xlabel=x, ylabel=y)
        places = sorted({at for line in lines for at in line.x})
        axes.set_xticks(places[:: -(-len(places) // 7)])
        axes.grid(axis="y")
        legend(axes)

    told = "; ".join(f"{c.label}: " + ", ".join(f"{a:g} is {p.value:.2f}" for a, p in _few(c)) for c in lines)
    return plot(
        name,
        title,
        f"Line plot of {y} by {x}. {told}.",
        note,
        draw,
        2.5 + 0.2 * legend_lines(line.label for line in lines),
    )


def bars(name: str, title: str, groups: Mapping[str, Sequence[float]], x: str, y: str, note: str) -> Plot:
    """Bars side by side, one group a number 0, 1, ..; shares of each series."""

    def draw(axes: Axes) -> None:
        width = 0.8 / len(groups)
        for i, (label, values) in enumerate(groups.items()):
            at = np.arange(len(values)) + (i - (len(groups) - 1) / 2) * width
            axes.bar(at, values, width * 0.92, color=SERIES[i % len(SERIES)], label=label, linewidth=0)
        axes.set(xlabel=x, ylabel=y)
        axes.set_xticks(range(max(map(len, groups.values()))))
        axes.yaxis.set_major_formatter(lambda v, _: f"{100 * v:.0f} %")
        axes.grid(axis="y")
        axes.set_axisbelow(True)
        legend(axes)

    told = "; ".join(
        f"{label}: " + ", ".join(f"{i} in {100 * v:.0f} %" for i, v in enumerate(values))
        for label, values in groups.items()
    )
    return plot(name, title, f"Histogram of {x}. {told}.", note, draw, 2.5 + 0.2 * legend_lines(groups))


def forest(name: str, title: str, rows: Mapping[str, Interval], x: str, note: str, ratio: bool = False) -> Plot:
    """One dot and whisker a row; a ratio has a logarithmic axis and a line at 1."""

    def draw(axes: Axes) -> None:
        for i, row in enumerate(rows.values()):
            if row.known:
                axes.plot([row.low, row.high], [i, i], color=SERIES[0], linewidth=2)
            axes.plot([row.value], [i], "o", color=SERIES[0], markersize=5.5)
            text = f"{row.value:.2f}{' x' if ratio else ''}"
            end = row.high if row.known else row.value
            axes.annotate(text, (end, i), (7, 0), textcoords="offset points", va="center", color=INK, fontsize=8.5)
        if ratio:
            axes.set_xscale("log", base=2)
            axes.axvline(1, color=MUTED, linewidth=1, linestyle=DASHES[1])
            ends = [1.0, *(end for row in rows.values() for end in (row.value, row.low, row.high) if end > 0)]
            near = max(ends) / min(ends) < 4  # powers of two alone would leave one tick
            axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5]) if near else LogLocator(2))
            axes.xaxis.set_minor_locator(NullLocator())
            axes.xaxis.set_major_formatter(lambda v, _: f"{v:g} x")
        list_rows(axes, shortened(rows))
        axes.margins(x=0.2)
        axes.set(xlabel=x)

    told = "; ".join(f"{label} {_words(row)}" for label, row in rows.items())
    return plot(name, title, f"Forest plot of {x}. {told}.", note, draw, 0.9 + 0.4 * len(rows))


def strips(name: str, title: str, rows: Mapping[str, Mapping[int, Sequence[float]]], unit: str, note: str) -> Plot:
    """Every raw value against the median of its row, block under block: two humps show here and nowhere else."""
    middle = {
        label: float(np.median(np.concatenate([list(v) for v in blocks.values()]))) for label, blocks in rows.items()
    }

    def draw(axes: Axes) -> None:
        for i, (label, blocks) in enumerate(rows.items()):
            for place, block in enumerate(sorted(blocks)):
                at = i - 0.36 + 0.72 * (place + 0.5) / len(blocks)
                values = 100 * (np.asarray(blocks[block]) / middle[label] - 1)
                axes.plot(values, [at] * len(values), ".", color=SERIES[i % len(SERIES)], alpha=0.5, markersize=4)
                axes.plot([np.median(values)], [at], "|", color=INK, markersize=4, markeredgewidth=1)
        names = zip(shortened(rows), middle.values(), strict=True)
        list_rows(axes, [f"{short}\n{value:.4g} {unit}" for short, value in names])
        axes.xaxis.set_major_formatter(lambda v, _: f"{v:+g} %" if v else "0 %")
        axes.set(xlabel="against the median of the row")

    told = "; ".join(
        f"{label}: median {middle[label]:.4g} {unit}, {len(blocks)} blocks" for label, blocks in rows.items()
    )
    return plot(name, title, f"Strip plot of raw values. {told}.", note, draw, 0.9 + 0.7 * len(rows))


def stacks(name: str, title: str, rows: Mapping[str, Mapping[str, float]], x: str, note: str) -> Plot:
    """One bar a row, split into named parts."""
    parts = list(dict.fromkeys(part for row in rows.values() for part in row))

    def draw(axes: Axes) -> None:
        for i, (label, row) in enumerate(rows.items()):
            left = 0.0
            for part in row:
                color = SERIES[parts.index(part) % len(SERIES)]
                first = label == next(name for name, r in rows.items() if part in r)
                axes.barh(i, row[part], 0.55, left, color=color, edgecolor=SHEET, label=part if first else None)
                left += row[part]
        list_rows(axes, shortened(rows))
        axes.set(xlabel=x)
        legend(axes)

    told = "; ".join(f"{label}: " + ", ".join(f"{p} {v:.3g}" for p, v in row.items()) for label, row in rows.items())
    return plot(
        name, title, f"Stacked bars of {x}. {told}.", note, draw, 1.0 + 0.42 * len(rows) + 0.2 * legend_lines(parts)
    )


def lollipops(name: str, title: str, rows: Mapping[str, float], x: str, bound: float, note: str) -> Plot:
    """One signed number a row, and lines at +-bound."""

    def draw(axes: Axes) -> None:
        for i, value in enumerate(rows.values()):
            axes.plot([0, value], [i, i], color=SERIES[0], linewidth=1.6)
            axes.plot([value], [i], MARKERS[0] if abs(value) >= bound else MARKERS[1], color=SERIES[0], markersize=6)
            behind = {"facecolor": SHEET, "edgecolor": "none", "pad": 0.6}
            axes.annotate(
                f"{value:+.1f}", (value, i), (0, 7), textcoords="offset points", ha="center", fontsize=8.5, bbox=behind
            )
        for at in (-bound, bound):
            axes.axvline(at, color=MUTED, linewidth=0.9, linestyle=DASHES[1])
        axes.axvline(0, color=GRID, linewidth=1)
        list_rows(axes, shortened(rows))
        axes.margins(x=0.1)
        axes.set(xlabel=x)

    told = "; ".join(f"{label} {value:+.1f}" for label, value in rows.items())
    return plot(name, title, f"Plot of {x}. {told}.", note, draw, 0.9 + 0.4 * len(rows))


def _few(curve: Curve) -> list[tuple[float, Interval]]:
    """At most six points of a curve, for the text that replaces it."""
    points = list(zip(curve.x, curve.y, strict=True))
    return points if len(points) <= 6 else points[:: -(-len(points) // 6)]


def _words(interval: Interval) -> str:
    if not interval.known:
        return f"{interval.value:.2f}, interval not known"
    return f"{interval.value:.2f}, from {interval.low:.2f} to {interval.high:.2f}"
