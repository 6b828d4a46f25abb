"""Tensor parallel over processes: one rank a process, a published shape in mid-text, tokens/s and who agrees.

    torchrun --nproc-per-node W -m suites.benchmarks.decode SHAPE --record FILE [--claims FILE]

NCCL on GPUs, with every sum over ranks inside the graph; gloo on CPUs at tiny size (`--dry-run`), which is the test of
this script. Every rank draws the same whole tensors and keeps its shard, so W ranks hold the model that one would hold.
All ranks must say the same text, which is refused otherwise; rank 0 writes the record.
"""

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from harness.record import Check, Observation, Recorder
from harness.runner import Exit
from harness.telemetry import Telemetry
from optimized.parallel import DistributedGroup, Group
from suites.benchmarks import ceilings, forced, phases, roofline
from suites.benchmarks.measure import CLAIM, DRAFTING, DRY, PLAIN, Bench, Protocol, begin, gate_of
from suites.benchmarks.shapes import SHAPES, Shape, build, small
from suites.benchmarks.steady import ChangedText, Steady


def measured(shape: Shape, protocol: Protocol, gate: str, group: Group, batch: int) -> Iterator[Observation]:
    """The race of plain decoding and drafting on this rank, phases, and the floor of a rank's share."""
    with Telemetry(torch.cuda.current_device() if protocol.device == "cuda" else 0) as telemetry:
        reached, samples = ceilings.measure(protocol.device, protocol.dtype, protocol.ceiling, telemetry)
        yield from samples
        rows = batch * (len(forced.RATES) + 1)
        built = build(shape, protocol.device, protocol.dtype, group, rows, protocol.form)
        bench = Bench(built, batch, protocol, gate, telemetry, reached)
        plain = bench.steady()
        drafting = bench.steady(forced.RATES, plain)
        cases = {PLAIN: bench.case(), DRAFTING: bench.case(forced.RATES, "forced")}
        for steady in (plain, drafting):
            hold_alike(steady, group)
        timed = bench.race({PLAIN: plain.visit, DRAFTING: drafting.visit}, protocol.num_blocks)
        length = forced.length(forced.RATES)
        floors = {PLAIN: roofline.decode(built, batch), DRAFTING: roofline.cycle(built, batch, len(forced.RATES))}
        for arm, case in cases.items():
            tokens = length if arm == DRAFTING else 1.0
            yield from bench.visits(case, timed, arm, tokens, roofline.floor(floors[arm], reached))
            yield from bench.must(case, floors[arm])
        yield from phases.split(plain, drafting, cases[DRAFTING], length, protocol.num_phase_blocks)


def hold_alike(steady: Steady, group: Group) -> None:
    """ChangedText where ranks say different texts."""
    mine = steady.said.to(steady.device)
    if not torch.equal(group.broadcast(mine), mine):
        raise ChangedText(f"{steady.built.shape.name}: rank {group.rank} says something else than rank 0")


def main(arguments: Sequence[str] | None = None) -> int:
    """One rank of several; the exit code is that of the commands."""
    asked = parsed(arguments)
    on_gpu = not asked.dry_run
    shape, protocol = (SHAPES[asked.shape], Protocol()) if on_gpu else (small(SHAPES[asked.shape]), DRY)
    gate = gate_of(shape, asked.claims)
    if gate != "passed":
        print(f"{shape.name}: its claims are {gate.replace('_', ' ')}; no speed is measured", file=sys.stderr)  # noqa: T201
        return Exit.GATE_FAILED
    torch.set_num_threads(1)
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if on_gpu else "gloo")
    group = DistributedGroup()
    try:
        # ranks time the same cycles, so they must agree on how many: no warm-up that watches a clock of its own
        found = list(measured(shape, replace(protocol, warm_up_s=0.0, agree=float("inf")), gate, group, asked.batch))
        if group.rank == 0:
            with Recorder(asked.record) as recorder:
                begin(recorder, asked.dry_run)
                recorder.append(*found, done(shape, group.size))
    finally:
        dist.destroy_process_group()
    return Exit.PASSED


def done(shape: Shape, size: int) -> Check:
    """The line that ends a whole record."""
    return Check(claim=f"{CLAIM}::{shape.name} over {size} ranks", pair=shape.name, status="passed")


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """What the ranks are asked for."""
    parser = argparse.ArgumentParser(description="Measure one published shape over several ranks.")
    parser.add_argument("shape", choices=list(SHAPES))
    parser.add_argument("--record", type=Path, required=True, help="the file to append to")
    parser.add_argument("--claims", type=Path, help="the record of the claims that must be green")
    parser.add_argument("--dry-run", action="store_true", help="tiny size on CPUs over gloo; the record says so")
    parser.add_argument("--batch", type=int, default=1)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
