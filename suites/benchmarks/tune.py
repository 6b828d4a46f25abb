"""The table of choices, measured: who multiplies by each published weight soonest, and in which tiles.

    python -m suites.benchmarks.tune [-o FILE] [--rows 16 64] [--size NAME ..] [--records FILE] [--dry-run]

Every candidate first gives the right product, then is timed: a graph goes through copies of one weight that no cache
holds together, one after another, and the median of its replays counts. Who wins is written with machine and versions
into the table that `optimized/ops/tiles.py` reads. A dry run walks the same steps on a CPU, at tiny sizes in the
interpreter: it measures nothing, so it writes choices that say so.
"""

import argparse
import itertools
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.nn import functional as F

from harness.compare import hold
from harness.record import Case, Observation, Recorder, Sample
from harness.timing import time_calls
from optimized.graphs import Replay
from optimized.ops.launch import Triton
from optimized.ops.table import choose
from optimized.ops.tiles import BUCKETS, CHOICES, Choice, Key, Tile, frozen, tile, write_choices
from optimized.parallel import GateUpLinear, SingleRank, VocabEmbedding, VocabHead
from optimized.shell import Shell
from suites.commands.memory import published

COLD_BYTES = 320 << 20
"""of copies of a weight: five times what the second-level cache of a Hopper holds"""
SHARED_BYTES = 232_448
REPEATS = {"cuda": 15, "cpu": 2}


class Weight(NamedTuple):
    """What is multiplied by: of a gate and its branch N counts one of the two."""

    kind: str
    """linear, gate_up or head"""
    out: int
    num_in: int


def weights(sizes: list[str]) -> list[Weight]:
    """Of every published target, or of those that are named."""
    found = set()
    for size, pair, keys in published():
        if pair.twin is None or (sizes and size not in sizes):
            continue
        twin = pair.optimized(pair.read_config(keys), choose("cpu"), SingleRank(), torch.bfloat16, "meta")
        if isinstance(twin, Shell):
            continue  # its text is published as a target of its own
        for part in twin.parts:
            if part.weight.dim() == 2 and not isinstance(part, VocabEmbedding):
                kind = {GateUpLinear: "gate_up", VocabHead: "head"}.get(type(part), "linear")
                found.add(Weight(kind, part.weight.shape[0] // (1 + (kind == "gate_up")), part.weight.shape[1]))
    return sorted(found)


def candidates(weight: Weight, rows: int) -> Iterator[Choice]:
    """The rule's choice first, then every tile that fits a program's memory, then the library."""
    rule = tile(weight.out, weight.num_in, rows, 2, 1 + (weight.kind == "gate_up"))
    yield Choice(rule)
    for block_n, block_k, num_warps, num_stages in itertools.product(
        (16, 32, 64), (64, 128, 256), (4, 8), (2, 3, 4, 5)
    ):
        blocks = Tile(rows, block_n, block_k, num_warps, num_stages)
        held = (rows + block_n * (1 + (weight.kind == "gate_up"))) * block_k * 2 * num_stages
        if blocks != rule and block_k <= weight.num_in and held <= SHARED_BYTES:
            yield Choice(blocks)
    if weight.kind == "linear":
        yield Choice(rule, library=True)


def early(best: Choice, weight: Weight, device: str) -> list[Choice]:
    """The same, launched before the kernel ahead has ended; asked of who won alone, and of GPUs."""
    return [] if best.library or weight.kind == "head" or device == "cpu" else [best._replace(early=True)]


class Bench:
    """Copies of one weight, and rows to multiply by them."""

    def __init__(self, weight: Weight, rows: int, device: str, dtype: torch.dtype, cold_bytes: int) -> None:
        self.weight, self.rows, self.device = weight, rows, device
        height = weight.out * (1 + (weight.kind == "gate_up"))
        count = max(2, math.ceil(cold_bytes / (height * weight.num_in * 2)))
        noise = torch.Generator(device).manual_seed(0)
        shape = (count, height, weight.num_in)
        self.copies = torch.empty(shape, dtype=dtype, device=device).normal_(0.0, 0.02, generator=noise)
        self.x = torch.empty(rows, weight.num_in, dtype=dtype, device=device).normal_(generator=noise)

    def call(self, choice: Choice, matrix: Tensor) -> Tensor:
        """One product: matrix [N, K] -> [M, N]; of a head the largest logits [M]"""
        key: Key = (matrix.element_size(), self.weight.out, self.weight.num_in, self.rows)
        ops = Triton(self.rows, choices={key: choice})
        if self.weight.kind == "head":
            return ops.head_argmax(self.x, matrix, self.weight.out)[0]
        return ops.linear(self.x, matrix) if self.weight.kind == "linear" else ops.gate_up_act(self.x, matrix)

    def hold(self, choice: Choice) -> None:
        """Red gate, no speed; errors: AssertionError with the share of its budget."""
        wide = self.x.float() @ self.copies[0].float().T
        gate, up = wide[:, : self.weight.out], wide[:, -self.weight.out :]
        want = {"linear": wide, "head": wide.amax(-1), "gate_up": F.silu(gate) * up}[self.weight.kind]
        got = self.call(choice, self.copies[0])
        hold(f"{self.weight} by {choice}", got, want, dtype=self.x.dtype, depth=1, width=self.weight.num_in)

    @torch.no_grad()
    def seconds(self, choice: Choice) -> tuple[float, ...]:
        """Of one product, a number a replay."""

        def through() -> None:
            for matrix in self.copies:
                self.call(choice, matrix)

        replay = Replay(through, self.device)
        replay()
        return tuple(s / len(self.copies) for s in time_calls(replay, REPEATS[self.device], self.device))


def tuned(bench: Bench, machine: Mapping[str, str], among: list[Choice]) -> tuple[Choice, list[Observation]]:
    """Who won, with what was measured; and a sample of each candidate."""
    times: dict[Choice, float] = {}
    samples: list[Observation] = []

    def ask(choices: list[Choice]) -> None:
        for choice in choices:
            bench.hold(choice)
            seconds = bench.seconds(choice)
            times[choice] = median(seconds)
            samples.append(sample(bench, choice, seconds))

    ask(among)
    ask(early(min(times, key=times.__getitem__), bench.weight, bench.device))
    best = min(times, key=times.__getitem__)
    us = {"us": round(1e6 * times[best], 3), "rule_us": round(1e6 * times[among[0]], 3), "beside": len(times) - 1}
    return best._replace(measured={**machine, **us}), samples


def sample(bench: Bench, choice: Choice, seconds: tuple[float, ...]) -> Sample:
    """Microseconds of a product."""
    w, by = bench.weight, "library" if choice.library else "x".join(map(str, choice.tile)) + ", early" * choice.early
    facts: dict[str, Any] = {"dtype": str(bench.x.dtype).removeprefix("torch."), "device": bench.device}
    facts |= {"family": w.kind, "form": by, "batch": bench.rows, "variant": f"{w.num_in} -> {w.out}"}
    values = tuple(float(f"{1e6 * s:.6g}") for s in seconds)
    case = Case(pair="tune", gate="passed", **facts)
    return Sample(case=case, metric="op_time", unit="us", better="down", values=values)


def machine() -> dict[str, str]:
    """Whose microseconds these are."""
    return {"device": torch.cuda.get_device_name(), "torch": str(torch.__version__), "triton": triton.__version__}


def dry(asked: list[Weight], rows: list[int]) -> dict[Key, Choice]:
    """The same steps at tiny sizes; nothing is measured, so the rule stands and says so."""
    for kind, out, num_in in (Weight("linear", 24, 64), Weight("gate_up", 16, 64), Weight("head", 40, 64)):
        bench = Bench(Weight(kind, out, num_in), rows[0], "cpu", torch.float32, 0)
        for choice in (Choice(Tile(rows[0], 16, 32, 4, 2)), Choice(Tile(rows[0], 32, 64, 4, 2))):
            bench.hold(choice)
            bench.seconds(choice)
    return {(2, w.out, w.num_in, m): next(candidates(w, m)) for w in asked for m in rows}


def main(argv: list[str] | None = None) -> None:
    """Measure, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, default=CHOICES)
    parser.add_argument("--rows", type=int, nargs="+", default=list(BUCKETS), choices=BUCKETS)
    parser.add_argument("--size", nargs="+", default=[], help="published targets; all when absent")
    parser.add_argument("--records", type=Path, help="takes a sample of each candidate; beside the table when absent")
    parser.add_argument("--dry-run", action="store_true")
    asked = parser.parse_args(argv)
    if not asked.dry_run and not torch.cuda.is_available():
        parser.error("measuring needs a GPU; --dry-run walks the same steps without one")
    table, every = dict(frozen()), weights(asked.size)
    if asked.dry_run:
        return write_choices(asked.output, dry(every, asked.rows) | table)
    with Recorder(asked.records or asked.output.with_suffix(".jsonl")) as recorder:
        for weight, rows in itertools.product(every, asked.rows):
            bench = Bench(weight, rows, "cuda", torch.bfloat16, COLD_BYTES)
            found, samples = tuned(bench, machine(), list(candidates(weight, rows)))
            table[2, weight.out, weight.num_in, rows] = found
            recorder.append(*samples)
            # whatever cuts the run off, what was measured stands
            write_choices(asked.output, table)


if __name__ == "__main__":
    main()
