"""Can this checkpoint tell its capture points from their neighbours?

The draft is forced along held-out text with the target's states taken where the checkpoint states, one layer earlier
and one layer later. Sequences are paired, so a difference of a hundredth of a nat is many standard errors.

    loss_k = mean over t of -log softmax(spread(logits_k,t))[x_{t+k+1}]     over the tokens that have a draft id
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer
from torch import Tensor

from harness.record import Sample
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


class Separation(NamedTuple):
    """One shift of the capture points against the stated ones."""

    shift: int
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


def losses(speculation: OpenSpeculation, points: Sequence[int], tokens: Tensor, num_steps: int = NUM_STEPS) -> Tensor:
    """Teacher-forced cross entropy of each draft step, by sequence; reference side.

    tokens  [B, T]
    ->      [K, B]
    """
    draft, found = speculation.draft, []
    steps = draft.unroll(tokens, speculation.target(tokens, capture=points), num_steps)
    for k, logits in enumerate(steps, 1):
        following = tokens[:, k + 1 :]
        # a token without a draft id has log-probability -inf: no capture point could make it likely
        said = draft.module.spread(logits[:, : -(k + 1)]).log_softmax(-1).gather(-1, following[..., None])[..., 0]
        known = draft.module.t2d[following]
        found.append(-said.masked_fill(~known, 0).sum(1) / known.sum(1).clamp(min=1))
    return torch.stack(found)


def shifts(speculation: OpenSpeculation) -> dict[int, tuple[int, ...]]:
    """0 and the moves by one layer that stay within the target."""
    stated, last = speculation.draft.capture_points, speculation.target.num_layers
    moved = {shift: tuple(point + shift for point in stated) for shift in (0, -1, 1)}
    return {shift: points for shift, points in moved.items() if min(points) >= 0 and max(points) <= last}


def separate(pair: Located, tokens: Tensor) -> tuple[list[Sample], list[Separation]]:
    """Record every loss by sequence, and how far each shift lies from the stated points.

    tokens  [B, T]
    """
    speculation = pair.open(side="reference")
    samples, totals = [], {}
    for shift, points in shifts(speculation).items():
        by_step = torch.cat([losses(speculation, points, part) for part in tokens.split(CHUNK)], 1)
        totals[shift] = by_step.mean(0)
        case = pair.case(
            gate="passed",
            method=pair.speculation.draft,
            impl="reference",
            form="torch",
            dtype="float32",
            device="cpu",
            batch=CHUNK,
            num_draft_tokens=NUM_STEPS,
            variant=f"capture points {shift:+d}" if shift else "",
            capture_points=points,
        )
        samples += [
            Sample(case=case, metric=f"{METRIC}_{k}", unit="nats", better="down", values=tuple(row))
            for k, row in enumerate(by_step.tolist(), 1)
        ]
    found = []
    for shift, points in shifts(speculation).items():
        if shift:
            worse = (totals[shift] - totals[0]).tolist()
            mean = sum(worse) / len(worse)
            found.append(Separation(shift, points, mean, standard_errors(worse), len(worse)))
    return samples, found
