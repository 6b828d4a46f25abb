"""What the numbers of a record say: acceptance, separation of capture points, speed."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from harness.record import ACCEPTANCES, Accept, Case, Sample
from reports import figures, statistics
from reports.figures import Curve, Plot
from reports.statistics import Arm, Interval
from reports.store import Records

SERIES = len(figures.SERIES)
PHASES = ("draft", "verify", "accept")
BASELINE = "transformers"
LOSS = "draft_loss_"
"""begins the metrics of teacher-forced loss, one a draft step"""
APART = 3.0
"""standard errors from which two capture points count as told apart"""

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

# facts that a label names only where two labels would be equal without them
FACTS: dict[str, Callable[[Case], str]] = {
    "implementation": lambda c: c.impl,
    "sampling": lambda c: "greedy" if c.temperature == 0 else f"T={c.temperature:g}",
    "drafts": lambda c: f"K={c.num_draft_tokens}" if c.num_draft_tokens else "plain",
    "variant": lambda c: c.variant or "as published",
    "dtype": lambda c: c.dtype,
    "device": lambda c: c.device,
    "batch": lambda c: f"B={c.batch}",
    "ranks": lambda c: f"TP={c.tp}",
    "form": lambda c: c.form,
    "run": lambda c: c.run,
}


class Section(NamedTuple):
    """Plots and a table, or the reason why there are none."""

    missing: str = ""
    head: tuple[str, ...] = ()
    rows: tuple[tuple[str, ...], ...] = ()
    plots: tuple[Plot, ...] = ()
    title: str = ""
    note: str = ""


class Reading(NamedTuple):
    """Other capture points than the published ones; above zero is worse."""

    case: Case
    worse: Interval
    errors: float
    unit: str


class Measured(NamedTuple):
    """One arm and where it comes from."""

    label: str
    case: Case
    dataset: str
    arm: Arm


def acceptance(records: Records) -> Section:
    """Length with interval, survival, histogram, length by output position."""
    found = _drafted(records)
    if not found:
        return Section("not measured: no complete verify step is in this record (draftproof bench acceptance)")
    lengths = {m.label: statistics.acceptance_length(m.arm) for m in found}
    rows = tuple(
        (m.label, _number(lengths[m.label]), _range(lengths[m.label]), str(m.arm.num_draft_tokens),
         str(lengths[m.label].units), str(sum(map(len, m.arm.steps.values()))))
        for m in found
    )  # fmt: skip
    forest = figures.forest(
        "lengths", "Acceptance length", lengths, "tokens a verify step",
        "Tokens emitted a verify step, the target's own included; 95 % interval by bootstrap over prompts.",
    )  # fmt: skip
    plots = [forest]
    parts = [found[first : first + SERIES] for first in range(0, len(found), SERIES)]
    for i, part in enumerate(parts, 1):
        plots += _acceptance_plots(part, i, f", part {i} of {len(parts)}" if len(parts) > 1 else "")
    return Section("", ("", "length", "95 % interval", "K", "prompts", "steps"), rows, tuple(plots))


def positions(records: Records) -> Section:
    """Unconditional and conditional rate of each draft position; empty where there is no acceptance either."""
    found = _drafted(records)
    longest = max((m.arm.num_draft_tokens for m in found), default=0)
    rows = []
    for m in found:
        cells = [
            f"{p.value:.1%} / {c.value:.1%}" if c.value >= 0 else f"{p.value:.1%}" for p, c in statistics.rates(m.arm)
        ]
        rows.append((m.label, *cells, *[""] * (longest - len(cells))))
    return Section("", ("", *(f"draft {i}" for i in range(1, longest + 1))), tuple(rows))


def separation(records: Records) -> Section:
    """How surely each other reading of a checkpoint is worse than the stated one, on the same sequences."""
    readings = [*_by_length(records.accepts), *_by_loss(records.samples)]
    if not readings:
        return Section("not measured: no run of this record varied what a draft reads (draftproof bench acceptance)")
    pairs = {r.case.pair for r in readings}
    several = len({(r.case.pair, r.case.variant) for r in readings}) < len(readings)
    rows, drawn = [], {}
    for i, r in enumerate(readings, 1):
        name = f"{r.case.pair}: {r.case.variant}" if len(pairs) > 1 else r.case.variant
        label = f"{name}, {r.unit}" if several else name
        label = label if label not in drawn else f"{label} ({i})"
        points = ", ".join(map(str, r.case.capture_points)) or "none"
        rows.append((label, points, f"{r.worse.value:+.3f} {r.unit}", _range(r.worse), f"{r.errors:+.1f}"))
        if math.isfinite(r.errors):
            drawn[label] = r.errors
    note = f"Mean paired loss over its standard error; beyond {APART:g} (dashed) two readings are told apart."
    title = "Other readings, against the stated ones"
    plots = (figures.lollipops("separation", title, drawn, "standard errors worse", APART, note),) if drawn else ()
    return Section("", ("", "capture points", "worse by", "95 % interval", "standard errors"), tuple(rows), plots)


def speeds(records: Records) -> tuple[Section, ...]:
    """One section a way of accepting: tokens/s as ratios to transformers, raw values by block, phases of a cycle.

    Real, forced and oracle acceptance answer different questions, so they share no table and no plot.
    """
    timed = [s for s in records.samples if s.metric in (*PHASES, "cycle") or _is_speed(s)]
    if not timed:
        return (Section("not measured: no decode was timed in this record (draftproof bench decode)"),)
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


def _speed(way: Way, samples: Sequence[Sample], name: str) -> Section:
    """Everything timed under one way of accepting."""
    raw = _by_case(s for s in samples if _is_speed(s))
    names = _labels([case for case, _ in raw.values()])
    ratios: dict[str, Interval] = {}
    rows = []
    for case, blocks in raw.values():
        label, base = names[_key(case)], _baseline(case, raw)
        middle = float(np.median(np.concatenate([list(v) for v in blocks.values()])))
        ratio = statistics.NOTHING
        if base is not None and case.impl != BASELINE:
            ratio = ratios[label] = statistics.paired_ratio(base, blocks)
        known = math.isfinite(ratio.value)
        words = f"{ratio.value:.2f} x" if known else "1 x" if case.impl == BASELINE else "no baseline"
        rows.append((label, f"{middle:.4g}", words, _range(ratio) if known else "", str(len(blocks))))
    plots = []
    if ratios:
        plots.append(figures.forest(
            f"ratios-{name}", "Speed, as a ratio to transformers", ratios, "tokens/s over transformers",
            "Generate of the same run: median ratio of paired blocks, 95 % interval over blocks.", ratio=True,
        ))  # fmt: skip
    strips = {names[_key(case)]: dict(enumerate(blocks.values())) for case, blocks in raw.values()}
    if strips:
        plots.append(figures.strips(
            f"strips-{name}", "Every raw value, by block", strips, "tokens/s",
            "One row of dots a block, the first at the top; a tick marks the median of the block.",
        ))  # fmt: skip
    plots += _phases([s for s in samples if not _is_speed(s)], f"phases-{name}")
    head = ("", "tokens/s", "ratio", "95 % interval", "blocks") if rows else ()
    return Section("", head, tuple(rows), tuple(plots), TITLES[way[0]], _note(way))


def _note(way: Way) -> str:
    """What the speeds below mean, in plain words."""
    return NOTES[way[0]].format(", ".join(f"{rate:.3f}" for rate in way[1]))


def arms(accepts: Sequence[Accept]) -> list[Measured]:
    """Acceptances of one case and data set belong together; a prompt that was answered twice is one cluster."""
    cases: dict[tuple[str, str, str], Case] = {}
    steps: dict[tuple[str, str, str], dict[str, tuple[int, ...]]] = {}
    for accept in accepts:
        key = (*_key(accept.case), accept.dataset)
        cases.setdefault(key, accept.case)
        kept = steps.setdefault(key, {})
        done = statistics.complete_steps(accept.accepted, accept.truncated)
        kept[accept.prompt] = kept.get(accept.prompt, ()) + done
    names = _labels(list(cases.values()), ("sampling",))
    several = len({dataset for _, _, dataset in cases}) > 1
    return [
        Measured(
            names[key[:2]] + (f", {key[2]}" if several else ""),
            case,
            key[2],
            Arm(case.num_draft_tokens, steps[key]),
        )
        for key, case in cases.items()
    ]


def _by_length(accepts: Sequence[Accept]) -> list[Reading]:
    """Readings compared by acceptance length over the same prompts."""
    groups: dict[tuple[Any, ...], list[Measured]] = {}
    for m in arms(accepts):
        groups.setdefault((*_but_reading(m.case), m.dataset), []).append(m)
    found = []
    for group in groups.values():
        published = [m.arm for m in group if not m.case.variant][:1]
        for arm in published:
            others = [m for m in group if m.case.variant and m.case.capture_points]
            found += [
                Reading(
                    m.case, statistics.acceptance_difference(m.arm, arm), statistics.separation(m.arm, arm), "tokens"
                )
                for m in others
            ]
    return found


def _by_loss(samples: Sequence[Sample]) -> list[Reading]:
    """Readings compared by the loss of teacher-forced drafts: one value a sequence, one metric a draft step."""
    steps: dict[tuple[str, str], list[tuple[float, ...]]] = {}
    cases: dict[tuple[str, str], Case] = {}
    unit = ""
    for s in samples:
        if s.metric.startswith(LOSS):
            cases[_key(s.case)], unit = s.case, s.unit
            steps.setdefault(_key(s.case), []).append(s.values)
    found = []
    for key, case in cases.items():
        same = [k for k, other in cases.items() if not other.variant and _but_reading(other) == _but_reading(case)]
        if case.variant and same and np.shape(steps[key]) == np.shape(steps[same[0]]):
            worse = np.mean(steps[key], axis=0) - np.mean(steps[same[0]], axis=0)
            mean = statistics.ratio_interval(worse, np.ones(len(worse)))
            found.append(Reading(case, mean, statistics.standard_errors(worse), unit))
    return found


def _but_reading(case: Case) -> tuple[Any, ...]:
    """Everything that two readings of one checkpoint share."""
    same = ("run", "pair", "impl", "form", "dtype", "device", "tp", "batch", "num_draft_tokens", "temperature",
            "acceptance", "forced_rates")  # fmt: skip
    return tuple(getattr(case, f) for f in same)


def _drafted(records: Records) -> list[Measured]:
    """Arms that drafted something, as published where that was measured."""
    accepts = [a for a in records.accepts if a.num_draft_tokens]
    found = arms([a for a in accepts if not a.case.variant] or accepts)
    return [m for m in found if any(m.arm.steps.values())]


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


def _phases(samples: Sequence[Sample], name: str) -> tuple[Plot, ...]:
    """One bar a case whose draft, verify and accept were timed apart."""
    medians: dict[tuple[str, str], dict[str, float]] = {}
    cases = {_key(s.case): s.case for s in samples}
    names = _labels(list(cases.values()))
    for key in cases:
        for metric in (*PHASES, "cycle"):
            values = [v for s in samples if _key(s.case) == key and s.metric == metric for v in s.values]
            if values:
                medians.setdefault(key, {})[metric] = float(np.median(values))
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
    return (figures.stacks(name, "Where a cycle's time goes", rows, unit, note),)


def _by_case(samples: Iterable[Sample]) -> dict[tuple[str, str], tuple[Case, dict[tuple[int, int], list[float]]]]:
    """(run, case) -> raw values of each (process, block)."""
    found: dict[tuple[str, str], tuple[Case, dict[tuple[int, int], list[float]]]] = {}
    for s in samples:
        blocks = found.setdefault(_key(s.case), (s.case, {}))[1]
        blocks.setdefault((s.process, s.block), []).extend(s.values)
    return found


def _baseline(case: Case, raw: dict[tuple[str, str], tuple[Case, Any]]) -> Any:
    """Plain transformers of the same run, pair and batch; None if it was not timed."""
    fits = [
        (other.num_draft_tokens, place, blocks)
        for place, (other, blocks) in enumerate(raw.values())
        if other.impl == BASELINE and _race(other) == _race(case)
    ]
    return min(fits, key=lambda fit: fit[:2])[2] if fits else None


def _race(case: Case) -> tuple[Any, ...]:
    return tuple(getattr(case, f) for f in RACE)


def _way(case: Case) -> Way:
    return case.acceptance, case.forced_rates


def _is_speed(sample: Sample) -> bool:
    return sample.metric == "decode" and sample.unit == "tokens/s"


def _labels(cases: Sequence[Case], always: tuple[str, ...] = ()) -> dict[tuple[str, str], str]:
    """(run, case) -> the pair and the facts in which the cases of this plot differ."""
    told = [f for f, say in FACTS.items() if f in always or len({say(case) for case in cases}) > 1]
    if "run" in told and len({(c.pair, *(FACTS[f](c) for f in told if f != "run")) for c in cases}) == len(cases):
        told.remove("run")
    labels = {}
    for case in cases:
        facts = [FACTS[f](case) for f in told]
        labels[_key(case)] = ", ".join([case.pair, *filter(None, facts)])
    if len(set(labels.values())) < len(labels):  # cases that differ in hashes only
        labels = {key: f"{label}, {key[1]}" for key, label in labels.items()}
    return labels


def _key(case: Case) -> tuple[str, str]:
    return case.run, case.id


def _number(interval: Interval) -> str:
    return f"{interval.value:.2f}" if math.isfinite(interval.value) else "not known"


def _range(interval: Interval) -> str:
    return f"{interval.low:.2f} to {interval.high:.2f}" if interval.known else "needs two units"
