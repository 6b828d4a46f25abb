"""Kernels: how many launches a layer is, and what the compiler made of every configuration."""

from collections.abc import Mapping, Sequence
from typing import Any

from harness.record import Sample
from reports.panels import Section, counted
from reports.store import Records

DEVICE, SHARED_KB = "sm_90", 227
"""what kernels are compiled for, and what a program may use of its shared memory"""
COLUMNS = {
    "registers": "registers",
    "spills": "spilled bytes",
    "shared": f"shared KB of {SHARED_KB}",
    "wide_loads": "16-byte loads",
    "wide_copies": "16-byte copies",
    "products": "matrix products",
}
"""compile.NAME -> what it counts"""
MORE = {"limit": "limit", "transformers": "transformers"}
"""columns that stand beside launches where a record has them"""

Name = tuple[str, str]
"""kernel or pair, and its configuration or size"""


def build(now: Records, every: Records) -> Section | None:
    """Nothing where no kernel was counted or compiled."""
    layers, compiled = launched(now.samples), configurations(now.samples)
    if not layers and not compiled:
        return None
    facts = {"sentences": [*layer_sentence(layers), *compiled_sentence(compiled)],
             "launches": launch_table(layers), "compiled": compiled_table(compiled)}  # fmt: skip
    return Section("kernels", "Kernels and launches", facts, template="kernels.html")


def launched(samples: Sequence[Sample]) -> dict[Name, dict[str, tuple[float, ...]]]:
    """(pair, size) -> implementation or limit -> kernels of every layer, as the newest run counted them."""
    found: dict[Name, dict[str, tuple[float, ...]]] = {}
    for s in sorted(samples, key=lambda s: s.run):
        if s.metric == "launches_per_layer":
            of = found.setdefault((s.case.pair, s.case.variant), {})
            of[s.case.impl] = s.values
            if "limit" in s.extra:
                of["limit"] = (s.extra["limit"],)
    return {name: of for name, of in sorted(found.items()) if "optimized" in of}


def configurations(samples: Sequence[Sample]) -> dict[Name, dict[str, float]]:
    """(kernel, configuration) -> what the newest run's compiler said; those of a run that was cut off are left out."""
    found: dict[Name, dict[str, float]] = {}
    for s in sorted(samples, key=lambda s: s.run):
        what = s.metric.removeprefix("compile.")
        if s.metric != what and s.case.device == DEVICE:
            found.setdefault((s.case.pair, s.case.variant), {})[what] = s.values[-1]
    return {name: of for name, of in sorted(found.items()) if of.keys() >= COLUMNS.keys()}


def layer_sentence(layers: Mapping[Name, Mapping[str, Sequence[float]]]) -> list[str]:
    """How many launches a layer is, over all sizes."""
    if not layers:
        return []
    counts = [count for of in layers.values() for count in of["optimized"]]
    # several pairs may read one size
    sizes = len({size for _, size in layers})
    return [f"A layer is {_span(counts)} launches in {counted(sizes, 'published size')}."]


def compiled_sentence(compiled: Mapping[Name, Mapping[str, float]]) -> list[str]:
    """Whether everything fits: registers without a spill, and the most shared memory."""
    if not compiled:
        return []
    spilled = [name for name, of in compiled.items() if of["spills"]]
    largest = max(compiled, key=lambda name: compiled[name]["shared"])
    some = f"; {len(spilled)} spill, the first {' '.join(spilled[0])}" if spilled else " without a spill"
    verb = "compiles" if len(compiled) == 1 else "compile"
    return [f"{counted(len(compiled), 'configuration')} {verb} for {DEVICE}{some}; the largest takes "
            f"{_kb(compiled[largest]['shared'])} of {SHARED_KB} KB of shared memory ({largest[0]})."]  # fmt: skip


def launch_table(layers: Mapping[Name, Mapping[str, Sequence[float]]]) -> dict[str, Any]:
    """A row for sizes of one pair that have the same numbers."""
    more = [what for what in MORE if any(what in of for of in layers.values())]
    sizes: dict[tuple[str, ...], list[str]] = {}
    for (pair, size), of in layers.items():
        cells = (_span(of[what]) if what in of else "" for what in ("optimized", *more))
        sizes.setdefault((pair, *cells), []).append(size)
    rows = [(f"{pair}: {', '.join(of)}", *cells) for (pair, *cells), of in sizes.items()]
    return {"head": ("", "launches a layer", *(MORE[what] for what in more)), "rows": rows}


def compiled_table(compiled: Mapping[Name, Mapping[str, float]]) -> dict[str, Any]:
    """A row a configuration."""
    rows = [
        (f"{kernel}: {who}", *(_kb(of[what]) if what == "shared" else f"{of[what]:g}" for what in COLUMNS))
        for (kernel, who), of in compiled.items()
    ]
    return {"head": ("", *COLUMNS.values()), "rows": rows}


def _span(counts: Sequence[float]) -> str:
    """The fewest and the most; one number where all are equal."""
    return " to ".join(f"{count:g}" for count in sorted({min(counts), max(counts)}))


def _kb(num_bytes: float) -> str:
    return f"{round(num_bytes / 1024, 2):g}"
