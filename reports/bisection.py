"""Which commit made it bad, when a look at a commit may be wrong, and how often is not known.

A hypothesis names the first bad commit h: a place is bad where h is the place itself or one of its ancestors, so a
history with merges is asked as it is, and not as a line. Two more hypotheses say that nothing is wrong tonight:
`unchanged` (every place is good) and `already` (every place is bad, the good end too); looks at the ends tell.

    a, b ~ Beta(3, 72)  chance that a good place looks bad, and that a bad place looks good
    P(answers | h)      = B(3 + wrong, 72 + right) / B(3, 72), over the places that h calls good, times that of the bad
    next place          = the one whose answer is expected to say most about h, in bits (mutual information)

Both error rates are integrated out, which for Beta and yes-or-no answers has a closed form, so no grid is needed.
Horstein 1963; Waeber et al. 2013; Henderson et al. ICST 2023. A place that cannot be tested gives no answer, and so
moves nothing; its neighbours are asked less gladly, since they are often as broken.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from harness.record import Bisection, Probe

Array = NDArray[np.float64]

WRONG, RIGHT = 3.0, 72.0
"""of the Beta priors: one answer in twenty-five is wrong, a guess that weighs as much as seventy-five answers"""
NOTHING = 0.03
"""prior of each of `unchanged` and `already`"""
NO_GAIN = 0.01
"""bits below which a further look is not worth its time"""


class Graph(NamedTuple):
    """What each hypothesis says about each place."""

    bad: NDArray[np.bool_]
    """[n + 2, n + 1] rows: n commits as the culprit, unchanged, already; columns: n commits, the good end"""
    prior: Array
    """[n + 2]"""

    @property
    def num_commits(self) -> int:
        return self.bad.shape[1] - 1


class Belief(NamedTuple):
    """What is known after some answers."""

    posterior: Array
    """[n + 2] as the rows of Graph.bad"""
    rates: tuple[float, float]
    """expected shares of good places that look bad, and of bad places that look good"""
    gain: Array
    """[n + 1] bits that one more answer at each place is expected to give"""


def graph(parents: Sequence[Sequence[int]], weights: Sequence[float] | None = None) -> Graph:
    """Commits after the good end up to the bad one, parents before children.

    parents   of each commit, those that are candidates themselves
    weights   prior of each commit as the culprit, up to a factor; equal when absent
    """
    n = len(parents)
    bad = np.zeros((n + 2, n + 1), dtype=bool)
    for place, above in enumerate(parents):
        bad[:n, place] = bad[:n, list(above)].any(axis=1)
        bad[place, place] = True
    bad[n + 1] = True
    share = np.ones(n) if weights is None else np.asarray(weights, float)
    return Graph(bad, np.array([*(share / share.sum() * (1 - 2 * NOTHING)), NOTHING, NOTHING]))


def believe(found: Graph, good: Array, bad: Array) -> Belief:
    """Posterior, error rates and the worth of each further look.

    good, bad  [n + 1] answers so far at each place
    """
    is_bad = found.bad.astype(float)
    alarms, quiet = (1 - is_bad) @ bad, (1 - is_bad) @ good
    misses, hits = is_bad @ good, is_bad @ bad
    log = np.log(found.prior) + _log_beta(WRONG + alarms, RIGHT + quiet) + _log_beta(WRONG + misses, RIGHT + hits)
    posterior = np.exp(log - log.max())
    posterior /= posterior.sum()
    alarm = (WRONG + alarms) / (WRONG + RIGHT + alarms + quiet)
    miss = (WRONG + misses) / (WRONG + RIGHT + misses + hits)
    looks_bad = np.where(found.bad, 1 - miss[:, None], alarm[:, None])
    gain = _entropy(posterior @ looks_bad) - posterior @ _entropy(looks_bad)
    return Belief(posterior, (float(posterior @ alarm), float(posterior @ miss)), gain)


def count(places: Mapping[str, int], answers: Iterable[tuple[str, str]]) -> tuple[Array, Array, set[int]]:
    """Good and bad answers at each place, and the places that gave none.

    places   id of a commit -> its place; answers as (id, answer of a Probe)
    """
    good, bad, mute = np.zeros(len(places)), np.zeros(len(places)), set()
    for name, answer in answers:
        if answer == "good":
            good[places[name]] += 1
        elif answer == "bad":
            bad[places[name]] += 1
        else:
            mute.add(places[name])
    return good, bad, mute


def choose(belief: Belief, mute: set[int]) -> int | None:
    """The place to look at next; None where no look that is left says anything."""
    worth = belief.gain.copy()
    num = len(worth) - 1
    for place in mute:
        # next to it half as gladly, two away three quarters, and so on; never itself
        worth[:num] *= 1 - 0.5 ** np.abs(np.arange(num) - place)
        worth[place] = 0.0
    best = int(np.argmax(worth))
    return best if worth[best] > NO_GAIN else None


def suspects(posterior: Array, share: float) -> list[int]:
    """The fewest commits that hold this much of the probability, likeliest first."""
    order = np.argsort(-posterior, kind="stable")
    return order[: int(np.searchsorted(np.cumsum(posterior[order]), share * posterior.sum())) + 1].tolist()


def sharpened(asked: Bisection, probes: Sequence[Probe]) -> Array:
    """The posterior over the commits of a search, before the first probe and after each.  -> [R + 1, n]"""
    found = graph(asked.parents)
    places = {name: place for place, (name, _) in enumerate(asked.candidates)} | {asked.good: len(asked.candidates)}
    answers = [(probe.candidate, probe.answer) for probe in probes]
    beliefs = [believe(found, *count(places, answers[:num])[:2]) for num in range(len(answers) + 1)]
    return np.stack([belief.posterior[: found.num_commits] for belief in beliefs])


def _log_beta(a: Array, b: Array) -> Array:
    """Log of Euler's Beta function."""
    values = [math.lgamma(x) + math.lgamma(y) - math.lgamma(x + y) for x, y in zip(a, b, strict=True)]
    return np.array(values)


def _entropy(p: Array) -> Array:
    """Of a yes-or-no answer that is never certain, in bits."""
    return -(p * np.log2(p) + (1 - p) * np.log2(1 - p))
