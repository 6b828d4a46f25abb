"""The gates of `gates.toml`: which metrics are judged, in which family, and how large a change must be to matter."""

import tomllib
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

from harness.record import RecordError

GATES = Path(__file__).with_name("gates.toml")

SCALES = ("ratio", "difference")
ON_WORSE = ("fail", "tell")


class Family(NamedTuple):
    """Metrics that are judged together."""

    name: str
    alpha: float
    """share of false alarms among the alarms of a first look"""
    alpha_again: float
    """error of the second look at one alarm, in fresh processes"""


class Gate(NamedTuple):
    """What one kind of metric may do."""

    metric: str
    """patterns of fnmatch, a bar between them"""
    family: Family
    scale: str
    min_effect: float
    see: float
    on_worse: str

    def holds(self, metric: str) -> bool:
        """Whether a metric belongs to this gate."""
        return any(fnmatchcase(metric, pattern) for pattern in self.metric.split("|"))


class Gates(NamedTuple):
    """All of them, in order."""

    gates: tuple[Gate, ...]
    throttled: float
    """share of the readings of a visit that may be of a device that was slowed down"""

    def of(self, metric: str) -> Gate | None:
        """The gate of a metric; None: it is recorded and not judged."""
        return next((gate for gate in self.gates if gate.holds(metric)), None)


def read_gates(path: Path = GATES) -> Gates:
    """The gates of a file; RecordError names what is wrong in it."""
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise RecordError(f"{path}: {error}") from error
    _only(path, found, {"throttled", "families", "gates"})
    families = {name: _built(f"{path}: families.{name}", Family, {"name": name, **facts})
                for name, facts in found.get("families", {}).items()}  # fmt: skip
    gates = []
    for number, facts in enumerate(found.get("gates", ()), 1):
        where = f"{path}: gate {number}"
        if facts.get("family") not in families:
            raise RecordError(f"{where}: family {facts.get('family')!r} is none of {', '.join(families)}")
        gates.append(_built(where, Gate, {**facts, "family": families[facts["family"]]}))
    for number, gate in enumerate(gates, 1):
        _hold(f"{path}: gate {number}", gate)
    throttled = found.get("throttled", 0.0)
    if not isinstance(throttled, float | int) or not 0 <= throttled < 1:
        raise RecordError(f"{path}: throttled is a share below 1, got {throttled!r}")
    return Gates(tuple(gates), float(throttled))


def _hold(where: str, gate: Gate) -> None:
    """RecordError where a gate could never open or never close."""
    if gate.scale not in SCALES or gate.on_worse not in ON_WORSE:
        raise RecordError(f"{where}: scale is one of {', '.join(SCALES)}, on_worse one of {', '.join(ON_WORSE)}")
    if not 0 < gate.min_effect < gate.see or (gate.scale == "ratio" and gate.see >= 1):
        raise RecordError(f"{where}: needs 0 < min_effect < see, and below 1 for a ratio")
    if not (0 < gate.family.alpha < 0.5 and 0 < gate.family.alpha_again < 0.5):
        raise RecordError(f"{where}: family {gate.family.name} needs alpha and alpha_again between 0 and 0.5")


def _built(where: str, kind: Any, facts: dict[str, Any]) -> Any:
    _only(where, facts, set(kind._fields))
    if missing := sorted(set(kind._fields) - set(facts)):
        raise RecordError(f"{where}: {missing[0]} is missing")
    return kind(**facts)


def _only(where: str | Path, facts: dict[str, Any], known: set[str]) -> None:
    if unknown := sorted(set(facts) - known):
        raise RecordError(f"{where}: {unknown[0]!r} is not known; known are {', '.join(sorted(known))}")
