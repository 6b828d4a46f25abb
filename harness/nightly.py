"""What a night adds to a record: its steps, what it owes, and the search for a culprit, probe by probe."""

from dataclasses import dataclass

from harness.observation import STATUSES, Observation, RecordError, hold_among

ANSWERS = ("good", "bad", "untestable", "unclear")
"""of a probe; the last two are no evidence: nothing could run, or what ran did not decide"""
KINDS = ("commits", "deps", "config")
ENDINGS = ("open", "found", "narrowed", "not_reproduced", "out_of_budget")
"""open: still looking; narrowed: no probe that is left can tell the suspects apart"""


@dataclass(frozen=True, kw_only=True)
class Bisection(Observation):
    """A search for what made a metric or a claim bad; written when it begins and, with its answer, when it ends."""

    kind: str
    question: str
    """the claim, metric or command that is asked"""
    good: str
    bad: str
    candidates: tuple[tuple[str, str], ...]
    """id and one line of each, oldest first: commits after `good` up to `bad`, or what differs between two files"""
    parents: tuple[tuple[int, ...], ...] = ()
    """of each commit, the places of its parents among the candidates; empty for what has no history"""
    status: str = "open"
    posterior: tuple[float, ...] = ()
    """probability of each candidate; with the two below it adds up to one"""
    unchanged: float = 0.0
    """probability that the bad end is good tonight"""
    already: float = 0.0
    """probability that the good end is bad tonight"""
    culprits: tuple[str, ...] = ()
    """found: the culprit (of commits, exactly one); narrowed: the suspects that are left"""
    confidence: float | None = None
    num_probes: int = 0
    error_rates: tuple[float, float] | None = None
    """estimated share of good things that look bad, and of bad things that look good"""
    reason: str = ""

    def hold(self) -> None:
        hold_among("kind", self.kind, KINDS)
        hold_among("status", self.status, ENDINGS)
        if self.posterior and len(self.posterior) != len(self.candidates):
            raise RecordError(f"{len(self.candidates)} candidates, {len(self.posterior)} probabilities")
        if (self.status == "found") and not self.culprits:
            raise RecordError(f"{self.question}: a culprit that is found has a name")


@dataclass(frozen=True, kw_only=True)
class Probe(Observation):
    """One look at one candidate, or at one of the ends."""

    candidate: str
    """id of a commit, or the differences that were moved to their bad value, joined by " + " """
    answer: str
    reason: str = ""
    """why nothing could be said, or what was seen"""
    value: float | None = None
    """what the metric moved by, in the scale of its gate"""
    records: tuple[str, ...] = ()
    """run ids of what this probe measured"""
    duration_s: float | None = None

    def hold(self) -> None:
        hold_among("answer", self.answer, ANSWERS)
        if self.answer in ("untestable", "unclear") and not self.reason:
            raise RecordError(f"{self.candidate}: a probe that is {self.answer} states its reason")


@dataclass(frozen=True, kw_only=True)
class Step(Observation):
    """One step of a night."""

    name: str
    status: str
    exit: int = 0
    """exit code of the command line"""
    started: str = ""
    """UTC, ISO 8601"""
    duration_s: float | None = None
    reason: str = ""
    """what it found, in one line"""
    runs: tuple[str, ...] = ()
    """ids of the runs that it wrote"""

    def hold(self) -> None:
        hold_among("status", self.status, STATUSES)
        if self.status != "passed" and not self.reason:
            raise RecordError(f"{self.name}: a step that is {self.status} states its reason")


@dataclass(frozen=True, kw_only=True)
class Debt(Observation):
    """Something that did not run tonight, and since when."""

    what: str
    """the claim"""
    pair: str = ""
    reason: str = ""
    last_run: str = ""
    """the run in which it last ran; empty where no record has one"""
    last: str = ""
    """when that was, UTC"""
    nights: int = 1
    """runs without it since then, this one included"""
