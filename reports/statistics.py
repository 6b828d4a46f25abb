"""From observations to estimates: every number with its interval, every interval from the unit that was repeated.

The unit of an acceptance length is the prompt, since the steps of one answer resemble each other; the unit of a speed
is the block, since the calls of one block share its clocks. Resampling is seeded: the same record gives the same bits.

    acceptance length      tau = 1 + sum of accepted / number of verify steps       over complete steps of all prompts
    unconditional rate     p_i = share of steps that accepted at least i drafts
    conditional rate       c_i = p_i / p_{i-1},  p_0 = 1

Intervals are BCa bootstraps (Efron 1987) for ratios over prompts and percentile bootstraps for medians over blocks.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

Array = NDArray[np.float64]
Blocks = Mapping[Any, ArrayLike]
"""block -> its raw values; a block is a number, or (process, number)"""

RESAMPLES = 4000
LEVEL = 0.95
BUCKET = 64
"""output tokens a bucket of `length_by_position`"""


class Interval(NamedTuple):
    """An estimate and where its true value lies, 95 times in 100."""

    value: float
    low: float
    high: float
    units: int
    """how many prompts or blocks it rests on"""

    @property
    def known(self) -> bool:
        """False where there was nothing, or one unit only, to learn from."""
        return bool(np.isfinite([self.value, self.low, self.high]).all())


class Arm(NamedTuple):
    """The verify steps of one way to run a speculation, by prompt."""

    num_draft_tokens: int
    steps: dict[str, tuple[int, ...]]
    """prompt -> accepted drafts of each complete verify step"""


APART = 3.0
"""standard errors from which two capture points count as told apart"""
NOTHING = Interval(np.nan, np.nan, np.nan, 0)


def complete_steps(accepted: Sequence[int], truncated: bool) -> tuple[int, ...]:
    """Without the last step if a length limit or an end token cut it: it says nothing about the draft."""
    return tuple(accepted[:-1] if truncated else accepted)


def acceptance_length(arm: Arm) -> Interval:
    """Tokens emitted a verify step, the target's own included."""
    accepted, steps = _totals(arm)
    return _shift(ratio_interval(accepted, steps), 1.0)


def acceptance_difference(baseline: Arm, candidate: Arm) -> Interval:
    """Acceptance length of the candidate minus the baseline's, over the prompts that both answered."""
    shared = _shared(baseline, candidate)
    old, new = _totals(baseline, shared), _totals(candidate, shared)

    def difference(sums: Array) -> Array:
        return sums[..., 2] / sums[..., 3] - sums[..., 0] / sums[..., 1]

    return _clusters(np.stack([*old, *new], axis=-1), difference)


def ratio_interval(numerators: ArrayLike, denominators: ArrayLike) -> Interval:
    """Sum over sum, by cluster bootstrap over the entries."""
    sums = np.stack([np.asarray(numerators, float), np.asarray(denominators, float)], axis=-1)
    return _clusters(sums, lambda s: s[..., 0] / s[..., 1])


def rates(arm: Arm) -> list[tuple[Interval, Interval]]:
    """(unconditional, conditional) rate of each draft position 1..K."""
    reached = np.array([[sum(a >= i for a in s) for i in range(arm.num_draft_tokens + 1)] for s in _kept(arm)], float)
    if not len(reached):
        return [(NOTHING, NOTHING)] * arm.num_draft_tokens
    return [
        (ratio_interval(reached[:, i], reached[:, 0]), ratio_interval(reached[:, i], reached[:, i - 1]))
        for i in range(1, arm.num_draft_tokens + 1)
    ]


def histogram(arm: Arm) -> list[int]:
    """Verify steps that accepted 0, 1, .. K drafts."""
    every = [a for steps in arm.steps.values() for a in steps]
    return np.bincount(np.array(every, dtype=int), minlength=arm.num_draft_tokens + 1).tolist()


def length_by_position(arm: Arm, bucket: int = BUCKET) -> dict[int, Interval]:
    """Acceptance length of the steps that begin in each bucket of the output; key: its first token.

    The first token comes from the prompt's own pass, so the first step begins at token 1.
    """
    places = {name: 1 + np.cumsum([0, *(a + 1 for a in steps[:-1])]) for name, steps in arm.steps.items() if steps}
    found: dict[int, Interval] = {}
    for first in range(0, 1 + max((int(p[-1]) for p in places.values()), default=-1), bucket):
        inside = {
            name: tuple(a for a, at in zip(arm.steps[name], place, strict=True) if first <= at < first + bucket)
            for name, place in places.items()
        }
        found[first] = acceptance_length(Arm(arm.num_draft_tokens, inside))
    return found


def separation(baseline: Arm, candidate: Arm) -> float:
    """How far two arms lie apart, in standard errors of the mean difference over the sequences both answered."""
    shared = [name for name in _shared(baseline, candidate) if baseline.steps[name] and candidate.steps[name]]
    return standard_errors([np.mean(candidate.steps[name]) - np.mean(baseline.steps[name]) for name in shared])


def standard_errors(differences: ArrayLike) -> float:
    """Mean of paired differences over its standard error; NaN for fewer than two of them."""
    apart = np.asarray(differences, float)
    if len(apart) < 2:
        return float("nan")
    error = apart.std(ddof=1) / np.sqrt(len(apart))
    if error == 0:
        return 0.0 if apart[0] == 0 else float(np.copysign(np.inf, apart[0]))
    return float(apart.mean() / error)


def paired_ratio(baseline: Blocks, candidate: Blocks, seed: int = 0) -> Interval:
    """Candidate over baseline: the median, over the blocks both have, of the ratio of block medians.

    The interval resamples blocks. Values are paired within a block, so a drift of the clocks cancels.
    """
    logs = log_ratios(baseline, candidate)
    if len(logs) < 2:
        return NOTHING if not len(logs) else Interval(float(np.exp(logs[0])), np.nan, np.nan, 1)
    rng = np.random.default_rng(seed)
    medians = np.median(logs[rng.integers(0, len(logs), (RESAMPLES, len(logs)))], axis=1)
    low, high = np.quantile(medians, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(np.exp(np.median(logs))), float(np.exp(low)), float(np.exp(high)), len(logs))


def log_ratios(baseline: Blocks, candidate: Blocks) -> Array:
    """log(candidate / baseline) of the medians of each shared block, in block order."""
    shared = sorted(set(baseline) & set(candidate))
    pairs = [(np.median(np.asarray(baseline[b])), np.median(np.asarray(candidate[b]))) for b in shared]
    if any(min(pair) <= 0 for pair in pairs):
        raise ValueError("a ratio needs values above zero")
    return np.array([np.log(new / old) for old, new in pairs], dtype=float)


def sign_flip_p(differences: ArrayLike, seed: int = 0, draws: int = 9999) -> float:
    """Two-sided p of paired differences being symmetric about zero; exact up to 13 of them."""
    values = np.asarray(differences, float)
    if not len(values):
        return 1.0
    if len(values) <= 13:
        signs = 1 - 2 * (np.arange(2 ** len(values))[:, None] >> np.arange(len(values)) & 1)
        own = 0
    else:
        signs, own = 1 - 2 * np.random.default_rng(seed).integers(0, 2, (draws, len(values))), 1
    sums = np.abs(signs @ values)
    # equal up to rounding counts as extreme, or the observed order itself could be missed
    extreme = np.count_nonzero(sums >= abs(values.sum()) * (1 - 1e-12))
    return float((extreme + own) / (len(signs) + own))


def benjamini_hochberg(p: ArrayLike) -> list[float]:
    """q-values: calling all below q a discovery is wrong for at most that share of them, on average."""
    values = np.asarray(p, float)
    return stats.false_discovery_control(values, method="bh").tolist() if len(values) else []


def _clusters(sums: Array, statistic: Callable[[Array], Array], seed: int = 0) -> Interval:
    """BCa interval of a statistic of column sums, resampling rows; rows of zeros carry nothing and are dropped.

    sums  [n, C] one row a cluster
    """
    sums = sums[(sums != 0).any(axis=1)]
    n = len(sums)
    with np.errstate(invalid="ignore", divide="ignore"):
        value = float(statistic(sums.sum(0))) if n else float("nan")
        if n < 2:
            return Interval(value, np.nan, np.nan, n)
        counts = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), RESAMPLES)
        draws = statistic(counts @ sums)
        jack = statistic(sums.sum(0) - sums)
    draws = draws[np.isfinite(draws)]
    if not np.isfinite(value) or not np.isfinite(jack).all() or not len(draws):
        return Interval(value, np.nan, np.nan, n)
    low, high = np.quantile(draws, _bca_levels(value, draws, jack))
    return Interval(value, float(low), float(high), n)


def _bca_levels(value: float, draws: Array, jack: Array) -> tuple[float, float]:
    """The quantiles to read: the percentile levels, moved by bias and skew and widened for few clusters."""
    n = len(jack)
    below = (np.count_nonzero(draws < value) + 0.5 * np.count_nonzero(draws == value)) / len(draws)
    bias = stats.norm.ppf(np.clip(below, 1 / len(draws), 1 - 1 / len(draws)))
    apart = jack.mean() - jack
    spread = (apart**2).sum() ** 1.5
    skew = (apart**3).sum() / (6 * spread) if spread else 0.0
    # a bootstrap of n clusters is too narrow by sqrt((n - 1) / n) and knows no t quantile (Hesterberg 2015)
    z = stats.t.ppf((1 + LEVEL) / 2, n - 1) * np.sqrt(n / (n - 1))
    levels = [float(stats.norm.cdf(bias + (bias + s) / (1 - skew * (bias + s)))) for s in (-z, z)]
    return levels[0], levels[1]


def _totals(arm: Arm, names: Sequence[str] | None = None) -> tuple[Array, Array]:
    """Accepted drafts and verify steps of each prompt."""
    kept = [arm.steps[name] for name in (arm.steps if names is None else names)]
    return np.array([sum(s) for s in kept], float), np.array([len(s) for s in kept], float)


def _shared(baseline: Arm, candidate: Arm) -> list[str]:
    return [name for name in baseline.steps if name in candidate.steps]


def _kept(arm: Arm) -> list[tuple[int, ...]]:
    return [steps for steps in arm.steps.values() if steps]


def _shift(interval: Interval, by: float) -> Interval:
    return Interval(interval.value + by, interval.low + by, interval.high + by, interval.units)
