"""Can a checkpoint tell the facts that it was trained with from their neighbours?

The draft is forced along held-out text as its checkpoint states, and again with one fact moved: its capture points a
layer earlier or later, the hidden state before the final norm instead of after it, its position or the last key that it
sees one further on. Sequences are paired, so a difference of a hundredth of a nat is many standard errors.

    loss_k = mean over t of  - sum over v of p_{t+k}(v) log q_{k,t}(v)

p is the target's own distribution after x_0 .. x_{t+k}, q the draft's; both over the tokens that have a draft id.
"""

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer
from torch import Tensor

from harness.planting import Bug, planted
from harness.record import Sample
from reference.outputs import TargetOutput
from reports.statistics import standard_errors
from suites.benchmarks.prompts import TOKENIZER
from suites.benchmarks.shipped import HELD_OUT, Located
from suites.opened import OpenSpeculation
from suites.zoo.held_out import read_jsonl

NUM_STEPS = 3
WIDTH = 96
"""tokens of a sequence"""
CHUNK = 16
"""sequences forced at once"""
METRIC = "draft_loss"
ASSISTANT = "reference.drafts.gemma4_assistant"


STATED = ""
"""the reading that the checkpoint states"""


class Reading(NamedTuple):
    """What a draft is forced with."""

    points: tuple[int, ...]
    """capture points that the target hands over"""
    read: Callable[[TargetOutput], TargetOutput] = lambda out: out
    changes: tuple[Bug, ...] = ()
    """what is replaced in the draft's page meanwhile"""


class Separation(NamedTuple):
    """One other reading against the stated one."""

    reading: str
    points: tuple[int, ...]
    loss: float
    """nats a token by which the draft is worse, mean over steps and sequences"""
    errors: float
    """standard errors of that mean"""
    sequences: int

    def summary(self, pair: str) -> dict[str, Any]:
        """Plain values, as `--json` prints them."""
        return {"pair": pair, **self._asdict(), "points": list(self.points)}


def sequences(pair: Located, count: int) -> Tensor:
    """The first held-out texts of a shipped pair.

    ->  [B, T]
    """
    tokenizer = Tokenizer.from_file(str(pair.target / TOKENIZER))
    texts = [row["text"] for row in read_jsonl(Path(pair.zoo) / HELD_OUT)[:count]]
    return torch.tensor([tokenizer.encode(text).ids[:WIDTH] for text in texts])


def readings(speculation: OpenSpeculation) -> dict[str, Reading]:
    """The stated reading, named "", and its neighbours; a draft that reads nothing of its target has none."""
    draft, last = speculation.draft, speculation.target.num_layers
    stated = draft.capture_points
    found = {STATED: Reading(stated)}
    reads = getattr(draft.facts.config, "reads", "tokens")
    if reads == "aux":
        for shift in (-1, 1):
            points = tuple(point + shift for point in stated)
            if min(points) >= 0 and max(points) <= last:
                found[f"capture points {shift:+d}"] = Reading(points)
    elif reads == "hidden":
        found["hidden state before the final norm"] = Reading(
            (last,), lambda out: out._replace(hidden=out.aux[:, :, 0])
        )
    elif reads == "keys":
        for shift in (-1, 1):
            found[f"position {shift:+d}"] = Reading((), changes=(_turned(shift),))
        # one key more would be that of a token which the target has not read yet
        found["last key -1"] = Reading((), changes=(_short_sighted(),))
    return found


def _turned(by: int) -> Bug:
    """Queries turned for another position, asking the same keys."""

    def make(right: Any) -> Any:
        return lambda q, positions, rope: right(q, positions + by, rope)

    return Bug(f"position {by:+d}", "", f"{ASSISTANT}.rotate", make, "")


def _short_sighted() -> Bug:
    """The key of the last token that stands left out; the first token keeps its own."""

    def make(right: Any) -> Any:
        return lambda positions, slots, window: right((positions - 1).clamp(min=0), slots, window)

    return Bug("last key -1", "", f"{ASSISTANT}.causal", make, "")


def losses(speculation: OpenSpeculation, reading: Reading, tokens: Tensor, num_steps: int = NUM_STEPS) -> Tensor:
    """Teacher-forced cross entropy of each draft step to the target, by sequence; reference side.

    tokens  [B, T]
    ->      [K, B]
    """
    draft, found = speculation.draft, []
    out = reading.read(speculation.target(tokens, capture=reading.points))
    with ExitStack() as stack:
        for change in reading.changes:
            stack.enter_context(planted(change))
        steps = draft.unroll(tokens, out, num_steps)
    width = tokens.shape[1]
    for k, logits in enumerate(steps, 1):
        said = draft.module.spread(logits[:, : width - k - 1]).log_softmax(-1)
        # a token without a draft id has log-probability -inf: no reading could make it likely
        known = said.isfinite()
        meant = out.logits[:, k : width - 1].masked_fill(~known, float("-inf")).softmax(-1)
        found.append(-(meant * said.masked_fill(~known, 0)).sum(-1).mean(1))
    return torch.stack(found)


def separate(pair: Located, tokens: Tensor) -> tuple[list[Sample], list[Separation]]:
    """Record every loss by sequence, and how far each other reading lies from the stated one.

    tokens  [B, T]
    """
    speculation = pair.open(side="reference")
    samples, totals, every = [], {}, readings(speculation)
    for name, reading in every.items() if len(every) > 1 else ():
        by_step = torch.cat([losses(speculation, reading, part) for part in tokens.split(CHUNK)], 1)
        totals[name] = by_step.mean(0)
        case = pair.case(
            gate="passed",
            method=pair.speculation.draft,
            impl="reference",
            form="torch",
            dtype="float32",
            device="cpu",
            batch=CHUNK,
            num_draft_tokens=NUM_STEPS,
            variant=name,
            capture_points=reading.points,
        )
        samples += [
            Sample(case=case, metric=f"{METRIC}_{k}", unit="nats", better="down", values=tuple(row))
            for k, row in enumerate(by_step.tolist(), 1)
        ]
    found = []
    for name, total in totals.items():
        if name != STATED:
            worse = (total - totals[STATED]).tolist()
            mean = sum(worse) / len(worse)
            found.append(Separation(name, every[name].points, mean, standard_errors(worse), len(worse)))
    return samples, found
