"""Provenance: what is needed to do a run again."""

from typing import Any

from harness.record import Case, Run
from reports.panels import Section
from reports.store import Records

SHOWN = 12
"""runs that are told in full, the newest; the others are a line each, or counted"""


def build(now: Records, every: Records) -> Section:
    """Runs, newest first, and the cases that are on the page."""
    runs = sorted(every.runs, key=lambda run: run.run, reverse=True)
    cases: dict[str, tuple[Case, int]] = {}
    for case in sorted(every.cases, key=lambda c: (c.pair, c.id, c.run)):
        cases[case.id] = case, cases.get(case.id, (case, 0))[1] + 1
    facts = {"runs": [_provenance(run) for run in runs[:SHOWN]], "older": runs[SHOWN : 5 * SHOWN],
             "unshown": len(runs[5 * SHOWN :]), "cases": list(cases.values())}  # fmt: skip
    return Section("provenance", "Provenance", facts, template="provenance.html")


def _provenance(run: Run) -> dict[str, Any]:
    """What is needed to do a run again."""
    env = run.environment
    source = env.get("source", {})
    return {
        "run": run.run,
        "facts": [
            ("started", run.started),
            ("command", " ".join(run.argv) or "not recorded"),
            ("profile", run.profile or "not recorded"),
            ("commit", source.get("commit") or source.get("reason") or "not recorded"),
            ("diff sha256", source.get("diff_sha256") or "none"),
            ("system", env.get("system", "not recorded")),
            ("seeds", _pairs(env.get("seeds", {}))),
            ("environment", _pairs(env.get("env", {}))),
            ("compared with", run.parent or "no other run"),
        ],
    }


def _pairs(facts: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in facts.items()) or "none recorded"
