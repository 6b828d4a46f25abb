"""One HTML file from records: opens anywhere, asks no network, and is the same bytes for the same records."""

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from harness.record import Run
from reports import findings, measured
from reports.store import Records, gather

TEMPLATES = Path(__file__).with_name("templates")
SHOWN = 50
"""failures that get a card; the others are counted"""


def render(paths: list[str | Path] | str | Path, out: str | Path) -> Path:
    """Write the page of record files or folders; several runs are read as one evening's work."""
    records = gather(*([paths] if isinstance(paths, (str, Path)) else paths))
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(html(records), encoding="utf-8")
    return out


def html(records: Records) -> str:
    """The page as text."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    failed = findings.failures(records)
    return environment.get_template("page.html").render(
        headline=findings.headline(records),
        ledger=findings.ledger(records),
        rig=findings.rig(records),
        table=findings.table(records),
        tests=findings.table(records, findings.sentence_of),
        failures=failed[:SHOWN],
        unshown=len(failed[SHOWN:]),
        score=findings.score(records),
        share=findings.share,
        place_of=findings.place_of,
        acceptance=measured.acceptance(records),
        positions=measured.positions(records),
        separation=measured.separation(records),
        speeds=measured.speeds(records),
        verdicts=records.verdicts,
        runs=[_provenance(run) for run in records.runs],
        cases=sorted({(c.id, c.run): c for c in records.cases}.values(), key=lambda c: (c.pair, c.run, c.id)),
    )


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
