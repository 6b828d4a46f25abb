"""JUnit XML, as continuous integration reads it: one case a check, one case a verdict.

A check that failed is a failure, one that broke an error, one that did not run skipped; each with its reason. WORSE is
a failure; UNCLEAR and INVALID decide nothing and are skipped.
"""

import re
from xml.etree import ElementTree

from harness.record import Check, Verdict
from reports.newest import newest
from reports.panels import claim_of
from reports.sections.compared import size, span_of
from reports.sections.failures import replay
from reports.store import Records

# what XML 1.0 cannot hold, even escaped
ILLEGAL = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
OUTCOMES = {"failed": "failure", "error": "error", "skipped": "skipped"}
DECIDED = {"WORSE": "failure", "UNCLEAR": "skipped", "INVALID": "skipped"}


def xml(records: Records) -> str:
    """The document."""
    now = newest(records)
    root = ElementTree.Element("testsuites", name="draftproof")
    started = {run.run: run.started for run in now.runs}
    for run in sorted({check.run for check in now.checks}):
        cases = [_check(check) for check in now.checks if check.run == run]
        root.append(_suite("checks", run, started.get(run, ""), cases))
    if now.verdicts:
        run = max(v.run for v in now.verdicts)
        root.append(_suite("verdicts", run, started.get(run, ""), [_verdict(v) for v in now.verdicts]))
    ElementTree.indent(root)
    return '<?xml version="1.0" encoding="utf-8"?>\n' + ElementTree.tostring(root, encoding="unicode") + "\n"


def _suite(name: str, run: str, started: str, cases: list[ElementTree.Element]) -> ElementTree.Element:
    """Cases with their counts."""
    numbers = {f"{tag}s": sum(case.find(tag) is not None for case in cases) for tag in ("failure", "error")}
    seconds = sum(float(case.get("time", 0)) for case in cases)
    found = ElementTree.Element(
        "testsuite", name=f"{name} {run}", tests=str(len(cases)), failures=str(numbers["failures"]),
        errors=str(numbers["errors"]), skipped=str(sum(case.find("skipped") is not None for case in cases)),
        time=f"{seconds:.3f}", timestamp=_time(started),
    )  # fmt: skip
    found.extend(cases)
    return found


def _check(check: Check) -> ElementTree.Element:
    """The pair is part of the name, so that two pairs of one claim are two cases."""
    name = check.claim.partition("::")[2] or check.claim
    case = _case(claim_of(check.claim), f"{name} ({check.pair})" if check.pair else name, check.duration_s or 0.0)
    if check.status in OUTCOMES:
        why = str(check.extra.get("explanation") or check.reason or check.status)
        _outcome(case, OUTCOMES[check.status], why, f"{check.reason}\n{replay(check)}".strip())
    return case


def _verdict(v: Verdict) -> ElementTree.Element:
    case = _case(f"compare {v.family}".strip(), f"{v.pair} {v.metric} {v.case_id}".strip(), 0.0)
    if v.verdict in DECIDED:
        told = f"{v.verdict}: {size(v, v.effect)} ({span_of(v)})"
        _outcome(case, DECIDED[v.verdict], told, "; ".join(v.reasons))
    return case


def _case(group: str, name: str, seconds: float) -> ElementTree.Element:
    return ElementTree.Element("testcase", classname=_legal(group), name=_legal(name), time=f"{seconds:.3f}")


def _outcome(case: ElementTree.Element, tag: str, message: str, text: str) -> None:
    ElementTree.SubElement(case, tag, message=_legal(message)).text = _legal(text)


def _legal(text: str) -> str:
    return ILLEGAL.sub("?", text)


def _time(started: str) -> str:
    """As the schema has it: without an offset, whole seconds; the epoch where nothing was recorded."""
    return found[0] if (found := re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d", started)) else "1970-01-01T00:00:00"
