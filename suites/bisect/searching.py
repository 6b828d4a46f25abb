"""The search over commits: both ends first, then wherever an answer says most, until one commit holds the probability.

Every probe is a line of the run's record before the next one starts, so a search that is killed goes on where it was.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from harness.record import Bisection, Probe, Recorder
from reports.bisection import Belief, believe, choose, count, graph, suspects
from suites.bisect.commits import History

CONFIDENCE = 0.95
BUDGET = 40

Ask = Callable[[str], Probe]
Tell = Callable[[Probe, Bisection], None]


def begin(history: History, question: str) -> Bisection:
    """The first line of a search."""
    return Bisection(
        kind="commits",
        question=question,
        good=history.good,
        bad=history.bad,
        candidates=history.commits,
        parents=history.parents,
    )


def search(
    asked: Bisection,
    probes: Sequence[Probe],
    ask: Ask,
    recorder: Recorder,
    confidence: float = CONFIDENCE,
    budget: int = BUDGET,
    tell: Tell = lambda probe, state: None,
) -> Bisection:
    """Probe until the answer is known; it is appended to the record and given back.

    probes   that an earlier process of this search has recorded already
    budget   probes in all, those included
    tell     hears of every probe and what is believed after it
    """
    found = graph(asked.parents)
    places = {sha: place for place, (sha, _) in enumerate(asked.candidates)} | {asked.good: len(asked.candidates)}
    names = {place: sha for sha, place in places.items()}
    probes = list(probes)
    while True:
        good, bad, mute = count(places, ((probe.candidate, probe.answer) for probe in probes))
        belief = believe(found, good, bad)
        state = stand(asked, belief, len(probes))
        ends = unseen_ends(asked, probes)
        silent = [end for end in (asked.good, asked.bad) if places[end] in mute]
        place = places[ends[0]] if ends else choose(belief, mute)
        if probes:
            tell(probes[-1], state)
        if ending := _ending(state, confidence, is_open=bool(ends), silent=silent, place=place, budget=budget):
            recorder.append(ending)
            return ending
        assert place is not None
        probes.append(ask(names[place]))
        recorder.append(probes[-1])


def unseen_ends(asked: Bisection, probes: Sequence[Probe]) -> list[str]:
    """What was good and bad some other day is measured tonight before anything else."""
    seen = {probe.candidate for probe in probes}
    return [end for end in (asked.good, asked.bad) if end not in seen]


def stand(asked: Bisection, belief: Belief, num_probes: int) -> Bisection:
    """What is believed, as a line of a record."""
    n = len(asked.candidates)
    shares = np.round(belief.posterior, 6)
    return replace(
        asked,
        posterior=tuple(shares[:n].tolist()),
        unchanged=float(shares[n]),
        already=float(shares[n + 1]),
        confidence=float(belief.posterior.max()),
        num_probes=num_probes,
        error_rates=belief.rates,
    )


def _ending(
    state: Bisection, confidence: float, *, is_open: bool, silent: Sequence[str], place: int | None, budget: int
) -> Bisection | None:
    """The answer, once there is one; None while a further probe is worth it."""
    if silent:
        return replace(state, status="not_reproduced", reason=f"the end {silent[0][:12]} cannot be tested")
    if is_open:
        return None
    posterior = np.array([*state.posterior, state.unchanged, state.already])
    best, n = int(posterior.argmax()), len(state.candidates)
    if posterior[best] >= confidence:
        if best < n:
            return replace(state, status="found", culprits=(state.candidates[best][0],))
        why = ("the bad end is as good as the good one", "the good end is as bad as the bad one")[best - n]
        return replace(state, status="not_reproduced", reason=f"not reproduced tonight: {why}")
    if place is not None and state.num_probes < budget:
        return None
    left = tuple(state.candidates[i][0] for i in suspects(posterior[:n], confidence))
    if place is None:
        return replace(state, status="narrowed", culprits=left, reason="no commit that is left can tell these apart")
    return replace(state, status="out_of_budget", culprits=left, reason=f"{budget} probes did not settle it")
