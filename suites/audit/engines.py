"""What every engine would make of a draft: loads as intended, refuses, or loads wrongly, and which edit makes it right.

What was meant is a reading too: the strict one of this project, or that of the trainer who wrote the checkpoint
(`written_by`). Everything here is read from headers and configs; what a wrong reading costs is measured in `costs.py`.
"""

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

from harness.checkpoints import Checkpoint
from suites.audit.costs import Cost
from suites.dialects import DIALECTS, DRAFTPROOF, ENGINES
from suites.formats.effect import Difference, differences
from suites.formats.places import find
from suites.formats.reading import Reading, Refusal, read_as
from suites.formats.rows import SILENT
from suites.formats.writing import DialectError, put, remove, write_as

INTENDED, REFUSES, WRONGLY, UNKNOWN = "as intended", "refuses", "wrongly", "not judged"


@dataclass(frozen=True)
class Verdict:
    """One engine and one draft."""

    dialect: str
    version: str
    outcome: str
    """as intended, refuses, wrongly, or not judged where nobody knows what was meant"""
    reading: Reading | Refusal
    differences: tuple[Difference, ...] = ()
    edits: tuple[tuple[str, Any], ...] = ()
    """(dotted key, value) of config.json that make it load as intended; None takes a key away"""
    remedy: str = ""
    cost: Cost | None = None
    """where it was measured"""

    @property
    def is_silent(self) -> bool:
        """Whether a user would see nothing of what is wrong."""
        return self.outcome == WRONGLY and all(d.manner == SILENT for d in self.differences)

    def facts(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        reading = self.reading
        seen: dict[str, Any] = {"refused": f"{reading.fact}: {reading.reason}"} if isinstance(reading, Refusal) else {
            "capture_points": list(reading.points), "filled": dict(reading.filled), "dropped": dict(reading.dropped)
        }  # fmt: skip
        return {
            "engine": self.dialect,
            "version": self.version,
            "outcome": self.outcome,
            "silent": self.is_silent,
            **seen,
            "differences": [
                {"fact": d.fact, "meant": str(d.meant), "read": str(d.read), "first_step": d.first_step,
                 "source": d.source} for d in self.differences
            ],
            "edits": dict(self.edits),
            "remedy": self.remedy,
            "cost": self.cost.summary() if self.cost else None,
        }  # fmt: skip


def meaning(checkpoint: Checkpoint, num_layers: int, target: str, written_by: str | None = None) -> Reading | Refusal:
    """What the draft means: as stated, or as the trainer of a name means what it writes."""
    return read_as(checkpoint, written_by or DRAFTPROOF, num_layers, target)


def judge_all(
    checkpoint: Checkpoint,
    meant: Reading | Refusal,
    num_layers: int,
    target: str = "llama",
    same_tables: bool | None = None,
) -> list[Verdict]:
    """Every engine of the table; `same_tables`: whether the draft's embedding is the target's, None where unknown."""
    return [judge(checkpoint, meant, name, num_layers, target, same_tables) for name in ENGINES]


def judge(
    checkpoint: Checkpoint,
    meant: Reading | Refusal,
    dialect: str,
    num_layers: int,
    target: str = "llama",
    same_tables: bool | None = None,
) -> Verdict:
    """One engine; arguments: `judge_all`."""
    read, version = read_as(checkpoint, dialect, num_layers, target), DIALECTS[dialect].version
    if isinstance(meant, Refusal):
        return Verdict(dialect, version, REFUSES if isinstance(read, Refusal) else UNKNOWN, read)
    if isinstance(read, Refusal):
        edits, remedy = repair(checkpoint, meant, dialect, num_layers, target)
        return Verdict(dialect, version, REFUSES, read, (), edits, remedy)
    wrong = tuple(d for d in differences(meant, read) if d.fact != "embedding" or same_tables is False)
    if not wrong:
        told = read.embedding != meant.embedding and same_tables is None
        note = "its own embedding is replaced by the target's; right if it is a copy" if told else ""
        return Verdict(dialect, version, INTENDED, read, remedy=note)
    edits, remedy = repair(checkpoint, meant, dialect, num_layers, target)
    return Verdict(dialect, version, WRONGLY, read, wrong, edits, remedy)


def repair(
    checkpoint: Checkpoint, meant: Reading, dialect: str, num_layers: int, target: str
) -> tuple[tuple[tuple[str, Any], ...], str]:
    """(the fewest edits of config.json that suffice, what to do in words)."""
    try:
        written = write_as(meant, checkpoint, dialect, num_layers, target, in_place=True)
    except DialectError as error:
        return (), f"no edit makes it right: {str(error).removeprefix(str(checkpoint.path) + ': ')}"
    edits = changes(checkpoint.config, written.config)
    if not _suffice(checkpoint, edits, meant, dialect, num_layers, target):
        return (), f"tensors or layout must change: draftproof convert --to {dialect}"
    for edit in list(edits):
        fewer = [e for e in edits if e != edit]
        if _suffice(checkpoint, fewer, meant, dialect, num_layers, target):
            edits = fewer
    words = (f"set {key} to {value!r}" if value is not None else f"remove {key}" for key, value in edits)
    return tuple(edits), "; ".join(words)


def _suffice(
    checkpoint: Checkpoint, edits: list[tuple[str, Any]], meant: Reading, dialect: str, num_layers: int, target: str
) -> bool:
    """Whether the checkpoint with these edits alone would be read as it is meant."""
    config: dict[str, Any] = deepcopy(checkpoint.config)
    for key, value in edits:
        if value is None:
            remove(config, key)
        else:
            put(config, key, value)
    read = read_as(replace(checkpoint, config=config), dialect, num_layers, target)
    return isinstance(read, Reading) and all(d.fact == "embedding" for d in differences(meant, read))


def changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Dotted keys and their new values; None where a key goes."""
    old, new = dict(leaves(before)), dict(leaves(after))
    gone = [(key, None) for key in old if key not in new and find(after, key) is None]
    return gone + [(key, value) for key, value in new.items() if key not in old or old[key] != value]


def leaves(config: Mapping[str, Any], path: str = "") -> list[tuple[str, Any]]:
    """Every value of a config under its dotted key."""
    found: list[tuple[str, Any]] = []
    for key, value in config.items():
        found += leaves(value, f"{path}{key}.") if isinstance(value, Mapping) else [(f"{path}{key}", value)]
    return found
