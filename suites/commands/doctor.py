"""`draftproof doctor`: what this machine is, and what cannot run on it and why."""

import importlib.util
import platform
import sys
from collections.abc import Sequence
from typing import Any

import torch

from harness.environment import describe
from harness.runner import Exit
from harness.telemetry import Telemetry
from suites.benchmarks.shipped import ZOO, shipped
from suites.commands.check import hold_capabilities
from suites.commands.desk import Answer, Desk


def doctor(desk: Desk, required: Sequence[str] = ()) -> Answer:
    """Tables of facts; MissingCapability where something required is not there."""
    environment = describe()
    clocks = look()
    lacking = shortfalls(environment)
    cpu, gpu = environment["cpu"], environment["gpu"]
    rows = [
        ("system", environment["system"]),
        ("processor", f"{cpu['name']}, {cpu['cores']} cores, torch uses {cpu['torch_threads']} threads"),
        *(("GPU", ", ".join(f"{k} {v}" for k, v in device.items() if v is not None)) for device in gpu["devices"]),
        ("driver", gpu["driver"] or gpu["reason"]),
        *((f"clock, {name}", f"{value['median']:g} MHz") for name, value in clocks.items()),
        *(environment["versions"].items()),
        ("commit", f"{environment['source']['commit']}{' and changes' if environment['source']['dirty'] else ''}"),
        *(environment["env"].items()),
    ]
    desk.table("This machine", ("", ""), rows)
    desk.table("What cannot run here", ("what", "why"), list(lacking.items()) or [("nothing", "all claims can run")])
    hold_capabilities(required)
    return Answer(Exit.PASSED, {"environment": environment, "clocks": clocks, "cannot_run": lacking})


def look() -> dict[str, Any]:
    """The clocks of the first GPU, empty without one."""
    with Telemetry() as telemetry:
        found = telemetry.summary()
    return {name: found[name] for name in ("sm_mhz", "memory_mhz") if found.get(name)}


def shortfalls(environment: dict[str, Any]) -> dict[str, str]:
    """What is left out on this machine -> why."""
    lacking = {}
    have = torch.cuda.device_count() if torch.cuda.is_available() else 0
    no_gpu = environment["gpu"]["reason"] or f"torch {torch.__version__} sees no CUDA device"
    if have < 1:
        lacking["claims marked gpu, and bench --device cuda"] = no_gpu
        lacking["Triton kernels compiled"] = f"{no_gpu}: they run in Triton's interpreter instead"
    if have < 2:
        lacking["claims marked multi_gpu"] = f"{have} of 2 NVIDIA GPUs"
    if importlib.util.find_spec("triton") is None:
        lacking["every claim about Triton kernels"] = f"triton is not installed ({sys.platform}, {platform.machine()})"
    try:
        shipped(ZOO)
    except ValueError as error:
        lacking["demo and bench on trained weights"] = str(error)
    return lacking
