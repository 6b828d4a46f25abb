"""Claim: every kernel, in every configuration in which it is launched, compiles for Hopper (sm_90) into what was meant.

The interpreter accepts what the compiler does not: loops that change a type, products of fewer than 16 columns, tiles
that fit no memory. Compiling needs no GPU, but an environment without TRITON_INTERPRET, so it runs in a process of its
own: this file, run as a script. Which configurations there are, `suites/configurations.py` finds out; a kernel that no
configuration names is a failure too.
"""

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from harness.record import Case, Sample

pytestmark = pytest.mark.correctness

ROOT = Path(__file__).parents[2]
ROOM = ROOT / "optimized" / "ops" / "kernels"
SHARED_BYTES = 232_448  # what one program may use on Hopper
REGISTERS = 255  # what one thread may use
NAMED = re.findall(r"^def (\w+_kernel)\(", "".join(p.read_text() for p in sorted(ROOM.glob("*.py"))), re.MULTILINE)

PRODUCTS = {"linear_kernel", "gate_up_kernel", "head_tile_kernel", "attend_chunk_kernel", "attend_latent_kernel"}
PRODUCTS |= {"absorb_kernel", "merge_values_kernel", "linear_scaled_kernel"}
"""tensor cores multiply; in the others there is one row, or none"""
STREAMS = PRODUCTS - {"merge_values_kernel"} | {"experts_gate_up_kernel", "experts_down_kernel", "router_kernel"}
STREAMS |= {"score_rows_kernel"}
"""weights or keys run ahead of the product, 16 bytes a copy"""
NARROW = {
    "accept_greedy_kernel": "a few tokens",
    "route_kernel": "a few scores a thread",
    "latent_write_kernel": "512 features are 8 bytes a thread",
    "head_merge_kernel": "the number of tiles is any number",
}
"""no load of 16 bytes is asked for, and why"""

Found = Mapping[str, Mapping[str, int]]


@pytest.fixture(scope="module")
def compiled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Found:
    """What the compiler said of every configuration; all of them in one process."""
    # here, not above: the script below runs without torch
    from suites.configurations import configurations

    wanted = configurations(request.config.getoption("--profile") == "nightly")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton"))}
    asked = json.dumps({name: launch._asdict() for name, launch in wanted.items()})
    how = {"capture_output": True, "text": True, "timeout": 1800}
    done = subprocess.run([sys.executable, __file__], env=environment, input=asked, **how)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def of(compiled: Found, kernel: str) -> Found:
    """The configurations of one kernel."""
    return {name: found for name, found in compiled.items() if name.split()[0] == kernel}


@pytest.mark.parametrize("kernel", NAMED)
def test_a_kernel_is_compiled_as_it_is_launched(compiled: Found, kernel: str, keep: Callable[..., None]) -> None:
    mine = of(compiled, kernel)

    assert mine, "no configuration launches it"
    for name, found in mine.items():
        assert found["spills"] == 0, name
        assert 0 < found["registers"] <= REGISTERS, name
        assert found["shared"] <= SHARED_BYTES, name
        assert (found["products"] > 0) == (kernel in PRODUCTS), name
        assert found["wide_copies"] > 0 or kernel not in STREAMS, name
        # whoever starts early waits for the kernel ahead before it touches memory, and nobody else does
        assert found["waits"] == found["early"], name
    assert kernel in NARROW or any(found["wide_loads"] + found["wide_copies"] for found in mine.values())
    for name, found in mine.items():
        case = Case(pair=kernel, gate="passed", form="triton", device="sm_90", variant=name.partition(" ")[2])
        for what, unit in UNITS.items():
            count = float(found[what])
            keep(Sample(case=case, metric=f"compile.{what}", unit=unit, better="none", values=(count,)))


UNITS = {"registers": "a thread", "spills": "bytes", "shared": "bytes", "products": "instructions"}
UNITS |= {"wide_loads": "instructions", "wide_copies": "instructions"}


def compile_launch(launch: Mapping[str, Any]) -> dict[str, int]:
    """Compile for sm_90 and read the assembler's report."""
    kernel = getattr(importlib.import_module(launch["module"]), launch["kernel"])
    place = {name: (index,) for index, name in enumerate(kernel.arg_names)}
    signature = dict.fromkeys(kernel.arg_names, "constexpr") | {name: kind for name, kind, _ in launch["arguments"]}
    attrs = {place[name]: [["tt.divisibility", 16]] for name, _, whole in launch["arguments"] if whole}
    constants = {place[name]: value for name, value in launch["constants"]}
    source = ASTSource(kernel, signature, constants, attrs)
    code = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": launch["num_warps"]})
    ptx = code.asm["ptx"]
    touches = min(at for at in (ptx.find("ld.global"), ptx.find("cp.async"), len(ptx)) if at >= 0)
    return {
        **assembled(ptx),
        "early": int(dict(launch["constants"]).get("EARLY", False)),
        "waits": int(0 <= ptx.find("griddepcontrol.wait") < touches),
        "shared": code.metadata.shared,
        "wide_loads": len(re.findall(r"ld\.global\.(?:\S+\.)?(?:v4\.[bf]32|v2\.[bf]64)", ptx)),
        "wide_copies": ptx.count("cp.async.cg"),
        "products": ptx.count("mma.sync") + ptx.count("wgmma.mma_async"),
    }


def assembled(ptx: str) -> dict[str, int]:
    """Registers a thread, and bytes of them that the assembler had to store."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx)
        command = [get_ptxas(90).path, "-v", "--gpu-name=sm_90a", str(path), "-o", os.devnull]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    spills = sum(int(size) for size in re.findall(r"(\d+) bytes spill stores", report))
    return {"registers": max(int(n) for n in re.findall(r"Used (\d+) registers", report)), "spills": spills}


if __name__ == "__main__":
    json.dump({name: compile_launch(launch) for name, launch in json.load(sys.stdin).items()}, sys.stdout)
