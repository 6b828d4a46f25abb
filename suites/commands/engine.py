"""`draftproof engine`: an engine's own model classes as a witness."""

import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.runner import Exit
from suites.commands.desk import Answer, Desk, MissingCapability, UsageFault
from suites.engine.cases import EVERY, Recipe
from suites.engine.environment import make
from suites.engine.judge import Posed, finding, pose
from suites.engine.protocol import ENGINES, Engine, ask, check_python, how, versions

RUNNERS = ("v1", "v2")
"""of vLLM's models"""


@dataclass(frozen=True)
class Options:
    """What was asked for."""

    engine: str
    target: Path | None = None
    draft: Path | None = None
    every: bool = False
    """all recipes of the project in the place of one pair"""
    python: Path | None = None
    make_env: Path | None = None
    pip_args: tuple[str, ...] = ()
    runner: str = "v1"
    evidence: Path | None = None
    """where to write what was found"""


def engine(desk: Desk, asked: Options) -> Answer:
    """Ask and judge; GATE_FAILED where the engine and the reference part, or the audit foretold something else."""
    chosen = _chosen(asked)
    python = _python(desk, chosen, asked)
    found = check_python(chosen, python)
    if found != chosen.version:
        desk.say(f"this is {chosen.name} {found}; the audit speaks of {chosen.version}")
    with tempfile.TemporaryDirectory() as root:
        posed = _posed(Path(root), asked)
        with desk.progress() as bar:
            task = bar.add_task(chosen.name, total=len(posed))
            dumps = ask(chosen, python, [one.case() for one in posed], Path(root), lambda name: bar.advance(task))
        findings = []
        with desk.progress() as bar:
            for one in bar.track(posed, description="the reference"):
                findings.append(finding(one, dumps[one.recipe.name]))
        facts = {"engine": chosen.name, "versions": versions(dumps), "cases": findings}
    _show(desk, findings)
    if asked.evidence is not None:
        write(asked.evidence, facts)
    wrong = [case["name"] for case in findings if not case["agrees"]]
    desk.say(f"{len(findings) - len(wrong)} of {len(findings)} agree; not: {', '.join(wrong) or 'none'}")
    return Answer(Exit.GATE_FAILED if wrong else Exit.PASSED, {**facts, "wrong": wrong})


def _chosen(asked: Options) -> Engine:
    if asked.engine not in ENGINES:
        raise UsageFault(f"no engine is named {asked.engine!r}; known are {', '.join(ENGINES)}")
    if asked.runner not in RUNNERS:
        raise UsageFault(f"--runner is {asked.runner!r}; known are {', '.join(RUNNERS)}")
    if asked.every == (asked.target is not None or asked.draft is not None):
        raise UsageFault("give --target and --draft, or --all for the project's own cases")
    if not asked.every and asked.target is None:
        raise UsageFault("a draft is asked about beside its target; give --target")
    return ENGINES[asked.engine]


def _python(desk: Desk, chosen: Engine, asked: Options) -> Path:
    if asked.make_env is not None:
        return make(chosen, asked.make_env, desk.say, asked.pip_args)
    if asked.python is None:
        raise MissingCapability(
            f"{chosen.name} runs in an environment of its own: --python PATH names it; {how(chosen)}"
        )
    return asked.python


def _posed(root: Path, asked: Options) -> Sequence[Posed]:
    if asked.every:
        return [pose(recipe, root / str(number), root / "targets") for number, recipe in enumerate(EVERY)]
    assert asked.target is not None
    recipe = Recipe("the checkpoint", runner=asked.runner)
    return [Posed(recipe, asked.target, asked.draft, asked.draft)]


def write(file: Path, facts: dict[str, Any]) -> None:
    """What was found, a case a line, in the place of what stood there."""
    cases = ",\n".join(json.dumps(case) for case in facts["cases"])
    head = json.dumps({key: value for key, value in facts.items() if key != "cases"})
    draft = file.with_name(file.name + ".part")
    draft.write_text(f'{head[:-1]}, "cases": [\n{cases}\n]}}\n', encoding="utf-8")
    os.replace(draft, file)


def _show(desk: Desk, findings: Sequence[dict[str, Any]]) -> None:
    rows = []
    for case in findings:
        used = {name: share for name, (_, share) in case.get("rungs", {}).items()}
        beyond = next((f", first at {name}" for name, share in used.items() if share > 1), "")
        share = f"{max(used.values()):.3g}{beyond}" if used else ""
        rows.append((case["name"], "yes" if case["agrees"] else "NO", share, told(case["audit"]), told(case["engine"])))
    desk.table("An engine as a witness", ("case", "agrees", "share of budget", "the audit", "the engine"), rows)


def told(facts: dict[str, Any]) -> str:
    """What was foretold or what happened, on a line."""
    if "refused" in facts:
        return f"refused: {facts['refused'][:90]}"
    words = [str(facts["outcome"])] if "outcome" in facts else []
    words += [f"captures {tuple(facts['points'])}"] if facts.get("points") else []
    words += [f"{name} left: {what}" for name, what in facts.get("left", {}).items()]
    words += [f"{name} unread" for name in facts.get("dropped", ())]
    return "; ".join(words)
