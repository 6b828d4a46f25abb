"""What an audit adds to a record: one checkpoint on the stand, and everything that was found."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from harness.observation import Observation, RecordError, hold_among

OUTCOMES = ("passed", "failed", "unclear")
"""no fault; a fault; something was asked for and nothing could be told"""


@dataclass(frozen=True, kw_only=True)
class Audit(Observation):
    """A draft beside its target; `facts` is what `draftproof audit --json` prints."""

    target: str
    """name of the folder"""
    draft: str
    pair: str = ""
    outcome: str
    facts: Mapping[str, Any] = field(default_factory=dict)

    def hold(self) -> None:
        hold_among("outcome", self.outcome, OUTCOMES)
        if (self.outcome == "failed") is not bool(self.facts.get("faults")):
            raise RecordError(f"{self.draft}: an audit has failed where it names faults, and only there")
