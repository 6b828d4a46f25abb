"""The part of `draftproof audit` that is measured: which facts a draft was trained with, and what readings cost."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from harness.checkpoints import Checkpoint, CheckpointError, open_checkpoint
from suites.audit.candidates import shown
from suites.audit.claims import AGREES, CONTRADICTED, Claim, edits_of, hold, open_neutral, read_claims
from suites.audit.costs import Costs
from suites.audit.engines import WRONGLY, Verdict
from suites.audit.identify import IDENTIFIED, LOOK, Answer, Identified, identify
from suites.audit.losses import Stand, blind_loss
from suites.audit.texts import Sample, gather
from suites.benchmarks.prompts import TOKENIZER
from suites.catalog import open_target
from suites.commands.desk import Desk
from suites.formats.reading import Reading
from suites.opened import OpenTarget

MOST_BYTES = 2**32
"""of a target that is measured without being asked to"""
NUM_SEQUENCES = 256


@dataclass(frozen=True)
class Asked:
    """What is to be measured, and on what."""

    target: Path
    draft: Path
    identify: bool | None = None
    """None: where it can be done soon"""
    prompts: Path | None = None
    num_sequences: int = NUM_SEQUENCES
    own_continuations: bool = False
    costs: bool = False

    @property
    def is_asked(self) -> bool:
        return bool(self.identify or self.costs or self.prompts or self.own_continuations)


def unasked(target: Path, draft: Path) -> str:
    """Why nothing is measured where nobody asked for it; "" where it is."""
    if not (target / TOKENIZER).is_file():
        return f"{target / TOKENIZER} is missing: text becomes token ids by the target's own tokenizer"
    size = sum(file.stat().st_size for folder in (target, draft) for file in folder.glob("*.safetensors"))
    if size > MOST_BYTES:
        return f"{size / 2**30:.1f} GiB of weights: ask with --identify, and choose --num-sequences"
    return ""


@dataclass(frozen=True)
class Measured:
    """What was found of a draft, and how its config stands to it."""

    sample: Sample
    found: Identified
    claims: tuple[Claim, ...]
    notes: tuple[str, ...]
    blind: float
    """nats that the frequencies of tokens alone would cost"""

    @property
    def is_told(self) -> bool:
        """Whether anything was found out: a draft that foresees no more than frequencies says nothing of its facts."""
        identified = any(answer.verdict == IDENTIFIED for answer in self.found.answers)
        return identified and self.found.losses[0] < self.blind

    @property
    def contradicted(self) -> list[str]:
        """The claims that the weights contradict; of a draft that says nothing, none."""
        return [claim.fact for claim in self.claims if claim.verdict == CONTRADICTED and self.is_told]

    def facts(self) -> dict[str, Any]:
        """Plain values, as `--json` prints them."""
        told = {"claims": [claim.summary() for claim in self.claims], "contradicted": self.contradicted}
        base = {"text": self.sample.source, "blind": self.blind, "told": self.is_told}
        return {**base, **self.found.summary(), **told, "notes": list(self.notes)}


def measure(
    desk: Desk, target: OpenTarget, draft: Checkpoint, sample: Sample, words: dict[str, str | None]
) -> Measured:
    """Identify a draft on a sample and hold its config to the answer."""
    opened = open_neutral(draft, target)
    claims = read_claims(draft, opened.pair, target, **words)
    with desk.progress() as bar:
        task = bar.add_task("readings", total=None)
        stand = Stand(target, opened, sample.texts, advance=lambda count: bar.advance(task, count))
        found = identify(stand, edits_of(claims, opened, target))
    blind = blind_loss(target, sample.texts.first(LOOK))
    return Measured(sample, found, tuple(hold(claims, found)), claims.notes, blind)


def show(desk: Desk, measured: Measured) -> None:
    """What was found, for people."""
    found, claims = measured.found, measured.claims
    desk.table(
        f"Identified on {found.sequences} sequences of {measured.sample.source}, {found.tokens} tokens",
        ("fact", "value", "answer", "closest other reading", "nats a token", "95% interval", "p (Holm)"),
        [_row(answer) for answer in found.answers],
    )
    if found.points:
        desk.say(f"capture points {found.points}")
    if not measured.is_told:
        desk.say(
            f"nothing can be told: at best the draft costs {found.losses[0]:.3f} nats a token, and the frequencies of "
            f"tokens alone {measured.blind:.3f}"
        )
    agreed = [claim.fact for claim in claims if claim.verdict == AGREES]
    desk.say(f"config.json agrees: {', '.join(agreed) or 'in nothing'}")
    for claim in claims:
        if claim.verdict != AGREES or len(claim.claimed) > 1:
            desk.say(str(claim))
    for note in measured.notes:
        desk.say(note)


def _row(answer: Answer) -> tuple[Any, ...]:
    one = answer.closest
    cost = one.contrast
    word = f"{answer.verdict}: {answer.why}" if answer.why else answer.verdict
    interval = f"[{cost.low:+.4f}, {cost.high:+.4f}]"
    return answer.fact, shown(answer.value), word, shown(one.value), f"{cost.nats:+.4f}", interval, f"{cost.p:.1g}"


def charge(desk: Desk, costs: Costs, verdicts: list[Verdict]) -> list[Verdict]:
    """The verdicts with what each wrong reading costs."""
    found = []
    with desk.progress() as bar:
        for verdict in bar.track(verdicts, description="costs"):
            if verdict.outcome == WRONGLY and isinstance(verdict.reading, Reading):
                verdict = replace(verdict, cost=costs.of(verdict.reading))
            found.append(verdict)
    return found


def open_sample(asked: Asked) -> tuple[OpenTarget, Checkpoint, Sample] | str:
    """Both checkpoints and the texts; or why not, where nobody asked.

    errors: PromptError, and CheckpointError where it was asked for
    """
    reason = "" if asked.is_asked else unasked(asked.target, asked.draft)
    if reason:
        return reason
    try:
        target, draft = open_target(asked.target), open_checkpoint(asked.draft)
    except CheckpointError as error:
        if asked.is_asked:
            raise
        return str(error)
    return target, draft, gather(target, asked.prompts, asked.num_sequences, asked.own_continuations)
