"""Acceptance: length with interval, survival by position, length along the output and by kind of prompt."""

from collections.abc import Sequence

from reports import figures, statistics
from reports.arms import Measured, arms, drafted
from reports.drawing import SERIES, Plot
from reports.figures import Curve
from reports.panels import Panel, Section, number, panels, span
from reports.statistics import Interval
from reports.store import Records


def build(now: Records, every: Records) -> Section:
    """Lengths, then rates by draft position."""
    return panels("acceptance", "Acceptance", acceptance(now), positions(now), categories(now), row="Pair and sampling")


def acceptance(records: Records) -> Panel:
    """Length with interval, survival, histogram, length by output position."""
    found = drafted(records)
    if not found:
        return Panel("not measured: no complete verify step is in this record (draftproof bench acceptance)")
    lengths = {m.label: statistics.acceptance_length(m.arm) for m in found}
    rows = tuple(
        (m.label, number(lengths[m.label]), span(lengths[m.label]), str(m.arm.num_draft_tokens),
         str(lengths[m.label].units), str(sum(map(len, m.arm.steps.values()))))
        for m in found
    )  # fmt: skip
    forest = figures.forest(
        "lengths", "Acceptance length", lengths, "tokens a verify step",
        "Tokens emitted a verify step, the target's own included; 95 % interval by bootstrap over prompts.",
    )  # fmt: skip
    plots = [forest]
    parts = [found[first : first + len(SERIES)] for first in range(0, len(found), len(SERIES))]
    for i, part in enumerate(parts, 1):
        plots += _acceptance_plots(part, i, f", part {i} of {len(parts)}" if len(parts) > 1 else "")
    return Panel("", ("", "length", "95 % interval", "K", "prompts", "steps"), rows, tuple(plots))


def positions(records: Records) -> Panel:
    """Unconditional and conditional rate of each draft position; empty where there is no acceptance either."""
    found = drafted(records)
    longest = max((m.arm.num_draft_tokens for m in found), default=0)
    rows = []
    for m in found:
        cells = [
            f"{p.value:.1%} / {c.value:.1%}" if c.value >= 0 else f"{p.value:.1%}" for p, c in statistics.rates(m.arm)
        ]
        rows.append((m.label, *cells, *[""] * (longest - len(cells))))
    note = "Share of all steps that accepted the draft / share of the steps that had accepted the one before it."
    if not rows:
        return Panel()
    return Panel(
        "", ("", *(f"draft {i}" for i in range(1, longest + 1))), tuple(rows), (), "Rates by draft position", note
    )


def categories(records: Records) -> Panel:
    """Length by kind of prompt, where the data set names kinds; empty where it does not."""
    known = [a for a in records.accepts if a.extra.get("category") and a.num_draft_tokens and not a.case.variant]
    kinds = sorted({str(a.extra["category"]) for a in known})
    if len(kinds) < 2:
        return Panel()
    rows: dict[str, dict[str, Interval]] = {}
    for kind in kinds:
        for m in arms([a for a in known if a.extra["category"] == kind]):
            rows.setdefault(m.label, {})[kind] = statistics.acceptance_length(m.arm)
    cells = tuple(
        (label, *(f"{number(row[k])} ({span(row[k])})" if k in row else "" for k in kinds))
        for label, row in rows.items()
    )
    return Panel("", ("", *kinds), cells, (), "Length by kind of prompt", "With 95 % intervals.", folded=True)


def _acceptance_plots(found: Sequence[Measured], part: int, suffix: str) -> list[Plot]:
    """Survival, histogram and length along the output, for as many arms as there are colours."""
    survival = []
    for m in found:
        reached = [Interval(1.0, 1.0, 1.0, len(m.arm.steps)), *(p for p, _ in statistics.rates(m.arm))]
        survival.append(Curve(m.label, range(len(reached)), reached))
    counted = {m.label: statistics.histogram(m.arm) for m in found}
    shares = {label: [n / max(1, sum(counts)) for n in counts] for label, counts in counted.items()}
    places = []
    for m in found:
        known = {at: i for at, i in statistics.length_by_position(m.arm).items() if i.known}
        places.append(Curve(m.label, list(known), list(known.values())))
    plots = [
        figures.curves(
            f"survival-{part}", "How far drafts survive" + suffix, survival, "draft position i", "share of steps",
            "Share of verify steps that accepted at least i drafts, with 95 % intervals.", zero=True,
        ),
        figures.bars(
            f"histogram-{part}", "Accepted drafts a step" + suffix, shares, "accepted drafts", "share of steps",
            "Two humps mean two kinds of text; a mean alone would hide them.",
        ),
    ]  # fmt: skip
    drawn = [curve for curve in places if curve.x]
    if any(len(curve.x) > 1 for curve in drawn):
        plots.append(figures.curves(
            f"position-{part}", "Along the output" + suffix, drawn, "output token", "acceptance length",
            f"Steps grouped by the output token they begin at, {statistics.BUCKET} tokens a bucket.",
        ))  # fmt: skip
    return plots
