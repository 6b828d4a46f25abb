"""What this machine reaches: the bandwidth of a copy and of a reading, the rate of a matrix product. In every run.

Numbers are random: a matrix product of zeros runs faster than one of numbers does. Buffers are several times larger
than any cache, so every repeat comes from memory.
"""

from statistics import median
from typing import NamedTuple

import torch

from harness import timing
from harness.record import Case, Sample
from harness.telemetry import Telemetry
from suites.benchmarks.roofline import Ceilings


class Size(NamedTuple):
    """Of what is measured."""

    num_bytes: int
    """of each buffer"""
    side: int
    """of both square matrices"""
    repeats: int
    blocks: int


LARGE = Size(2**31, 8192, 5, 5)
SMALL = Size(2**22, 256, 3, 2)
UNITS = {"copy": (1e9, "GB/s"), "read": (1e9, "GB/s"), "matmul": (1e12, "TFLOP/s")}


def measure(device: str, dtype: torch.dtype, size: Size, telemetry: Telemetry) -> tuple[Ceilings, list[Sample]]:
    """Medians of every repeat, and the raw values."""
    generator = torch.Generator(device).manual_seed(0)

    def numbers(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=device).normal_(generator=generator)

    source = numbers(size.num_bytes // dtype.itemsize)
    into, total = torch.empty_like(source), torch.empty((), dtype=dtype, device=device)
    a, b = numbers(size.side, size.side), numbers(size.side, size.side)
    product = torch.empty_like(a)
    work = {"copy": 2.0 * size.num_bytes, "read": 1.0 * size.num_bytes, "matmul": 2.0 * size.side**3}
    calls: dict[str, timing.Call] = {
        "copy": lambda: into.copy_(source),
        "read": lambda: torch.amax(source, 0, out=total),
        "matmul": lambda: torch.mm(a, b, out=product),
    }
    timed = timing.interleave(calls, size.blocks, size.repeats, device, warm_up_s=2.0, watch=telemetry.window)
    case = Case(pair="ceilings", gate="passed", impl="torch", dtype=str(dtype).removeprefix("torch."), device=device)
    samples, reached = [], {}
    for name, visits in timed.visits.items():
        scale, unit = UNITS[name]
        rates = [tuple(work[name] / s for s in visit.seconds) for visit in visits]
        valid = [r for row, visit in zip(rates, visits, strict=True) if visit.valid for r in row]
        reached[name] = median(valid or [r for row in rates for r in row])
        for row, visit in zip(rates, visits, strict=True):
            place = {"block": visit.block, "order": visit.order}
            about = visit.telemetry(settled=timed.settled[name])
            values = tuple(float(f"{r / scale:.6g}") for r in row)
            facts = {"metric": f"ceiling_{name}", "unit": unit, "better": "up", "values": values}
            samples.append(Sample(case=case, telemetry=about, **facts, **place))
    return Ceilings(**reached), samples
