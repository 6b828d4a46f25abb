"""Where a number comes from: commit, versions, processor, GPUs, seeds and the switches that change results.

`describe` never fails. What cannot be found out is None, with the reason beside it.
"""

import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pynvml

from harness.telemetry import NoGpu, ask, handle, nvml

ROOT = Path(__file__).resolve().parent.parent

PACKAGES = ("draftproof", "torch", "triton", "transformers", "numpy")

# only names that change results or speed; nothing else of the environment is read
ALLOWED = (
    "CUBLAS_WORKSPACE_CONFIG",
    "CUDA_DEVICE_ORDER",
    "CUDA_LAUNCH_BLOCKING",
    "CUDA_VISIBLE_DEVICES",
    "HF_HUB_OFFLINE",
    "MKL_NUM_THREADS",
    "NVIDIA_TF32_OVERRIDE",
    "OMP_NUM_THREADS",
    "PYTHONHASHSEED",
    "PYTORCH_ALLOC_CONF",
    "PYTORCH_CUDA_ALLOC_CONF",
    "SOURCE_DATE_EPOCH",
    "TRITON_INTERPRET",
)


def describe(seeds: Mapping[str, int] | None = None, root: Path = ROOT) -> dict[str, Any]:
    """The `environment` of a Run: plain values, ready for JSON."""
    return {
        "source": source(root),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        "system": platform.platform(),
        "cpu": cpu(),
        "gpu": gpus(),
        "seeds": dict(seeds or {}),
        "env": {name: os.environ[name] for name in ALLOWED if name in os.environ},
    }


def source(root: Path = ROOT) -> dict[str, Any]:
    """Commit, whether files differ from it, and a hash of how; all None outside a checkout."""
    unknown = {"commit": None, "dirty": None, "diff_sha256": None}
    top = _git(root, "rev-parse", "--show-toplevel")
    # an installed copy may lie inside somebody else's repository
    if top is None or Path(os.fsdecode(top).strip()).resolve() != root.resolve():
        return unknown | {"reason": "not a git checkout, or git is not installed"}
    commit = _git(root, "rev-parse", "--verify", "HEAD")
    status = _git(root, "status", "--porcelain")
    dirty = None if status is None else bool(status.strip())
    if commit is None:
        return unknown | {"dirty": dirty, "reason": "the checkout has no commit yet"}
    return {
        "commit": commit.decode().strip(),
        "dirty": dirty,
        "diff_sha256": _diff_hash(root) if dirty else None,
        "reason": "" if dirty is not None else "git status did not answer",
    }


def cpu() -> dict[str, Any]:
    """Name, cores this process may use, and threads of torch if torch is loaded."""
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    except OSError:
        pass
    torch = sys.modules.get("torch")  # asked, not imported: a report has no need of it
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"name": name, "cores": usable, "torch_threads": torch.get_num_threads() if torch else None}


def gpus() -> dict[str, Any]:
    """Driver and devices as NVML tells them, or the reason why there are none."""
    try:
        with nvml():
            count = pynvml.nvmlDeviceGetCount()
            hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
            seen = count if hidden is None else len([name for name in hidden.split(",") if name.strip()])
            devices = [_gpu(handle(index)) for index in range(seen)]
            driver = ask(pynvml.nvmlSystemGetDriverVersion)
    except (NoGpu, pynvml.NVMLError) as error:
        return {"available": False, "reason": str(error), "driver": None, "devices": []}
    reason = "" if devices else "no device is visible to this process"
    return {"available": bool(devices), "reason": reason, "driver": driver, "devices": devices}


def _gpu(device: Any) -> dict[str, Any]:
    memory = ask(pynvml.nvmlDeviceGetMemoryInfo, device)
    uuid = ask(pynvml.nvmlDeviceGetUUID, device)
    ecc, mig = ask(pynvml.nvmlDeviceGetEccMode, device), ask(pynvml.nvmlDeviceGetMigMode, device)
    return {
        "name": ask(pynvml.nvmlDeviceGetName, device),
        "uuid_sha256": None if uuid is None else sha256(str(uuid).encode()).hexdigest()[:16],
        "memory_gib": None if memory is None else round(memory.total / 2**30, 1),
        "ecc": None if ecc is None else bool(ecc[0]),
        "mig": None if mig is None else bool(mig[0]),
        "vbios": ask(pynvml.nvmlDeviceGetVbiosVersion, device),
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _diff_hash(root: Path) -> str | None:
    """One hash of the tracked changes and of every untracked file that git does not ignore."""
    diff = _git(root, "diff", "HEAD", "--binary", "--no-ext-diff")
    untracked = _git(root, "ls-files", "--others", "--exclude-standard", "-z")
    if diff is None or untracked is None:
        return None
    digest = sha256(diff)
    for name in sorted(filter(None, untracked.split(b"\0"))):
        digest.update(b"\0" + name + b"\0")
        try:
            digest.update((root / os.fsdecode(name)).read_bytes())
        except OSError:
            digest.update(b"unreadable")
    return digest.hexdigest()


def _git(root: Path, *args: str) -> bytes | None:
    """What git prints, or None if it is absent, slow or refuses."""
    # optional locks off: a look must not disturb a git command that runs beside it
    command = ["git", "--no-optional-locks", "-C", str(root), *args]
    try:
        done = subprocess.run(command, capture_output=True, timeout=20, check=False)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout if done.returncode == 0 else None
