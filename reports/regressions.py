"""Better, worse, the same, or not known: each with its reasons.

    SAME      two one-sided tests of 5 % put the effect inside what nobody minds (Schuirmann 1987)
    BETTER    unlike chance after Benjamini-Hochberg inside its family, and at least as large as what nobody minds
    WORSE     the same the other way, twice: on the first look, and again in fresh processes
    UNCLEAR   neither; the smallest change that would have been found is stated
    INVALID   the two sides cannot be compared, and why

A first look alone never says WORSE: it names suspects, which `again` judges on their own.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from harness.record import RecordError, Verdict
from reports import noise, paired, statistics
from reports.gates import Family, Gates
from reports.noise import Array, Layout
from reports.sides import Key, Series, is_number, medians, runs, series
from reports.store import Frames

TIMED = "ratio of medians over processes, stratified permutation, hierarchical bootstrap"
ANSWERED = "paired cluster bootstrap over prompts, sign flips, max-T over positions"
ONCE = "worse on a first look; measure both sides again in fresh processes (--again)"
NOT_AGAIN = "worse on a first look, and not again in fresh processes"


class Estimate(NamedTuple):
    """What one series says, in the scale that adds: logs of ratios, or differences."""

    effect: float
    low: float
    high: float
    inner: tuple[float, float]
    """the interval that lies inside the band where both one-sided tests hold"""
    p: float
    visible: float
    units: int
    """processes or prompts, of the smaller side"""
    enough: str = ""
    """why there are too few of them; empty where there are enough"""
    notes: tuple[str, ...] = ()


class Judged(NamedTuple):
    """A series with its verdict."""

    series: Series
    verdict: str
    reasons: tuple[str, ...]
    estimate: Estimate | None = None
    q: float | None = None


Sides = tuple[Frames, Frames]


def judge(baseline: Frames, candidate: Frames, gates: Gates, again: Sides | None = None) -> list[Verdict]:
    """One verdict a series that the baseline measured and a gate judges, gravest first."""
    sides: tuple[tuple[str, ...], ...] = (runs(baseline), runs(candidate))
    first = look(series(baseline, candidate, gates))
    suspects = [one.series.key for one in first if one.verdict == "WORSE"]
    second: list[Judged] = []
    if again is not None:
        fresh = (runs(again[0]), runs(again[1]))
        if shared := {*sides[0], *sides[1]} & {*fresh[0], *fresh[1]}:
            raise RecordError(f"run {min(shared)} is no fresh process: it was part of the first look")
        sides += fresh
        second = look(series(*again, gates, suspects), is_again=True)
    return [_verdict(one, sides) for one in ordered(settle(first, second))]


def look(found: Sequence[Series], is_again: bool = False) -> list[Judged]:
    """Every series on its own data, family by family."""
    judged = [Judged(s, "INVALID", (s.fault,)) for s in found if s.fault]
    families: dict[Family, list[Series]] = {}
    for s in found:
        if not s.fault:
            families.setdefault(s.gate.family, []).append(s)
    for family, members in families.items():
        alpha = family.alpha_again if is_again else family.alpha
        estimates = estimate(members, alpha)
        known = [(s, e) for s, e in zip(members, estimates, strict=True) if e is not None]
        q = statistics.benjamini_hochberg([e.p for _, e in known])
        judged += [decide(s, e, share, alpha) for (s, e), share in zip(known, q, strict=True)]
        judged += [Judged(s, "UNCLEAR", ("fewer than two prompts were answered by both sides",))
                   for s, e in zip(members, estimates, strict=True) if e is None]  # fmt: skip
    return judged


def decide(found: Series, e: Estimate, q: float, alpha: float) -> Judged:
    """The verdict of one look."""
    band = float(np.log1p(found.gate.min_effect)) if found.gate.scale == "ratio" else found.gate.min_effect
    is_loss = (e.effect < 0) == (found.better == "up")
    if e.enough:
        verdict, why = "UNCLEAR", e.enough
    elif -band < e.inner[0] and e.inner[1] < band:
        verdict, why = "SAME", f"two one-sided tests: inside {told(found, band)} either way"
    elif q <= alpha and abs(e.effect) >= band:
        verdict, why = "WORSE" if is_loss else "BETTER", f"q = {q:.2g} of its family, and beyond {told(found, band)}"
    elif q <= alpha:
        verdict, why = "UNCLEAR", f"it moved (q = {q:.2g}), and whether beyond {told(found, band)} is not known"
    else:
        verdict, why = "UNCLEAR", f"neither a change nor its absence is shown (q = {q:.2g})"
    return Judged(found, verdict, (why, *e.notes), e, q)


def settle(first: Sequence[Judged], second: Sequence[Judged]) -> list[Judged]:
    """First looks, with WORSE only where a second look says so too; its effect is the one to quote."""
    again = {one.series.key: one for one in second}
    found = []
    for one in first:
        if one.verdict == "WORSE":
            repeat = again.get(one.series.key)
            if repeat is None:
                one = one._replace(verdict="UNCLEAR", reasons=(ONCE, *one.reasons))
            elif repeat.verdict != "WORSE":
                one = one._replace(verdict="UNCLEAR", reasons=(f"{NOT_AGAIN}: {repeat.reasons[0]}", *one.reasons))
            else:
                one = repeat._replace(reasons=("twice, the second time in fresh processes", *repeat.reasons))
        found.append(one)
    return found


def estimate(members: Sequence[Series], alpha: float) -> list[Estimate | None]:
    """What each series of a family says; the smallest visible change is that of one that moves alone."""
    found: dict[Key, Estimate | None] = {}
    layouts: dict[Layout, list[Series]] = {}
    for s in members:
        if s.arms is not None:
            found[s.key] = _answered(s, alpha / len(members))
        elif s.layout is not None:
            layouts.setdefault(s.layout, []).append(s)
    for layout, alike in layouts.items():
        found |= zip((s.key for s in alike), _timed(alike, layout, alpha, len(members)), strict=True)
    return [found[s.key] for s in members]


def _timed(alike: Sequence[Series], layout: Layout, alpha: float, num: int) -> list[Estimate]:
    """Series that the same processes measured."""
    middles = medians([process for s in alike for process in s.values])
    logs: Array = np.log(middles.reshape(len(alike), -1))
    effects, fewest = noise.effect(logs, layout), min(layout.sides)
    needed = noise.processes_needed(num, alpha)
    enough = "" if layout.smallest_p * num <= alpha else (
        f"{fewest} processes a side; {num} metrics that are judged together need {needed}"
    )  # fmt: skip
    draws = noise.hierarchical([s.values for s in alike], layout)
    low, high = noise.interval(effects, draws, statistics.LEVEL)
    inner = noise.interval(effects, draws, paired.EQUIVALENCE)
    p = noise.permutation_p(logs, layout, careful=5 * alpha)
    band = np.log1p([s.gate.min_effect for s in alike])
    # what is found must also come out beyond the band, four times in five
    visible = np.maximum(noise.visible(logs, layout, alpha / num), band + _tail(draws))
    columns = [column.tolist() for column in (effects, low, high, *inner, p, visible)]
    return [
        Estimate(middle, under, over, (left, right), chance, reach, fewest, enough)
        for middle, under, over, left, right, chance, reach in zip(*columns, strict=True)
    ]


def _tail(draws: Array) -> Array:
    """How far below its true value an effect comes out one time in five."""
    return -np.quantile(draws - np.median(draws, axis=-1, keepdims=True), 1 - noise.POWER, axis=-1)


def _answered(s: Series, threshold: float) -> Estimate | None:
    """A series that prompts answered."""
    assert s.arms is not None
    found = paired.compare(*s.arms)
    if found is None:
        return None
    moved = [f"draft {i} by {one.change:+.3f} (p = {one.p:.2g})" for i, one in enumerate(found.positions, 1)
             if one.p <= 1 - statistics.LEVEL]  # fmt: skip
    difference = found.difference
    seen = max(paired.visible(found.error, threshold), s.gate.min_effect + 0.85 * found.error)
    return Estimate(
        difference.value, difference.low, difference.high, found.inner, found.p, seen, difference.units,
        notes=(f"rates that moved: {', '.join(moved)}",) if moved else (),
    )  # fmt: skip


def told(found: Series, value: float) -> str:
    """A size of effect in words."""
    return f"{np.expm1(value):.2%}" if found.gate.scale == "ratio" else f"{value:.3f} {found.unit}"


def ordered(found: Iterable[Judged]) -> list[Judged]:
    """Gravest first, then by pair and metric."""
    ranks = ("WORSE", "INVALID", "UNCLEAR", "BETTER", "SAME")
    return sorted(found, key=lambda one: (ranks.index(one.verdict), one.series.pair, one.series.key))


def _verdict(one: Judged, sides: tuple[tuple[str, ...], ...]) -> Verdict:
    """As a line of a record, in the scale of its gate."""
    s, e = one.series, one.estimate
    numbers = (None,) * 3 if e is None else (e.effect, e.low, e.high)
    scaled = [float(np.exp(n)) if s.gate.scale == "ratio" and n is not None else n for n in numbers]
    reach = None if e is None or not is_number(e.visible) else e.visible
    return Verdict(
        metric=f"{s.key.metric} {s.key.dataset}".strip(),
        verdict=one.verdict,
        better=s.better,
        unit=s.unit,
        pair=s.pair,
        case_id=s.key.case,
        family=s.gate.family.name,
        scale=s.gate.scale,
        effect=_known(scaled[0]),
        low=_known(scaled[1]),
        high=_known(scaled[2]),
        p=None if e is None else e.p,
        q=one.q,
        visible=float(np.expm1(reach)) if reach is not None and s.gate.scale == "ratio" else reach,
        method=ANSWERED if s.arms is not None else TIMED,
        sides=sides,
        reasons=one.reasons,
        extra={
            "on_worse": s.gate.on_worse,
            "min_effect": s.gate.min_effect,
            **({} if e is None else {"units": e.units}),
        },
    )


def _known(value: float | None) -> float | None:
    return value if is_number(value) else None
