"""What every line of a record is, whatever it says."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from harness.plain import frozen

STATUSES = ("passed", "failed", "skipped", "error")


class RecordError(ValueError):
    """An observation that must not exist, or a file that is not a record."""


@dataclass(frozen=True, kw_only=True)
class Observation:
    """What every line has; `run` is filled in by the Recorder."""

    run: str = ""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """fields of the line that this version does not know"""

    def __post_init__(self) -> None:
        for name, value in list(vars(self).items()):
            object.__setattr__(self, name, frozen(value))
        self.hold()

    def hold(self) -> None:
        """Raise RecordError if this observation must not exist."""


def hold_among(name: str, value: str, allowed: tuple[str, ...]) -> None:
    """RecordError where a word is none of those that have a meaning."""
    if value not in allowed:
        raise RecordError(f"{name} is one of {', '.join(allowed)}; got {value!r}")
