"""The one door to the clock for every number that becomes a speed.

Two things are compared by running both in one process, in blocks that read A B B A, then B A A B: whatever drifts
slowly (clocks, temperature, a neighbour) meets both alike. Raw seconds of every call are kept; the best of N is never
taken, since it favours whoever was sampled more often.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from itertools import pairwise
from statistics import median
from typing import Any, NamedTuple

import torch

from harness.telemetry import is_throttled

Call = Callable[[], object]
Clock = Callable[[Call, int, torch.device | str], tuple[float, ...]]
"""seconds of each of so many calls"""
Watch = Callable[[], AbstractContextManager[dict[str, Any]]]
"""a look at the device while a visit lasts, as `Telemetry.window` is"""

AGREE = 0.01
"""warm-up is over when three medians in a row lie within this share of each other"""
TRIES = 3
"""a visit that was throttled is made again, so often in all; then it stands and is not valid"""


class Visit(NamedTuple):
    """One turn of one callable within a block."""

    block: int
    order: int
    """place of this turn within its block"""
    seconds: tuple[float, ...]
    """one number a call"""
    wall: float
    """host time of the whole turn; wall - sum(seconds) is the gap that the host left on a GPU"""
    about: Mapping[str, Any] = {}
    """what the watch saw meanwhile"""
    tries: int = 1
    valid: bool = True
    """False: the device was throttled in every try"""

    def telemetry(self, **more: Any) -> dict[str, Any]:
        """What a record keeps beside the values."""
        return {"wall_s": self.wall, "valid": self.valid, "tries": self.tries, **self.about, **more}


class Timing(NamedTuple):
    visits: dict[str, list[Visit]]
    settled: dict[str, bool]
    """False: the medians still moved when the warm-up limit came"""


def now() -> float:
    """Seconds on a clock that never goes back."""
    return time.perf_counter()


@contextmanager
def stopwatch() -> Iterator[Callable[[], float]]:
    """Seconds since the block began, by calling what it gives; they stand still once the block is over."""
    start, end = now(), None
    try:
        yield lambda: (now() if end is None else end) - start
    finally:
        end = now()


def time_calls(call: Call, repeats: int, device: torch.device | str = "cpu") -> tuple[float, ...]:
    """Seconds of each of `repeats` calls: CUDA events on a GPU, the host's clock elsewhere."""
    if torch.device(device).type != "cuda":
        return tuple(_host_seconds(call) for _ in range(repeats))
    with torch.cuda.device(device):
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
        torch.cuda.synchronize()
        marks[0].record()
        for mark in marks[1:]:
            call()
            mark.record()
        # waiting once keeps the host ahead of the device, as in a real decoding loop
        torch.cuda.synchronize()
    return tuple(before.elapsed_time(after) / 1000 for before, after in pairwise(marks))


def time_in_turn(
    calls: Mapping[str, Call], repeats: int, device: torch.device | str = "cpu"
) -> dict[str, tuple[float, ...]]:
    """Seconds of each of several calls that follow one another, over and over: the parts of one cycle."""
    names = [name for _ in range(repeats) for name in calls]
    waiting = iter(names)
    seconds = time_calls(lambda: calls[next(waiting)](), len(names), device)
    return {name: tuple(s for s, whose in zip(seconds, names, strict=True) if whose == name) for name in calls}


def own_seconds(call: Call, repeats: int, device: torch.device | str = "cpu") -> tuple[float, ...]:
    """A clock for calls that do more than is timed: each returns the seconds of the part that counts."""
    return tuple(float(call()) for _ in range(repeats))  # type: ignore[arg-type]


def told_seconds(call: Call, repeats: int, device: torch.device | str = "cpu") -> tuple[float, ...]:
    """A clock for calls that time many steps of their own: each returns the seconds of every step."""
    return tuple(s for _ in range(repeats) for s in call())  # type: ignore[attr-defined]


def warm_up(
    call: Call,
    repeats: int = 5,
    device: torch.device | str = "cpu",
    agree: float = AGREE,
    limit_s: float = 10.0,
    clock: Clock = time_calls,
) -> bool:
    """Call until three medians in a row agree; False if `limit_s` passed before they did."""
    start, medians = now(), list[float]()
    while True:
        medians = [*medians[-2:], median(clock(call, repeats, device))]
        if len(medians) == 3 and max(medians) <= (1 + agree) * min(medians):
            return True
        if len(medians) == 3 and now() - start >= limit_s:
            return False


def interleave(
    calls: Mapping[str, Call],
    blocks: int = 20,
    repeats: int = 5,
    device: torch.device | str = "cpu",
    agree: float = AGREE,
    warm_up_s: float = 10.0,
    clock: Clock = time_calls,
    watch: Watch | None = None,
) -> Timing:
    """Warm every callable up, then visit each twice a block, there and back; throttled visits are made again.

    The samples of one block are made to be paired: `reports.statistics.paired_ratio` takes the median of each block.
    """
    if not calls or blocks < 1 or repeats < 1:
        raise ValueError("interleave needs a callable, a block and a repeat")
    settled = {name: warm_up(call, repeats, device, agree, warm_up_s, clock) for name, call in calls.items()}
    visits: dict[str, list[Visit]] = {name: [] for name in calls}
    for block in range(blocks):
        for order, name in enumerate(_turns(list(calls), block)):
            visits[name].append(_visit(partial(clock, calls[name], repeats, device), block, order, watch))
    return Timing(visits, settled)


def _visit(turn: Callable[[], tuple[float, ...]], block: int, order: int, watch: Watch | None) -> Visit:
    """One turn, made again for as long as the device is throttled meanwhile."""
    tries, valid = 0, False
    while not valid and tries < TRIES:
        start, tries = now(), tries + 1
        with nullcontext(dict[str, Any]()) if watch is None else watch() as seen:
            seconds = turn()
        wall, valid = now() - start, not is_throttled(seen)
    return Visit(block, order, seconds, wall, seen, tries, valid)


def _turns(names: list[str], block: int) -> list[str]:
    """There and back; each block begins with another name."""
    first = block % len(names)
    there = names[first:] + names[:first]
    return there + there[::-1]


def _host_seconds(call: Call) -> float:
    start = now()
    call()
    return now() - start
