"""How much of a draft its target accepts, on text that neither was trained on, through the optimized twin.

Every prompt is one observation: the accepted drafts of each verify step, how the text ended, its hash. A target that
loops flatters any draft, so the share of repeated 4-grams stands beside every acceptance length.
"""

from collections.abc import Callable
from hashlib import sha256
from statistics import fmean
from typing import Any, NamedTuple

from torch import Tensor

from harness.acceptance import whole_steps
from harness.record import Accept, Case, Sample
from reports.statistics import Arm, Interval, acceptance_length, complete_steps, rates
from suites.benchmarks.prompts import Encoded
from suites.benchmarks.shipped import Located
from suites.opened import OpenSpeculation
from suites.zoo.measure import repeated_share

GRAM = 4
BATCH = 16


class Answered(NamedTuple):
    """All prompts answered in one way."""

    case: Case
    accepts: tuple[Accept, ...]
    repeated: Sample | None
    """None where no answer has four tokens"""

    @property
    def arm(self) -> Arm:
        """What the intervals are drawn over: complete steps, by prompt."""
        steps = {a.prompt: complete_steps(a.accepted, a.truncated) for a in self.accepts}
        return Arm(self.case.num_draft_tokens, steps)

    @property
    def length(self) -> Interval:
        return acceptance_length(self.arm)

    def summary(self) -> dict[str, Any]:
        """Plain values, as `--json` prints them."""
        length = self.length
        return {
            "pair": self.case.pair,
            "temperature": self.case.temperature,
            "num_draft_tokens": self.case.num_draft_tokens,
            "acceptance_length": round(length.value, 4),
            "interval": [round(length.low, 4), round(length.high, 4)] if length.known else None,
            "rates": [round(unconditional.value, 4) for unconditional, _ in rates(self.arm)],
            "prompts": length.units,
            "steps": sum(map(len, self.arm.steps.values())),
            f"repeated_{GRAM}grams": round(fmean(self.repeated.values), 4) if self.repeated else None,
        }


def answer(
    pair: Located,
    speculation: OpenSpeculation,
    prompts: Encoded,
    *,
    num_tokens: int = 64,
    num_draft_tokens: int = 3,
    temperature: float = 0.0,
    seed: int = 0,
    advance: Callable[[int], object] = lambda count: None,
) -> Answered:
    """Answer every prompt; the case states that its gate passed, so hold the claims before.

    advance   told how many prompts were done
    """
    eos = speculation.target.checkpoint.config.get("eos_token_id")
    case = measured_case(pair, speculation, prompts, num_draft_tokens, temperature)
    accepts, texts = [], []
    for first in range(0, len(prompts.rows), BATCH):
        rows = prompts.rows[first : first + BATCH]
        result = speculation.generate(
            rows, num_tokens, num_draft_tokens, temperature, seed, eos, range(first, first + len(rows))
        )
        asked = prompts.prompts[first : first + len(rows)]
        for prompt, text, accepted in zip(asked, _texts(result.tokens), result.accepted, strict=True):
            texts.append(text)
            accepts.append(
                Accept(
                    case=case,
                    prompt=prompt.name,
                    dataset=prompts.dataset,
                    num_draft_tokens=num_draft_tokens,
                    accepted=tuple(accepted),
                    emitted=len(text),
                    truncated=whole_steps(accepted, len(text)) != accepted,
                    stop="end" if text[-1] == eos else "length",
                    text_sha256=sha256(" ".join(map(str, text)).encode()).hexdigest(),
                    extra={"category": prompt.category, "seed": seed},
                )
            )
        advance(len(rows))
    shares = tuple(repeated_share([text], GRAM) for text in texts if len(text) >= GRAM)
    facts = {"metric": f"repeated_{GRAM}grams", "unit": "share", "better": "none"}
    return Answered(case, tuple(accepts), Sample(case=case, values=shares, **facts) if shares else None)


def measured_case(
    pair: Located, speculation: OpenSpeculation, prompts: Encoded, num_draft_tokens: int, temperature: float
) -> Case:
    """The case of a run whose gate has passed."""
    side = speculation.target.side
    return pair.case(
        gate="passed",
        method=pair.speculation.draft,
        impl=side.name,
        form=form_of(speculation),
        dtype=str(side.dtype).removeprefix("torch."),
        device=side.device,
        tp=side.tp_size,
        batch=min(BATCH, len(prompts.rows)),
        num_draft_tokens=num_draft_tokens,
        temperature=temperature,
        capture_points=speculation.draft.capture_points,
        prompts_sha256=prompts.sha256,
    )


def form_of(speculation: OpenSpeculation) -> str:
    """Which operations ran, and in which shapes."""
    side = speculation.target.side
    if side.name == "reference":
        return "torch"
    kernels = side.form or ("triton" if side.device.startswith("cuda") else "aten")
    whole = ", graph" if side.device.startswith("cuda") else ""
    return f"{kernels}{whole}, {'exact' if side.exact else 'natural'} shapes"


def _texts(tokens: Tensor) -> list[list[int]]:
    """tokens [B, num_tokens] -> ids without what stands after the end"""
    return [[t for t in row if t >= 0] for row in tokens.tolist()]
