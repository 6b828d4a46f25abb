"""What the checks of a record say: the sentence at the top, the ledger, the rig, the table and the failures."""

import math
import re
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

from harness.record import Check, Planted, Sample
from reports.store import Records

# the first of these that occurs names a cell
SEVERITY = ("failed", "error", "passed", "skipped")
# a test's node id: the file is the claim, the name a true sentence, what stands in brackets one case of it
NODE_ID = re.compile(r"(?:.*/)?test_(?P<file>\w+)\.py::(?:\w+::)*test_(?P<test>\w+)(?:\[(?P<case>.*)\])?", re.DOTALL)


class Headline(NamedTuple):
    tone: str
    """good, bad or unsure"""
    sentence: str
    then: str
    """what to do next"""
    command: str = ""


class Debt(NamedTuple):
    """One line of the ledger: something that did not run."""

    what: str
    times: int
    """0: all of it"""
    why: str


class Cell(NamedTuple):
    """All checks of one claim on one pair."""

    status: str
    text: str
    heat: float
    """share of the error budget, cut at 1"""
    more: str
    """how many checks, where one cell holds several"""
    title: str


class Table(NamedTuple):
    pairs: list[str]
    rows: list[tuple[str, list[Cell | None]]]
    """claim, one cell a pair"""


class Score(NamedTuple):
    caught: int
    bugs: int
    quiet: int
    """harmless changes that stayed green"""
    harmless: int
    rows: list[tuple[Planted, str, bool]]
    """what was planted, the outcome in words, whether it is the right one"""


def claim_of(name: str) -> str:
    """The claim that a check belongs to: the words of its file's name, or its own name where that is no node id."""
    found = NODE_ID.fullmatch(name)
    return found["file"].replace("_", " ") if found else name


def sentence_of(name: str) -> str:
    """The claim and the sentence that a test proves of it."""
    found = NODE_ID.fullmatch(name)
    return f"{claim_of(name)}: {found['test'].replace('_', ' ')}" if found else name


def place_of(name: str) -> str:
    """The same with the one case that was drawn or listed."""
    found = NODE_ID.fullmatch(name)
    return sentence_of(name) + (f" [{found['case']}]" if found and found["case"] else "")


def headline(records: Records) -> Headline:
    """The verdict in one sentence, the gravest finding first."""
    count = Counter(check.status for check in records.checks)
    ran = count["passed"] + count["failed"]
    if count["failed"]:
        first = next(check for check in records.checks if check.status == "failed")
        claims = len({claim_of(check.claim) for check in records.checks if check.status == "failed"})
        sentence = f"{count['failed']} of {_counted(ran, 'check')} failed, in {_counted(claims, 'claim')}."
        return Headline("bad", sentence, "Run the first failure again:", first.replay)
    if count["error"]:
        broken = next(check for check in records.checks if check.status == "error")
        sentence = f"{_counted(count['error'], 'check')} could not be finished, so nothing is proven."
        return Headline("bad", sentence, f"The first one stopped with: {broken.reason}", broken.replay)
    passed = (
        f"All {ran} checks that ran pass" if ran > 1 else "The one check that ran passes" if ran else "No check ran"
    )
    wrong = [row for row in score(records).rows if not row[2]]
    if wrong:
        sentence = f"{passed}, but {_counted(len(wrong), 'planted change')} had the wrong outcome."
        return Headline("bad", sentence, "Sharpen the claim named in the score table, then:", "draftproof planted")
    compared = _compared(records, passed)
    if compared is not None:
        return compared
    if not ran:
        sentence = "No check ran, so nothing can be concluded about correctness."
        return Headline("unsure", sentence, "Run the claims:", "draftproof check")
    if count["skipped"]:
        sentence = f"{passed}; {_counted(count['skipped'], 'check')} did not run."
        return Headline("good", sentence, "Read below what that leaves unproven.")
    then = "Read below what was not part of this run." if ledger(records) else "Nothing is left to do."
    return Headline("good", f"{passed}.", then)


def _compared(records: Records, passed: str) -> Headline | None:
    """What comparisons with another run add where no check is red; None if they are all well."""
    found = {kind: [v for v in records.verdicts if v.verdict == kind] for kind in ("WORSE", "INVALID", "UNCLEAR")}
    if found["WORSE"]:
        names = ", ".join(f"{v.pair} {v.metric}".strip() for v in found["WORSE"][:3])
        return Headline("bad", f"{passed}, but WORSE than before: {names}.", "Find the commit:", "draftproof bisect")
    if found["INVALID"] or found["UNCLEAR"]:
        some = found["INVALID"] or found["UNCLEAR"]
        sentence = f"{passed}; {_counted(len(some), 'comparison')} ended {some[0].verdict}."
        return Headline("unsure", sentence, "; ".join(some[0].reasons) or "Measure again with more blocks.")
    return None


def ledger(records: Records) -> list[Debt]:
    """What did not run, and why; a skip is a debt, not a pass."""
    skipped = Counter(
        (sentence_of(check.claim), check.reason.removeprefix("Skipped: "))
        for check in records.checks
        if check.status == "skipped"
    )
    debts = [Debt(f"claim {claim}", count, reason) for (claim, reason), count in skipped.items()]
    red = Counter((case.pair, case.gate) for case in records.cases if case.gate != "passed")
    for (pair, gate), count in red.items():
        why = "its correctness gate failed" if gate == "failed" else "its correctness gate was not run"
        debts.append(Debt(f"numbers of {pair}", count, f"{why}: no number from a gate that is not green"))
    if not records.planted:
        debts.append(Debt("planted bugs", 0, "not part of this run; draftproof planted"))
    if not records.accepts:
        debts.append(Debt("acceptance length", 0, "not part of this run; draftproof bench acceptance"))
    if not records.samples:
        debts.append(Debt("speed", 0, "not part of this run; draftproof bench decode"))
    for reason in dict.fromkeys(g.get("reason") or "not recorded" for g in map(_gpu, records.runs) if not _has(g)):
        debts.append(Debt("everything on a GPU", 0, f"no GPU: not measured ({reason})"))
    return debts


def rig(records: Records) -> list[tuple[str, str]]:
    """The machine of the newest run, fact by fact; what was not recorded says so."""
    if not records.runs:
        return [("run", "not recorded")]
    env = max(records.runs, key=lambda run: run.run).environment
    source, cpu, gpu = env.get("source", {}), env.get("cpu", {}), env.get("gpu", {})
    commit = source.get("commit")
    state = {True: "dirty", False: "clean", None: "state not known"}[source.get("dirty")]
    facts = [
        ("commit", f"{commit[:12]}, {state}" if commit else f"not known: {source.get('reason', 'not recorded')}"),
        ("processor", f"{cpu.get('name', 'not recorded')}, {cpu.get('cores', '?')} cores"),
        ("GPU", _gpu_words(gpu)),
    ]
    versions = {name: number for name, number in env.get("versions", {}).items() if number}
    facts.append(("versions", ", ".join(f"{name} {number}" for name, number in versions.items()) or "not recorded"))
    facts.append(("clocks", _clock_words([s for s in records.samples if s.telemetry])))
    return facts


def table(records: Records, row_of: Callable[[str], str] = claim_of) -> Table:
    """Claims (or what `row_of` makes of a check's name) by pairs; what is held to no pair has the column "all"."""
    pairs = sorted({check.pair for check in records.checks})
    claims = sorted({row_of(check.claim) for check in records.checks})
    cells: dict[tuple[str, str], list[Check]] = {}
    for check in records.checks:
        cells.setdefault((row_of(check.claim), check.pair), []).append(check)
    rows = [(claim, [_cell(cells.get((claim, pair), [])) for pair in pairs]) for claim in claims]
    return Table([pair or "all" for pair in pairs], rows)


def failures(records: Records) -> list[tuple[Check, str]]:
    """Each check that failed or broke, with its worst place in words."""
    return [(check, _worst(check)) for check in records.checks if check.status in ("failed", "error")]


def score(records: Records) -> Score:
    """Bugs that must be caught, and harmless changes that must not be."""
    bugs = [p for p in records.planted if not p.harmless]
    harmless = [p for p in records.planted if p.harmless]
    rows = []
    for planted in sorted(records.planted, key=lambda p: (p.harmless, p.caught)):
        if planted.harmless:
            outcome = "false alarm" if planted.caught else "stayed green"
        else:
            outcome = "caught" if planted.caught else "missed"
        rows.append((planted, outcome, planted.caught is not planted.harmless))
    return Score(sum(p.caught for p in bugs), len(bugs), sum(not p.caught for p in harmless), len(harmless), rows)


def share(used: float | None) -> str:
    """A share of the error budget, as people read it."""
    if used is None:
        return "exact"
    if math.isinf(used):
        return "not finite"
    if used >= 10:
        return f"{used:.3g}x"
    return f"{100 * used:.0f} %" if used == 0 or used >= 0.01 else "< 1 %"


def _cell(checks: list[Check]) -> Cell | None:
    if not checks:
        return None
    statuses = Counter(check.status for check in checks)
    status = next(kind for kind in SEVERITY if statuses[kind])
    title = ", ".join(f"{number} {kind}" for kind, number in statuses.items())
    more = _counted(len(checks), "check") if len(checks) > 1 else ""
    if status == "skipped":
        return Cell(status, "skipped", 0.0, more, f"{title}: {checks[0].reason}")
    used = max((check.used for check in checks if check.used is not None), default=None)
    text = share(used)
    if status != "passed":
        text = status if used is None else f"{status}, {text}"
    elif statuses["skipped"]:
        more += f", {statuses['skipped']} skipped"
    return Cell(status, text, min(1.0, used or 0.0), more, title)


def _worst(check: Check) -> str:
    if check.worst is None:
        return ""
    tensor, index = check.worst
    return f"{tensor}[{', '.join(map(str, index))}]"


def _gpu(run: Any) -> dict[str, Any]:
    return dict(run.environment.get("gpu", {}))


def _has(gpu: dict[str, Any]) -> bool:
    return bool(gpu.get("available"))


def _gpu_words(gpu: dict[str, Any]) -> str:
    if not _has(gpu):
        return f"no GPU: not measured ({gpu.get('reason') or 'not recorded'})"
    names = Counter(device.get("name") or "unnamed" for device in gpu.get("devices", []))
    devices = ", ".join(f"{count} x {name}" for name, count in names.items())
    return f"{devices}, driver {gpu.get('driver') or 'not known'}"


def _clock_words(samples: list[Sample]) -> str:
    told = [s.telemetry.get("gpu", s.telemetry) for s in samples]
    seen = [t for t in told if t.get("available")]
    if not seen:
        reasons = {t.get("reason") or "no reason recorded" for t in told} or {"no telemetry in this record"}
        return f"not measured ({', '.join(sorted(reasons))})"
    clocks = [t["sm_mhz"] for t in seen if t.get("sm_mhz")]
    span = (
        f"SM {min(c['low'] for c in clocks):.0f} to {max(c['high'] for c in clocks):.0f} MHz"
        if clocks
        else "SM unknown"
    )
    throttled = [t["throttled"] for t in seen if t.get("throttled") is not None]
    return f"{span}, throttled in up to {100 * max(throttled):.0f} % of readings" if throttled else span


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
