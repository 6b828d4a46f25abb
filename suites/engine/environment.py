"""An environment of an engine's own: vLLM's source package without its kernels, which a CPU build would need."""

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from suites.commands.desk import MissingCapability
from suites.engine.protocol import Engine

TORCH = "torch==2.13.0"
"""the newest that has a build for CPUs; vLLM asks for a later one and its model classes run on this"""
BUILD = (TORCH, "setuptools<81", "setuptools-scm", "setuptools-rust", "wheel", "packaging")


def steps(engine: Engine, folder: Path, pip_args: Sequence[str] = ()) -> list[list[str]]:
    """The command lines that make it, in order."""
    pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", *pip_args]
    source = ["--no-build-isolation", "--no-deps", "--no-binary", engine.name, f"{engine.name}=={engine.version}"]
    # torch again: nothing that is required below may bring a build with CUDA in its place
    return [
        [sys.executable, "-m", "venv", str(folder)],
        [*pip, *BUILD],
        [*pip, *source],
        [*pip, TORCH, "setuptools<81", "--requirement", str(engine.requirements)],
    ]


def make(engine: Engine, folder: Path, say: Callable[[str], None], pip_args: Sequence[str] = ()) -> Path:
    """Make it and give its python; errors: MissingCapability naming the step that failed."""
    # without cargo on the path vLLM leaves its Rust front end out; "empty" leaves its kernels out
    path = [place for place in os.environ.get("PATH", "").split(os.pathsep) if not (Path(place) / "cargo").exists()]
    facts = {"PATH": os.pathsep.join(path), "VLLM_TARGET_DEVICE": "empty", "VLLM_VERSION_OVERRIDE": engine.version}
    for step in steps(engine, folder, pip_args):
        say(" ".join(step))
        done = subprocess.run(step, env=os.environ | facts, capture_output=True, text=True)
        if done.returncode:
            last = " ".join(done.stderr.split())[-300:]
            raise MissingCapability(f"{folder}: no environment for {engine.name}: {' '.join(step)}: {last}")
    return folder / "bin" / "python"
