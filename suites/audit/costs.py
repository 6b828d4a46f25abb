"""What a wrong reading costs: cross-entropy on texts, and acceptance length at K = 3, both against what was meant.

Both readings are run as their consumers would run them (`suites/formats/effect.py`) beside the same target.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from harness.acceptance import whole_steps
from harness.checkpoints import Checkpoint, Ledger
from harness.conventions import DEFAULT, LayerIds
from reference.decoding import generate
from reference.outputs import TargetOutput
from reports.statistics import Arm, Interval, acceptance_difference, acceptance_length
from suites.audit.contrasts import Contrast, paired
from suites.audit.losses import NUM_STEPS, Texts, losses
from suites.audit.variants import with_parts
from suites.formats.effect import realise
from suites.formats.reading import Reading
from suites.opened import DraftFacts, OpenDraft, OpenTarget, Ranks, Side

NUM_TEXTS, NUM_PROMPTS = 32, 8
PROMPT, ANSWER = 24, 32
"""tokens of each prompt, and of each answer"""


@dataclass(frozen=True)
class Cost:
    """One reading against the meant one."""

    contrast: Contrast
    meant: Interval
    """acceptance length of what was meant"""
    read: Interval
    difference: Interval
    """of acceptance lengths, over the prompts that both answered"""

    def summary(self) -> dict[str, Any]:
        """Plain values, as `--json` prints them."""
        return {
            "nats": self.contrast.nats,
            "interval": [self.contrast.low, self.contrast.high],
            "by_step": list(self.contrast.by_step),
            "sequences": self.contrast.sequences,
            "acceptance_length": {"meant": self.meant.value, "read": self.read.value},
            "difference": self.difference.value,
            "difference_interval": [self.difference.low, self.difference.high],
            "prompts": self.difference.units,
            "num_draft_tokens": NUM_STEPS,
        }

    def __str__(self) -> str:
        return f"{self.contrast.nats:+.3f} nats, length {self.meant.value:.2f} -> {self.read.value:.2f}"


@dataclass
class Costs:
    """Costs of readings of one checkpoint; readings that run alike are run once."""

    checkpoint: Checkpoint
    target: OpenTarget
    meant: Reading
    texts: Texts
    rows: Sequence[Tensor]

    def __post_init__(self) -> None:
        self.texts = self.texts.first(NUM_TEXTS)
        self.known: dict[str, tuple[Tensor, Arm]] = {}

    def of(self, reading: Reading) -> Cost:
        """What a reading costs; errors: CheckpointError where it cannot run."""
        (mine, meant), (theirs, read) = self._run(self.meant), self._run(reading)
        lengths = acceptance_length(meant), acceptance_length(read)
        return Cost(paired(theirs, mine), *lengths, acceptance_difference(meant, read))

    def _run(self, reading: Reading) -> tuple[Tensor, Arm]:
        facts = (reading.config, reading.points, reading.source, reading.filled, reading.embedding, reading.skips_fc,
                 reading.captures, reading.embedding_scale)  # fmt: skip
        if repr(facts) not in self.known:
            draft = opened(reading, self.checkpoint, self.target)
            self.known[repr(facts)] = losses(self.target, [draft], self.texts)[0], self._answer(draft)
        return self.known[repr(facts)]

    def _answer(self, draft: OpenDraft) -> Arm:
        prompts = [row[:PROMPT] for row in self.rows[:NUM_PROMPTS]]
        modules, never = (self.target.module, draft.module), self.target.voice.suppressed
        points = draft.capture_points
        said = generate(*modules, prompts, ANSWER, NUM_STEPS, capture=points, suppressed=never)
        steps = {str(i): tuple(whole_steps(row, ANSWER)) for i, row in enumerate(said.accepted)}
        return Arm(NUM_STEPS, steps)


def opened(reading: Reading, checkpoint: Checkpoint, target: OpenTarget) -> OpenDraft:
    """The draft as a consumer would run it, beside its target."""
    module = realise(reading, checkpoint, target.module)
    told = LayerIds((), reading.points, DEFAULT, reading.dialect, "") if reading.points else None
    facts = DraftFacts(reading.config, told, own_embedding=True, own_head=True)
    draft = OpenDraft(reading.pair, checkpoint, facts, Side(), (module,), Ranks(1), Ledger(checkpoint.path))
    return draft if reading.captures == "the residual stream" else _normed(draft, target)


def _normed(draft: OpenDraft, target: OpenTarget) -> OpenDraft:
    """The draft handed what layers read, their input normed, in the place of the residual stream."""
    whole = draft.module

    def read(out: TargetOutput) -> Tensor:
        """out -> [B, T, H]"""
        aux = out.aux.clone()
        for i, point in enumerate(draft.capture_points):
            if point < target.num_layers:
                aux[:, :, i] = target.module.layers[point].input_layernorm(aux[:, :, i])
        return whole.read(out._replace(aux=aux))

    return replace(with_parts(draft, read=read), facts=draft.facts)
