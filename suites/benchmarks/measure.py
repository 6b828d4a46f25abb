"""One published shape, measured: what its machinery reaches at forced acceptance, beside what no version can pass.

    python -m suites.benchmarks.measure Llama-3.1-8B-eagle3 --claims CLAIMS.jsonl --runs FOLDER

Every shape ends in a record of its own. Numbers come from one process, arms take turns A B B A, the same arm under
another name is the A/A of the run, and a run whose device forced other rates than its record states is refused.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean, median

import torch

from harness import timing
from harness.environment import describe
from harness.record import Case, Check, Observation, Recorder, Run, Sample, read
from harness.runner import Exit
from harness.telemetry import Telemetry
from suites.benchmarks import baselines, ceilings, experts, forced, phases, roofline
from suites.benchmarks.roofline import Ceilings, Traffic
from suites.benchmarks.shapes import SHAPES, Built, Shape, build, free, small
from suites.benchmarks.steady import Steady, num_slots

PLAIN, DRAFTING, AGAIN = "plain", "drafting", "drafting again"
ROOM = 100e9
"""bytes that may lie on the device"""
LATER = 1000
"""number of the first block of a second race"""
CLAIM = "suites/benchmarks/measure.py"
Write = Callable[[Observation], None]


@dataclass(frozen=True)
class Protocol:
    """How long and where."""

    device: str = "cuda"
    dtype: torch.dtype = torch.bfloat16
    form: str | None = None
    """of the operations; None: by device"""
    num_cycles: int = 12
    """of a visit"""
    num_blocks: int = 20
    num_phase_blocks: int = 6
    warm_up_s: float = 4.0
    agree: float = 0.01
    energy_s: float = 2.0
    rate_steps: int = 512
    """over which forced rates are held"""
    sweep: tuple[int, ...] = (1, 2, 5, 7)
    """other numbers of drafts, every draft kept"""
    ceiling: ceilings.Size = ceilings.LARGE
    baselines: tuple[str, ...] = tuple(baselines.MAKERS)
    """of the smallest batch"""
    is_alone: bool = False
    """baselines without the twin beside them, which would not fit: the record of another process of the same script"""
    process: int = 0

    @property
    def most_drafts(self) -> int:
        """Of any arm."""
        return max(len(forced.RATES), *self.sweep, 0)


DRY = Protocol(
    device="cpu",
    dtype=torch.float32,
    num_cycles=3,
    num_blocks=2,
    num_phase_blocks=2,
    warm_up_s=0.0,
    energy_s=0.05,
    rate_steps=64,
    sweep=(1,),
    ceiling=ceilings.SMALL,
)


@dataclass(frozen=True)
class Bench:
    """One batch of one shape on a device, and what it says of itself."""

    built: Built
    batch: int
    protocol: Protocol
    gate: str
    telemetry: Telemetry
    reached: Ceilings

    def case(self, rates: Sequence[float] = (), acceptance: str = "real", **facts: str) -> Case:
        """The case of an arm that drafts one token a rate."""
        shape, device = self.built.shape, self.protocol.device
        target, draft = shape.pairs
        where = f"{self.protocol.form or ('triton' if device == 'cuda' else 'aten')}{', graph' * (device == 'cuda')}"
        said = "dry run" if shape.is_small else ""
        return Case(
            pair=shape.name,
            gate=self.gate,
            family=target.name,
            method=draft.name if rates else "",
            form=facts.pop("form", where),
            impl=facts.pop("impl", "optimized"),
            dtype=str(self.protocol.dtype).removeprefix("torch."),
            device=device,
            batch=self.batch,
            tp=self.built.text.at.group.size,
            num_draft_tokens=len(rates),
            acceptance=acceptance,
            forced_rates=tuple(rates) if acceptance == "forced" else (),
            variant=", ".join(filter(None, (said, facts.pop("variant", "")))),
            capture_points=shape.points if rates else (),
            config_sha256=shape.digest,
        )

    def steady(self, rates: Sequence[float] = (), beside: Steady | None = None) -> Steady:
        """An arm; one beside another reads the same keys, so that a large batch lies on the device once."""
        return Steady(self.built, self.batch, rates, self.protocol.num_cycles, beside, self.protocol.most_drafts)

    def race(self, arms: Mapping[str, timing.Call], num_blocks: int) -> timing.Timing:
        """Turns there and back, each arm giving the seconds of its own steps."""
        p = self.protocol
        clock = (p.device, p.agree, p.warm_up_s, timing.told_seconds, self.telemetry.window)
        return timing.interleave(arms, num_blocks, 1, *clock)

    def sample(self, case: Case, metric: str, unit: str, better: str, values: Sequence[float]) -> Sample:
        short = tuple(float(f"{v:.6g}") for v in values)
        return Sample(case=case, metric=metric, unit=unit, better=better, values=short, process=self.protocol.process)

    def visits(
        self, case: Case, timed: timing.Timing, arm: str, length: float, floor: float | None, first: int = 0
    ) -> Iterator[Sample]:
        """Every visit of an arm: raw steps, tokens/s, share of the floor.

        first    number of the first block
        length   tokens of one step and sequence: of forced rates the exact one, since chance moves no cost
        """
        p = self.protocol
        for visit in timed.visits[arm]:
            place = {"block": first + visit.block, "order": visit.order, "process": p.process, "case": case}
            place["telemetry"] = visit.telemetry(settled=timed.settled[arm])
            raw = tuple(float(f"{1000 * s:.6g}") for s in visit.seconds)
            yield Sample(metric="cycle", unit="ms", better="down", values=raw, **place)
            speed = float(f"{self.batch * length / fmean(visit.seconds):.6g}")
            yield Sample(metric="decode", unit="tokens/s", better="up", values=(speed,), **place)
            if floor is not None:
                share = float(f"{floor / median(visit.seconds):.6g}")
                # the device stands beside the other two
                place["telemetry"] = {"valid": visit.valid}
                yield Sample(metric="utilisation", unit="share", better="up", values=(share,), **place)

    def must(self, case: Case, passes: tuple[Traffic, ...]) -> Iterator[Sample]:
        """The floor of a step and the bytes behind it."""
        yield self.sample(case, "floor", "ms", "none", [1000 * roofline.floor(passes, self.reached)])
        yield self.sample(case, "bytes_weights", "GB", "none", [sum(one.weights for one in passes) / 1e9])
        yield self.sample(case, "bytes_keys", "GB", "none", [sum(one.keys for one in passes) / 1e9])

    def energy(self, steady: Steady, case: Case) -> Iterator[Sample]:
        """Joules a committed token, over seconds of work; nothing where the device does not tell."""
        start, tokens, seed = timing.now(), 0, 0
        with self.telemetry.window() as meanwhile:
            while timing.now() - start < self.protocol.energy_s:
                seed += 1
                steady.begin(seed)
                for _ in range(steady.num_cycles):
                    steady.step()
                tokens += committed(steady)
        if joules := meanwhile.get("energy_j"):
            yield self.sample(case, "energy", "J/token", "down", [per_token(joules, tokens)])


def committed(steady: Steady) -> int:
    """Tokens that a visit's cycles committed, of all sequences; the first of each came before."""
    return int(steady.session.state.num_output.sum()) - steady.session.plan.batch


def per_token(joules: float, tokens: int) -> float:
    """Joules a committed token."""
    return joules / tokens


def measure(shape: Shape, protocol: Protocol, gate: str, write: Write) -> None:
    """Everything about one shape, observation by observation."""
    with Telemetry() as telemetry:
        reached, samples = ceilings.measure(protocol.device, protocol.dtype, protocol.ceiling, telemetry)
        for sample in samples:
            write(sample)
        free()
        if protocol.is_alone:
            built = build(shape, "meta", protocol.dtype)
            for observation in alone(Bench(built, 1, protocol, gate, telemetry, reached)):
                write(observation)
            return
        # a batch of its own after another: a twin knows the largest number of rows of its steps
        for batch in shape.batches:
            rows = batch * (len(forced.RATES) + 1)
            empty = build(shape, "meta", protocol.dtype)
            slots = num_slots(empty, protocol.num_cycles, protocol.most_drafts)
            held = roofline.resident(empty, batch, slots)
            if held > ROOM:
                write(skipped(shape, f"B={batch}", f"needs {held / 1e9:.0f} GB, {ROOM / 1e9:.0f} GB are allowed"))
                continue
            built = build(shape, protocol.device, protocol.dtype, num_rows=rows, form=protocol.form)
            bench = Bench(built, batch, protocol, gate, telemetry, reached)
            for observation in observed(bench):
                write(observation)
            del built, bench
            free()


def observed(bench: Bench) -> Iterator[Observation]:
    """One batch: the race with its A/A and its baselines, phases, energy, experts, other numbers of drafts."""
    built, batch, protocol = bench.built, bench.batch, bench.protocol
    plain = bench.steady()
    drafting = bench.steady(forced.RATES, plain)
    cases = {PLAIN: bench.case(), DRAFTING: bench.case(forced.RATES, "forced")}
    floors = {PLAIN: roofline.decode(built, batch), DRAFTING: roofline.cycle(built, batch, len(forced.RATES))}
    yield bench.sample(cases[DRAFTING], "length", "tokens a step", "none", [drafting.hold_rates(protocol.rate_steps)])
    arms: dict[str, timing.Call] = {PLAIN: plain.visit, DRAFTING: drafting.visit}
    if batch == built.shape.batches[0]:
        arms[AGAIN] = drafting.visit
        cases[AGAIN], floors[AGAIN] = bench.case(forced.RATES, "forced", variant="A/A"), floors[DRAFTING]
    timed = bench.race(arms, protocol.num_blocks)
    for arm, case in cases.items():
        length = 1.0 if arm == PLAIN else forced.length(forced.RATES)
        yield from bench.visits(case, timed, arm, length, roofline.floor(floors[arm], bench.reached))
        yield from bench.must(case, floors[arm]) if arm != AGAIN else ()
    if AGAIN in arms:
        yield from others(bench, plain)
    yield from phases.split(plain, drafting, cases[DRAFTING], forced.length(forced.RATES), protocol.num_phase_blocks)
    for arm, steady in ((PLAIN, plain), (DRAFTING, drafting)):
        yield from bench.energy(steady, cases[arm])
        if counts := experts.touched(steady):
            yield bench.sample(cases[arm], "distinct_experts", "experts", "none", counts)
    del drafting, steady
    free()
    for num_drafts in protocol.sweep:
        yield from swept(bench, plain, num_drafts)


def others(bench: Bench, plain: Steady) -> Iterator[Observation]:
    """Baselines beside plain decoding, in blocks of their own: a slow arm would spread those of a fast one."""
    protocol = bench.protocol
    found = baselines.arms(bench.built, protocol.device, protocol.baselines)
    for name, made in found.items():
        if isinstance(made, str):
            yield skipped(bench.built.shape, name, made)
    made_arms = {name: made for name, made in found.items() if not isinstance(made, str)}
    if made_arms:
        arms: dict[str, timing.Call] = {PLAIN: plain.visit, **{name: arm.visit for name, arm in made_arms.items()}}
        timed = bench.race(arms, max(2, protocol.num_blocks // 3))
        yield from bench.visits(bench.case(), timed, PLAIN, 1.0, None, LATER)
        for name, arm in made_arms.items():
            yield from bench.visits(bench.case(impl=arm.impl, form=arm.form), timed, name, 1.0, None, LATER)
        arms.clear()
    found.clear()
    made_arms.clear()
    free()


def alone(bench: Bench) -> Iterator[Observation]:
    """Baselines of a shape that leaves no room beside itself."""
    for name, made in baselines.arms(bench.built, bench.protocol.device, baselines.ALONE).items():
        if isinstance(made, str):
            yield skipped(bench.built.shape, name, made)
        else:
            timed = bench.race({name: made.visit}, bench.protocol.num_blocks)
            # no block of another process is the partner of one of these
            yield from bench.visits(bench.case(impl=made.impl, form=made.form), timed, name, 1.0, None, 2 * LATER)
        del made
        free()


def swept(bench: Bench, plain: Steady, num_drafts: int) -> Iterator[Sample]:
    """Another number of drafts beside plain decoding, every draft kept."""
    rates = (1.0,) * num_drafts
    case, other = bench.case(rates, "oracle"), bench.steady(rates, plain)
    timed = bench.race({PLAIN: plain.visit, DRAFTING: other.visit}, max(2, bench.protocol.num_blocks // 4))
    passes = roofline.cycle(bench.built, bench.batch, num_drafts)
    yield from bench.visits(case, timed, DRAFTING, forced.length(rates), roofline.floor(passes, bench.reached))
    yield from bench.must(case, passes)
    steps, cycles = (median(s for v in timed.visits[arm] for s in v.seconds) for arm in (PLAIN, DRAFTING))
    yield bench.sample(case, "break_even", "tokens a step", "down", [cycles / steps])
    del other
    free()


def skipped(shape: Shape, what: str, reason: str) -> Check:
    """What a step leaves out, and why."""
    return Check(claim=f"{CLAIM}::{shape.name} {what}", pair=shape.name, status="skipped", reason=reason)


def gate_of(shape: Shape, claims: Path | None) -> str:
    """Whether a record proves a shape, as its speculation or as both its pairs, and refutes none of these."""
    if claims is None or not claims.is_file():
        return "not_run"
    pairs, whole = {pair.name for pair in shape.pairs}, shape.speculation
    held = [o for o in read(claims) if isinstance(o, Check) and o.pair in {whole, *pairs}]
    if any(o.status in ("failed", "error") for o in held):
        return "failed"
    proven = {o.pair for o in held if o.status == "passed"}
    return "passed" if whole in proven or pairs <= proven else "not_run"


def main(arguments: Sequence[str] | None = None) -> int:
    """One shape from the command line; the exit code is that of the commands."""
    asked = parsed(arguments)
    shape = small(SHAPES[asked.shape]) if asked.dry_run else SHAPES[asked.shape]
    shape = replace(shape, batches=tuple(asked.batch or shape.batches))
    gate = gate_of(shape, asked.claims)
    if gate != "passed":
        print(f"{shape.name}: its claims are {gate.replace('_', ' ')}; no speed is measured", file=sys.stderr)  # noqa: T201
        return Exit.GATE_FAILED
    facts = {"process": asked.process, "is_alone": asked.alone, "form": asked.form}
    facts |= {"baselines": BASELINES[asked.baselines], **({"num_blocks": asked.blocks} if asked.blocks else {})}
    facts |= {"sweep": (), "num_phase_blocks": 2, "energy_s": 0.1} if asked.short else {}
    protocol = replace(DRY if asked.dry_run else Protocol(), **facts)
    torch.set_num_threads(1)
    with Recorder(asked.record) as recorder:
        begin(recorder, asked.dry_run)
        start = timing.now()
        measure(shape, protocol, gate, recorder.append)
        done = Check(claim=f"{CLAIM}::{shape.name}", pair=shape.name, status="passed", duration_s=timing.now() - start)
        recorder.append(done)
    return Exit.PASSED


def begin(recorder: Recorder, is_dry: bool) -> None:
    """The line that says where everything after it comes from."""
    about, now = describe(), datetime.now(UTC).isoformat(timespec="seconds")
    facts = {"started": now, "version": about["versions"]["draftproof"] or "", "environment": about}
    recorder.append(Run(argv=tuple(sys.argv), profile="dry run" if is_dry else "", **facts))


BASELINES = {"all": tuple(baselines.MAKERS), "loops": baselines.LOOPS, "none": ()}


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """What a step is asked for."""
    parser = argparse.ArgumentParser(description="Measure one published shape at random weights.")
    parser.add_argument("shape", choices=list(SHAPES))
    parser.add_argument("--record", type=Path, required=True, help="the file to append to")
    parser.add_argument("--claims", type=Path, help="the record of the claims that must be green")
    parser.add_argument("--dry-run", action="store_true", help="tiny size on a CPU; the record says so")
    parser.add_argument("--batch", type=int, action="append", help="only this batch; may be given several times")
    parser.add_argument("--blocks", type=int, help="blocks of the race")
    parser.add_argument("--baselines", choices=list(BASELINES), default="all")
    parser.add_argument("--alone", action="store_true", help="baselines alone, for a shape that fills the device")
    parser.add_argument("--short", action="store_true", help="the race alone, for one of several processes")
    parser.add_argument("--form", choices=("aten", "triton"), help="of the operations; by device when absent")
    parser.add_argument("--process", type=int, default=0, help="number of this process among several")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
