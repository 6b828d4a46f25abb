"""Acceptance that is forced: each sequence keeps its drafts by chance, at given rates, while everything is computed.

Rates are unconditional, p_i = the share of verify steps that keep at least i drafts. The device draws one coin a
sequence and draft position and holds it against the conditional rate c_i = p_i / p_(i-1), so that sequences of one
batch part as real ones do. A run that forces says what it drew, and `hold` refuses one that drew something else.
"""

import math
from collections.abc import Sequence
from itertools import pairwise

RATES = (0.730, 0.521, 0.355)
"""unconditional, of EAGLE-3 beside Llama-3.1-8B on MT-Bench: vLLM's tests/v1/spec_decode/test_acceptance_length.py"""
ERRORS = 5.0
"""standard errors that chance may explain"""
SURE = 64
"""steps that no two sequences share by chance"""


class NotForced(RuntimeError):
    """A run whose drafts were not kept at the rates that its record states."""


def conditional(rates: Sequence[float]) -> tuple[float, ...]:
    """Rate of each position, given that all before it were kept."""
    return tuple(now / then if then else 0.0 for then, now in pairwise((1.0, *rates)))


def length(rates: Sequence[float]) -> float:
    """Tokens a verify step, the target's own included."""
    return 1 + sum(rates)


def deviation(rates: Sequence[float]) -> float:
    """Standard deviation of the number of drafts that a step keeps."""
    square = sum((2 * i - 1) * rate for i, rate in enumerate(rates, 1))
    return math.sqrt(max(0.0, square - sum(rates) ** 2))


def hold(accepted: Sequence[Sequence[int]], rates: Sequence[float], used: Sequence[float]) -> float:
    """The length that was drawn; NotForced where chance does not explain it.

    accepted   of each sequence, drafts that each step kept
    used       [K] what the device holds its coins against
    """
    wanted = conditional(rates)
    if max(abs(a - b) for a, b in zip(used, wanted, strict=True)) > 1e-12:
        raise NotForced(
            f"the device holds its coins against {list(used)}; {list(rates)} are {list(wanted)} by condition"
        )
    steps = [a for row in accepted for a in row]
    drawn, spread = 1 + sum(steps) / len(steps), ERRORS * deviation(rates) / math.sqrt(len(steps))
    if abs(drawn - length(rates)) > spread + 1e-12:
        raise NotForced(f"{drawn:.3f} tokens a step in {len(steps)} steps, {length(rates):.3f} were to be forced")
    alike = len(accepted) > 1 and len({tuple(row) for row in accepted}) == 1
    if alike and deviation(rates) > 0.0 and len(steps) >= SURE:
        raise NotForced("all sequences keep the same drafts in every step: one coin was drawn for the whole batch")
    return drawn
