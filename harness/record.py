"""What a measurement is: one JSON line an observation, and no number from a red gate.

A record is an append-only file (`harness/lines.py`): several workers may share it, and a process that is killed loses
at most the line it was writing. `read` gives the observations back as the dataclasses below; fields that this version
does not know are kept in `extra`. The lines are described by `record.schema.json` beside this file.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from types import TracebackType
from typing import Any

from harness.audited import Audit as Audit
from harness.lines import Lines, whole
from harness.nightly import Bisection as Bisection
from harness.nightly import Debt as Debt
from harness.nightly import Probe as Probe
from harness.nightly import Step as Step
from harness.observation import STATUSES, hold_among
from harness.observation import Observation as Observation
from harness.observation import RecordError as RecordError
from harness.plain import plain
from harness.ulid import new_run_id

SCHEMA = "draftproof/1"
SCHEMA_FILE = Path(__file__).with_name("record.schema.json")

GATES = ("passed", "failed", "not_run")
VERDICTS = ("SAME", "BETTER", "WORSE", "UNCLEAR", "INVALID")
BETTER = ("up", "down", "none")
ACCEPTANCES = ("real", "forced", "oracle")
ABOVE_ZERO = ("s", "ms", "us", "tokens/s")
"""units of which nothing can be zero"""


@dataclass(frozen=True, kw_only=True)
class Run(Observation):
    """One start of the harness; `run` is its own id, a ULID."""

    started: str
    """UTC, ISO 8601"""
    version: str = ""
    """of draftproof"""
    argv: tuple[str, ...] = ()
    profile: str = ""
    environment: Mapping[str, Any] = field(default_factory=dict)
    """`harness.environment.describe()`"""
    parent: str = ""
    """the run this one is compared with"""


@dataclass(frozen=True, kw_only=True)
class Case(Observation):
    """What was run, and whether its correctness gate is green."""

    pair: str
    gate: str
    family: str = ""
    method: str = ""
    """of drafting: eagle3, mtp, ...; empty for plain decoding"""
    impl: str = "optimized"
    """reference, optimized or transformers"""
    form: str = ""
    """how the implementation ran: aten, triton, graph, exact or natural shapes"""
    dtype: str = ""
    device: str = ""
    tp: int = 1
    batch: int = 1
    num_draft_tokens: int = 0
    """0 is plain decoding"""
    temperature: float = 0.0
    acceptance: str = "real"
    """who decides what is kept: the target (real), fixed rates (forced), or a draft that is told the text (oracle)"""
    forced_rates: tuple[float, ...] = ()
    """of forced acceptance: unconditional, one a draft position"""
    variant: str = ""
    """what differs from the pair as published, such as "layer ids + 1" """
    capture_points: tuple[int, ...] = ()
    prompts_sha256: str = ""
    weights_sha256: str = ""
    config_sha256: str = ""

    @cached_property
    def id(self) -> str:
        """Twelve hex digits of everything above: the same case has the same id in every run."""
        facts = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("run", "extra")}
        return sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]

    def hold(self) -> None:
        hold_among("gate", self.gate, GATES)
        hold_among("acceptance", self.acceptance, ACCEPTANCES)
        forced = self.num_draft_tokens if self.acceptance == "forced" else 0
        if len(self.forced_rates) != forced or (self.acceptance == "forced" and not forced):
            raise RecordError(
                f"{self.pair}: {self.acceptance} acceptance of {self.num_draft_tokens} drafts has {forced} forced "
                f"rates, got {self.forced_rates}; plain decoding forces nothing"
            )


@dataclass(frozen=True, kw_only=True)
class Check(Observation):
    """One claim held to one pair."""

    claim: str
    pair: str
    status: str
    used: float | None = None
    """share of the error budget; None where the claim is exact, infinite where the output was not finite"""
    worst: tuple[str, tuple[int, ...]] | None = None
    """tensor and index of the largest error"""
    seed: int | None = None
    replay: str = ""
    """one line that runs this check again"""
    duration_s: float | None = None
    reason: str = ""

    def hold(self) -> None:
        hold_among("status", self.status, STATUSES)
        if self.used is not None and math.isnan(self.used):
            object.__setattr__(self, "used", math.inf)
        if self.used is not None and self.used < 0:
            raise RecordError(f"{self.claim}: used is a share of a budget, got {self.used}")
        if self.status in ("skipped", "error") and not self.reason:
            raise RecordError(f"{self.claim}: a check that is {self.status} states its reason")
        if self.status == "failed" and not self.replay:
            raise RecordError(f"{self.claim}: a check that failed says how to run it again")


@dataclass(frozen=True, kw_only=True)
class Sample(Observation):
    """Raw values of one metric, one visit of one block."""

    case: Case
    metric: str
    """decode (tokens/s); draft, verify, accept, cycle (ms); or any other name"""
    unit: str
    better: str
    values: tuple[float, ...]
    process: int = 0
    block: int = 0
    order: int = 0
    """place of this visit within its block"""
    telemetry: Mapping[str, Any] = field(default_factory=dict)

    def hold(self) -> None:
        _needs_green(self.case)
        hold_among("better", self.better, BETTER)
        if not self.values or not all(math.isfinite(v) for v in self.values):
            raise RecordError(f"{self.metric}: values must be finite and at least one, got {self.values[:4]}")
        if self.unit in ABOVE_ZERO and min(self.values) <= 0:
            raise RecordError(f"{self.metric}: {self.unit} must be above zero, got {min(self.values)}")


@dataclass(frozen=True, kw_only=True)
class Accept(Observation):
    """What the target accepted while it answered one prompt."""

    case: Case
    prompt: str
    dataset: str
    num_draft_tokens: int
    accepted: tuple[int, ...]
    """drafted tokens kept, one number a verify step"""
    emitted: int
    """tokens written, the first one (from the prompt's own pass) included"""
    truncated: bool = False
    """the last verify step was cut by the length limit or an end token"""
    stop: str = ""
    text_sha256: str = ""

    def hold(self) -> None:
        _needs_green(self.case)
        if self.case.acceptance != "real":
            raise RecordError(f"{self.prompt}: {self.case.acceptance} acceptance is chosen, so it is not measured")
        if self.num_draft_tokens != self.case.num_draft_tokens:
            raise RecordError(f"{self.prompt}: K is {self.num_draft_tokens}, its case has {self.case.num_draft_tokens}")
        if any(not 0 <= a <= self.num_draft_tokens for a in self.accepted):
            raise RecordError(f"{self.prompt}: a step accepts 0 to {self.num_draft_tokens} drafts, got {self.accepted}")


@dataclass(frozen=True, kw_only=True)
class Planted(Observation):
    """One bug put into the code that runs, and who caught it."""

    bug: str
    origin: str
    claim: str
    """the claim that must catch it"""
    caught: bool
    caught_by: str = ""
    harmless: bool = False
    """a change that must stay green"""
    duration_s: float | None = None


@dataclass(frozen=True, kw_only=True)
class Verdict(Observation):
    """One metric of two sides compared."""

    metric: str
    verdict: str
    better: str = "none"
    unit: str = ""
    pair: str = ""
    case_id: str = ""
    family: str = ""
    scale: str = "ratio"
    """what the effect is: ratio (candidate over baseline) or difference (candidate minus baseline)"""
    effect: float | None = None
    low: float | None = None
    high: float | None = None
    p: float | None = None
    q: float | None = None
    """p after Benjamini-Hochberg inside the family"""
    visible: float | None = None
    """the smallest change that this comparison would have found four times in five, in the scale of the effect"""
    method: str = ""
    sides: tuple[tuple[str, ...], ...] = ()
    """run ids of the baseline and of the candidate, then of their repeats"""
    reasons: tuple[str, ...] = ()

    def hold(self) -> None:
        hold_among("verdict", self.verdict, VERDICTS)
        hold_among("better", self.better, BETTER)


@dataclass(frozen=True, kw_only=True)
class Certificate(Observation):
    """How quiet a machine was, by one family of metrics: one commit compared with itself."""

    family: str
    status: str
    """passed: nothing moved, there were enough processes, and a change worth seeing would have been seen"""
    compared: tuple[str, ...]
    metrics: int
    processes: int
    """a side, the fewest of any metric; `needed` for this many metrics"""
    needed: int
    visible: float | None = None
    """the largest of the smallest visible changes; None where no change could have been seen"""
    metric: str = ""
    """whose it is"""
    reasons: tuple[str, ...] = ()

    def hold(self) -> None:
        hold_among("status", self.status, STATUSES)


TYPES: dict[str, type[Observation]] = {
    "run": Run,
    "case": Case,
    "check": Check,
    "sample": Sample,
    "accept": Accept,
    "planted": Planted,
    "verdict": Verdict,
    "certificate": Certificate,
    "bisection": Bisection,
    "probe": Probe,
    "step": Step,
    "debt": Debt,
    "audit": Audit,
}
_NAMES = {cls: name for name, cls in TYPES.items()}


class Recorder:
    """Appends observations to one file; several processes may hold one each.

    A worker joins a run by `Recorder(path, run_id)`; without an id a new run begins.
    """

    def __init__(self, path: str | Path, run_id: str | None = None) -> None:
        self.path, self.run_id = Path(path), run_id or new_run_id()
        self._cases: set[str] = set()
        self._lines = Lines(self.path)

    def append(self, *observations: Observation) -> None:
        """Write each observation as one line of this run; a case goes before the first line that names it."""
        for observation in observations:
            case = observation if isinstance(observation, Case) else getattr(observation, "case", None)
            if case is not None and case.id not in self._cases:
                self._lines.append(_line(replace(case, run=self.run_id)))
                self._cases.add(case.id)
            if not isinstance(observation, Case):
                self._lines.append(_line(replace(observation, run=self.run_id)))

    def close(self) -> None:
        """Put the file on the disk; closing twice is harmless."""
        self._lines.close()

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read(path: str | Path) -> list[Observation]:
    """Every observation of a record, in the order of its lines; a torn line is left out."""
    return parse(str(path), Path(path).read_text(encoding="utf-8", errors="replace"))


def parse(name: str, text: str) -> list[Observation]:
    """The observations in the text of a record; `name` is for complaints."""
    parsed = []
    for number, line, has_end in whole(text):
        try:
            parsed.append(_parsed(f"{name}:{number}", line))
        except RecordError as error:
            # no end: either torn, or the last line of a file that an editor saved
            if has_end or not isinstance(error.__cause__, json.JSONDecodeError):
                raise
    cases: dict[tuple[str, str], Case] = {}
    for where, kind, facts in parsed:
        if kind == "case":
            case = _built(where, Case, {k: v for k, v in facts.items() if k != "id"})
            assert isinstance(case, Case)
            cases[case.run, facts.get("id", case.id)] = case
    found: list[Observation] = []
    for where, kind, facts in parsed:
        if kind == "case":
            facts.pop("id", None)
        if kind in ("sample", "accept"):
            case_id = str(facts.get("case"))
            if (facts["run"], case_id) not in cases:
                raise RecordError(f"{where}: names case {case_id!r}, which this record does not describe")
            facts["case"] = cases[facts["run"], case_id]
        found.append(_built(where, TYPES[kind], facts))
    return found


def _line(observation: Observation) -> str:
    """One JSON object: what it is, its fields, and what an unknown version added."""
    facts: dict[str, Any] = {"schema": SCHEMA, "type": _NAMES[type(observation)]}
    if isinstance(observation, Case):
        facts["id"] = observation.id
    facts |= {f.name: getattr(observation, f.name) for f in fields(observation) if f.name != "extra"}
    if "case" in facts:
        facts["case"] = facts["case"].id
    if facts.get("used") == math.inf:
        facts["used"] = "Infinity"  # JSON has no infinite number
    try:
        return json.dumps(facts | dict(observation.extra), allow_nan=False, default=plain)
    except (TypeError, ValueError) as error:
        raise RecordError(f"{facts['type']}: cannot be written as JSON: {error}") from error


def _parsed(where: str, line: str) -> tuple[str, str, dict[str, Any]]:
    try:
        facts = json.loads(line)
    except json.JSONDecodeError as error:
        raise RecordError(f"{where}: not a JSON line: {error}") from error
    if not isinstance(facts, dict) or facts.pop("schema", None) != SCHEMA:
        raise RecordError(f"{where}: not a line of {SCHEMA}; convert it or read it with the version that wrote it")
    kind = facts.pop("type", None)
    if kind not in TYPES:
        raise RecordError(f"{where}: unknown type {kind!r}; known are {', '.join(TYPES)}")
    if "run" not in facts:
        raise RecordError(f"{where}: names no run")
    if facts.get("used") == "Infinity":
        facts["used"] = math.inf
    return where, kind, facts


def _built(where: str, cls: type[Observation], facts: dict[str, Any]) -> Observation:
    known = {f.name for f in fields(cls)} - {"extra"}
    extra = {k: v for k, v in facts.items() if k not in known}
    try:
        return cls(**{k: v for k, v in facts.items() if k in known}, extra=extra)
    except (TypeError, ValueError) as error:
        raise RecordError(f"{where}: {error}") from error


def _needs_green(case: Case) -> None:
    if case.gate != "passed":
        raise RecordError(
            f"{case.pair}: numbers only if the gate passed, and this gate is {case.gate}; "
            f"run its claims first (draftproof check {case.pair})"
        )
