"""Which single edit makes an error vanish; where none does, the first place at which it exceeds its budget.

Every edit is tried on the reference: if the reference with one fact read otherwise says what the dump says, at every
place and within the budgets, then that fact explains the dump. Several may: facts that do the same to this checkpoint
cannot be told apart, and all are named. An edit that leaves more than NEARER of the error is not worth a word.
"""

import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, NamedTuple

from suites.explain.dump import Dump
from suites.explain.edits import Edit, edits
from suites.explain.ladder import Ladder, climb
from suites.explain.states import walk
from suites.opened import OpenDraft, OpenTarget

NEARER = 0.5


class Trial(NamedTuple):
    """One edit and what is left with it."""

    name: str
    left: Ladder


class Explanation(NamedTuple):
    """What is known about an error."""

    before: Ladder
    by: tuple[Trial, ...]
    """edits that leave nothing beyond its budget, the nearest first"""
    nearest: Trial | None
    """the edit that takes most of the error away where none explains it"""
    tried: int

    @property
    def text(self) -> str:
        """One line for people."""
        first = self.before.first
        if first is None:
            return f"nothing to explain: the largest share of a budget is {self.before.used:.2g}"
        if self.by:
            others = f" (as do {len(self.by) - 1} more)" if self.by[1:] else ""
            return f"explained by: {self.by[0].name}{others}, error {_shown(self.before)} -> {_shown(self.by[0].left)}"
        near = f"; nearest: {self.nearest.name}, {_shown(self.nearest.left)}" if self.nearest else ""
        return (
            f"no single edit of {self.tried} explains it; first beyond its budget: {first.place} "
            f"({first.used:.3g} times, error {first.error:.1e}){near}"
        )

    def facts(self) -> dict[str, Any]:
        """Plain values, for JSON and records."""
        first = self.before.first
        return {
            "explanation": self.text,
            "explained_by": [trial.name for trial in self.by],
            "first_wrong": first.name if first else "",
            "tried": self.tried,
            "error": number(self.before.error),
            "error_left": number(self.by[0].left.error if self.by else self.before.error),
            "ladder": rungs(self.before),
        }


def _shown(ladder: Ladder) -> str:
    return f"{ladder.error:.1e}"


def rungs(ladder: Ladder) -> list[Mapping[str, Any]]:
    """Every place of a ladder in plain values."""
    return [
        {"name": rung.name, "used": number(rung.used), "error": number(rung.error), "worst": list(rung.worst)}
        for rung in ladder.rungs
    ]


def number(value: float) -> float | str:
    """A number as records write it: JSON has no infinite one."""
    return value if math.isfinite(value) else "Infinity"


def explain(
    dump: Dump,
    target: OpenTarget,
    draft: OpenDraft | None = None,
    watch: Callable[[int, int], None] = lambda done, total: None,
) -> Explanation:
    """Try every edit on the reference.

    target, draft  of the reference side, as they should have been read
    watch          is told (edits tried, edits there are)
    errors: DumpError where the dump does not fit the checkpoints
    """
    made = walk(target, dump.tokens, dump.positions, dump.numbered("hidden"))
    before = climb(dump, target, draft, made)
    if before.first is None:
        return Explanation(before, (), None, 0)
    asked, trials = list(edits(target, draft)), []
    for number, edit in enumerate(asked):
        watch(number, len(asked))
        # an edit with which the pair cannot run, or makes something of another shape, explains nothing
        with suppress(ValueError, RuntimeError, IndexError):
            trials.append(Trial(edit.name, _left(edit, dump, target, draft, made)))
    watch(len(asked), len(asked))
    trials.sort(key=lambda trial: trial.left.error)
    nearest = trials[0] if trials and trials[0].left.error < NEARER * before.error else None
    return Explanation(before, tuple(trial for trial in trials if trial.left.first is None), nearest, len(asked))


def _left(edit: Edit, dump: Dump, target: OpenTarget, draft: OpenDraft | None, made: Any) -> Ladder:
    """The ladder with one edit made."""
    if edit.target is not None:
        target, made = edit.target(target), None
    if edit.draft is not None:
        assert draft is not None
        draft = edit.draft(draft, target)
    return climb(dump, target, draft, made)
