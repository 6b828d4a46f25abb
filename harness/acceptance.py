"""Counting what a target accepted.

A verify step that accepted a of K drafted tokens emits a + 1: the accepted ones and one of the target's own.

    acceptance length       mean over steps of a + 1
    acceptance rate         sum of a / (K * steps)
    unconditional, i        share of steps with a > i: position i was accepted
    conditional, i          the same among steps that accepted every position before i

The last step of a sequence may emit more than was asked for, or pass the end of the text. What it would have accepted
is cut off, so it is left out of every mean here; it took time like any other, so `steps_run` counts it.
Intervals and verdicts are drawn in `reports/statistics.py`, from `per_sequence`.
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class PositionBucket:
    """Steps that began at output positions first..last."""

    first: int
    last: int
    steps: int
    length: float


@dataclass(frozen=True)
class Acceptance:
    """Counts of one run; a mean over nothing is None."""

    num_draft_tokens: int
    steps: int
    """whole steps, the ones the means are over"""
    steps_run: int
    """whole and truncated steps, the ones that took time"""
    length: float | None
    rate: float | None
    unconditional: tuple[float | None, ...]
    conditional: tuple[float | None, ...]
    histogram: tuple[int, ...]
    """steps that accepted exactly 0, 1, .. K tokens"""
    per_sequence: tuple[tuple[int, int], ...]
    """(tokens emitted by whole steps, whole steps) of each sequence"""
    by_output_position: tuple[PositionBucket, ...]


def emitted(accepted: int) -> int:
    """Tokens that one verify step adds to the text: the only place that adds the target's own token."""
    return accepted + 1


def count(
    accepted: Sequence[Sequence[int]],
    num_draft_tokens: int,
    *,
    num_emitted: Sequence[int] | None = None,
    bucket: int = 64,
) -> Acceptance:
    """Count the accepted drafts of each verify step of each sequence.

    num_emitted   tokens each sequence really has, the first (the prompt's own) included; a sequence whose steps would
                  have given more ended inside its last step. None: no step was truncated.
    bucket        width of the buckets of `by_output_position`
    """
    for row in accepted:
        for a in row:
            if not 0 <= a <= num_draft_tokens:
                raise ValueError(f"a step accepted {a} of {num_draft_tokens} draft tokens")
    if num_emitted is not None and len(num_emitted) != len(accepted):
        raise ValueError(f"{len(accepted)} sequences, but num_emitted of {len(num_emitted)}")
    limits = [None] * len(accepted) if num_emitted is None else list(num_emitted)
    whole = [whole_steps(row, limit) for row, limit in zip(accepted, limits, strict=True)]
    steps = [a for row in whole for a in row]
    histogram = tuple(steps.count(a) for a in range(num_draft_tokens + 1))
    reached = [sum(histogram[i:]) for i in range(num_draft_tokens + 2)]
    return Acceptance(
        num_draft_tokens=num_draft_tokens,
        steps=len(steps),
        steps_run=sum(len(row) for row in accepted),
        length=_ratio(sum(emitted(a) for a in steps), len(steps)),
        rate=_ratio(sum(steps), num_draft_tokens * len(steps)),
        unconditional=tuple(_ratio(reached[i + 1], len(steps)) for i in range(num_draft_tokens)),
        conditional=tuple(_ratio(reached[i + 1], reached[i]) for i in range(num_draft_tokens)),
        histogram=histogram,
        per_sequence=tuple((sum(emitted(a) for a in row), len(row)) for row in whole),
        by_output_position=_buckets(whole, bucket),
    )


def whole_steps(accepted: Sequence[int], num_emitted: int | None) -> list[int]:
    """The steps of one sequence without a truncated last one; ValueError if more than the last step was cut."""
    if num_emitted is None or not accepted:
        return list(accepted)
    *before, _ = accepted
    # one token comes from the prompt's own forward pass
    total = 1 + sum(emitted(a) for a in accepted)
    if total < num_emitted:
        raise ValueError(f"{len(accepted)} steps and the prompt's own token give {total} tokens, not {num_emitted}")
    if 1 + sum(emitted(a) for a in before) >= num_emitted:
        raise ValueError(f"{num_emitted} tokens were there before the last of {len(accepted)} steps ran")
    return list(accepted) if total == num_emitted else before


def _buckets(whole: Sequence[Sequence[int]], width: int) -> tuple[PositionBucket, ...]:
    if width < 1:
        raise ValueError(f"bucket must be at least 1, got {width}")
    lengths: dict[int, list[int]] = {}
    for row in whole:
        position = 1
        for a in row:
            lengths.setdefault(position // width, []).append(emitted(a))
            position += emitted(a)
    return tuple(
        PositionBucket(k * width, (k + 1) * width - 1, len(seen), sum(seen) / len(seen))
        for k, seen in sorted(lengths.items())
    )


def _ratio(part: int, whole: int) -> float | None:
    return part / whole if whole else None
