"""An engine's acceptance held against the reference's, on the same prompts."""

from collections.abc import Callable, Collection, Mapping, Sequence
from enum import StrEnum
from typing import NamedTuple

from torch import Tensor

from harness.acceptance import emitted
from reports.statistics import NOTHING, Arm, Interval, acceptance_difference, acceptance_length
from suites.benchmarks.acceptance import BATCH
from suites.opened import OpenSpeculation

FEWEST_PROMPTS = 8
"""a bootstrap over fewer says little about the next prompt"""
FEWEST_TOKENS = 400
"""that verify steps of one side emitted"""


class Word(StrEnum):
    """How the two compare."""

    AGREE = "AGREE"
    DISAGREE = "DISAGREE"
    TOO_FEW = "TOO FEW"


class Verdict(NamedTuple):
    """One word, what it rests on, and why."""

    word: Word
    difference: Interval
    """acceptance length of the engine minus the reference's, over the prompts that both answered"""
    reason: str


def tokens_of(arm: Arm) -> int:
    """Tokens that the verify steps of an arm emitted."""
    return sum(emitted(a) for steps in arm.steps.values() for a in steps)


def enough(arm: Arm) -> str:
    """Why an arm is too small to speak of; empty where it is not."""
    prompts = sum(bool(steps) for steps in arm.steps.values())
    if prompts < FEWEST_PROMPTS or tokens_of(arm) < FEWEST_TOKENS:
        return (
            f"{prompts} prompts and {tokens_of(arm)} tokens of verify steps; at least {FEWEST_PROMPTS} and "
            f"{FEWEST_TOKENS} are needed"
        )
    return ""


def hold(reference: Arm, engine: Arm, within: float) -> Verdict:
    """AGREE where all of the interval lies within the bound, DISAGREE where none of it does.

    within   the bound, as a share of the reference's acceptance length
    """
    if few := enough(engine) or enough(reference):
        return Verdict(Word.TOO_FEW, NOTHING, few)
    difference, bound = acceptance_difference(reference, engine), within * acceptance_length(reference).value
    span = f"{difference.value:+.3f} ({difference.low:+.3f} to {difference.high:+.3f}), bound {bound:.3f}"
    if not difference.known:
        return Verdict(Word.TOO_FEW, difference, "no interval: too few prompts were answered by both")
    if -bound <= difference.low and difference.high <= bound:
        return Verdict(Word.AGREE, difference, span)
    if difference.low > bound or difference.high < -bound:
        return Verdict(Word.DISAGREE, difference, span)
    return Verdict(Word.TOO_FEW, difference, f"{span}: the interval reaches over the bound; ask more prompts")


class Drafting(NamedTuple):
    """How the engine drafts and answers, for the reference to do the same."""

    num_tokens: int
    temperature: float
    num_draft_tokens: int
    tree: Mapping[str, int]


def reference_arm(
    speculation: OpenSpeculation,
    rows: Mapping[str, Tensor],
    drafting: Drafting,
    ends: Collection[int],
    advance: Callable[[int], object] = lambda count: None,
) -> Arm:
    """The same prompts through our own loop, counted as engines count: the last step in full.

    rows  one [T] a prompt
    """
    names, steps = list(rows), {}
    draft = {"num_draft_tokens": drafting.num_draft_tokens} | dict(drafting.tree)
    for first in range(0, len(names), BATCH):
        batch = names[first : first + BATCH]
        result = speculation.generate(
            [rows[name] for name in batch],
            drafting.num_tokens,
            temperature=drafting.temperature,
            sequence_ids=range(first, first + len(batch)),
            **draft,
        )
        for name, text, accepted in zip(batch, result.tokens.tolist(), result.accepted, strict=True):
            steps[name] = until_end(accepted, text, ends)
        advance(len(batch))
    return Arm(drafting.num_draft_tokens, steps)


def until_end(accepted: Sequence[int], text: Sequence[int], ends: Collection[int]) -> tuple[int, ...]:
    """The steps up to the one that emitted the first end token, that one in full."""
    length = next((place for place, token in enumerate(text) if token in ends), len(text)) + 1
    kept, said = [], 1  # the first token is the prompt's own
    for a in accepted:
        if said >= length:
            break
        kept.append(a)
        said += emitted(a)
    return tuple(kept)
