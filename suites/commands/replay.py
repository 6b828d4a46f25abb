"""`draftproof replay`: run a counterexample again, here or, as a case, on another implementation.

0   it no longer fails          2   the file cannot be read, or its claim is gone
1   it fails as it did          4   it cannot be told: the claim draws otherwise than it did, hypothesis is another
                                    version, or it passes and what may decide that (torch, processor) differs too
"""

from pathlib import Path
from typing import Any

from harness.runner import ROOT, Exit, Outcome, run
from suites.commands.desk import Answer, Desk, UsageFault
from suites.replay import Counterexample, read, versions

GONE = "DidNotReproduce"
CHANGED = ("shape of the test data", "failed to satisfy an assumption", "different version of Hypothesis")


def replay(
    desk: Desk, file: Path, case: Path | None = None, script: bool = False, timeout: float = 600.0, root: Path = ROOT
) -> Answer:
    """Run the claim on what it failed with; `case` and `script` write it for others instead."""
    found = read(file)
    if case is not None or script:
        return handed_on(desk, found, case, script)
    options = [f"--replay={file.resolve()}", f"--profile={found.profile}"]
    outcome = run([found.claim], options=[*options, "-n0"], timeout=timeout, root=root)
    differing = [f"{name} {then} -> {now}" for name, (then, now) in changed(found).items()]
    verdict, why = judged(found, outcome, differing)
    desk.say(f"{found.claim}\n  given: {found.line or 'nothing drawn'}\n  then:  {found.reason}\n  now:   {why}")
    facts = {"claim": found.claim, "pair": found.pair, "then": found.reason, "now": why, "differs": differing}
    return Answer(verdict, {**facts, "seconds": round(outcome.seconds, 1)})


def changed(found: Counterexample) -> dict[str, tuple[Any, Any]]:
    """What may decide whether a claim passes, and is not what it was: name -> (then, now)."""
    here = versions()
    return {name: (then, here.get(name)) for name, then in found.versions.items() if here.get(name) != then}


def judged(found: Counterexample, outcome: Outcome, differing: list[str]) -> tuple[Exit, str]:
    """How a run of the claim ended for this counterexample."""
    said = outcome.first_failure
    if outcome.is_red and any(mark in said for mark in CHANGED):
        return Exit.INCONCLUSIVE, f"the claim can no longer be given the same: {said[:300]}"
    if outcome.is_green or (outcome.is_red and GONE in said):
        if differing:
            return Exit.INCONCLUSIVE, f"passes, but not where it failed: {', '.join(differing)}"
        return Exit.PASSED, "passes"
    if outcome.is_red:
        return Exit.GATE_FAILED, f"fails: {said[:300]}"
    if outcome.exit in (Exit.USAGE, Exit.NOTHING_SELECTED):
        raise UsageFault(f"{found.claim} is no claim of this checkout; check out {found.source.get('commit')}")
    return outcome.exit, outcome.text.strip()[-300:]


def handed_on(desk: Desk, found: Counterexample, case: Path | None, is_script: bool) -> Answer:
    """The same as checkpoints, a text and what the reference makes of it; and as a script."""
    # imported here: a replay needs no model
    import tempfile

    from suites.explain.cases import write_case
    from suites.explain.failures import couple_of, text_of, write_pair
    from suites.explain.script import DRAFTS, script

    if case is not None and case.exists() and any(case.iterdir()):
        raise UsageFault(f"{case}: is not empty; a case is written into a new folder")
    facts: dict[str, Any] = {"claim": found.claim}
    with tempfile.TemporaryDirectory() as scratch:
        couple, folder = couple_of(found), case or Path(scratch)
        pair = write_pair(couple, folder)
        target, draft = pair.open()
        if case is not None:
            origin = {"claim": found.claim, "reason": found.reason, "given": found.line}
            facts["case"] = str(write_case(case, pair, text_of(found, couple), origin))
            desk.say(
                f"{case}: run yours on target/ and draft/ with the tokens of expected.safetensors, write its dump, then"
            )
            desk.say(f"draftproof explain --case {case} --ours DUMP.safetensors")
        if is_script:
            alone = draft is not None and draft.pair.name in DRAFTS
            shown, config = (draft.pair, draft.facts.config) if draft and alone else (target.pair, target.config)
            facts["script"] = script(shown, config, f"{found.claim}\n{found.reason}")
            desk.say(facts["script"])
    return Answer(Exit.PASSED, facts)
