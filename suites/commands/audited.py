"""`draftproof audit` with its record: what was found stands in a run, from which the page renders it."""

from collections.abc import Callable, Mapping
from typing import Any

from harness.record import Audit, Recorder
from harness.runner import Exit
from suites.commands.audit import Options, audit
from suites.commands.desk import Answer, Desk, finite

OUTCOMES = {Exit.PASSED: "passed", Exit.GATE_FAILED: "failed", Exit.INCONCLUSIVE: "unclear"}


def audited(desk: Desk, begin: Callable[[], Recorder], asked: Options) -> Answer:
    """Audit, then record; a checkpoint that cannot be opened leaves no run."""
    found = audit(desk, asked)
    recorder = begin()
    recorder.append(observation(asked, found))
    desk.say(f"run {recorder.run_id}: {recorder.path}")
    return Answer(found.exit, {**found.facts, "run": recorder.run_id, "records": str(recorder.path)})


def observation(asked: Options, found: Answer) -> Audit:
    """The audit as one line; of a target only those tensors that were not loaded as themselves."""
    accounts: Mapping[str, Any] = found.facts["accounting"]
    kept = [tensor for tensor in accounts["target"]["tensors"] if tensor["status"] not in ("loaded", "named")]
    told = {**accounts, "target": {**accounts["target"], "tensors": kept}}
    return Audit(
        target=asked.target.resolve().name,
        draft=asked.draft.resolve().name,
        pair=str(accounts["draft"]["pair"]),
        outcome=OUTCOMES[found.exit],
        facts=finite({**found.facts, "accounting": told}),
    )
