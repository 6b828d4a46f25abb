"""Records read together: as lists by type, or as tables, one pandas frame a type.

A place is a record file, a folder of them, or the URL of either in any form that fsspec reads (s3://, gs://, hf://,
memory://). A folder that `pack` wrote holds one Parquet file a type instead and is read in a fraction of the time; its
cells that are no plain column (values, environment, extra) are JSON there and come back as they were.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from harness.record import (
    TYPES,
    Accept,
    Audit,
    Bisection,
    Case,
    Certificate,
    Check,
    Debt,
    Observation,
    Planted,
    Probe,
    RecordError,
    Run,
    Sample,
    Step,
    Verdict,
    parse,
    read,
)

Frames = dict[str, pd.DataFrame]

NESTED = ("extra", "argv", "environment", "forced_rates", "capture_points", "worst", "values", "telemetry", "accepted",
          "sides", "reasons", "compared", "candidates", "parents", "posterior", "culprits", "error_rates",
          "records", "runs", "facts")  # fmt: skip
"""columns whose cells are no single number or word"""
MAPPINGS = ("extra", "environment", "telemetry", "facts")
"""those whose cells are mappings, which keep their lists"""
OF_CASE = (Sample, Accept)


class Records(NamedTuple):
    """Observations by type, in the order of TYPES; each in the order of the lines."""

    runs: list[Run]
    cases: list[Case]
    checks: list[Check]
    samples: list[Sample]
    accepts: list[Accept]
    planted: list[Planted]
    verdicts: list[Verdict]
    certificates: list[Certificate]
    bisections: list[Bisection]
    probes: list[Probe]
    steps: list[Step]
    debts: list[Debt]
    audits: list[Audit]


def gather(*places: str | Path) -> Records:
    """The observations of record files, or of every `*.jsonl` under a folder."""
    found: dict[type[Observation], list[Any]] = {cls: [] for cls in TYPES.values()}
    for observation in stream(*places):
        found[type(observation)].append(observation)
    return Records(*found.values())


def load(*places: str | Path) -> Frames:
    """The frames of record files, of every `*.jsonl` under a folder, or of packed folders; absent types are empty.

    A `sample` or `accept` row carries the facts of its case beside its own; `case` is the case's id.
    """
    packed = [place for place in places if is_packed(place)]
    others = [place for place in places if place not in packed]
    parts = [*map(_unpacked, packed), *([frames(stream(*others))] if others or not packed else [])]
    if len(parts) == 1:
        return parts[0]
    return {name: pd.concat([p[name] for p in parts if len(p[name])] or [parts[0][name]], ignore_index=True)
            for name in TYPES}  # fmt: skip


def stream(*places: str | Path) -> Iterator[Observation]:
    """The observations, a file at a time."""
    for file in find(*places):
        if isinstance(file, Path):
            yield from read(file)
        else:
            import fsspec

            with fsspec.open(file, "rt", encoding="utf-8", errors="replace") as opened:
                yield from parse(file, opened.read())


def find(*places: str | Path) -> list[Path | str]:
    """The record files meant by `places`, in the order of their names within each folder; URLs stay URLs."""
    found: list[Path | str] = []
    for place in places:
        if _is_url(place):
            found += _find_url(str(place))
        elif Path(place).is_dir():
            found += sorted(Path(place).rglob("*.jsonl"))
        elif Path(place).is_file():
            found.append(Path(place))
        else:
            raise RecordError(f"{place}: no such record")
    if not found:
        raise RecordError(f"{', '.join(map(str, places))}: no *.jsonl record here")
    return found


def frames(observations: Iterable[Observation]) -> Frames:
    """The frames of observations that are already read."""
    own = {cls: [f.name for f in fields(cls)] for cls in TYPES.values()}
    columns: dict[type[Observation], list[list[Any]]] = {cls: [[] for _ in names] for cls, names in own.items()}
    for observation in observations:
        facts = vars(observation)
        for name, column in zip(own[type(observation)], columns[type(observation)], strict=True):
            column.append(facts[name])
    return {name: _frame(cls, dict(zip(own[cls], columns.pop(cls), strict=True))) for name, cls in TYPES.items()}


def pack(tables: Frames, folder: str | Path) -> None:
    """Write frames as `TYPE.parquet`; needs pyarrow (pip install draftproof[history])."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    for name, table in tables.items():
        nested = [c for c in table.columns if c in NESTED]
        flat = table.assign(**{c: table[c].map(_dumped) for c in nested})
        try:
            flat.to_parquet(Path(folder) / f"{name}.parquet", engine="pyarrow", index=False)
        except ImportError as error:
            raise RecordError("Parquet needs pyarrow: pip install draftproof[history]") from error


def is_packed(place: str | Path) -> bool:
    """Whether a folder was written by `pack`."""
    return not _is_url(place) and (Path(place) / "run.parquet").is_file()


def _unpacked(folder: str | Path) -> Frames:
    try:
        tables = {name: pd.read_parquet(Path(folder) / f"{name}.parquet", engine="pyarrow") for name in TYPES}
    except ImportError as error:
        raise RecordError(f"{folder} is Parquet and needs pyarrow: pip install draftproof[history]") from error
    return {
        name: table.assign(**{c: table[c].map(_loaded(c)) for c in table.columns if c in NESTED})
        for name, table in tables.items()
    }


def _dumped(value: Any) -> str:
    return json.dumps(value, default=dict)


def _loaded(column: str) -> Callable[[str], Any]:
    """JSON has no tuples; records have no lists."""
    return lambda text: json.loads(text) if column in MAPPINGS else _tuples(json.loads(text))


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _is_url(place: str | Path) -> bool:
    return isinstance(place, str) and "://" in place


def _find_url(url: str) -> list[Path | str]:
    from fsspec.core import url_to_fs

    system, root = url_to_fs(url)
    if system.isfile(root):
        return [url]
    if not system.exists(root):
        raise RecordError(f"{url}: no such record")
    return [system.unstrip_protocol(name) for name in sorted(system.find(root)) if name.endswith(".jsonl")]


def _frame(cls: type[Observation], columns: dict[str, list[Any]]) -> pd.DataFrame:
    """One type's table; every line of one case shares the case's cells, so a case is spread once a case."""
    if cls is Case:
        ids = [Case(**dict(zip(columns, row, strict=True))).id for row in zip(*columns.values(), strict=True)]
        return pd.DataFrame({**columns, "id": ids})
    if cls not in OF_CASE:
        return pd.DataFrame(columns)
    # a reader gives all lines of one case the same object
    cases = {id(case): case for case in columns["case"]}
    codes = {key: code for code, key in enumerate(cases)}
    at = [codes[id(case)] for case in columns["case"]]
    facts = {f.name: [getattr(case, f.name) for case in cases.values()] for f in fields(Case) if f.name not in columns}
    ids = pd.Series([case.id for case in cases.values()], dtype=object).take(at)
    own = pd.DataFrame({name: ids.to_numpy() if name == "case" else column for name, column in columns.items()})
    shared = pd.DataFrame(facts, columns=list(facts)).take(at).reset_index(drop=True)
    return pd.concat([own, shared], axis=1)
