"""Is one side slower than the other? The unit is the process.

Calls of one process share its start-up: address layout, clocks, autotuned choices. A test over pooled calls takes two
processes that merely started differently for two programs (Kalibera and Jones 2013). So a process is one number, its
median, and sides are compared by re-labelling processes:

    effect      log of the ratio of the medians of the two sides' process medians, each over the baseline's median of
                its stratum, so that a slow rig is no slow side
    p           share of all ways to deal the labels, within each stratum, whose difference of means of logs is at
                least as large as the one seen; exact where all ways can be listed
    interval    bootstrap over processes within a stratum and side, then over the samples of each process
    visible     the effect that p < threshold finds four times in five, at the spread of these processes

Many metrics that were measured by the same processes are one array [M, N]: M metrics, N processes of both sides.
"""

from collections.abc import Sequence
from functools import cache
from itertools import combinations
from math import comb
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import optimize, stats

Array = NDArray[np.float64]
Labels = NDArray[np.bool_]

LISTED = 200_000
"""deals up to which all of them are tried"""
SCREEN = 999
"""random deals of a first look; what looks unlike chance there is tried again in full"""
RESAMPLES = 1000
BANK = 32
"""resampled medians kept of one process"""
POWER = 0.8
CHUNK = 8_000_000
"""numbers of one product, so that memory stays small"""


class Layout(NamedTuple):
    """Which process belongs to which side and stratum."""

    candidate: tuple[bool, ...]
    stratum: tuple[int, ...]

    @property
    def sides(self) -> tuple[int, int]:
        """Processes of the baseline and of the candidate."""
        return len(self.candidate) - sum(self.candidate), sum(self.candidate)

    @property
    def num_deals(self) -> int:
        """Ways to deal the labels within each stratum."""
        total = 1
        for name in set(self.stratum):
            mine = [c for c, s in zip(self.candidate, self.stratum, strict=True) if s == name]
            total *= comb(len(mine), sum(mine))
        return total

    @property
    def smallest_p(self) -> float:
        """No two-sided p can be below this; a stratum of one side only says nothing."""
        return min(1.0, 2 / self.num_deals)


def processes_needed(num_metrics: int, alpha: float) -> int:
    """Processes a side from which one metric of so many can pass Benjamini-Hochberg at alpha.

    Even, since turns are taken as baseline, candidate, candidate, baseline.
    """
    num = 2
    while 2 / comb(2 * num, num) * num_metrics > alpha:
        num += 2
    return num


def permutation_p(logs: Array, layout: Layout, careful: float = 1.0, seed: int = 0) -> Array:
    """Two-sided p of each metric.

    logs     [M, N] logs of process medians
    careful  metrics whose p is not above this are tried in full; of others a thousand random deals say enough
    -> [M]
    """
    centred, listed = _centred(logs, layout), _deals(layout)
    p = _share(centred, layout, _random_deals(layout, SCREEN, seed), own=1)
    close = p <= careful
    if listed is None:
        p[close] = _share(centred[close], layout, _random_deals(layout, LISTED, seed + 1), own=1)
    else:
        p[close] = _share(centred[close], layout, listed, own=0)
    return p


def hierarchical(values: Sequence[Sequence[ArrayLike]], layout: Layout, seed: int = 0) -> Array:
    """Draws of the log ratio of medians: processes resampled within side and stratum, then samples of each.

    values  M metrics of N processes of any number of raw values above zero
    -> [M, RESAMPLES]
    """
    rng = np.random.default_rng(seed)
    bank = np.log(_bank(values, rng))
    bank -= _levels(np.median(bank, axis=-1), layout)[..., None]
    columns: dict[bool, list[NDArray[np.int64]]] = {False: [], True: []}
    for side in columns:
        for name in sorted(set(layout.stratum)):
            mine = np.flatnonzero((np.array(layout.candidate) == side) & (np.array(layout.stratum) == name))
            if len(mine):
                columns[side].append(mine[rng.integers(0, len(mine), (RESAMPLES, len(mine)))])
    draws = []
    for side in (False, True):
        process = np.concatenate(columns[side], axis=1)
        draws.append(np.median(bank[:, process, rng.integers(0, BANK, process.shape)], axis=-1))
    return draws[1] - draws[0]


def interval(effects: Array, draws: Array, level: float) -> tuple[Array, Array]:
    """Percentiles; medians of few processes resample coarsely, which makes them a little too wide, not too narrow."""
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2], axis=-1)
    # a side whose middle processes agree would give an interval that leaves out its own estimate
    return np.minimum(low, effects), np.maximum(high, effects)


def effect(logs: Array, layout: Layout) -> Array:
    """Log of the ratio of medians, candidate over baseline.  logs [M, N] -> [M]"""
    candidate, found = np.array(layout.candidate), logs - _levels(logs, layout)
    return np.median(found[:, candidate], axis=1) - np.median(found[:, ~candidate], axis=1)


def visible(logs: Array, layout: Layout, threshold: float) -> Array:
    """The log effect found four times in five at p <= threshold; infinite where no p can be that small.

    logs [M, N] -> [M]
    """
    if layout.smallest_p > threshold or min(layout.sides) < 2:
        return np.full(len(logs), np.inf)
    candidate, found = np.array(layout.candidate), logs - _levels(logs, layout)
    spread = np.sqrt((found[:, candidate].var(axis=1, ddof=1) + found[:, ~candidate].var(axis=1, ddof=1)) / 2)
    return spread * _visible_in_spreads(*layout.sides, threshold, layout.smallest_p)


@cache
def _visible_in_spreads(baseline: int, candidate: int, threshold: float, smallest_p: float) -> float:
    """The same for processes of spread one: Student's, or where only perfect order is rare enough, that."""
    freedom = baseline + candidate - 2
    bound, scale = stats.t.ppf(1 - threshold / 2, freedom), np.sqrt(1 / baseline + 1 / candidate)
    student = float(scale * optimize.brentq(lambda far: stats.nct.sf(bound, freedom, far) - POWER, 0, 5 * bound))
    if threshold >= 4 * smallest_p:
        return student
    rng = np.random.default_rng(0)
    gaps = rng.normal(size=(4000, baseline)).max(axis=1) - rng.normal(size=(4000, candidate)).min(axis=1)
    return max(student, float(np.quantile(gaps, POWER)))


def _levels(logs: Array, layout: Layout) -> Array:
    """The baseline's median of each process's stratum; of all processes there where the baseline has none.

    logs [M, N] -> [M, N]
    """
    candidate, stratum = np.array(layout.candidate), np.array(layout.stratum)
    found = np.empty_like(logs)
    for name in set(layout.stratum):
        mine = stratum == name
        own = mine & ~candidate if (mine & ~candidate).any() else mine
        found[:, mine] = np.median(logs[:, own], axis=1, keepdims=True)
    return found


def _centred(logs: Array, layout: Layout) -> Array:
    """Each stratum about its own mean: what is left is what labels can explain."""
    stratum = np.array(layout.stratum)
    found = np.array(logs, dtype=float)
    for name in set(layout.stratum):
        found[:, stratum == name] -= found[:, stratum == name].mean(axis=1, keepdims=True)
    return found


def _share(centred: Array, layout: Layout, deals: Labels, own: int) -> Array:
    """Share of deals whose difference is at least as large as the one seen.

    centred [M, N], deals [P, N]; own  1 if the deal that was seen is not among them
    """
    seen = np.abs(centred @ np.array(layout.candidate, float))
    # equal up to rounding counts as extreme, or the deal that was seen could be missed
    bound = seen * (1 - 1e-9) - 1e-12
    count = np.zeros(len(centred))
    step = max(1, CHUNK // max(1, len(centred)))
    for first in range(0, len(deals), step):
        sums = np.abs(centred @ deals[first : first + step].T.astype(float))
        count += (sums >= bound[:, None]).sum(axis=1)
    return (count + own) / (len(deals) + own)


def _random_deals(layout: Layout, num: int, seed: int) -> Labels:
    """Labels dealt at random within each stratum.  -> [num, N]"""
    rng = np.random.default_rng(seed)
    candidate, stratum = np.array(layout.candidate), np.array(layout.stratum)
    deals = np.empty((num, len(candidate)), dtype=bool)
    for name in set(layout.stratum):
        mine = stratum == name
        deals[:, mine] = rng.permuted(np.tile(candidate[mine], (num, 1)), axis=1)
    return deals


@cache
def _deals(layout: Layout) -> Labels | None:
    """Every way to deal the labels; None if there are too many to list.  -> [P, N]"""
    if layout.num_deals > LISTED:
        return None
    stratum = np.array(layout.stratum)
    deals = np.zeros((1, len(stratum)), dtype=bool)
    for name in sorted(set(layout.stratum)):
        mine = np.flatnonzero(stratum == name)
        chosen = list(combinations(mine, sum(layout.candidate[i] for i in mine)))
        more = np.zeros((len(chosen), len(stratum)), dtype=bool)
        for row, places in zip(more, chosen, strict=True):
            row[list(places)] = True
        deals = (deals[:, None] | more[None]).reshape(-1, len(stratum))
    return deals


def _bank(values: Sequence[Sequence[ArrayLike]], rng: np.random.Generator) -> Array:
    """Medians of each process whose samples are drawn again.  -> [M, N, BANK]"""
    flat = [np.asarray(process, float) for metric in values for process in metric]
    found = np.empty((len(flat), BANK))
    lengths = np.array([len(process) for process in flat])
    for length in set(lengths.tolist()):
        mine = np.flatnonzero(lengths == length)
        raw = np.stack([flat[i] for i in mine])
        drawn = rng.integers(0, length, (len(mine), BANK * length))
        found[mine] = np.median(np.take_along_axis(raw, drawn, axis=1).reshape(len(mine), BANK, length), axis=-1)
    return found.reshape(len(values), -1, BANK)
