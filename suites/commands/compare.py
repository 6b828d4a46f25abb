"""`draftproof compare`: two sides and a verdict a metric, recorded; a commit against itself is a certificate."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from harness.record import Recorder, Run, Verdict
from harness.runner import Exit
from reports import store
from reports.baselines import certify, one_commit
from reports.gates import read_gates
from reports.regressions import judge
from reports.store import Frames
from suites.commands.desk import Answer, Desk, NothingSelected

BASELINES = "baseline:"
FOLDER = Path(__file__).resolve().parents[2] / "reports" / "baselines"
MAY_DIFFER = ("system", "versions", "env")
"""parts of an environment that are told where the sides differ, since they may explain a verdict"""


def place(name: str, runs: Path) -> str | Path:
    """What a name means: a run id, `baseline:NAME`, a record file or folder, or a URL."""
    if name.startswith(BASELINES):
        return FOLDER / f"{name.removeprefix(BASELINES)}.jsonl"
    if "://" in name:
        return name
    return runs / name if (runs / name).is_dir() else Path(name)


def compare(
    desk: Desk,
    begin: Callable[[], Recorder],
    names: Sequence[str],
    again: Sequence[str],
    runs: Path,
    gates_file: Path,
    is_certificate: bool = False,
) -> Answer:
    """Judge the second side against the first; `again`: both sides in fresh processes."""
    gates = read_gates(gates_file)
    old, new = (store.load(place(name, runs)) for name in names)
    fresh = [store.load(place(name, runs)) for name in again]
    if is_certificate:
        one_commit([o for name in names for o in store.stream(place(name, runs)) if isinstance(o, Run)])
    verdicts = judge(old, new, gates, (fresh[0], fresh[1]) if fresh else None)
    if not verdicts:
        raise NothingSelected(f"{names[0]} measured nothing that a gate judges")
    recorder = begin()
    recorder.append(*verdicts)
    warnings = differences(old, new)
    for line in warnings:
        desk.say(f"the sides differ in {line}")
    show(desk, verdicts)
    facts: dict[str, Any] = {
        "run": recorder.run_id,
        "records": str(recorder.path),
        "differences": warnings,
        "verdicts": [plain(v) for v in verdicts],
    }
    if not is_certificate:
        return Answer(verdict(verdicts), facts)
    certificates = certify(verdicts, gates)
    recorder.append(*certificates)
    names_of = ("family", "status", "metrics", "processes", "needed", "visible", "metric", "reasons")
    facts["certificates"] = [{name: getattr(c, name) for name in names_of} for c in certificates]
    for c in certificates:
        desk.say(f"{c.family}: {c.status}; {c.processes} units a side, {c.needed} needed; smallest visible {c.visible}")
        for reason in c.reasons:
            desk.say(f"  {reason}")
    quiet = all(c.status == "passed" for c in certificates)
    return Answer(Exit.PASSED if quiet else Exit.INCONCLUSIVE, facts)


def verdict(found: Sequence[Verdict]) -> Exit:
    """Of the metrics whose gates can stop anything; the others only tell."""
    decisive = [v.verdict for v in found if v.extra["on_worse"] == "fail"] or ["SAME"]
    if "WORSE" in decisive:
        return Exit.GATE_FAILED
    if set(decisive) == {"INVALID"}:
        return Exit.MACHINE_FAILED
    return Exit.INCONCLUSIVE if {"UNCLEAR", "INVALID"} & set(decisive) else Exit.PASSED


def differences(old: Frames, new: Frames) -> list[str]:
    """What besides the commit is not the same on both sides, one line each."""
    found = []
    for part in MAY_DIFFER:
        was, now = (
            sorted({f"{part} {value}" for env in side["run"]["environment"] for value in items(env.get(part))})
            for side in (old, new)
        )
        if was != now:
            gone, come = (", ".join(sorted(set(a) - set(b))) or "nothing" for a, b in ((was, now), (now, was)))
            found.append(f"{gone} -> {come}")
    return found


def items(value: Any) -> list[str]:
    """A mapping as `key value`, anything else as itself."""
    return [f"{k} {v}" for k, v in value.items()] if isinstance(value, dict) else [str(value)]


def plain(v: Verdict) -> dict[str, Any]:
    """A verdict for machines."""
    names = ("pair", "metric", "verdict", "better", "unit", "scale", "effect", "low", "high", "p", "q", "visible",
             "family", "reasons")  # fmt: skip
    return {name: getattr(v, name) for name in names} | {"case": v.case_id, **v.extra}


def show(desk: Desk, verdicts: Sequence[Verdict]) -> None:
    """One row a metric, gravest first."""
    rows = [
        (v.verdict, v.pair, v.metric, size(v, v.effect), f"{size(v, v.low)} to {size(v, v.high)}",
         size(v, v.visible, is_change=True), "; ".join(v.reasons))
        for v in verdicts
    ]  # fmt: skip
    head = ("verdict", "pair", "metric", "effect", "95 % interval", "smallest visible", "why")
    desk.table("Second side against the first", head, rows)


def size(v: Verdict, value: float | None, is_change: bool = False) -> str:
    """An effect in words: a change in per cent, or in the metric's own unit."""
    if value is None:
        return "not known"
    if v.scale == "ratio":
        return f"{value:.2%}" if is_change else f"{value - 1:+.2%}"
    return f"{value:.3f}" if is_change else f"{value:+.3f}"
