"""`draftproof explain`: which single edit of a target or a draft makes an error vanish, else where it begins."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from harness.record import Check, Recorder
from harness.runner import Exit
from suites.commands.desk import Answer, Desk, UsageFault
from suites.explain.cases import Folders, read_case
from suites.explain.dump import read_dump
from suites.explain.failures import couple_of, explain_pair, text_of, write_pair
from suites.explain.ladder import Ladder
from suites.explain.search import Explanation
from suites.explain.search import explain as search
from suites.replay import read


class Options(NamedTuple):
    """What is held to what."""

    target: Path | None = None
    draft: Path | None = None
    ours: Path | None = None
    """a dump"""
    case: Path | None = None
    """a case folder, in the place of target and draft"""
    counterexample: Path | None = None
    """a failure, whose pair is held to itself: the twin to the reference"""
    layer_ids: str | None = None
    norm_output: str | None = None


def explain(desk: Desk, asked: Options, begin: Callable[[], Recorder] | None = None) -> Answer:
    """GATE_FAILED where the dump is not what the reference computes, explained or not."""
    if asked.counterexample is not None:
        found, name = _failure(asked.counterexample)
        return told(desk, found, name, f"draftproof explain {asked.counterexample}", begin)
    pair, dump = pair_of(asked), read_dump(_needed(asked.ours))
    target, draft = pair.open(dump.dtype)
    with desk.progress() as progress:
        bar = progress.add_task("edits", total=None)
        found = search(dump, target, draft, lambda done, total: progress.update(bar, completed=done, total=total))
    name = target.pair.name + (f"-{draft.pair.name}" if draft else "")
    places = f"--target {pair.target}" + (f" --draft {pair.draft}" if pair.draft else "")
    return told(desk, found, name, f"draftproof explain {places} --ours {asked.ours}", begin)


def pair_of(asked: Options) -> Folders:
    """The pair that was asked about; errors: UsageFault."""
    if asked.case is not None:
        if asked.target or asked.draft:
            raise UsageFault("--case names the target and the draft; leave out --target and --draft")
        return read_case(asked.case)
    if asked.target is None:
        raise UsageFault("say what the dump is held to: --target and --draft, or --case")
    return Folders(asked.target, asked.draft, asked.layer_ids, asked.norm_output)


def _needed(ours: Path | None) -> Path:
    if ours is None:
        raise UsageFault("--ours FILE.safetensors is missing: the dump to explain")
    return ours


def _failure(file: Path) -> tuple[Explanation, str]:
    """The pair of a counterexample, twin against reference."""
    failed = read(file)
    couple = couple_of(failed)
    with tempfile.TemporaryDirectory() as folder:
        return explain_pair(write_pair(couple, Path(folder)), text_of(failed, couple)), failed.pair


def told(desk: Desk, found: Explanation, pair: str, again: str, begin: Callable[[], Recorder] | None = None) -> Answer:
    """The ladder, the verdict, and a line of record where one is kept."""
    ladder(desk, found.before)
    desk.say(found.text)
    failed = found.before.first is not None
    if begin is not None:
        recorder = begin()
        recorder.append(
            Check(
                claim="explain",
                pair=pair,
                status="failed" if failed else "passed",
                used=found.before.used,
                reason=found.text if failed else "",
                replay=again,
                extra=found.facts(),
            )
        )
    return Answer(Exit.GATE_FAILED if failed else Exit.PASSED, {"pair": pair, **found.facts()})


def ladder(desk: Desk, climbed: Ladder) -> None:
    """Every place and how much of its budget was used; the first one beyond it is marked."""
    first = climbed.first
    rows = [
        (rung.name, f"{rung.error:.1e}", f"{rung.used:.3g}", "first beyond its budget" if rung is first else "")
        for rung in climbed.rungs
    ]
    desk.table("Ladder", ("place", "error", "of the budget", ""), rows)
