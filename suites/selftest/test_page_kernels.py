"""Claim: the page tells launches and compiled kernels as the newest run found them, after speed and apart from it.

All numbers below are made up for these tests.
"""

from dataclasses import replace
from pathlib import Path

import pytest

from harness.record import Case, Observation, Recorder, Run, Sample
from reports import page, store
from reports.newest import newest
from reports.sections import kernels, ledger
from suites.selftest.made_up import START, Elements, records, samples
from suites.selftest.made_up_nights import RUNS

pytestmark = pytest.mark.correctness


def launches(pair: str, size: str, *counts: float, impl: str = "optimized") -> Sample:
    case = Case(pair=pair, gate="passed", impl=impl, form="triton", dtype="bfloat16", device="meta", variant=size)
    return Sample(case=case, metric="launches_per_layer", unit="launches", better="down", values=counts)


def compiled(kernel: str, who: str, **changes: float) -> list[Sample]:
    case = Case(pair=kernel, gate="passed", form="triton", device="sm_90", variant=who)
    found = {"registers": 64.0, "spills": 0.0, "shared": 51_200.0, "products": 8.0, "wide_loads": 2.0,
             "wide_copies": 4.0} | changes  # fmt: skip
    return [Sample(case=case, metric=f"compile.{what}", unit="", better="none", values=(value,))
            for what, value in found.items()]  # fmt: skip


KERNELS = [
    *compiled("b_kernel", "Made-up-8B, 16 rows", shared=204_800.0),
    *compiled("a_kernel", "Made-up-8B, 16 rows #2", products=0.0),
    *compiled("a_kernel", "Made-up-8B, 16 rows", registers=168.0, wide_copies=0.0),
]
LAYERS = [
    launches("moe", "Small", 11.0, 13.0, 13.0),
    launches("moe", "Large", 11.0, 11.0, 13.0),
    launches("llama", "Made-up-8B", 9.0, 9.0),
]


def runs(folder: Path, *parts: list[Observation]) -> store.Records:
    for name, part in zip(RUNS, parts, strict=False):
        with Recorder(folder / f"{name}.jsonl", name) as recorder:
            recorder.append(*part)
    return store.gather(folder)


def test_kernels_are_told_in_a_sentence_and_a_row_a_configuration(tmp_path: Path) -> None:
    again = launches("llama_mm", "Made-up-8B", 9.0)

    section = kernels.build(found := records(tmp_path, [again, *LAYERS, *KERNELS]), found)

    assert section is not None
    assert section.facts["sentences"] == [
        "A layer is 9 to 13 launches in 3 published sizes.",
        "3 configurations compile for sm_90 without a spill; the largest takes 200 of 227 KB of shared memory "
        "(b_kernel).",
    ]
    assert section.facts["launches"] == {
        "head": ("", "launches a layer"),
        "rows": [("llama: Made-up-8B", "9"), ("llama_mm: Made-up-8B", "9"), ("moe: Large, Small", "11 to 13")],
    }
    assert section.facts["compiled"]["head"][1:] == (
        "registers", "spilled bytes", "shared KB of 227", "16-byte loads", "16-byte copies", "matrix products",
    )  # fmt: skip
    assert section.facts["compiled"]["rows"] == [
        ("a_kernel: Made-up-8B, 16 rows", "168", "0", "50", "2", "0", "8"),
        ("a_kernel: Made-up-8B, 16 rows #2", "64", "0", "50", "2", "4", "0"),
        ("b_kernel: Made-up-8B, 16 rows", "64", "0", "200", "2", "4", "8"),
    ]


def test_a_spill_is_named_and_half_a_configuration_is_none(tmp_path: Path) -> None:
    spills = compiled("c_kernel", "Made-up-70B, 64 rows", spills=32.0)
    cut_off = compiled("d_kernel", "Made-up-8B, 16 rows")[:3]

    section = kernels.build(found := records(tmp_path, [*KERNELS, *spills, *cut_off]), found)

    assert section is not None
    assert section.facts["sentences"] == [
        "4 configurations compile for sm_90; 1 spill, the first c_kernel Made-up-70B, 64 rows; the largest takes "
        "200 of 227 KB of shared memory (b_kernel)."
    ]


def test_limit_and_transformers_have_columns_where_a_record_has_them(tmp_path: Path) -> None:
    limited = [replace(s, extra={"limit": 13}) for s in LAYERS[:2]]
    theirs = [launches("llama", "Made-up-8B", 40.0, 40.0, impl="transformers"),
              launches("gemma", "Made-up-4B", 84.0, impl="transformers")]  # fmt: skip

    section = kernels.build(found := records(tmp_path, [*limited, LAYERS[2], *theirs]), found)

    assert section is not None
    assert section.facts["launches"] == {
        "head": ("", "launches a layer", "limit", "transformers"),
        "rows": [("llama: Made-up-8B", "9", "", "40"), ("moe: Large, Small", "11 to 13", "13", "")],
    }
    assert section.facts["sentences"] == ["A layer is 9 to 13 launches in 3 published sizes."]


def test_of_several_runs_the_newest_counts_and_the_section_comes_after_speed(tmp_path: Path) -> None:
    machines = [Run(started="", environment={"cpu": {"name": name}}) for name in "ab"]
    fewer = launches("llama", "Made-up-8B", 8.0, 8.0)
    smaller = compiled("b_kernel", "Made-up-8B, 16 rows", shared=102_400.0)

    every = runs(tmp_path, [machines[0], *LAYERS, *KERNELS], [machines[1], *samples(), fewer, *smaller])
    section = kernels.build(newest(every), every)
    elements = Elements(page.html(every))

    assert section is not None
    assert section.facts["sentences"][0].startswith("A layer is 8 to 13 launches")
    assert "takes 100 of 227 KB" in section.facts["sentences"][1]
    sections = [a["id"] for tag, a in elements.found if tag == "section"]
    assert sections.index("speed") < sections.index("kernels") < sections.index("provenance")
    assert elements.open == []


def test_kernels_are_no_measurement_of_speed(tmp_path: Path) -> None:
    found = records(tmp_path, [START, *LAYERS, *KERNELS])

    assert [owed.why for owed in ledger.debts(found) if owed.what == "speed"] == [
        "not part of this run; draftproof bench decode"
    ]
    timed = records(tmp_path, [START, *samples()])
    assert [owed for owed in ledger.debts(timed) if owed.what == "speed"] == []
    assert kernels.build(timed, timed) is None
