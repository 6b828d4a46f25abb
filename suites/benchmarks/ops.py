"""Every operation at the sizes at which published shapes call it: PyTorch's form beside Triton's, and the bandwidth.

A cycle of a shape is run once, eagerly, and its calls are noted. Calls of one operation with one set of sizes come from
different layers, so going through them reads other weights every time, as a model does, and no cache helps; on CUDA
they are one graph. Bytes are counted once each: a table by the rows that are looked up, experts by those that are
chosen, keys up to where the text ends. Without a GPU there is PyTorch's form alone.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from harness import timing
from harness.record import Case, Observation, Recorder, Sample
from harness.runner import Exit
from harness.telemetry import Telemetry
from optimized import cycle
from optimized.graphs import Replay
from optimized.ops.table import choose
from suites.benchmarks import ceilings, forced
from suites.benchmarks.calls import Called, noted
from suites.benchmarks.measure import DRY, Protocol, begin, gate_of, skipped
from suites.benchmarks.roofline import Ceilings
from suites.benchmarks.shapes import SHAPES, Shape, build, free, shallow, small
from suites.benchmarks.steady import Steady

LAYERS = 8
"""of a shape that is measured for its operations: enough for every kind of layer, and more than a cache holds"""
REPEATS = 5
CACHES = {"embed": (1,), "qk_rope_kv_write": (5, 6), "latent_write": (7,), "compact": (0,)}
"""places of tensors that a call touches by single rows, which count with its result"""
KEYS = {"attend": (1, 2), "attend_latent": (2,)}
"""places of keys, read up to where the text ends"""
WINDOW = 5
"""place of a sliding layer's window"""


def measure(
    shapes: Sequence[Shape], protocol: Protocol, gate: str, advance: Callable[[], object] = lambda: None
) -> Iterator[Observation]:
    """Ceilings, then each operation of each shape once a form; sizes that were seen are not measured again."""
    seen: set[tuple[Any, ...]] = set()
    with Telemetry() as telemetry:
        reached, samples = ceilings.measure(protocol.device, protocol.dtype, protocol.ceiling, telemetry)
        yield from samples
        for shape in shapes:
            steady = Steady(build(shape, protocol.device, protocol.dtype), 1, forced.RATES, num_cycles=2)
            for key, calls in called(steady).items():
                if key in seen:
                    continue
                seen.add(key)
                advance()
                try:
                    yield from timed(calls, key, shape.length, protocol, gate, reached, telemetry, shape.is_small)
                except RuntimeError as error:
                    # a form that one operation cannot be captured in says nothing about the others
                    yield skipped(shape, f"{key[0]}, {key[1]}", f"{type(error).__name__}: {error}"[:300])
            del steady, calls
            free()


def called(steady: Steady) -> dict[tuple[Any, ...], list[Called]]:
    """The calls of one cycle, by operation and sizes."""
    steady.begin()
    with noted(steady.built.text.at.ops) as calls, torch.no_grad():
        cycle.cycle(steady.session.models, steady.session.state)
    found: dict[tuple[Any, ...], list[Called]] = {}
    for call in calls:
        found.setdefault((call.name, sizes(call)), []).append(call)
    return found


def sizes(call: Called) -> str:
    """What tells two calls of one operation apart."""
    tensors = ", ".join("x".join(map(str, tensor.shape)) for tensor in call.tensors)
    numbers = [f"{value}" for value in (*call.args, *call.kwargs.values()) if isinstance(value, bool | str)]
    return "; ".join([tensors, *numbers])


def timed(
    calls: list[Called],
    key: tuple[Any, ...],
    length: int,
    protocol: Protocol,
    gate: str,
    reached: Ceilings,
    telemetry: Telemetry,
    is_small: bool,
) -> Iterator[Sample]:
    """Microseconds of a call in each form, and its share of the copy's bandwidth."""
    device = protocol.device
    forms = {form: choose(device, form) for form in (("aten", "triton") if device == "cuda" else ("aten",))}
    runs = {form: Replay(partial(through, ops, calls), device) for form, ops in forms.items()}
    clock = (device, protocol.agree, min(1.0, protocol.warm_up_s), timing.time_calls, telemetry.window)
    found = timing.interleave(runs, max(2, protocol.num_blocks // 4), REPEATS, *clock)
    size = sum(num_bytes(call, length) for call in calls) / len(calls)
    for form, visits in found.visits.items():
        case = Case(
            pair="ops",
            gate=gate,
            family=key[0],
            form=form,
            dtype=str(protocol.dtype).removeprefix("torch."),
            device=device,
            variant=("dry run, " if is_small else "") + key[1],
        )
        for visit in visits:
            each = [seconds / len(calls) for seconds in visit.seconds]
            place = {"case": case, "block": visit.block, "order": visit.order}
            about = visit.telemetry(settled=found.settled[form])
            micro = tuple(float(f"{1e6 * s:.6g}") for s in each)
            yield Sample(metric="op_time", unit="us", better="down", values=micro, telemetry=about, **place)
            shares = tuple(float(f"{size / s / reached.copy:.6g}") for s in each)
            yield Sample(metric="op_bandwidth", unit="share", better="up", values=shares, **place)


@torch.no_grad()
def through(ops: Any, calls: Sequence[Called]) -> None:
    """Every call once."""
    for call in calls:
        getattr(ops, call.name)(*call.args, **call.kwargs)


def num_bytes(call: Called, length: int) -> float:
    """What a call must read and write.

    length   slots that hold text
    """
    rows, given = 0.0, dict(enumerate(call.args))
    visible = min(length, (given.get(WINDOW) or length) if call.name == "attend" else length)
    single = [given.get(place) for place in CACHES.get(call.name, ())]
    keys = [given.get(place) for place in KEYS.get(call.name, ())]
    for tensor in call.tensors:
        if any(tensor is other for other in single):
            continue
        share = min(1.0, visible / tensor.shape[1]) if any(tensor is other for other in keys) else 1.0
        if call.name == "experts" and tensor.dim() == 3:
            share = len(given[1].unique()) / len(tensor)
        rows += tensor.nbytes * share
    results = call.result if isinstance(call.result, tuple) else (call.result,)
    return rows + sum(result.nbytes for result in results if isinstance(result, Tensor))


def main(arguments: Sequence[str] | None = None) -> int:
    """Operations of some shapes from the command line, recorded."""
    parser = argparse.ArgumentParser(description="Measure every operation that published shapes call.")
    parser.add_argument("shapes", nargs="+", choices=list(SHAPES))
    parser.add_argument("--record", type=Path, required=True, help="the file to append to")
    parser.add_argument("--claims", type=Path, help="the record of the claims that must be green")
    parser.add_argument("--dry-run", action="store_true", help="tiny size on a CPU; the record says so")
    asked = parser.parse_args(arguments)
    chosen = [SHAPES[name] for name in asked.shapes]
    gates = {gate_of(shape, asked.claims) for shape in chosen}
    if gates != {"passed"}:
        print(f"claims are {', '.join(sorted(gates))}; no speed is measured", file=sys.stderr)  # noqa: T201
        return Exit.GATE_FAILED
    torch.set_num_threads(1)
    sized = [small(shape) if asked.dry_run else shallow(shape, LAYERS) for shape in chosen]
    with Recorder(asked.record) as recorder:
        begin(recorder, asked.dry_run)
        for observation in measure(sized, DRY if asked.dry_run else Protocol(), "passed"):
            recorder.append(observation)
    return Exit.PASSED


if __name__ == "__main__":
    sys.exit(main())
