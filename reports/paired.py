"""Does one side accept less than the other? The unit is the prompt, and both sides answered the same ones.

    p_i           share of verify steps that accepted at least i drafts
    length        1 + p_1 + .. + p_K
    difference    of the candidate's minus the baseline's, ratios of sums over the prompts that both answered

A prompt's share in a difference is its linear influence, so a prompt is one number and a test deals signs to prompts.
Positions are tested together: each difference over its bootstrap error, against the largest of all positions (max-T,
Westfall and Young 1993), so that one claim about K positions errs as often as one claim.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from reports import statistics
from reports.statistics import Arm, Interval

Array = NDArray[np.float64]

EQUIVALENCE = 0.90
"""level of the interval that lies inside the band when two one-sided tests of 5 % both hold"""


class Position(NamedTuple):
    """Change of the unconditional rate of one draft position; all positions together err 1 time in 20."""

    change: float
    low: float
    high: float
    p: float


class Paired(NamedTuple):
    """Acceptance length of two sides."""

    difference: Interval
    inner: tuple[float, float]
    """percentiles of the difference at the level of EQUIVALENCE"""
    p: float
    error: float
    """standard error of the difference"""
    positions: tuple[Position, ...]


def compare(baseline: Arm, candidate: Arm) -> Paired | None:
    """None where fewer than two prompts were answered by both sides."""
    names = [n for n in baseline.steps if baseline.steps[n] and candidate.steps.get(n)]
    if len(names) < 2:
        return None
    old, new = (_reached(arm, names) for arm in (baseline, candidate))
    shares, drawn = _influences(new) - _influences(old), _draws(old, new)
    inner = np.quantile(drawn.sum(axis=1), [(1 - EQUIVALENCE) / 2, (1 + EQUIVALENCE) / 2])
    arms = [Arm(arm.num_draft_tokens, {n: arm.steps[n] for n in names}) for arm in (baseline, candidate)]
    return Paired(
        statistics.acceptance_difference(arms[0], arms[1]),
        (float(inner[0]), float(inner[1])),
        statistics.sign_flip_p(shares.sum(axis=1)),
        float(shares.sum(axis=1).std(ddof=1) / np.sqrt(len(names))),
        positions(old, new, drawn),
    )


def positions(old: Array, new: Array, draws: Array) -> tuple[Position, ...]:
    """Each position with an interval and a p that hold for all of them at once.

    old, new  [n, K + 1] of each prompt: its verify steps, then those that accepted at least 1, .. K drafts
    draws     [R, K] differences over prompts that were drawn again
    """
    n = len(old)
    change = _rates(new.sum(axis=0)) - _rates(old.sum(axis=0))
    error = draws.std(axis=0, ddof=1) * np.sqrt(n / (n - 1))
    with np.errstate(invalid="ignore", divide="ignore"):
        largest = np.nan_to_num(np.abs(draws - change) / error).max(axis=1)
        seen = np.nan_to_num(np.abs(change) / error, posinf=np.inf)
    reach = float(np.quantile(largest, statistics.LEVEL)) * error
    p = (1 + (largest[:, None] >= seen).sum(axis=0)) / (1 + len(largest))
    return tuple(Position(*map(float, row)) for row in zip(change, change - reach, change + reach, p, strict=True))


def visible(error: float, threshold: float, power: float = 0.8) -> float:
    """The change of a length that p < threshold finds that often."""
    return float((stats.norm.ppf(1 - threshold / 2) + stats.norm.ppf(power)) * error)


def _draws(old: Array, new: Array, seed: int = 0) -> Array:
    """Differences of the rates over prompts that are drawn again.  -> [RESAMPLES, K]"""
    n = len(old)
    chosen = np.random.default_rng(seed).integers(0, n, (statistics.RESAMPLES, n))
    places = chosen + n * np.arange(len(chosen))[:, None]
    counts = np.bincount(places.ravel(), minlength=chosen.size).reshape(chosen.shape).astype(float)
    return _rates(counts @ new) - _rates(counts @ old)


def _reached(arm: Arm, names: list[str]) -> Array:
    """Steps of each prompt that accepted at least 0, 1, .. K drafts.  -> [n, K + 1]"""
    depth = np.arange(arm.num_draft_tokens + 1)
    return np.array([(np.array(arm.steps[n])[:, None] >= depth).sum(axis=0) for n in names], dtype=float)


def _rates(sums: Array) -> Array:
    """Unconditional rates.  sums [.., K + 1] -> [.., K]"""
    return sums[..., 1:] / sums[..., :1]


def _influences(reached: Array) -> Array:
    """What each prompt contributes to the rates; the mean over prompts is the rates themselves.  -> [n, K]"""
    rates = _rates(reached.sum(axis=0))
    return rates + (reached[:, 1:] - rates * reached[:, :1]) / reached[:, 0].mean()
