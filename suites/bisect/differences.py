"""Which of several differences make something bad: delta debugging (Zeller and Hildebrandt 2002).

Two sides differ in some things. Moving a set of them to the bad side's value is a probe. The answer is a smallest set
whose move is bad: without any one of its members it is not. What cannot be tested is never bad.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from harness.record import Bisection, Probe, Recorder

JOIN = " + "
NOTHING = "(nothing moved)"

Ask = Callable[[frozenset[str]], Probe]
Tell = Callable[[Probe], None]


class OutOfBudget(Exception):
    """No probe is left; what is known so far is in the record."""


class Asked:
    """Answers of sets of differences, each asked once; a search that was killed brings those that it has."""

    def __init__(
        self, order: Sequence[str], ask: Ask, recorder: Recorder, probes: Sequence[Probe], budget: int, tell: Tell
    ) -> None:
        self.order, self._ask, self._recorder, self._tell, self._budget = order, ask, recorder, tell, budget
        self.probes = {probe.candidate: probe for probe in probes}

    def answer(self, moved: frozenset[str]) -> str:
        """Good, bad, or no evidence."""
        name = name_of(moved, self.order)
        if name not in self.probes:
            if len(self.probes) >= self._budget:
                raise OutOfBudget
            probe = self._ask(moved)
            self._recorder.append(probe)
            self.probes[name] = probe
            self._tell(probe)
        return self.probes[name].answer


def name_of(moved: frozenset[str], order: Sequence[str]) -> str:
    """A set of differences as the candidate of a probe."""
    return JOIN.join(name for name in order if name in moved) or NOTHING


def smaller(answers: Asked) -> Iterator[frozenset[str]]:
    """Ever smaller sets that are bad together, the last one without a member to spare."""
    left, parts = list(answers.order), 2
    while len(left) > 1:
        pieces = [left[i * len(left) // parts : (i + 1) * len(left) // parts] for i in range(parts)]
        rests = [[name for name in left if name not in piece] for piece in pieces]
        for subset in (*pieces, *rests):
            if answers.answer(frozenset(subset)) == "bad":
                left, parts = subset, 2 if subset in pieces else max(parts - 1, 2)
                yield frozenset(left)
                break
        else:
            if parts >= len(left):
                return
            parts = min(2 * parts, len(left))


def search(asked: Bisection, answers: Asked, recorder: Recorder) -> Bisection:
    """Both ends, then ever smaller sets; the answer is appended to the record and given back."""
    smallest, status, reason = frozenset(answers.order), "found", ""
    try:
        if (none := answers.answer(frozenset())) != "good":
            status, reason = "not_reproduced", f"not reproduced tonight: the good end is {none}"
        elif (every := answers.answer(smallest)) != "bad":
            status, reason = "not_reproduced", f"not reproduced tonight: the bad end is {every}"
        else:
            for found in smaller(answers):
                smallest = found
            without = {answers.answer(smallest - {name}) for name in smallest}
            if without - {"good"}:
                status, reason = "narrowed", "whether all of these are needed cannot be tested"
    except OutOfBudget:
        status, reason = "out_of_budget", f"{len(answers.probes)} probes did not settle it"
    culprits = () if status == "not_reproduced" else tuple(name for name in answers.order if name in smallest)
    ending = replace(asked, status=status, reason=reason, culprits=culprits, num_probes=len(answers.probes))
    recorder.append(ending)
    return ending
