"""`draftproof bench`: acceptance, tokens/s and operations, recorded; never from a pair whose claims are red."""

import tempfile
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

from harness.checkpoints import open_checkpoint
from harness.record import Recorder, Sample
from harness.runner import Exit
from reports.statistics import APART
from suites.benchmarks import ab, acceptance, made, ops, races, separation
from suites.benchmarks.forced import RATES
from suites.benchmarks.measure import DRY, Protocol
from suites.benchmarks.prompts import Encoded, encode, read_prompts
from suites.benchmarks.shapes import SHAPES, Shape, shallow, small
from suites.benchmarks.shipped import PROMPTS, ZOO, Located, shipped
from suites.commands.check import gate, hold_capabilities
from suites.commands.desk import Answer, Desk, UsageFault

PARTS = ("acceptance", "decode", "ops")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Options:
    """What a bench is asked for."""

    pairs: tuple[str, ...] = ()
    """(): every shipped pair's acceptance, the first one's speed"""
    prompts: Path | None = None
    """None: the held-out prompts of the zoo"""
    num_prompts: int = 80
    num_tokens: int = 64
    num_draft_tokens: int = 3
    temperatures: tuple[float, ...] = (0.0, 1.0)
    num_sequences: int = 600
    """of held-out text, for what a reading costs"""
    blocks: int = 10
    timed_prompts: int = 4
    timed_tokens: int = 48
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    device: str = "cpu"
    threads: int = 1
    """of torch: a small pair gains nothing from more, and a neighbour on one of the cores stops them all"""
    big: bool = True
    """also time the random model of 100 M parameters"""
    zoo: Path = ZOO
    shapes: tuple[str, ...] = ()
    """whose operations are measured; (): the first one's"""

    def __post_init__(self) -> None:
        for name in ("num_prompts", "num_draft_tokens", "blocks", "timed_prompts", "threads"):
            if getattr(self, name) < 1:
                raise UsageFault(f"{name} is {getattr(self, name)}; at least 1 is needed")
        if min(self.num_tokens, self.timed_tokens) < 4:
            raise UsageFault("an answer of fewer than 4 tokens holds no whole verify step")
        if unknown := [name for name in self.dtypes if name not in DTYPES]:
            raise UsageFault(f"dtype {unknown[0]!r} is none of {', '.join(DTYPES)}")
        if self.device not in ("cpu", "cuda"):
            raise UsageFault(f"device {self.device!r} is neither cpu nor cuda")
        if unknown := [name for name in self.shapes if name not in SHAPES]:
            raise UsageFault(f"shape {unknown[0]!r} is none of {', '.join(SHAPES)}")

    @property
    def arguments(self) -> list[str]:
        """The same as a command line."""
        said = {"--pair": self.pairs, "--dtype": self.dtypes, "--shape": self.shapes}
        said |= {"--prompts": (self.prompts,) if self.prompts else (), "--zoo": (self.zoo,)}
        said |= {"--num-prompts": (self.num_prompts,), "--num-tokens": (self.num_tokens,), "--blocks": (self.blocks,)}
        said |= {"-K": (self.num_draft_tokens,), "--device": (self.device,), "--threads": (self.threads,)}
        listed = [str(word) for option, values in said.items() for value in values for word in (option, value)]
        return [*listed, "--big" if self.big else "--no-big"]


def bench(desk: Desk, begin: Callable[[], Recorder], parts: Collection[str], options: Options, profile: str) -> Answer:
    """Hold the claims, then measure; a red gate ends it with the gate's own code."""
    hold_capabilities(("gpu",) if options.device == "cuda" else ())
    pairs = chosen(options) if {"acceptance", "decode"} & {*parts} else []
    shapes = [SHAPES[name] for name in options.shapes or list(SHAPES)[:1]] if "ops" in parts else []
    # a file that cannot be read is told before minutes of claims
    texts = {pair.name: read(pair, options) for pair in pairs}
    torch.set_num_threads(options.threads)
    recorder = begin()
    names = dict.fromkeys([*(pair.name for pair in pairs), *(shape.speculation for shape in shapes)])
    held = gate(desk, recorder, list(names), profile)
    if held.exit != Exit.PASSED:
        desk.say("nothing was measured: numbers come only from a green gate")
        return held
    facts: dict[str, Any] = {"run": recorder.run_id, "records": str(recorder.path)}
    if "acceptance" in parts:
        facts["acceptance"], facts["separation"] = accept(desk, recorder, pairs, texts, options)
    if "decode" in parts:
        facts["decode"] = speeds(desk, recorder, pairs if options.pairs else pairs[:1], texts, options)
    if "ops" in parts:
        facts["ops"] = operations(desk, recorder, shapes, options)
    desk.say(f"run {recorder.run_id}: {recorder.path}")
    return Answer(verdict([one["errors"] for one in facts.get("separation", ())]), facts)


def against(desk: Desk, revision: str, part: str, options: Options, profile: str, runs: Path, processes: int) -> Answer:
    """The same bench in processes of both commits, which take turns."""
    asked = options.arguments
    # each side reads the weights of its own tree, unless others were asked for
    if options.zoo == ZOO:
        del asked[asked.index("--zoo") : asked.index("--zoo") + 2]
    return ab.race(desk, revision, ["bench", part, *asked, "--profile", profile], runs, processes)


def chosen(options: Options) -> list[Located]:
    """The pairs that are asked for; UsageFault for one that does not ship."""
    pairs = shipped(options.zoo, options.pairs)
    if missing := set(options.pairs) - {pair.name for pair in pairs}:
        raise UsageFault(f"no trained pair ships as {sorted(missing)[0]!r}; `draftproof zoo show` lists those that do")
    return pairs


def verdict(errors: Sequence[float]) -> Exit:
    """Of the other readings: each must be told from the stated one, and be worse."""
    if any(error < -APART for error in errors):
        return Exit.GATE_FAILED
    return Exit.PASSED if all(error > APART for error in errors) else Exit.INCONCLUSIVE


def read(pair: Located, options: Options) -> Encoded:
    """The prompts that a pair is asked, as its own tokenizer reads them."""
    file = options.prompts or options.zoo / PROMPTS
    room = positions(pair) - max(options.num_tokens, options.timed_tokens) - options.num_draft_tokens - 1
    return encode(read_prompts(file)[: options.num_prompts], file.name, pair.target, room)


def positions(pair: Located) -> int:
    """How many positions the target was made for."""
    return int(open_checkpoint(pair.target).config["max_position_embeddings"])


def accept(
    desk: Desk, recorder: Recorder, pairs: Sequence[Located], texts: dict[str, Encoded], options: Options
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Acceptance on every shipped pair, and the separation of its facts from their neighbours."""
    found, apart = [], []
    with desk.progress() as progress:
        for pair in pairs:
            prompts, speculation = texts[pair.name], pair.open(side="optimized", device=options.device)
            if prompts.num_cut:
                desk.say(f"{prompts.num_cut} of {len(prompts.rows)} prompts lost their beginning to fit {pair.name}")
            for temperature in options.temperatures:
                bar = progress.add_task(f"{pair.name} T={temperature:g}", total=len(prompts.rows))
                answered = acceptance.answer(
                    pair,
                    speculation,
                    prompts,
                    num_tokens=options.num_tokens,
                    num_draft_tokens=options.num_draft_tokens,
                    temperature=temperature,
                    advance=lambda count, bar=bar: progress.advance(bar, count),
                )
                recorder.append(*answered.accepts, *([answered.repeated] if answered.repeated else []))
                found.append(answered.summary())
            bar = progress.add_task(f"{pair.name} other readings", total=None)
            samples, separations = separation.separate(pair, separation.sequences(pair, options.num_sequences))
            recorder.append(*samples)
            apart += [one.summary(pair.name) for one in separations]
    show_acceptance(desk, found)
    show_separation(desk, apart)
    return found, apart


def show_acceptance(desk: Desk, found: Sequence[dict[str, Any]]) -> None:
    """One row a pair and temperature."""
    rows = [
        (
            one["pair"],
            "greedy" if not one["temperature"] else f"T={one['temperature']:g}",
            f"{one['acceptance_length']:.2f}",
            "{:.2f} to {:.2f}".format(*one["interval"]) if one["interval"] else "needs two prompts",
            ", ".join(f"{rate:.2f}" for rate in one["rates"]),
            one["prompts"],
            one["steps"],
            "" if one["repeated_4grams"] is None else f"{one['repeated_4grams']:.2f}",
        )
        for one in found
    ]
    head = ("pair", "sampling", "length", "95 % interval", "rates", "prompts", "steps", "repeated 4-grams")
    desk.table(f"Acceptance, K={found[0]['num_draft_tokens']}", head, rows)


def show_separation(desk: Desk, apart: Sequence[dict[str, Any]]) -> None:
    """One row a shift."""
    rows = [
        (
            one["pair"],
            one["reading"],
            ", ".join(map(str, one["points"])),
            f"{one['loss']:+.3f}",
            f"{one['errors']:+.1f}",
            one["sequences"],
        )
        for one in apart
    ]
    head = ("pair", "other reading", "capture points", "nats a token", "standard errors", "sequences")
    desk.table("Other readings, against the stated ones", head, rows)


def speeds(
    desk: Desk, recorder: Recorder, pairs: Sequence[Located], texts: dict[str, Encoded], options: Options
) -> list[dict[str, Any]]:
    """Every shipped pair with real acceptance, then the random one with forced acceptance."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        wanted = [race_of(pair, texts[pair.name].first(options.timed_prompts).rows, options) for pair in pairs]
        if options.big:
            big = race_of(made.make(Path(folder)), made.prompts(1), options)
            wanted.append(replace(big, is_forced=True))
        for race in wanted:
            rows = [timed(desk, recorder, replace(race, dtype=DTYPES[name])) for name in options.dtypes]
            show_speeds(desk, rows)
            found += rows
    return found


def race_of(pair: Located, rows: tuple[torch.Tensor, ...], options: Options) -> races.Race:
    """What the options say about timing."""
    return races.Race(
        pair,
        rows,
        device=options.device,
        num_tokens=options.timed_tokens,
        num_draft_tokens=len(RATES),
        blocks=options.blocks,
    )


def timed(desk: Desk, recorder: Recorder, race: races.Race) -> dict[str, Any]:
    """One race, recorded; its summary as plain values."""
    dtype = str(race.dtype).removeprefix("torch.")
    with desk.progress() as progress:
        bar = progress.add_task(f"{race.pair.name} {dtype}", total=None)
        raced = races.run(race, lambda: progress.advance(bar))
    recorder.append(*raced.samples)
    return {
        "pair": race.pair.name,
        "dtype": dtype,
        "acceptance": "forced" if race.is_forced else "real",
        "tokens_per_s": {arm: round(speed, 2) for arm, speed in raced.speeds.items()},
        "ratios": {name: [round(x, 3) for x in ratio[:3]] for name, ratio in raced.ratios.items()},
        "verify_in_decode_steps": round(raced.verify_cost, 3),
        "same_text_as_transformers": raced.same_text,
    }


def operations(desk: Desk, recorder: Recorder, shapes: Sequence[Shape], options: Options) -> list[dict[str, Any]]:
    """Every operation of the shapes, at their own sizes on a GPU and small elsewhere."""
    on_gpu = options.device == "cuda"
    protocol = replace(Protocol() if on_gpu else DRY, num_blocks=4 * options.blocks)
    sized = [shallow(shape, ops.LAYERS) if on_gpu else small(shape) for shape in shapes]
    medians: dict[tuple[str, str, str], dict[str, list[float]]] = {}
    with desk.progress() as progress:
        bar = progress.add_task("operations", total=None)
        for sample in ops.measure(sized, protocol, "passed", lambda: progress.advance(bar)):
            recorder.append(sample)
            if not isinstance(sample, Sample):
                continue
            key = (sample.case.family, sample.case.variant, sample.case.form)
            medians.setdefault(key, {}).setdefault(sample.metric, []).extend(sample.values)
    rows = [
        {"op": op, "sizes": sizes, "form": form, "us": median(of["op_time"]), "bandwidth": median(of["op_bandwidth"])}
        for (op, sizes, form), of in medians.items()
        if "op_time" in of
    ]
    head = ("operation", "sizes", "form", "us", "of the copy's bandwidth")
    told = [(r["op"], r["sizes"], r["form"], f"{r['us']:.1f}", f"{r['bandwidth']:.1%}") for r in rows]
    desk.table("Operations", head, told)
    return rows


def show_speeds(desk: Desk, found: Sequence[dict[str, Any]]) -> None:
    """Real and forced acceptance have a table each."""
    head = ("dtype", "arm", "tokens/s", f"to {races.TRANSFORMERS}", "95 % interval", f"to {races.PLAIN}")
    rows = []
    for one in found:
        for arm, speed in one["tokens_per_s"].items():
            ratio = one["ratios"].get(f"{arm} / {races.TRANSFORMERS}")
            own = one["ratios"].get(f"{arm} / {races.PLAIN}")
            told = (f"{ratio[0]:.2f} x", f"{ratio[1]:.2f} to {ratio[2]:.2f}") if ratio else ("1 x", "")
            rows.append((one["dtype"], arm, f"{speed:.1f}", *told, f"{own[0]:.2f} x" if own else ""))
    desk.table(f"{found[0]['pair']}: tokens/s, one sequence, {found[0]['acceptance']} acceptance", head, rows)
    for one in found:
        width, cost = len(RATES) + 1, one["verify_in_decode_steps"]
        desk.say(f"{one['dtype']}: a verify of {width} rows costs {cost:.2f} decode steps")
