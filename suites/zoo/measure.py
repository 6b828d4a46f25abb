"""What a trained pair reaches on text it never saw: acceptance, repetition, and whether it knows its capture points.

A target that loops flatters any draft, so the share of repeated 4-grams stands beside every acceptance length.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from harness.acceptance import Acceptance, count
from suites.catalog import open_speculation
from suites.opened import OpenSpeculation
from suites.zoo.entries import target_of
from suites.zoo.held_out import read_jsonl

NUM_SEQUENCES, SEQUENCE = 64, 96
"""sequences of a shift and tokens of each"""

CASES = ((0.0, 32), (0.0, 64), (0.0, 128), (1.0, 64), (1.0, 128))
"""temperature and tokens; greedy text falls into loops as it grows, so one length would not tell"""


def repeated_share(texts: Sequence[Sequence[int]], size: int = 4) -> float:
    """Share of `size`-grams that stood earlier in the same text."""
    repeated = total = 0
    for text in texts:
        seen: set[tuple[int, ...]] = set()
        for i in range(len(text) - size + 1):
            gram = tuple(text[i : i + size])
            repeated += gram in seen
            total += 1
            seen.add(gram)
    return repeated / total


def standard_error(acceptance: Acceptance) -> float:
    """Of the acceptance length, a ratio of sums over sequences: by the delta method."""
    pairs = torch.tensor(acceptance.per_sequence, dtype=torch.float64)
    ratio = pairs[:, 0].sum() / pairs[:, 1].sum()
    residual = pairs[:, 0] - ratio * pairs[:, 1]
    n = len(pairs)
    return (residual.std() * math.sqrt(n) / pairs[:, 1].sum()).item()


def measure_acceptance(
    speculation: OpenSpeculation, prompts: Sequence[Tensor], num_tokens: int, num_draft_tokens: int, temperature: float
) -> dict[str, Any]:
    """One run over all prompts at once.

    prompts  tensors [T]
    """
    result = speculation.generate(prompts, num_tokens, num_draft_tokens, temperature)
    acceptance = count(result.accepted, num_draft_tokens, num_emitted=(result.tokens >= 0).sum(1).tolist())
    if acceptance.length is None:
        raise ValueError(f"{num_tokens} tokens are too few for one whole verify step")
    return {
        "temperature": temperature,
        "num_tokens": num_tokens,
        "acceptance_length": round(acceptance.length, 4),
        "standard_error": round(standard_error(acceptance), 4),
        "rates": [round(rate or 0.0, 4) for rate in acceptance.unconditional],
        "repeated_share": round(repeated_share(result.tokens.tolist()), 4),
        "steps": acceptance.steps,
    }


def forced_losses(speculation: OpenSpeculation, points: Sequence[int], tokens: Tensor) -> Tensor:
    """Teacher-forced cross entropy of the first draft step, per sequence, over the tokens that have a draft id.

    tokens  [B, T]
    ->      [B]
    """
    draft = speculation.draft
    logits = draft.unroll(tokens, speculation.target(tokens, capture=points), 1)[0, :, :-2]
    # column t proposes x_{t+2}; a token without a draft id has log-probability -inf and is left out
    said = draft.module.spread(logits).log_softmax(-1).gather(-1, tokens[:, 2:, None])[..., 0]
    known = draft.module.t2d[tokens[:, 2:]]
    return -said.masked_fill(~known, 0).sum(1) / known.sum(1)


def measure_shift(speculation: OpenSpeculation, tokens: Tensor, shift: int) -> dict[str, Any]:
    """How much worse the draft is when its states come from `shift` layers later, paired by sequence.

    tokens  [B, T]
    """
    points = speculation.draft.capture_points
    moved = [point + shift for point in points]
    worse = forced_losses(speculation, moved, tokens) - forced_losses(speculation, points, tokens)
    return {
        "shift": shift,
        "loss": round(worse.mean().item(), 4),
        "errors": round((worse.mean() / (worse.std() / math.sqrt(len(worse)))).item(), 1),
    }


def measure(out: Path, name: str, num_draft_tokens: int = 3) -> dict[str, Any]:
    """A draft under `out` with its target on held-out text: every one of CASES, and both shifts of what it captures."""
    target = out / target_of(name)
    speculation = open_speculation(target, out / name, side="reference")
    tokenizer = Tokenizer.from_file(str(target / "tokenizer.json"))
    prompts = [torch.tensor(tokenizer.encode(row["turns"][0]).ids) for row in read_jsonl(out / "prompts.jsonl")]
    texts = [row["text"] for row in read_jsonl(out / "heldout.jsonl")[:NUM_SEQUENCES]]
    sequences = torch.tensor([tokenizer.encode(text).ids[:SEQUENCE] for text in texts])
    shifts = (-1, 1) if speculation.draft.capture_points else ()
    return {
        "prompts": len(prompts),
        "num_draft_tokens": num_draft_tokens,
        "seed": 0,
        "cases": [measure_acceptance(speculation, prompts, n, num_draft_tokens, t) for t, n in CASES],
        "sequences": len(sequences),
        "shifts": [measure_shift(speculation, sequences, shift) for shift in shifts],
    }
