"""Where the time of a cycle goes, and what a draft gains: phases captured apart, and the speed-up as a product.

    speed-up = length * plain / cycle
             = length                    what acceptance alone would give
             * plain / verify            reading K + 1 rows instead of one
             * verify / (verify + draft)
             * (verify + draft) / (verify + draft + accept)
             * (verify + draft + accept) / cycle      what the parts leave out, within 2 % of one

`plain` is a plain decode step in the same block. A draft pays where its length is above cycle / plain.
"""

from collections.abc import Iterator, Sequence
from statistics import median
from typing import NamedTuple

from harness.record import Case, Sample
from suites.benchmarks.steady import Steady

NAMES = ("draft", "verify", "accept")
APART = 0.02
"""how far the sum of the phases may be from the whole cycle"""


class Costs(NamedTuple):
    """Seconds, medians of one block."""

    plain: float
    draft: float
    verify: float
    accept: float
    cycle: float

    @property
    def share(self) -> float:
        """The sum of the phases over the whole cycle."""
        return (self.draft + self.verify + self.accept) / self.cycle

    @property
    def break_even(self) -> float:
        """Tokens a step from which a cycle pays."""
        return self.cycle / self.plain

    def factors(self, length: float) -> dict[str, float]:
        """By name, in the order in which they multiply up to the speed-up."""
        two = self.verify + self.draft
        return {
            "acceptance": length,
            "verify": self.plain / self.verify,
            "draft": self.verify / two,
            "accept": two / (two + self.accept),
            "gap": self.share,
        }


def split(plain: Steady, drafting: Steady, case: Case, length: float, num_blocks: int) -> Iterator[Sample]:
    """Phases of every block raw, in ms, and what they say of it; each block is gone through there and back."""
    for block in range(num_blocks):
        steps = [*plain.visit()]
        whole = [*drafting.visit()]
        parts = drafting.split()
        whole += drafting.visit()
        steps += plain.visit()
        for name in NAMES:
            yield _sample(case, name, "ms", "down", [1000 * s for s in parts[name]], block)
        costs = Costs(median(steps), **{name: median(parts[name]) for name in NAMES}, cycle=median(whole))
        yield _sample(case, "phase_sum", "share", "none", [costs.share], block)
        yield _sample(case, "break_even", "tokens a step", "down", [costs.break_even], block)
        for name, factor in costs.factors(length).items():
            yield _sample(case, f"factor_{name}", "x", "none", [factor], block)
        yield _sample(case, "speedup", "x", "up", [length * costs.plain / costs.cycle], block)


def _sample(case: Case, metric: str, unit: str, better: str, values: Sequence[float], block: int) -> Sample:
    short = tuple(float(f"{v:.6g}") for v in values)
    return Sample(case=case, metric=metric, unit=unit, better=better, values=short, block=block)
