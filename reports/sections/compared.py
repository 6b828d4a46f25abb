"""Verdicts: every metric of two sides, against the band of what nobody minds; acceptance prompt by prompt."""

from matplotlib.axes import Axes

from harness.record import Verdict
from reports.drawing import GRID, INK, SERIES, Plot, lines, list_rows, plot
from reports.panels import Section
from reports.store import Records

SHOWN, DRAWN = 60, 20
"""verdicts in the table and in a plot, gravest first; the others are counted"""
RANKS = ("WORSE", "INVALID", "UNCLEAR", "BETTER", "SAME")
MARKS = {"WORSE": "v", "BETTER": "^", "SAME": "o", "UNCLEAR": "D", "INVALID": "X"}
SCALES = {"ratio": "change in per cent", "difference": "change in the metric's own unit"}


def build(now: Records, every: Records) -> Section | None:
    """A table of verdicts and a forest plot a scale; nothing where nothing was compared."""
    found = ordered(now.verdicts)
    if not found:
        return None
    rows = [
        (f"{v.pair} {v.metric}".strip(), v.verdict, size(v, v.effect), span_of(v), size(v, v.visible, is_width=True),
         "not known" if v.p is None else f"{v.p:.2g}", "; ".join(v.reasons))
        for v in found[:SHOWN]
    ]  # fmt: skip
    counts = ", ".join(f"{n} {kind}" for kind in RANKS if (n := sum(v.verdict == kind for v in found)))
    plots = [p for scale in SCALES if (p := forest([v for v in found if v.scale == scale], scale)) is not None]
    facts = {"rows": rows, "unshown": len(found[SHOWN:]), "counts": counts, "plots": plots}
    return Section("compared", "Compared with the baseline", facts, "Compared", "compared.html")


def ordered(found: list[Verdict]) -> list[Verdict]:
    """Gravest first, in the order of the record otherwise."""
    return sorted(found, key=lambda v: RANKS.index(v.verdict))


def size(v: Verdict, value: float | None, is_width: bool = False) -> str:
    """An effect in words: a change in per cent, or in the metric's own unit."""
    if value is None:
        return "not known"
    if v.scale == "ratio":
        return f"{value:.2%}" if is_width else f"{value - 1:+.2%}"
    return f"{value:.3f}" if is_width else f"{value:+.3f}"


def span_of(v: Verdict) -> str:
    """The interval of an effect in words."""
    return "not known" if v.low is None or v.high is None else f"{size(v, v.low)} to {size(v, v.high)}"


def forest(found: list[Verdict], scale: str) -> Plot | None:
    """Effects with intervals on the band that nobody minds; None where no effect is known."""
    known = [v for v in found if v.effect is not None and v.low is not None and v.high is not None]
    drawn = known[:DRAWN]
    if not drawn:
        return None
    zero, factor = (1.0, 100.0) if scale == "ratio" else (0.0, 1.0)
    effects = {
        i: [factor * (x - zero) for x in (v.effect, v.low, v.high) if x is not None] for i, v in enumerate(drawn)
    }

    def draw(axes: Axes) -> None:
        for i, v in enumerate(drawn):
            middle, low, high = effects[i]
            band = factor * float(v.extra.get("min_effect") or 0.0)
            axes.barh(i, 2 * band, 0.8, -band, color=GRID, alpha=0.6, linewidth=0)
            color = SERIES[1] if v.verdict == "WORSE" else SERIES[0]
            axes.plot([low, high], [i, i], color=color, linewidth=2)
            axes.plot([middle], [i], MARKS[v.verdict], color=color, markersize=6)
            axes.annotate(v.verdict, (high, i), (6, 0), textcoords="offset points", va="center", color=INK, fontsize=8)
        axes.axvline(0, color=GRID, linewidth=1)
        list_rows(axes, [lines(f"{v.pair}, {v.metric}", 30) for v in drawn])
        if scale == "ratio":
            axes.xaxis.set_major_formatter(lambda x, _: f"{x:+g} %" if x else "0 %")
        axes.margins(x=0.18)
        axes.set(xlabel=SCALES[scale])

    told = "; ".join(f"{v.pair} {v.metric} {v.verdict}: {size(v, v.effect)}, {span_of(v)}" for v in drawn)
    more = f" The {len(drawn)} gravest of {len(known)}." if len(known) > len(drawn) else ""
    note = f"Candidate against baseline, 95 % interval. Grey: what nobody minds. SAME lies inside.{more}"
    height = 0.9 + 0.42 * len(drawn)
    return plot(
        f"forest-{scale}", "Effects on their bands", f"Forest plot of {SCALES[scale]}. {told}.", note, draw, height
    )
