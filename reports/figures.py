"""Plots as inline SVG: text stays text, colours are the page's CSS variables, the same data give the same bytes.

matplotlib draws with marker colours (INK, MUTED, ...); afterwards each is replaced by `var(--...)`, so one drawing
serves a light page, a dark page and paper. Series differ by marker and dash as well as by colour (the palette is Okabe
and Ito's, darkened or lightened until text-sized marks stand out).
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from io import StringIO
from typing import Any, NamedTuple

import numpy as np
from markupsafe import Markup
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from reports.statistics import Interval

INK, MUTED, GRID, SHEET = "#010101", "#020202", "#030303", "#040404"
SERIES = ("#100001", "#100002", "#100003", "#100004", "#100005", "#100006")
VARIABLES = {INK: "ink", MUTED: "muted", GRID: "line", SHEET: "sheet"} | {
    color: f"series-{i}" for i, color in enumerate(SERIES, 1)
}
MARKERS, DASHES = "osD^vP", ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (5, 1.5, 1, 1.5)), (0, (8, 2)), (0, (3, 1)))

STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "draftproof",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9,
    "axes.edgecolor": GRID,
    "axes.labelcolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.titlecolor": INK,
    "axes.unicode_minus": False,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.labelcolor": INK,
    "legend.fontsize": 8.5,
    "lines.linewidth": 1.6,
    "lines.markersize": 4.5,
    "text.color": INK,
    "text.parse_math": False,
    "xtick.color": GRID,
    "xtick.labelcolor": MUTED,
    "ytick.color": GRID,
    "ytick.labelcolor": MUTED,
}
WIDTH = 4.3
"""inches; every figure has it, so that letters have one size on the page"""


class Curve(NamedTuple):
    """One line of a plot."""

    label: str
    x: Sequence[float]
    y: Sequence[Interval]


class Plot(NamedTuple):
    """What the page shows of one figure."""

    title: str
    svg: Markup
    note: str


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
        _legend(axes)

    told = "; ".join(f"{c.label}: " + ", ".join(f"{a:g} is {p.value:.2f}" for a, p in _few(c)) for c in lines)
    return _plot(
        name, title, f"Line plot of {y} by {x}. {told}.", note, draw, 2.5 + 0.2 * _rows(line.label for line in lines)
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
        _legend(axes)

    told = "; ".join(
        f"{label}: " + ", ".join(f"{i} in {100 * v:.0f} %" for i, v in enumerate(values))
        for label, values in groups.items()
    )
    return _plot(name, title, f"Histogram of {x}. {told}.", note, draw, 2.5 + 0.2 * _rows(groups))


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
        _list(axes, _shortened(rows))
        axes.margins(x=0.2)
        axes.set(xlabel=x)

    told = "; ".join(f"{label} {_words(row)}" for label, row in rows.items())
    return _plot(name, title, f"Forest plot of {x}. {told}.", note, draw, 0.9 + 0.4 * len(rows))


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
        names = zip(_shortened(rows), middle.values(), strict=True)
        _list(axes, [f"{short}\n{value:.4g} {unit}" for short, value in names])
        axes.xaxis.set_major_formatter(lambda v, _: f"{v:+g} %" if v else "0 %")
        axes.set(xlabel="against the median of the row")

    told = "; ".join(
        f"{label}: median {middle[label]:.4g} {unit}, {len(blocks)} blocks" for label, blocks in rows.items()
    )
    return _plot(name, title, f"Strip plot of raw values. {told}.", note, draw, 0.9 + 0.7 * len(rows))


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
        _list(axes, _shortened(rows))
        axes.set(xlabel=x)
        _legend(axes)

    told = "; ".join(f"{label}: " + ", ".join(f"{p} {v:.3g}" for p, v in row.items()) for label, row in rows.items())
    return _plot(name, title, f"Stacked bars of {x}. {told}.", note, draw, 1.0 + 0.42 * len(rows) + 0.2 * _rows(parts))


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
        _list(axes, _shortened(rows))
        axes.margins(x=0.1)
        axes.set(xlabel=x)

    told = "; ".join(f"{label} {value:+.1f}" for label, value in rows.items())
    return _plot(name, title, f"Plot of {x}. {told}.", note, draw, 0.9 + 0.4 * len(rows))


def _plot(name: str, title: str, alt: str, note: str, draw: Any, height: float) -> Plot:
    with style.context(["default", STYLE]):  # whatever a user's matplotlibrc says
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        figure.patch.set_alpha(0)
        axes = figure.subplots()
        axes.patch.set_alpha(0)
        draw(axes)
        out = StringIO()
        figure.savefig(out, format="svg")
    return Plot(title, Markup(_inline(out.getvalue(), name, alt)), note)


def _inline(svg: str, name: str, alt: str) -> str:
    """The drawing alone: no addresses of namespaces, ids that are unique on the page, colours of the page."""
    svg = svg[svg.index("<svg") :]
    # the metadata hold the date of drawing
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    box = re.search(r'viewBox="[^"]*"', svg)
    assert box is not None
    # role img hides the letters inside from a screen reader, which reads the label instead
    head = f'<svg {box[0]} role="img" aria-label="{escape(alt, quote=True)}">'
    svg = head + svg[svg.index(">") + 1 :]
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = svg.replace("url(#", f"url(#{name}-").replace('xlink:href="#', f'href="#{name}-')
    svg = re.sub(r"(font: [^;\"]*?)'DejaVu Sans'[^;\"]*", r"\1var(--sans)", svg)
    for color, variable in VARIABLES.items():
        svg = svg.replace(color, f"var(--{variable})")
    return re.sub(r"\n\s*", "\n", svg).strip()


def _list(axes: Axes, rows: Sequence[str]) -> None:
    """Rows from top to bottom, named at the left."""
    axes.set_yticks(range(len(rows)), rows)
    axes.tick_params(axis="y", length=0, labelcolor=INK)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x")
    axes.set_axisbelow(True)


def _legend(axes: Axes) -> None:
    """Above the plot, in two columns if the names are short."""
    names = axes.get_legend_handles_labels()[1]
    if len(names) > 1:
        columns = 2 if max(map(len, names)) <= 24 else 1
        figure = axes.get_figure()
        assert figure is not None
        figure.legend(loc="outside upper left", ncols=columns, borderaxespad=0.2, handlelength=2.2)


def _rows(names: Iterable[str]) -> int:
    """Lines that `_legend` takes."""
    found = list(names)
    return 0 if len(found) < 2 else len(found) if max(map(len, found)) > 24 else (len(found) + 1) // 2


def _shortened(labels: Iterable[str]) -> list[str]:
    """Labels of one plot without the facts that all of them name; the words of the plot name them in full."""
    parts = [label.split(", ") for label in labels]
    shared = set.intersection(*map(set, parts)) if len(parts) > 1 else set()
    return [_lines(", ".join(fact for fact in label if fact not in shared) or label[0]) for label in parts]


def _lines(label: str, width: int = 22) -> str:
    """A label in lines of about `width` letters, broken where its facts are joined."""
    lines = [""]
    for fact in re.split(r"(?<=[,:]) ", label):
        if lines[-1] and len(lines[-1]) + len(fact) >= width:
            lines.append(fact)
        else:
            lines[-1] = f"{lines[-1]} {fact}".strip()
    return "\n".join(lines)


def _few(curve: Curve) -> list[tuple[float, Interval]]:
    """At most six points of a curve, for the text that replaces it."""
    points = list(zip(curve.x, curve.y, strict=True))
    return points if len(points) <= 6 else points[:: -(-len(points) // 6)]


def _words(interval: Interval) -> str:
    if not interval.known:
        return f"{interval.value:.2f}, interval not known"
    return f"{interval.value:.2f}, from {interval.low:.2f} to {interval.high:.2f}"
