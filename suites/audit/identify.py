"""Which facts a draft was trained with: every other reading of it against the one that foresees its target best.

From a reading that rests on no hint of the config, the search takes the single edit that lowers the loss most, again
and again, on few texts. What it ends in is then held against every single edit, and against pairs of the closest ones,
on all texts; where one of these is better after all, the search goes on from there, and an edit that turns out to gain
nothing is taken back: of readings that cannot be told apart, the one that was begun with. A reading that is plainly
worse after the first texts is read no further (p under `PLAINLY`: the early look of Haybittle and Peto costs no ALPHA).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from suites.audit.candidates import FACTS, Edit, Value, candidates, shown, standing
from suites.audit.contrasts import BETTER, SAME, SMALLEST, UNSURE, WORSE, Contrast, adjusted, paired
from suites.audit.losses import Hypothesis, Resampled, Stand

CLIMB, LOOK = 16, 64
"""texts that a step of the search rests on, and those that are read before a look at what is plain already"""
STEP, PLAINLY = 0.01, 1e-4
CLOSEST = 5
"""edits of which every pair is tried"""

IDENTIFIED = "identified"
ORDER = {fact.name: i for i, fact in enumerate(FACTS)}
POINTS = "capture points"
MOVES = (POINTS, "capture shift", "capture order")


@dataclass(frozen=True)
class Alternative:
    """One other reading against the one that was found."""

    fact: str
    value: Value
    points: tuple[int, ...]
    """its capture points"""
    contrast: Contrast
    idle: str = ""

    def summary(self) -> dict[str, Any]:
        """Plain values, as `--json` prints them."""
        numbers = {**self.contrast._asdict(), "by_step": list(self.contrast.by_step)}
        return {"value": shown(self.value), **numbers, "verdict": self.contrast.verdict}


@dataclass(frozen=True)
class Answer:
    """What was found about one fact."""

    fact: str
    value: Value
    alternatives: tuple[Alternative, ...]

    @property
    def verdict(self) -> str:
        """identified where each reading that has an effect is worse, no effect where none has one, else cannot tell."""
        seen = {one.contrast.verdict for one in self.alternatives}
        if seen & {UNSURE, BETTER}:
            return UNSURE
        return IDENTIFIED if WORSE in seen else SAME

    @property
    def closest(self) -> Alternative:
        """The alternative that is told apart worst, of those that have an effect where there are any."""
        effective = [one for one in self.alternatives if one.contrast.verdict != SAME]
        return min(effective or self.alternatives, key=lambda one: one.contrast.low)

    @property
    def why(self) -> str:
        """Why nothing was seen, where the equations say it."""
        return next((one.idle for one in self.alternatives if one.idle), "") if self.verdict == SAME else ""

    def summary(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "fact": self.fact,
            "value": shown(self.value),
            "answer": self.verdict,
            "why": self.why,
            "closest": self.closest.summary(),
            "alternatives": [one.summary() for one in self.alternatives],
        }


@dataclass(frozen=True)
class Identified:
    """Everything that was found about one draft."""

    edits: Hypothesis
    """of the reading that the search began with"""
    points: tuple[int, ...]
    answers: tuple[Answer, ...]
    pairs: tuple[Alternative, ...]
    """two facts changed at once"""
    losses: tuple[float, ...]
    """of what was found, in nats by draft step"""
    sequences: int
    tokens: int
    """of text that were read"""

    def answer(self, fact: str) -> Answer:
        return next(answer for answer in self.answers if answer.fact == fact)

    def summary(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "capture_points": list(self.points),
            "losses": list(self.losses),
            "sequences": self.sequences,
            "tokens": self.tokens,
            "facts": [answer.summary() for answer in self.answers],
            "pairs": [{"fact": one.fact, **one.summary()} for one in self.pairs],
        }


def identify(stand: Stand | Resampled, more: Sequence[Edit] = (), look: int = LOOK) -> Identified:
    """The facts of a draft from its weights and texts.

    more   edits that the table would not try, such as what a config claims
    look   texts after which what is plain is settled; 0: every reading reads every text
    """
    edits = sorted((*candidates(stand.draft, stand.target), *more), key=lambda edit: ORDER[edit.fact])
    found, seen = climb(stand, edits), set[Hypothesis]()
    while True:
        seen.add(found)
        near = neighbours(found, edits)
        singles = compare(stand, found, near, look)
        pairs = joint(near, singles)
        every = adjusted([*singles, *compare(stand, found, pairs, look)])
        following = _next(found, list(zip((*near, *pairs), every, strict=True)))
        if following is None or following in seen:
            return _told(stand, found, near, pairs, every)
        found = following


def _next(found: Hypothesis, told: Sequence[tuple["Near", Contrast]]) -> Hypothesis | None:
    """Where the search goes on: to what is better; of an edited fact to its best value, or back if it gains nothing."""
    edited = {edit.fact for edit in found}
    better = [one for one in told if one[1].verdict == BETTER or (one[0].fact in edited and one[1].nats < 0)]
    idle = [one for one in told if one[0].value is None and one[1].verdict != WORSE]
    if not better and not idle:
        return None
    return min(better or idle, key=lambda one: one[1].nats)[0].hypothesis


@dataclass(frozen=True)
class Near:
    """A reading one or two edits away."""

    fact: str
    value: Value
    hypothesis: Hypothesis
    idle: str = ""


def neighbours(found: Hypothesis, edits: Sequence[Edit]) -> list[Near]:
    """Every reading that differs in one fact: another value of it, or the one that the search began with."""
    held = {edit.fact: edit for edit in found}
    near = [Near(edit.fact, edit.value, _with(found, edit), edit.idle) for edit in edits if held.get(edit.fact) != edit]
    return near + [Near(edit.fact, None, tuple(one for one in found if one != edit), edit.idle) for edit in found]


def joint(near: Sequence[Near], contrasts: Sequence[Contrast]) -> list[Near]:
    """Pairs of the closest edits of different facts: two facts that were moved together may hide each other."""
    ranked = sorted(zip(near, contrasts, strict=True), key=lambda pair: pair[1].nats)
    closest = {one.fact: one for one, contrast in reversed(ranked) if contrast.verdict != SAME and not one.idle}
    first = sorted(closest.values(), key=[one for one, _ in ranked].index)[:CLOSEST]
    return [
        Near(f"{a.fact} and {b.fact}", (shown(a.value), shown(b.value)), _merged(a.hypothesis, b))
        for a, b in combinations(first, 2)
        if a.value is not None and b.value is not None
    ]


def climb(stand: Stand | Resampled, edits: Sequence[Edit]) -> Hypothesis:
    """The reading from which no single edit leads to a lower loss on the first texts."""
    found: Hypothesis = ()
    count = min(CLIMB, stand.count)
    for _ in edits:
        near = neighbours(found, [edit for edit in edits if not edit.idle])
        (stated,) = stand.losses([found], count)
        steps = [paired(row, stated) for row in stand.losses([one.hypothesis for one in near], count)]
        down = [pair for pair in zip(steps, near, strict=True) if pair[0].nats < 0 and pair[0].p < STEP]
        if not down:
            break
        found = min(down, key=lambda pair: pair[0].nats)[1].hypothesis
    return found


def compare(stand: Stand | Resampled, found: Hypothesis, near: Sequence[Near], look: int) -> list[Contrast]:
    """Each reading against what was found, on as many texts as it needs; p is not adjusted."""
    hypotheses = [one.hypothesis for one in near]
    (stated,) = stand.losses([found], stand.count)
    early = min(look, stand.count) or stand.count
    contrasts = [paired(row, stated) for row in stand.losses(hypotheses, early)]
    open_ = [i for i, one in enumerate(contrasts) if one.p >= PLAINLY or one.nats < SMALLEST]
    for i, row in zip(open_, stand.losses([hypotheses[i] for i in open_], stand.count), strict=True):
        contrasts[i] = paired(row, stated)
    return contrasts


def _with(found: Hypothesis, edit: Edit) -> Hypothesis:
    kept = [one for one in found if one.fact != edit.fact]
    return tuple(sorted((*kept, edit), key=lambda one: ORDER[one.fact]))


def _merged(found: Hypothesis, other: Near) -> Hypothesis:
    return _with(found, next(edit for edit in other.hypothesis if edit.fact == other.fact))


def _told(
    stand: Stand | Resampled, found: Hypothesis, near: Sequence[Near], pairs: Sequence[Near], every: Sequence[Contrast]
) -> Identified:
    began, held = standing(stand.draft), {edit.fact: edit.value for edit in found}
    alternatives = [
        Alternative(one.fact, began[one.fact] if one.value is None else one.value,
                    stand.realise(one.hypothesis).capture_points, contrast, one.idle)
        for one, contrast in zip((*near, *pairs), every, strict=True)
    ]  # fmt: skip
    singles = alternatives[: len(near)]
    answers = tuple(
        Answer(fact, held.get(fact, began[fact]), tuple(one for one in singles if one.fact == fact))
        for fact in _facts(singles)
    )
    losses = stand.losses([found], stand.count)[0].mean(1).tolist()
    points = stand.realise(found).capture_points
    read = stand.texts.num_tokens
    return Identified(found, points, answers, tuple(alternatives[len(near) :]), tuple(losses), stand.count, read)


def _facts(singles: Iterable[Alternative]) -> list[str]:
    return sorted(dict.fromkeys(one.fact for one in singles), key=ORDER.__getitem__)
