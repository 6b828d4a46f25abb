"""What two sides of a comparison measured, series by series, and what forbids to compare them.

A series is one metric of one case. Both sides name the same case, since its id holds model, weights, prompts, type,
device and way of drafting, and not the commit. A process is one run's process number; a stratum is the rig that it
ran on, and a rig that only one side saw proves nothing about speed.
"""

import json
import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from reports import statistics
from reports.gates import Gate, Gates
from reports.noise import Layout
from reports.statistics import Arm
from reports.store import Frames

ACCEPTANCE = "acceptance_length"
RIG = ("cpu", "gpu")
"""parts of an environment that a speed belongs to"""


class Key(NamedTuple):
    """A series."""

    case: str
    metric: str
    dataset: str = ""
    """of an acceptance"""


class Timed(NamedTuple):
    """One side of a series whose unit is the process."""

    pair: str
    unit: str
    better: str
    processes: dict[Hashable, list[float]]
    """(run, process) -> its raw values"""
    rigs: dict[Hashable, str]
    throttled: int
    """visits during which the device was slowed down"""


class Answered(NamedTuple):
    """One side of a series whose unit is the prompt."""

    pair: str
    arm: Arm


class Series(NamedTuple):
    """Both sides of a series, or what forbids to compare them."""

    key: Key
    gate: Gate
    pair: str
    unit: str
    better: str
    fault: str = ""
    layout: Layout | None = None
    """of `values`; None for an acceptance"""
    values: tuple[tuple[float, ...], ...] = ()
    """raw values of each process, the baseline's first"""
    arms: tuple[Arm, Arm] | None = None


def series(baseline: Frames, candidate: Frames, gates: Gates, only: Iterable[Key] | None = None) -> list[Series]:
    """Every series that the baseline measured and a gate judges, in a fixed order."""
    wanted = None if only is None else set(only)
    found = [
        *_timed_series(timed(baseline, gates.throttled), timed(candidate, gates.throttled), gates),
        *_answered_series(answered(baseline), answered(candidate), gates),
    ]
    return [s for s in found if wanted is None or s.key in wanted]


def runs(frames: Frames) -> tuple[str, ...]:
    """Run ids of a side, in order."""
    seen = [name for kind in ("run", "sample", "accept") for name in frames[kind]["run"].tolist()]
    return tuple(dict.fromkeys(seen))


def timed(frames: Frames, throttled: float = 0.0) -> dict[Key, Timed]:
    """The samples of one side; a visit is throttled where more than that share of its readings is."""
    table, rigs = frames["sample"], _rigs(frames["run"])
    found: dict[Key, Timed] = {}
    names = ("case", "metric", "pair", "unit", "better", "run", "process", "values", "telemetry")
    for case, metric, pair, unit, better, run, process, values, telemetry in _rows(table, names):
        key = Key(case, metric)
        one = found.setdefault(key, Timed(pair, unit, better, {}, {}, 0))
        one.processes.setdefault((run, process), []).extend(values)
        one.rigs[run, process] = rigs.get(run, "")
        if (telemetry.get("throttled") or 0.0) > throttled:
            found[key] = one._replace(throttled=one.throttled + 1)
    return found


def answered(frames: Frames) -> dict[Key, Answered]:
    """The acceptances of one side; a prompt that was answered twice is one cluster."""
    found: dict[Key, Answered] = {}
    names = ("case", "dataset", "pair", "prompt", "num_draft_tokens", "accepted", "truncated")
    for case, dataset, pair, prompt, num, accepted, truncated in _rows(frames["accept"], names):
        if num:
            one = found.setdefault(Key(case, ACCEPTANCE, dataset), Answered(pair, Arm(int(num), {})))
            done = statistics.complete_steps(accepted, bool(truncated))
            one.arm.steps[prompt] = one.arm.steps.get(prompt, ()) + done
    return found


def _timed_series(old: Mapping[Key, Timed], new: Mapping[Key, Timed], gates: Gates) -> Iterable[Series]:
    for key, was in old.items():
        gate = gates.of(key.metric)
        if gate is None or was.better == "none":
            continue
        now = new.get(key)
        blank = Series(key, gate, was.pair, was.unit, was.better)
        fault = "the candidate did not measure it" if now is None else _fault(was, now, gate)
        if now is None or fault:
            yield blank._replace(fault=fault)
            continue
        rigs = [*was.rigs.values(), *now.rigs.values()]
        order = {rig: i for i, rig in enumerate(dict.fromkeys(rigs))}
        candidate = (False,) * len(was.processes) + (True,) * len(now.processes)
        values = [*was.processes.values(), *now.processes.values()]
        yield blank._replace(
            layout=Layout(candidate, tuple(order[rig] for rig in rigs)), values=tuple(map(tuple, values))
        )


def _answered_series(old: Mapping[Key, Answered], new: Mapping[Key, Answered], gates: Gates) -> Iterable[Series]:
    for key, was in old.items():
        gate = gates.of(key.metric)
        if gate is None:
            continue
        now = new.get(key)
        blank = Series(key, gate, was.pair, "tokens a step", "up")
        if now is None:
            yield blank._replace(fault="the candidate did not measure it")
        else:
            yield blank._replace(arms=(was.arm, now.arm))


def _fault(was: Timed, now: Timed, gate: Gate) -> str:
    """Why two sides cannot be compared; empty where they can."""
    if (was.unit, was.better) != (now.unit, now.better):
        return f"{was.unit}, better {was.better}, is now {now.unit}, better {now.better}"
    if was.throttled or now.throttled:
        return f"the device was throttled in {was.throttled + now.throttled} visits"
    if set(was.rigs.values()) != set(now.rigs.values()):
        return "the sides ran on different machines, GPUs or drivers"
    every = [v for one in (was, now) for values in one.processes.values() for v in values]
    if gate.scale == "ratio" and min(every) <= 0:
        return "a ratio needs values above zero"
    return ""


def _rigs(table: pd.DataFrame) -> dict[str, str]:
    """Run -> what it ran on, as one text."""
    return {
        run: json.dumps({part: environment.get(part) for part in RIG}, sort_keys=True)
        for run, environment in _rows(table, ("run", "environment"))
    }


def _rows(table: pd.DataFrame, names: tuple[str, ...]) -> Iterable[tuple[Any, ...]]:
    return zip(*(table[name].tolist() for name in names), strict=True)


def medians(rows: Sequence[Sequence[float]]) -> NDArray[np.float64]:
    """The median of each row; rows of one length at a time."""
    lengths = np.array([len(row) for row in rows], dtype=int)
    found = np.empty(len(rows))
    for length in set(lengths.tolist()):
        mine = np.flatnonzero(lengths == length)
        raw: NDArray[np.float64] = np.array([rows[i] for i in mine.tolist()], dtype=float)
        found[mine] = np.median(raw, axis=1)
    return found


def is_number(value: float | None) -> bool:
    """Neither absent nor endless."""
    return value is not None and math.isfinite(value)
