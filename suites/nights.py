"""Nights that never were: series with the troubles that real ones have, and with a change where one is wanted.

Taken from what was seen on GPUs: processes differ more than their calls do; a few start in one of two states that
they keep (newton #2534: 22.5 or 25.5 ms); some have heavy tails; counts of bytes do not move at all; clocks drift
through the night, which turns taken in the order baseline, candidate, candidate, baseline balance.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from reports.gates import Gates
from reports.noise import Array, Layout
from reports.regressions import Judged, look, settle
from reports.sides import ACCEPTANCE, Key, Series
from reports.statistics import Arm

BETWEEN, WITHIN = 0.004, 0.004
"""spread of processes, and of the calls of one process, as shares: a GPU whose clocks are held"""
STATES = 0.12
"""how far apart the two states of a start-up are, as a share"""
TROUBLED = (0.15, 0.10, 0.05)
"""shares of series with two states, with heavy tails, and that never move"""
DRIFT = 0.005
CALLS = 5
DRAFTS = 3
SPREAD = 8.0
"""of prompts: the larger, the more alike they are"""


class Night(NamedTuple):
    """What a simulated night holds."""

    gates: Gates
    num_timed: int
    num_processes: int
    """a side"""
    num_answered: int = 0
    num_prompts: int = 80
    num_tokens: int = 512
    slow: float = 0.0
    """share by which the first timed series is slower"""
    loss: float = 0.0
    """tokens a step that the first acceptance loses"""


def verdicts(night: Night, seed: int) -> list[Judged]:
    """A first look, and a second look at its suspects in fresh processes."""
    first = look(series(night, seed, 0))
    suspects = {one.series.key for one in first if one.verdict == "WORSE"}
    second = [s for s in series(night, seed, 1) if s.key in suspects] if suspects else []
    return settle(first, look(second, is_again=True))


def series(night: Night, seed: int, visit: int) -> list[Series]:
    """Every series of one visit; a series keeps its kind of trouble on every visit."""
    return [*timed(night, seed, visit), *answered(night, seed, visit)]


def timed(night: Night, seed: int, visit: int) -> list[Series]:
    """Milliseconds, the first one slower by what was asked."""
    num, sides = night.num_timed, 2 * night.num_processes
    candidate = np.resize([False, True, True, False], sides)
    rng = np.random.default_rng([seed, visit, 0])
    kinds = np.random.default_rng(seed).random(num)
    kinds[0] = 1.0
    logs = spreads(rng, kinds, (num, sides)) + DRIFT * np.linspace(0, 1, sides)
    logs[0, candidate] += np.log1p(night.slow)
    still = is_still(kinds)
    calls = rng.normal(0, WITHIN, (num, sides, CALLS))
    order = np.argsort(candidate, kind="stable")
    values = 10 * np.exp(np.where(still[:, None, None], 0.0, logs[..., None] + calls))[:, order]
    gate = night.gates.of("decode")
    assert gate is not None
    layout = Layout(tuple(candidate[order].tolist()), (0,) * sides)
    return [
        Series(Key(f"{i:012x}", "decode"), gate, "made-up", "ms", "down", layout=layout, values=tuple(map(tuple, row)))
        for i, row in enumerate(values.tolist())
    ]


def spreads(rng: np.random.Generator, kinds: Array, shape: tuple[int, int]) -> Array:
    """Logs of process medians, each series of its kind."""
    two, heavy, _ = np.cumsum(TROUBLED)
    logs = rng.normal(0, BETWEEN, shape)
    logs += (kinds < two)[:, None] * STATES * (rng.random(shape) < 0.3)
    logs += ((two <= kinds) & (kinds < heavy))[:, None] * BETWEEN * rng.standard_t(3, shape)
    return logs


def is_still(kinds: Array) -> NDArray[np.bool_]:
    """Counts, that are the same every time."""
    _, heavy, still = np.cumsum(TROUBLED)
    return (heavy <= kinds) & (kinds < still)


def answered(night: Night, seed: int, visit: int) -> list[Series]:
    """Acceptances, the first one shorter by what was asked; texts differ between the sides, prompts do not."""
    gate = night.gates.of(ACCEPTANCE)
    assert gate is not None
    rng, own = np.random.default_rng([seed, visit, 1]), np.random.default_rng([seed, 2])
    found = []
    for i in range(night.num_answered):
        rates = own.beta(SPREAD * 0.65, SPREAD * 0.35, night.num_prompts)
        worse = lowered(rates, night.loss if i == 0 else 0.0)
        steps = int(night.num_tokens / length(rates))
        arms = answers(rng, rates, steps), answers(rng, worse, steps)
        found.append(Series(Key(f"{i:012x}", ACCEPTANCE, "made up"), gate, "made-up", "tokens", "up", arms=arms))
    return found


def answers(rng: np.random.Generator, rates: Array, steps: int) -> Arm:
    """Each draft is accepted with its prompt's own rate, until one is not."""
    accepted = np.cumprod(rng.random((len(rates), steps, DRAFTS)) < rates[:, None, None], axis=-1).sum(-1)
    return Arm(DRAFTS, {str(i): tuple(row) for i, row in enumerate(accepted.tolist())})


def length(rates: Array) -> float:
    """Tokens a step of prompts with these rates."""
    return 1 + float(sum((rates**i).mean() for i in range(1, DRAFTS + 1)))


def lowered(rates: Array, loss: float) -> Array:
    """Rates whose length is shorter by `loss`."""
    low, high = 0.0, 0.5
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if length(rates) - length(rates * (1 - middle)) < loss else (low, middle)
    return rates * (1 - low)


def alarms(found: Sequence[Judged], verdict: str = "WORSE") -> list[Key]:
    """Series that got a verdict."""
    return [one.series.key for one in found if one.verdict == verdict]
