"""The verdict of a page in a sentence, and what to do next."""

from collections import Counter
from typing import NamedTuple

from reports.panels import claim_of, counted
from reports.sections import ledger
from reports.sections.planted import score
from reports.store import Records


class Headline(NamedTuple):
    tone: str
    """good, bad or unsure"""
    sentence: str
    then: str
    """what to do next"""
    command: str = ""


def headline(records: Records) -> Headline:
    """The verdict in one sentence, the gravest finding first."""
    count = Counter(check.status for check in records.checks)
    ran = count["passed"] + count["failed"]
    if count["failed"]:
        first = next(check for check in records.checks if check.status == "failed")
        claims = len({claim_of(check.claim) for check in records.checks if check.status == "failed"})
        sentence = f"{count['failed']} of {counted(ran, 'check')} failed, in {counted(claims, 'claim')}."
        return Headline("bad", sentence, "Run the first failure again:", first.replay)
    if count["error"]:
        broken = next(check for check in records.checks if check.status == "error")
        sentence = f"{counted(count['error'], 'check')} could not be finished, so nothing is proven."
        return Headline("bad", sentence, f"The first one stopped with: {broken.reason}", broken.replay)
    passed = (
        f"All {ran} checks that ran pass" if ran > 1 else "The one check that ran passes" if ran else "No check ran"
    )
    wrong = [row for row in score(records).rows if not row[2]]
    if wrong:
        sentence = f"{passed}, but {counted(len(wrong), 'planted change')} had the wrong outcome."
        return Headline("bad", sentence, "Sharpen the claim named in the score table, then:", "draftproof planted")
    compared = _compared(records, passed)
    if compared is not None:
        return compared
    if not ran:
        sentence = "No check ran, so nothing can be concluded about correctness."
        return Headline("unsure", sentence, "Run the claims:", "draftproof check")
    if count["skipped"]:
        sentence = f"{passed}; {counted(count['skipped'], 'check')} did not run."
        return Headline("good", sentence, "Read below what that leaves unproven.")
    then = "Read below what was not part of this run." if ledger.debts(records) else "Nothing is left to do."
    return Headline("good", f"{passed}.", then)


def _compared(records: Records, passed: str) -> Headline | None:
    """What comparisons with another run add where no check is red; None if they are all well."""
    found = {kind: [v for v in records.verdicts if v.verdict == kind] for kind in ("WORSE", "INVALID", "UNCLEAR")}
    if found["WORSE"]:
        names = ", ".join(f"{v.pair} {v.metric}".strip() for v in found["WORSE"][:3])
        return Headline("bad", f"{passed}, but WORSE than before: {names}.", "Find the commit:", "draftproof bisect")
    if found["INVALID"] or found["UNCLEAR"]:
        some = found["INVALID"] or found["UNCLEAR"]
        sentence = f"{passed}; {counted(len(some), 'comparison')} ended {some[0].verdict}."
        return Headline("unsure", sentence, "; ".join(some[0].reasons) or "Measure again with more blocks.")
    return None
