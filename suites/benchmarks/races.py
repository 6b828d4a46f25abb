"""Tokens a second: transformers, the twin alone, the twin with its draft; one process, one run, turns there and back.

One sequence at a time, prompts read before the clock starts. A turn answers every prompt once, so each block holds the
same text for every arm; its seconds are those of the decode loops alone. What a timed turn said must be what the same
arm said untimed. Phases (draft, verify, accept) are timed apart, in turns with a plain decode step, whose cost is the
measure of a verify: on a CPU a float32 product of a few rows may cost more than of one, and a draft must earn it.

Acceptance is real where the weights are trained. Otherwise it is forced to `forced.RATES` (unconditional rates), every
computation still done; the case says so in `acceptance`, and the two are never put into one table.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor

from harness import timing, witness
from harness.record import Case, Sample
from harness.telemetry import Telemetry
from optimized import cycle
from optimized.decoding import RESERVED_DRAFTS, Engine, Session
from optimized.graphs import Replay
from optimized.state import Plan, whole_tiles
from reports.statistics import Interval, paired_ratio
from suites.benchmarks.acceptance import form_of
from suites.benchmarks.forced import RATES
from suites.benchmarks.shipped import Located
from suites.benchmarks.steady import ChangedText

TRANSFORMERS, PLAIN, SPECULATIVE = "transformers", "plain", "speculative"
ATTENTION = "sdpa"
"""of the baseline: what transformers chooses by itself"""
AGREE, WARM_UP_S = 0.05, 5.0
"""a turn is long, so its medians settle sooner and looser than those of a kernel"""


@dataclass(frozen=True)
class Race:
    """What is timed and how often."""

    pair: Located
    prompts: tuple[Tensor, ...]
    """one [T] each"""
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    num_tokens: int = 48
    num_draft_tokens: int = 3
    blocks: int = 10
    is_forced: bool = False
    warm_up_s: float = WARM_UP_S
    """of each arm, at most"""

    @property
    def num_slots(self) -> int:
        """One size for every prompt, so that buffers and graphs are made once."""
        return max(len(row) for row in self.prompts) + self.num_tokens + RESERVED_DRAFTS

    @property
    def num_timed(self) -> int:
        """Tokens of a turn; the first of each answer comes from its prompt's own pass."""
        return len(self.prompts) * (self.num_tokens - 1)


class Raced(NamedTuple):
    """Raw samples, and what they say."""

    samples: tuple[Sample, ...]
    speeds: dict[str, float]
    """arm -> median tokens/s"""
    ratios: dict[str, Interval]
    """"arm / arm" -> paired ratio of blocks"""
    verify_cost: float
    """a verify of K + 1 rows in decode steps of one row"""
    same_text: bool
    """transformers and the twin said the same"""


class Turn(NamedTuple):
    """Every prompt answered once."""

    seconds: float
    """of all decode loops"""
    steps: int
    """passes of the target after the prompts'"""
    text: Tensor
    """[P, num_tokens]"""


class Clocked(Engine):
    """An engine that times its decode loop: after the prompts are read, until the last row is done."""

    seconds = 0.0

    def _decode(self, session: Session) -> None:
        self._wait()
        with timing.stopwatch() as passed:
            super()._decode(session)
            self._wait()
        self.seconds = passed()

    def _wait(self) -> None:
        if self.target.at.device.type == "cuda":
            torch.cuda.synchronize(self.target.at.device)


class Phased(Engine):
    """An engine that times each phase of each cycle; on CUDA each phase is a graph of its own."""

    def __init__(self, *models: Any) -> None:
        super().__init__(*models)
        self.seconds: dict[str, list[float]] = {}
        self.phases: dict[str, Replay] = {}

    def _session(self, plan: Plan, cycles_per_read: int) -> Session:
        kept, session = self.session, super()._session(plan, cycles_per_read)
        if session is not kept:
            run = {"draft": cycle.propose, "verify": cycle.verify, "accept": _accept}
            parts = {name: partial(call, session.models, session.state) for name, call in run.items()}
            self.phases = {name: Replay(part, self.target.at.device) for name, part in parts.items()}
        return session

    def _decode(self, session: Session) -> None:
        state, device = session.state, self.target.at.device
        self.seconds = {name: [] for name in self.phases}
        while (reached := max(state.progress.tolist())) >= 0:
            bound = whole_tiles(reached + session.plan.num_draft_tokens + 1)
            for name, phase in self.phases.items():
                call = phase if phase.graph is not None else partial(phase.run, bound)
                self.seconds[name] += timing.time_calls(call, 1, device)


def _accept(models: cycle.Speculation, state: Any, num_slots: int | None = None) -> None:
    cycle.accept(models, state)


class Stamps:
    """What transformers' `generate` tells while it writes: once the prompt, then every token."""

    def __init__(self) -> None:
        self.at: list[float] = []

    def put(self, value: Tensor) -> None:
        self.at.append(timing.now())

    def end(self) -> None:
        """Part of a streamer's face."""

    @property
    def seconds(self) -> float:
        """From the first token to the last."""
        return self.at[-1] - self.at[1]


def run(race: Race, advance: Callable[[], object] = lambda: None) -> Raced:
    """Time the three arms against each other; hold the claims of the pair before.

    advance   called after every turn
    """
    speculation = race.pair.open(side="optimized", dtype=race.dtype, device=race.device)
    models = (speculation.target.module, speculation.draft.module, speculation.draft.capture_points)
    baseline = witness.load(race.pair.target, dtype=race.dtype, device=race.device)
    baseline.model.set_attn_implementation(ATTENTION)
    answers = {
        TRANSFORMERS: partial(_by_transformers, baseline, race),
        PLAIN: partial(_by_twin, Clocked(*models), race, 0),
        SPECULATIVE: partial(_by_twin, Clocked(*models), race, race.num_draft_tokens),
    }
    untimed = {arm: call() for arm, call in answers.items()}

    def turn(arm: str) -> float:
        said = answers[arm]()
        if not torch.equal(said.text, untimed[arm].text):
            raise ChangedText(f"{race.pair.name}: {arm} said something else while it was timed")
        advance()
        return said.seconds

    turns = {arm: partial(turn, arm) for arm in answers}
    with Telemetry() as telemetry:
        clock = (race.device, AGREE, race.warm_up_s, timing.own_seconds, telemetry.window)
        timed = timing.interleave(turns, race.blocks, 1, *clock)
    cases = {arm: _case(race, arm, form_of(speculation)) for arm in answers}
    samples = []
    for arm, visits in timed.visits.items():
        for visit in visits:
            about = visit.telemetry(settled=timed.settled[arm])
            place = {"case": cases[arm], "block": visit.block, "order": visit.order, "telemetry": about}
            speeds = tuple(race.num_timed / seconds for seconds in visit.seconds)
            cycles = tuple(1000 * seconds / untimed[arm].steps for seconds in visit.seconds)
            samples.append(Sample(metric="decode", unit="tokens/s", better="up", values=speeds, **place))
            samples.append(Sample(metric="cycle", unit="ms", better="down", values=cycles, **place))
    phases, cost = split(race, Phased(*models), Phased(*models), cases)
    same = torch.equal(untimed[TRANSFORMERS].text, untimed[PLAIN].text)
    return Raced((*samples, *phases), *_compared(samples), cost, same)


def split(race: Race, plain: Phased, speculative: Phased, cases: dict[str, Case]) -> tuple[list[Sample], float]:
    """Phases of a cycle by block, and what a verify costs in decode steps."""
    samples, costs = [], []
    for block in range(race.blocks):
        verify = {}
        for arm, engine, num_drafts in ((PLAIN, plain, 0), (SPECULATIVE, speculative, race.num_draft_tokens)):
            seconds: dict[str, list[float]] = {}
            for row in race.prompts:
                _generate(engine, race, row, num_drafts)
                for name, values in engine.seconds.items():
                    seconds.setdefault(name, []).extend(values)
            verify[arm] = median(seconds["verify"])
            if num_drafts:
                for name, values in seconds.items():
                    spent = tuple(1000 * s for s in values)
                    facts = {"metric": name, "unit": "ms", "better": "down", "block": block}
                    samples.append(Sample(case=cases[arm], values=spent, **facts))
        costs.append(verify[SPECULATIVE] / verify[PLAIN])
    facts = {"metric": "verify_cost", "unit": "decode steps", "better": "down"}
    return [*samples, Sample(case=cases[SPECULATIVE], values=tuple(costs), **facts)], median(costs)


def _case(race: Race, arm: str, form: str) -> Case:
    drafts = race.num_draft_tokens if arm == SPECULATIVE else 0
    is_forced = race.is_forced and drafts > 0
    return race.pair.case(
        gate="passed",
        method=race.pair.speculation.draft if drafts else "",
        impl=TRANSFORMERS if arm == TRANSFORMERS else "optimized",
        form=f"dynamic cache, {ATTENTION}" if arm == TRANSFORMERS else form,
        dtype=str(race.dtype).removeprefix("torch."),
        device=race.device,
        num_draft_tokens=drafts,
        acceptance="forced" if is_forced else "real",
        forced_rates=RATES if is_forced else (),
    )


def _generate(engine: Engine, race: Race, row: Tensor, num_drafts: int) -> Any:
    """row [T]"""
    forced = RATES if race.is_forced and num_drafts else None
    return engine.generate([row], race.num_tokens, num_drafts, num_slots=race.num_slots, forced_rates=forced)


def _by_twin(engine: Clocked, race: Race, num_drafts: int) -> Turn:
    seconds, steps, said = 0.0, 0, []
    for row in race.prompts:
        result = _generate(engine, race, row, num_drafts)
        said.append(result.tokens[0])
        steps += len(result.accepted[0])
        seconds += engine.seconds
    return Turn(seconds, steps, torch.stack(said))


def _by_transformers(baseline: witness.Witness, race: Race) -> Turn:
    """`generate` with a dynamic cache."""
    seconds, said = 0.0, []
    for row in race.prompts:
        stamps = Stamps()
        prompt = row[None].to(race.device)
        said.append(baseline.generate(prompt, race.num_tokens, inputs={"streamer": stamps})[0].cpu())
        seconds += stamps.seconds
    return Turn(seconds, race.num_timed, torch.stack(said))


def _compared(samples: Sequence[Sample]) -> tuple[dict[str, float], dict[str, Interval]]:
    """Median speeds of the arms, and every ratio with its interval."""
    blocks: dict[str, dict[int, list[float]]] = {}
    for sample in (s for s in samples if s.metric == "decode"):
        drafted = SPECULATIVE if sample.case.num_draft_tokens else PLAIN
        arm = TRANSFORMERS if sample.case.impl == TRANSFORMERS else drafted
        blocks.setdefault(arm, {}).setdefault(sample.block, []).extend(sample.values)
    speeds = {arm: median(v for values in found.values() for v in values) for arm, found in blocks.items()}
    contests = ((PLAIN, TRANSFORMERS), (SPECULATIVE, TRANSFORMERS), (SPECULATIVE, PLAIN))
    return speeds, {f"{a} / {b}": paired_ratio(blocks[b], blocks[a]) for a, b in contests}
