"""`draftproof list`: what the project holds."""

import ast
from pathlib import Path
from typing import Any

from harness.environment import ROOT
from harness.runner import Exit
from suites.commands.desk import Answer, Desk

SUITES = ("correctness", "selftest")


def pairs(desk: Desk) -> Answer:
    """Every target and draft that exists twice."""
    from suites.catalog import PAIRS

    rows = [
        {"name": pair.name, "kind": pair.kind, "model": pair.model, "covers": list(pair.covers), "note": pair.note}
        for pair in PAIRS.values()
    ]
    return _told(desk, "pairs", rows)


def speculations(desk: Desk) -> Answer:
    """Every target and draft that join, and whether trained weights ship."""
    from suites.catalog import SPECULATIONS

    rows = [
        {"name": s.name, "target": s.target, "draft": s.draft, "algorithm": s.algorithm, "shipped": bool(s.checkpoints)}
        for s in SPECULATIONS.values()
    ]
    return _told(desk, "speculations", rows)


def bugs(desk: Desk) -> Answer:
    """Every bug that `planted` plants."""
    from suites.planted import BUGS

    rows = [
        {"name": bug.name, "origin": bug.origin, "claim": bug.claim, "harmless": bug.harmless, "at": bug.at}
        for bug in BUGS
    ]
    return _told(desk, "bugs", rows)


def dialects(desk: Desk) -> Answer:
    """How each trainer and engine writes or reads an EAGLE-3 draft, one fact a line."""
    from suites.dialects import DIALECTS

    rows = []
    for name, dialect in DIALECTS.items():
        lines = [
            {"fact": row.fact, "where": row.where or "everywhere", "key": row.key, "default": row.absent,
             "convention": row.means, "manner": row.manner, "source": row.source} for row in dialect.rows
        ]  # fmt: skip
        title = f"{name}: {dialect.title} {dialect.version}, {dialect.role}"
        desk.table(title, tuple(lines[0]), [tuple(line.values()) for line in lines])
        rows += [{"dialect": name, "version": dialect.version, **line} for line in lines]
    return Answer(Exit.PASSED, {"dialects": rows})


def suites(desk: Desk, root: Path = ROOT) -> Answer:
    """Every file of claims and what it claims; read, not imported."""
    rows = []
    for suite in SUITES:
        for file in sorted((root / "suites" / suite).glob("test_*.py")):
            module = ast.parse(file.read_text(encoding="utf-8"))
            claim = " ".join((ast.get_docstring(module) or "").split("\n\n")[0].split()).removeprefix("Claim: ")
            tests = sum(isinstance(n, ast.FunctionDef) and n.name.startswith("test_") for n in ast.walk(module))
            rows.append({"file": f"{suite}/{file.name}", "tests": tests, "claim": claim})
    return _told(desk, "suites", rows)


def _told(desk: Desk, name: str, rows: list[dict[str, Any]]) -> Answer:
    words = [tuple(", ".join(v) if isinstance(v, list) else v for v in row.values()) for row in rows]
    desk.table(name.capitalize(), tuple(rows[0]) if rows else (), words)
    return Answer(Exit.PASSED if rows else Exit.NOTHING_SELECTED, {name: rows})


LISTS = {"pairs": pairs, "speculations": speculations, "bugs": bugs, "dialects": dialects, "suites": suites}
