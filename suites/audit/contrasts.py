"""Paired differences of losses and what may be said of them.

The unit is the sequence: tokens of one text resemble each other. Readings are compared on the same sequences, so what
is hard about a text cancels. What is tested is not whether two readings differ - a norm whose weights are nearly ones
differs from none, for sure and by nothing - but whether they differ by more than anybody would notice: `p` is that of a
difference no larger than SMALLEST, and an interval within it is "no effect" (two one-sided tests). Many readings are
compared at once and one false accusation spoils an audit, so p-values are adjusted by Holm (the chance of any error,
whatever their dependence) and not held as shares of false discoveries.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import stdtr, stdtrit
from torch import Tensor

LEVEL = 0.95
ALPHA = 0.05
SMALLEST = 0.002
"""nats a token that nobody notices"""

WORSE, BETTER, SAME, UNSURE = "worse", "better", "no effect", "cannot tell"


class Contrast(NamedTuple):
    """One reading against another, in nats a token: above zero, it foresees the target less."""

    nats: float
    low: float
    high: float
    p: float
    """of a difference no larger than SMALLEST; adjusted by Holm for all readings that were compared"""
    by_step: tuple[float, ...]
    """the mean difference of each draft step"""
    sequences: int

    @property
    def verdict(self) -> str:
        if self.low > -SMALLEST and self.high < SMALLEST:
            return SAME
        if self.p >= ALPHA:
            return UNSURE
        return WORSE if self.nats > 0 else BETTER


def paired(other: Tensor, stated: Tensor) -> Contrast:
    """`other` against `stated` on the sequences that both read; p is not adjusted.

    other   [K, B]
    stated  [K, C]  C sequences, of which the first are B's
    """
    apart = (other - stated[:, : other.shape[1]]).double()
    values = apart.mean(0).numpy()
    mean, count = float(values.mean()), len(values)
    error = float(values.std(ddof=1) / np.sqrt(count)) if count > 1 else float("nan")
    reach = float(stdtrit(max(count - 1, 1), (1 + LEVEL) / 2)) * error
    p = _beyond(abs(mean) - SMALLEST, error, count - 1)
    return Contrast(mean, mean - reach, mean + reach, p, tuple(apart.mean(1).tolist()), count)


def _beyond(excess: float, error: float, freedom: int) -> float:
    """p of a mean that lies so far beyond the margin, on either side of it."""
    if freedom < 1:
        return 1.0
    if not error:
        return 0.0 if excess > 0 else 1.0
    return float(stdtr(freedom, -excess / error))


def holm(p: ArrayLike) -> list[float]:
    """Adjusted p-values: calling all below a level is wrong about any of them at most that often (Holm 1979)."""
    values = np.asarray(p, float)
    order = np.argsort(values, kind="stable")
    steps = np.minimum(values[order] * np.arange(len(values), 0, -1), 1.0)
    adjusted = np.empty_like(values)
    adjusted[order] = np.maximum.accumulate(steps) if len(values) else steps
    return adjusted.tolist()


def adjusted(contrasts: Sequence[Contrast]) -> list[Contrast]:
    """The same contrasts as one family."""
    p = holm([one.p for one in contrasts])
    return [one._replace(p=value) for one, value in zip(contrasts, p, strict=True)]
