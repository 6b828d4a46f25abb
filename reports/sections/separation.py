"""Other readings: how surely a draft that reads other states than the stated ones is worse."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from harness.record import Accept, Case, Sample
from reports import figures, statistics
from reports.arms import Measured, arms
from reports.labels import key_of
from reports.panels import Panel, Section, panels, span
from reports.statistics import APART, Interval
from reports.store import Records

LOSS = "draft_loss_"
"""begins the metrics of teacher-forced loss, one a draft step"""


class Reading(NamedTuple):
    """Other capture points than the published ones; above zero is worse."""

    case: Case
    worse: Interval
    errors: float
    unit: str


def build(now: Records, every: Records) -> Section:
    """One row a reading."""
    return panels("separation", "Other readings", separation(now), row="Reading")


def separation(records: Records) -> Panel:
    """How surely each other reading of a checkpoint is worse than the stated one, on the same sequences."""
    readings = [*_by_length(records.accepts), *_by_loss(records.samples)]
    if not readings:
        return Panel("not measured: no run of this record varied what a draft reads (draftproof bench acceptance)")
    pairs = {r.case.pair for r in readings}
    several = len({(r.case.pair, r.case.variant) for r in readings}) < len(readings)
    rows, drawn = [], {}
    for i, r in enumerate(readings, 1):
        name = f"{r.case.pair}: {r.case.variant}" if len(pairs) > 1 else r.case.variant
        label = f"{name}, {r.unit}" if several else name
        label = label if label not in drawn else f"{label} ({i})"
        points = ", ".join(map(str, r.case.capture_points)) or "none"
        rows.append((label, points, f"{r.worse.value:+.3f} {r.unit}", span(r.worse), f"{r.errors:+.1f}"))
        if math.isfinite(r.errors):
            drawn[label] = r.errors
    note = f"Mean paired loss over its standard error; beyond {APART:g} (dashed) two readings are told apart."
    title = "Other readings, against the stated ones"
    plots = (figures.lollipops("separation", title, drawn, "standard errors worse", APART, note),) if drawn else ()
    return Panel("", ("", "capture points", "worse by", "95 % interval", "standard errors"), tuple(rows), plots)


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
            cases[key_of(s.case)], unit = s.case, s.unit
            steps.setdefault(key_of(s.case), []).append(s.values)
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
