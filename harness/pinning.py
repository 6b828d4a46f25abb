"""One GPU for each worker of pytest-xdist, so that claims fan out over the GPUs of a machine and never share one.

`DRAFTPROOF_GPUS` says how: `each` (a worker sees one GPU, claims that need several are left out) or `all` (only those
claims, in a process that sees every GPU). Without it nothing is changed. Has to be read before torch is.
"""

import os
from collections.abc import MutableMapping

import pynvml

from harness.telemetry import NoGpu, nvml

EACH, ALL = "each", "all"
SWITCH = "DRAFTPROOF_GPUS"


def pin(environment: MutableMapping[str, str] = os.environ, num_gpus: int | None = None) -> None:
    """Show this worker the GPU that is its own, by the number in its name.

    num_gpus   of the machine; NVML's answer when absent
    """
    worker = environment.get("PYTEST_XDIST_WORKER", "")
    if environment.get(SWITCH) != EACH or not worker.startswith("gw"):
        return
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        devices = [str(index) for index in range(counted() if num_gpus is None else num_gpus)]
    else:
        devices = [name.strip() for name in visible.split(",") if name.strip()]
    if devices:
        environment["CUDA_VISIBLE_DEVICES"] = devices[int(worker.removeprefix("gw")) % len(devices)]


def counted() -> int:
    """GPUs that NVML sees, zero without it."""
    try:
        with nvml():
            return int(pynvml.nvmlDeviceGetCount())
    except (NoGpu, pynvml.NVMLError):
        return 0


def is_left_out(needs_several: bool, environment: MutableMapping[str, str] = os.environ) -> bool:
    """Whether a claim belongs to the other of the two ways."""
    return {EACH: needs_several, ALL: not needs_several}.get(environment.get(SWITCH, ""), False)
