"""`draftproof probe`: the acceptance of a running engine in our words, held against the reference's on its prompts."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from harness.checkpoints import open_checkpoint
from harness.runner import Exit
from reports.statistics import Arm, Interval, acceptance_length, rates
from suites.benchmarks.prompts import Prompt, encode, read_prompts
from suites.benchmarks.shipped import PROMPTS, ZOO
from suites.catalog import open_speculation
from suites.commands.desk import Answer, Desk, UsageFault
from suites.probe.definitions import DEFINITIONS, SGLANG, VLLM
from suites.probe.sglang import Sglang
from suites.probe.told import Asked, Crowded, Engine
from suites.probe.verdict import Drafting, Verdict, Word, enough, hold, reference_arm
from suites.probe.vllm import Vllm
from suites.probe.wire import Wire

ENGINES: Mapping[str, Callable[[Wire, str], Engine]] = {VLLM: Vllm.at, SGLANG: Sglang.at}
MANY = 2**20
"""positions of a target that names no end of them"""
EXITS = {Word.AGREE: Exit.PASSED, Word.DISAGREE: Exit.GATE_FAILED, Word.TOO_FEW: Exit.INCONCLUSIVE}


@dataclass(frozen=True)
class Options:
    """What was asked for."""

    url: str
    engine: str
    target: Path | None = None
    draft: Path | None = None
    prompts: Path | None = None
    num_prompts: int = 80
    asked: Asked = field(default_factory=Asked)
    model: str = ""
    within: float = 0.05
    """share of the reference's acceptance length; vLLM's own test of acceptance lengths has the same"""
    timeout: float = 60.0
    retries: int = 3
    key_from: str = ""
    """environment variable that holds the engine's key"""
    side: Mapping[str, Any] = field(default_factory=lambda: {"side": "reference"})

    def __post_init__(self) -> None:
        if self.engine not in ENGINES:
            raise UsageFault(f"--engine is {self.engine!r}; known are {', '.join(ENGINES)}")
        if (self.target is None) != (self.draft is None):
            raise UsageFault("the reference needs both --target and --draft, or neither")
        if self.num_prompts < 1 or self.asked.num_tokens < 4 or not self.asked.temperature >= 0 or not self.within > 0:
            raise UsageFault("needed: a prompt, 4 tokens of an answer, a temperature from 0 on, a bound above 0")
        if self.key_from and self.key_from not in os.environ:
            raise UsageFault(f"--api-key-env names {self.key_from}, which is not set")


def probe(desk: Desk, asked: Options) -> Answer:
    """Ask, convert, compare."""
    wire = Wire(asked.url, asked.timeout, asked.retries, key=os.environ.get(asked.key_from, ""))
    prompts = read_prompts(asked.prompts or ZOO / PROMPTS)[: asked.num_prompts]
    engine = ENGINES[asked.engine](wire, asked.model)
    rows = {} if asked.target is None else token_ids(prompts, asked.target, asked.asked, engine)
    engine.facts()  # what cannot be read is told before minutes of answers
    try:
        arm, cut = told(desk, engine, prompts, rows, asked)
    except Crowded as error:
        desk.say(f"inconclusive: {error}; its counters speak of all requests together, so ask it while it is idle")
        return Answer(Exit.INCONCLUSIVE, {"verdict": str(Word.TOO_FEW), "reason": str(error)})
    own = None if not rows else reference(desk, engine, rows, asked)
    few = enough(arm)
    found = hold(own, arm, asked.within) if own else None
    word, reason = (found.word, found.reason) if found else (Word.TOO_FEW if few else "", few)
    facts = {"engine": engine.name, "url": asked.url, **engine.facts(), "verdict": str(word), "reason": reason}
    facts |= {"num_draft_tokens": arm.num_draft_tokens, "tree": dict(engine.tree), "cut_answers": cut}
    facts |= {"acceptance": summary(arm), "reference": summary(own) if own else None}
    facts["difference"] = list(found.difference[:3]) if found else None
    facts["definitions"] = [one._asdict() for one in DEFINITIONS if one.engine == engine.name]
    show(desk, facts, arm, own, found)
    return Answer(EXITS[found.word] if found else Exit.INCONCLUSIVE if few else Exit.PASSED, facts)


def token_ids(prompts: Sequence[Prompt], target: Path, asked: Asked, engine: Engine) -> dict[str, Tensor]:
    """The prompts as the target's tokenizer reads them, so that both sides are asked the same ids."""
    config = open_checkpoint(target).config
    text = config.get("text_config") or config
    drafted = engine.tree.get("num_draft_tokens", engine.num_draft_tokens)
    room = int(text.get("max_position_embeddings", MANY)) - asked.num_tokens - drafted - 1
    rows = encode(prompts, "prompts", target, room).rows
    return {prompt.name: row for prompt, row in zip(prompts, rows, strict=True)}


def told(
    desk: Desk, engine: Engine, prompts: Sequence[Prompt], rows: Mapping[str, Tensor], asked: Options
) -> tuple[Arm, int]:
    """What the engine accepted by prompt, and how many answers broke off and are left out; one prompt at a time."""
    steps, cut = {}, 0
    with desk.progress() as progress:
        bar = progress.add_task(f"{engine.name} {asked.url}", total=len(prompts))
        for prompt in prompts:
            one = engine.ask(rows[prompt.name].tolist() if rows else prompt.text, asked.asked)
            if one.is_whole:
                steps[prompt.name] = one.steps
            cut += not one.is_whole
            progress.advance(bar)
    return Arm(engine.num_draft_tokens, steps), cut


def reference(desk: Desk, engine: Engine, rows: Mapping[str, Tensor], asked: Options) -> Arm:
    """What the reference accepts on the same ids, drafting as the engine does."""
    assert asked.target is not None
    assert asked.draft is not None
    speculation = open_speculation(asked.target, asked.draft, **asked.side)
    drafting = Drafting(asked.asked.num_tokens, asked.asked.temperature, engine.num_draft_tokens, engine.tree)
    ends = speculation.target.voice.ends
    with desk.progress() as progress:
        bar = progress.add_task("reference", total=len(rows))
        return reference_arm(speculation, rows, drafting, ends, lambda count: progress.advance(bar, count))


def summary(arm: Arm) -> dict[str, Any]:
    """Plain values, as `--json` prints them."""
    return {
        "acceptance_length": list(acceptance_length(arm)[:3]),
        "rates": [list(unconditional[:3]) for unconditional, _ in rates(arm)],
        "prompts": sum(bool(steps) for steps in arm.steps.values()),
        "steps": sum(map(len, arm.steps.values())),
    }


def show(desk: Desk, facts: Mapping[str, Any], arm: Arm, own: Arm | None, found: Verdict | None) -> None:
    """Verdict first, then the numbers, then where they come from."""
    desk.say(f"{facts['verdict'] or 'no reference, so no verdict'}{': ' if facts['reason'] else ''}{facts['reason']}")
    if facts["cut_answers"]:
        desk.say(f"{facts['cut_answers']} answers broke off and are left out")
    names = ["acceptance length", *(f"rate of position {i + 1}" for i in range(arm.num_draft_tokens))]
    sides = [[acceptance_length(side), *(rate for rate, _ in rates(side))] for side in (arm, own) if side is not None]
    rows = [(name, *map(_told, values)) for name, *values in zip(names, *sides, strict=True)]
    if found and found.difference.known:
        rows.append(("difference of lengths", _told(found.difference), ""))
    head = ("", facts["engine"], "reference")[: 1 + len(sides)]
    desk.table(f"K={arm.num_draft_tokens}, {facts['acceptance']['steps']} verify steps, 95 % intervals", head, rows)
    if facts.get("avg_spec_accept_length"):
        desk.say(f"the engine's own mean since its start: {facts['avg_spec_accept_length']}")
    columns = ("theirs", "what it counts", "ours", "source")
    desk.table("Definitions", columns, [tuple(one[key] for key in ("theirs", "means", "ours", "source"))
                                        for one in facts["definitions"]])  # fmt: skip


def _told(interval: Interval) -> str:
    span = f" ({interval.low:.3f} to {interval.high:.3f})" if interval.known else ""
    return f"{interval.value:.3f}{span}"
