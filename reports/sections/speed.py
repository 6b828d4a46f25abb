"""Speed: ratios to transformers, raw values by block, and where the time of a cycle goes."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from harness.record import ACCEPTANCES, Case, Sample
from reports import figures, statistics
from reports.drawing import Plot
from reports.labels import key_of, labels
from reports.newest import joined
from reports.panels import Panel, Section, panels, span
from reports.statistics import Interval
from reports.store import Records

PHASES = ("draft", "verify", "accept")
BASELINES = ("transformers", "reference")
"""what a speed is a ratio to, the first that raced"""
DRAWN = 14
"""rows of a plot; the table holds all"""

Drawn = TypeVar("Drawn")
Way = tuple[str, tuple[float, ...]]
"""how acceptance came about: real, forced or oracle, and the rates that were forced"""
RACE = ("run", "pair", "batch", "dtype", "device")
"""what arms share that were timed against each other"""
TITLES = {"real": "Real acceptance", "forced": "Forced acceptance", "oracle": "Oracle draft"}
NOTES = {
    "real": "The target decided which drafts were kept, as in serving.",
    "forced": "The target did not decide here: by chance, a verify step kept its drafts at the rates {} "
    "(unconditional, one a draft position), while every computation of draft, verify and accept was still done. Such a "
    "speed says what the machinery would reach at that acceptance; it says nothing about a draft.",
    "oracle": "The draft was told the target's text, so every draft is kept: a bound that no real draft reaches.",
}


def build(now: Records, every: Records) -> Section:
    """One panel a way of accepting."""
    return panels("speed", "Speed", *speeds(now), row="Pair and implementation")


def speeds(records: Records) -> tuple[Panel, ...]:
    """One section a way of accepting: tokens/s as ratios to transformers, raw values by block, phases of a cycle.

    Real, forced and oracle acceptance answer different questions, so they share no table and no plot.
    """
    # a visit that was slowed down in every try says nothing about speed
    kept = [s for s in joined(records) if s.telemetry.get("valid") is not False]
    timed = [s for s in kept if s.metric in (*PHASES, "cycle") or _is_speed(s)]
    if not timed:
        return (Panel("not measured: no decode was timed in this record (draftproof bench decode)"),)
    ways: dict[Way, list[Sample]] = {}
    races: dict[tuple[Any, ...], list[Way]] = {}
    for case in (s.case for s in timed if s.case.num_draft_tokens):
        found = races.setdefault(_race(case), [])
        found += [way for way in [_way(case)] if way not in found]
    for s in timed:
        # what drafts nothing stands beside every way that raced against it
        beside = [_way(s.case)] if s.case.num_draft_tokens else races.get(_race(s.case), [_way(s.case)])
        for way in beside:
            ways.setdefault(way, []).append(s)
    ordered = sorted(ways, key=lambda way: (ACCEPTANCES.index(way[0]), way[1]))
    return tuple(_speed(way, ways[way], f"{way[0]}-{i}") for i, way in enumerate(ordered, 1))


def _speed(way: Way, samples: Sequence[Sample], name: str) -> Panel:
    """Everything timed under one way of accepting."""
    raw = _by_case(s for s in samples if _is_speed(s))
    names = labels([case for case, _ in raw.values()])
    ratios: dict[str, Interval] = {}
    rows, plots = [], []
    for case, blocks in raw.values():
        label, base = names[key_of(case)], _baseline(case, raw)
        middle = float(np.median(np.concatenate([list(v) for v in blocks.values()])))
        ratio = statistics.NOTHING
        if base is not None and base is not blocks:
            ratio = ratios[label] = statistics.paired_ratio(base, blocks)
        known = math.isfinite(ratio.value)
        words = f"{ratio.value:.2f} x" if known else "1 x" if base is blocks else "no baseline"
        rows.append((label, f"{middle:.4g}", words, span(ratio) if known else "", str(len(blocks))))
    if ratios:
        than = next(impl for impl in BASELINES if any(case.impl == impl for case, _ in raw.values()))
        plots.append(figures.forest(
            f"ratios-{name}", f"Speed, as a ratio to {than}", first(ratios), f"tokens/s over {than}",
            "Of the same run: median ratio of paired blocks, 95 % interval over blocks." + left_out(ratios), ratio=True,
        ))  # fmt: skip
    strips = {names[key_of(case)]: dict(enumerate(blocks.values())) for case, blocks in raw.values()}
    if strips:
        plots.append(figures.strips(
            f"strips-{name}", "Every raw value, by block", first(strips), "tokens/s",
            "One row of dots a block of a process, the first at the top; a tick marks the median of the block."
            + left_out(strips),
        ))  # fmt: skip
    plots += _phases([s for s in samples if not _is_speed(s)], f"phases-{name}")
    head = ("", "tokens/s", "ratio", "95 % interval", "blocks") if rows else ()
    return Panel("", head, tuple(rows), tuple(plots), TITLES[way[0]], _note(way))


def first(rows: Mapping[str, Drawn]) -> dict[str, Drawn]:
    """As many rows as a plot can hold."""
    return dict(list(rows.items())[:DRAWN])


def left_out(rows: Mapping[str, Any]) -> str:
    """What `first` says about the others."""
    return f" The first {DRAWN} of {len(rows)}." if len(rows) > DRAWN else ""


def _note(way: Way) -> str:
    """What the speeds below mean, in plain words."""
    return NOTES[way[0]].format(", ".join(f"{rate:.3f}" for rate in way[1]))


def _phases(samples: Sequence[Sample], name: str) -> tuple[Plot, ...]:
    """One bar a case whose draft, verify and accept were timed apart."""
    values: dict[tuple[str, str], dict[str, list[float]]] = {}
    cases = {key_of(s.case): s.case for s in samples if s.metric in (*PHASES, "cycle")}
    for s in samples:
        values.setdefault(key_of(s.case), {}).setdefault(s.metric, []).extend(s.values)
    names = labels(list(cases.values()))
    medians = {key: {metric: float(np.median(v)) for metric, v in of.items()} for key, of in values.items()}
    rows = {names[key]: {p: found[p] for p in PHASES if p in found} for key, found in medians.items()}
    rows = {label: row for label, row in rows.items() if row}
    if not rows:
        return ()
    whole = [f"{names[k] + ': ' if len(rows) > 1 else ''}{sum(rows[names[k]].values()) / f['cycle']:.0%}"
             for k, f in medians.items() if "cycle" in f and names[k] in rows]  # fmt: skip
    unit = next(s.unit for s in samples if s.metric in PHASES)
    note = "Medians of phases timed apart."
    told = f" Their sum, as a share of the whole cycle that other turns timed: {', '.join(whole)}."
    note += told if whole else " The whole cycle was not timed."
    return (figures.stacks(name, "Where a cycle's time goes", first(rows), unit, note + left_out(rows)),)


def _by_case(samples: Iterable[Sample]) -> dict[tuple[str, str], tuple[Case, dict[tuple[int, int], list[float]]]]:
    """(run, case) -> raw values of each (process, block)."""
    found: dict[tuple[str, str], tuple[Case, dict[tuple[int, int], list[float]]]] = {}
    for s in samples:
        blocks = found.setdefault(key_of(s.case), (s.case, {}))[1]
        blocks.setdefault((s.process, s.block), []).extend(s.values)
    return found


def _baseline(case: Case, raw: dict[tuple[str, str], tuple[Case, Any]]) -> Any:
    """Plain decoding by transformers, or else by the reference, of the same run, pair and batch; None if not timed."""
    fits = [
        (BASELINES.index(other.impl), other.num_draft_tokens, place, blocks)
        for place, (other, blocks) in enumerate(raw.values())
        if other.impl in BASELINES and _race(other) == _race(case)
    ]
    return min(fits, key=lambda fit: fit[:3])[3] if fits else None


def _race(case: Case) -> tuple[Any, ...]:
    return tuple(getattr(case, f) for f in RACE)


def _way(case: Case) -> Way:
    return case.acceptance, case.forced_rates


def _is_speed(sample: Sample) -> bool:
    return sample.metric == "decode" and sample.unit == "tokens/s"
