"""Records read together: as lists by type, or as tables, one pandas frame a type."""

from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from harness.record import (
    TYPES,
    Accept,
    Case,
    Check,
    Observation,
    Planted,
    RecordError,
    Run,
    Sample,
    Verdict,
    read,
)

Frames = dict[str, pd.DataFrame]


class Records(NamedTuple):
    """Observations by type, each in the order of the lines."""

    runs: list[Run]
    cases: list[Case]
    checks: list[Check]
    samples: list[Sample]
    accepts: list[Accept]
    planted: list[Planted]
    verdicts: list[Verdict]


def gather(*paths: str | Path) -> Records:
    """The observations of record files, or of every `*.jsonl` under a folder."""
    every = [observation for path in find(*paths) for observation in read(path)]
    return Records(
        runs=[o for o in every if isinstance(o, Run)],
        cases=[o for o in every if isinstance(o, Case)],
        checks=[o for o in every if isinstance(o, Check)],
        samples=[o for o in every if isinstance(o, Sample)],
        accepts=[o for o in every if isinstance(o, Accept)],
        planted=[o for o in every if isinstance(o, Planted)],
        verdicts=[o for o in every if isinstance(o, Verdict)],
    )


def load(*paths: str | Path) -> Frames:
    """The frames of record files, or of every `*.jsonl` under a folder; absent types are empty frames.

    A `sample` or `accept` row carries the facts of its case beside its own; `case` is the case's id.
    """
    return frames(observation for path in find(*paths) for observation in read(path))


def find(*paths: str | Path) -> list[Path]:
    """The record files meant by `paths`, in the order of their names within each folder."""
    found: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            found += sorted(path.rglob("*.jsonl"))
        elif path.is_file():
            found.append(path)
        else:
            raise RecordError(f"{path}: no such record")
    if not found:
        raise RecordError(f"{', '.join(map(str, paths))}: no *.jsonl record here")
    return found


def frames(observations: Iterable[Observation]) -> Frames:
    """The frames of observations that are already read."""
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in TYPES}
    names = {cls: name for name, cls in TYPES.items()}
    for observation in observations:
        rows[names[type(observation)]].append(_row(observation))
    return {name: pd.DataFrame(rows[name], columns=_columns(cls)) for name, cls in TYPES.items()}


def _row(observation: Observation) -> dict[str, Any]:
    row = {f.name: getattr(observation, f.name) for f in fields(observation)}
    if isinstance(observation, Case):
        row["id"] = observation.id
    if isinstance(observation, (Sample, Accept)):
        row = _row(observation.case) | row | {"case": observation.case.id}
    return row


def _columns(cls: type[Observation]) -> list[str]:
    own = [f.name for f in fields(cls)]
    if cls is Case:
        return [*own, "id"]
    if cls in (Sample, Accept):
        return own + [f.name for f in fields(Case) if f.name not in own]
    return own
