"""Plots as inline SVG: text stays text, colours are the page's CSS variables, the same data give the same bytes.

matplotlib draws with marker colours (INK, MUTED, ...); afterwards each is replaced by `var(--...)`, so one drawing
serves a light page, a dark page and paper. Series differ by marker and dash as well as by colour (the palette is Okabe
and Ito's, darkened or lightened until text-sized marks stand out).
"""

import re
from collections.abc import Iterable, Sequence
from html import escape
from io import StringIO
from typing import Any, NamedTuple

from markupsafe import Markup
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

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
WIDTH, WIDE = 4.3, 9.1
"""inches of a figure in one column and in both, so that letters have one size on the page"""


class Plot(NamedTuple):
    """What the page shows of one figure."""

    title: str
    svg: Markup
    note: str
    wide: bool = False
    """takes the whole width of the page"""


def plot(
    name: str, title: str, alt: str, note: str, draw: Any, height: float, wide: bool = False, rows: int = 1
) -> Plot:
    """A figure of the page: `draw` gets its axes, or one a row over a shared x.

    name    begins every id inside, so it is unique on the page
    alt     the words that stand for the figure
    height  inches
    """
    with style.context(["default", STYLE]):  # whatever a user's matplotlibrc says
        figure = Figure(figsize=(WIDE if wide else WIDTH, height), layout="constrained")
        figure.patch.set_alpha(0)
        axes = figure.subplots(rows, sharex=True, squeeze=False)[:, 0]
        for one in axes:
            one.patch.set_alpha(0)
        draw(axes if rows > 1 else axes[0])
        out = StringIO()
        figure.savefig(out, format="svg")
    return Plot(title, Markup(_inline(out.getvalue(), name, alt)), note, wide)


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


def plain_log(axis: Axis) -> None:
    """Plain numbers on a logarithmic axis; powers of ten alone would leave one tick on a short one."""
    low, high = axis.get_view_interval()
    if high / low < 10:
        axis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5]))
    else:
        axis.set_major_locator(LogLocator(10, subs=(1, 2, 5) if high / low < 1000 else (1,)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(lambda v, _: f"{v:g}")


def list_rows(axes: Axes, rows: Sequence[str]) -> None:
    """Rows from top to bottom, named at the left."""
    axes.set_yticks(range(len(rows)), rows)
    axes.tick_params(axis="y", length=0, labelcolor=INK)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x")
    axes.set_axisbelow(True)


def legend(axes: Axes) -> None:
    """Above the plot, in two columns if the names are short."""
    names = axes.get_legend_handles_labels()[1]
    if len(names) > 1:
        columns = 2 if max(map(len, names)) <= 24 else 1
        figure = axes.get_figure()
        assert figure is not None
        figure.legend(loc="outside upper left", ncols=columns, borderaxespad=0.2, handlelength=2.2)


def legend_lines(names: Iterable[str]) -> int:
    """Lines that `_legend` takes."""
    found = list(names)
    return 0 if len(found) < 2 else len(found) if max(map(len, found)) > 24 else (len(found) + 1) // 2


def shortened(labels: Iterable[str]) -> list[str]:
    """Labels of one plot without the facts that all of them name; the words of the plot name them in full."""
    parts = [label.split(", ") for label in labels]
    shared = set.intersection(*map(set, parts)) if len(parts) > 1 else set()
    return [lines(", ".join(fact for fact in label if fact not in shared) or label[0]) for label in parts]


def lines(label: str, width: int = 22) -> str:
    """A label in lines of about `width` letters, broken where its facts are joined."""
    lines = [""]
    for fact in re.split(r"(?<=[,:]) ", label):
        if lines[-1] and len(lines[-1]) + len(fact) >= width:
            lines.append(fact)
        else:
            lines[-1] = f"{lines[-1]} {fact}".strip()
    return "\n".join(lines)
