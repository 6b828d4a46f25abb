"""Cost: where a speed-up comes from, what batch and K do to it, and how far the machine's ceilings are."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from harness.record import Case, Sample
from reports.drawing import DASHES, INK, MARKERS, MUTED, SERIES, Plot, legend, legend_lines, list_rows, plain_log, plot
from reports.labels import key_of, labels
from reports.newest import joined
from reports.panels import Panel, Section, panels
from reports.store import Records

FACTORS = ("factor_acceptance", "factor_verify", "factor_draft", "factor_accept", "factor_gap")
"""their product is the speed-up over plain decoding"""
CEILINGS = {"ceiling_copy": "copy", "ceiling_read": "read", "ceiling_matmul": "matrix product"}
DRAWN = 6
"""waterfalls, heat maps and points of a kind that are drawn; tables hold all"""

Middles = dict[tuple[str, str], dict[str, float]]
"""(run, case) -> median of each metric, visits that were slowed down in every try left out"""


def build(now: Records, every: Records) -> Section | None:
    """Nothing where no cost was taken apart."""
    samples = joined(now)
    cases = {key_of(s.case): s.case for s in samples}
    found = middles(samples)
    parts = (waterfalls, grids, roofline, ops)
    shown = [panel for part in parts if (panel := part(cases, found)) is not None]
    return panels("cost", "Where the time goes", *shown, link="Cost", row="Case") if shown else None


def middles(samples: Sequence[Sample]) -> Middles:
    """The median of each metric of each case."""
    values: dict[tuple[str, str], dict[str, list[float]]] = {}
    for s in samples:
        if s.telemetry.get("valid") is not False:
            values.setdefault(key_of(s.case), {}).setdefault(s.metric, []).extend(s.values)
    return {key: {metric: float(np.median(v)) for metric, v in of.items()} for key, of in values.items()}


def waterfalls(cases: Mapping[tuple[str, str], Case], found: Middles) -> Panel | None:
    """Each factor of a speed-up, and its sum of parts."""
    taken = [key for key, of in found.items() if all(factor in of for factor in FACTORS)]
    if not taken:
        return None
    names = labels([cases[key] for key in taken])
    columns = (*FACTORS, "speedup", "break_even", "phase_sum", "energy")
    rows = tuple((names[key], *(f"{found[key][c]:.3g}" if c in found[key] else "" for c in columns)) for key in taken)
    head = (
        "",
        *(f.removeprefix("factor_") for f in FACTORS),
        "speed-up",
        "break-even length",
        "sum of phases",
        "J/token",
    )
    plots = tuple(waterfall(f"waterfall-{i}", names[key], found[key]) for i, key in enumerate(taken[:DRAWN], 1))
    note = "Plain decoding is 1; each factor multiplies what stands before it, and their product is the speed-up. " \
           "Below the break-even length a draft costs more than it brings."  # fmt: skip
    return Panel("", head, rows, plots, "Where a speed-up comes from", note)


def waterfall(name: str, label: str, of: Mapping[str, float]) -> Plot:
    """Bars from one product to the next, on a logarithmic axis."""
    steps = [of[factor] for factor in FACTORS]
    reached = np.cumprod([1.0, *steps])

    def draw(axes: Axes) -> None:
        for i, (start, end, factor) in enumerate(zip(reached[:-1], reached[1:], steps, strict=True)):
            color = SERIES[2] if factor >= 1 else SERIES[1]
            axes.barh(i, end - start, 0.6, start, color=color, linewidth=0)
            axes.annotate(f"x {factor:.2f}", (max(start, end), i), (5, 0), textcoords="offset points", va="center",
                          fontsize=8.5, color=INK)  # fmt: skip
        axes.barh(len(steps), reached[-1] - 1, 0.6, 1, color=SERIES[0], linewidth=0)
        axes.annotate(f"{reached[-1]:.2f} x", (max(1.0, reached[-1]), len(steps)), (5, 0), textcoords="offset points",
                      va="center", fontsize=8.5, color=INK)  # fmt: skip
        axes.axvline(1, color=MUTED, linewidth=1, linestyle=DASHES[1])
        list_rows(axes, [*(f.removeprefix("factor_") for f in FACTORS), "speed-up"])
        axes.set(xlabel="times plain decoding", xscale="log")
        axes.margins(x=0.22)
        plain_log(axes.xaxis)

    told = ", ".join(f"{f.removeprefix('factor_')} x {v:.3g}" for f, v in zip(FACTORS, steps, strict=True))
    alt = f"Waterfall of a speed-up of {label}: {told}; together {reached[-1]:.3g} times plain decoding."
    return plot(
        name, label, alt, f"Medians of blocks; measured speed-up {of.get('speedup', reached[-1]):.3g} x.", draw, 2.7
    )


def grids(cases: Mapping[tuple[str, str], Case], found: Middles) -> Panel | None:
    """A heat map of tokens/s by batch and K, one a pair and way of accepting."""
    worlds: dict[tuple[Any, ...], dict[tuple[int, int], float]] = {}
    for key, of in found.items():
        c = cases[key]
        if "decode" in of and c.impl == "optimized":
            ways = [(c.acceptance, c.forced_rates)] if c.num_draft_tokens else []
            for way in ways or _ways(cases, c):
                world = (c.pair, c.dtype, c.device, c.variant, way[0], way[1] if way[0] == "forced" else ())
                worlds.setdefault(world, {})[c.batch, c.num_draft_tokens] = of["decode"]
    several = {w: g for w, g in worlds.items() if any(k for _, k in g) and len(g) > 2}
    if not several:
        return None
    plots = tuple(grid(f"grid-{i}", world, several[world]) for i, world in enumerate(sorted(several)[:DRAWN], 1))
    note = "tokens/s of all sequences together; the fuller the colour, the more over plain decoding of the same batch."
    return Panel("", (), (), plots, "Batch and number of drafts", note)


def _ways(cases: Mapping[tuple[str, str], Case], plain: Case) -> list[tuple[str, tuple[float, ...]]]:
    """Ways of accepting beside which plain decoding stands."""
    beside = {(c.acceptance, c.forced_rates) for c in cases.values() if c.num_draft_tokens and c.pair == plain.pair}
    return sorted(beside)


def grid(name: str, world: tuple[Any, ...], speeds: Mapping[tuple[int, int], float]) -> Plot:
    """One cell a batch and K."""
    batches, drafts = sorted({b for b, _ in speeds}), sorted({k for _, k in speeds})
    ratios = {(b, k): v / speeds[b, 0] if (b, 0) in speeds else 1.0 for (b, k), v in speeds.items()}
    most = max(max(ratios.values()), 1.0 + 1e-9)

    def draw(axes: Axes) -> None:
        for (b, k), v in speeds.items():
            at = drafts.index(k), batches.index(b)
            full = max(0.0, (ratios[b, k] - 1) / (most - 1))
            axes.bar(at[0], 0.94, 0.94, at[1] - 0.47, color=SERIES[0], alpha=0.08 + 0.5 * full, linewidth=0)
            more = f"\n{ratios[b, k]:.2f} x" if k and (b, 0) in speeds else ""
            axes.text(*at, f"{v:.4g}{more}", ha="center", va="center", fontsize=8, color=INK)
        axes.set_xticks(range(len(drafts)), ["plain" if k == 0 else f"K={k}" for k in drafts])
        axes.set_yticks(range(len(batches)), [f"B={b}" for b in batches])
        axes.set_ylim(len(batches) - 0.5, -0.5)
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)

    pair, dtype, device, variant, way, _ = world
    told = "; ".join(f"B={b} {'plain' if k == 0 else f'K={k}'} {v:.4g}" for (b, k), v in sorted(speeds.items()))
    title = ", ".join(filter(None, (pair, dtype, device, variant, f"{way} acceptance")))
    return plot(
        name, title, f"Heat map of tokens/s by batch and number of drafts. {told}.", "", draw, 1.0 + 0.5 * len(batches)
    )


def roofline(cases: Mapping[tuple[str, str], Case], found: Middles) -> Panel | None:
    """Measured cycles against the time that the machine's ceilings allow."""
    taken = [key for key, of in found.items() if "floor" in of and "cycle" in of]
    if not taken:
        return None
    names = labels([cases[key] for key in taken])
    tops = [(key, metric) for key, of in found.items() for metric in CEILINGS if metric in of]
    unit = {"ceiling_copy": "GB/s", "ceiling_read": "GB/s", "ceiling_matmul": "TFLOP/s"}
    told = ", ".join(f"{CEILINGS[metric]} {found[key][metric]:.4g} {unit[metric]}" for key, metric in tops)
    rows = tuple(
        (names[key], f"{of['floor']:.4g}", f"{of['cycle']:.4g}", f"{of['floor'] / of['cycle']:.0%}",
         *(f"{of[m]:.3g}" if m in of else "" for m in ("bytes_weights", "bytes_keys")))
        for key in taken for of in [found[key]]
    )  # fmt: skip
    head = ("", "floor, ms", "cycle, ms", "of the ceiling", "weights, GB", "keys, GB")
    ceilings = told or "not recorded"
    note = f"The floor is what the bytes and operations of a cycle take at this machine's own ceilings: {ceilings}."
    points = {names[key]: (found[key]["floor"], found[key]["cycle"], cases[key].pair) for key in taken}
    return Panel("", head, rows, (_against(points),), "Against the ceilings", note)


def _against(points: Mapping[str, tuple[float, float, str]]) -> Plot:
    """A point a case; the solid line is the ceiling."""
    pairs = list(dict.fromkeys(pair for _, _, pair in points.values()))

    def draw(axes: Axes) -> None:
        ends = np.array([min(f for f, _, _ in points.values()) / 1.5, max(c for _, c, _ in points.values()) * 1.5])
        for share, dash in ((1.0, 0), (0.5, 1), (0.25, 2)):
            axes.plot(ends, ends / share, color=MUTED, linewidth=1, linestyle=DASHES[dash])
        for i, pair in enumerate(pairs):
            mine = [(f, c) for f, c, p in points.values() if p == pair]
            axes.plot(*zip(*mine, strict=True), MARKERS[i % 6], color=SERIES[i % 6], label=pair, alpha=0.8)
        axes.set(xscale="log", yscale="log", xlabel="floor, ms", ylabel="measured cycle, ms")
        plain_log(axes.xaxis)
        plain_log(axes.yaxis)
        axes.grid()
        legend(axes)

    told = "; ".join(f"{label}: floor {f:.3g}, cycle {c:.3g} ms" for label, (f, c, _) in points.items())
    note = "Solid: as fast as the ceilings allow; dashed: half of that; dotted: a quarter."
    return plot(
        "roofline", "Roofline", f"Measured cycles against floors. {told}.", note, draw, 2.9 + 0.2 * legend_lines(pairs)
    )


def ops(cases: Mapping[tuple[str, str], Case], found: Middles) -> Panel | None:
    """Kernels alone: their time, and the share of the copy ceiling that they move bytes at."""
    taken = [key for key, of in found.items() if "op_time" in of]
    if not taken:
        return None
    taken.sort(key=lambda key: (cases[key].family, cases[key].variant, cases[key].form))
    rows = tuple(
        (f"{c.family}, {c.variant}, {c.form}", f"{of['op_time']:.4g}",
         f"{of['op_bandwidth']:.0%}" if "op_bandwidth" in of else "")
        for key in taken for c, of in [(cases[key], found[key])]
    )  # fmt: skip
    return Panel("", ("", "us", "of copy bandwidth"), rows, (), "Operations alone", folded=len(rows) > 12)
