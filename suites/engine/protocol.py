"""How an engine is asked: cases in, dumps out, through a subprocess in an environment of the engine's own.

The runner of an engine is one plain file that imports nothing of draftproof. It reads

    {"cases": [{"name", "target", "draft", "tokens", "capture", "steps", "dtype", "runner", "dump"}, ..]}

and for each case writes a dump (`suites/explain/dump.py`) to `dump`, then its name on a line of stdout. `target` and
`draft` are folders (`draft` may be null), `tokens` the texts [B, T], `capture` the capture points to tell, `steps` the
teacher-forced draft steps, `runner` whichever of an engine's ways is asked. The draft is handed the states at the
layer ids that the engine itself makes of the config. Beside the tensors of a dump its metadata hold, as JSON:

    versions          package -> version, the engine's first
    unwritten[_target]  {parameter: what stands there} of all that the loader left unwritten
    unread[_target]     tensors of the file that are in no parameter
    shared            tables taken from the target, as the draft would name them
    points            {runner: capture points in the order in which the draft gets them}
    refused           {"stage": config | load | run, "reason"}, where the engine would not; there are then no tensors
"""

import json
import os
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from suites.commands.desk import MissingCapability
from suites.explain.dump import Dump, read_dump

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Engine:
    """An engine that can be asked."""

    name: str
    version: str
    """that the table of dialects speaks of"""
    runner: Path
    requirements: Path
    """what its environment holds beside it"""


ENGINES = {"vllm": Engine("vllm", "0.33.0", HERE / "vllm_runner.py", HERE / "vllm_requirements.txt")}


@dataclass(frozen=True)
class Case:
    """One question to an engine."""

    name: str
    target: str
    draft: str | None
    tokens: tuple[tuple[int, ...], ...]
    """[B, T]"""
    capture: tuple[int, ...]
    steps: int = 3
    dtype: str = "float32"
    runner: str = "v1"


class EngineDied(OSError):
    """A subprocess that ended before its answer."""


def check_python(engine: Engine, python: Path) -> str:
    """The engine's version in an environment; errors: MissingCapability where it has none."""
    asked = f"import importlib.metadata as m; print(m.version({engine.name!r}))"
    try:
        found = subprocess.run([python, "-c", asked], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise MissingCapability(f"{python}: no python runs there ({error}); {how(engine)}") from error
    if found.returncode:
        raise MissingCapability(f"{python}: {engine.name} is not installed there; {how(engine)}")
    return found.stdout.strip()


def how(engine: Engine) -> str:
    return f"draftproof engine {engine.name} --make-env DIR makes such an environment"


def ask(
    engine: Engine, python: Path, cases: Sequence[Case], folder: Path, told: Callable[[str], Any] = lambda name: None
) -> dict[str, Dump]:
    """The dumps of an engine by the name of the case; `told` hears of each as it is done.

    errors: EngineDied where the subprocess ends early, DumpError where it writes something else
    """
    files = {case.name: folder / f"{number}.safetensors" for number, case in enumerate(cases)}
    asked = [{**asdict(case), "dump": str(files[case.name])} for case in cases]
    (folder / "cases.json").write_text(json.dumps({"cases": asked}), encoding="utf-8")
    threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [str(python), str(engine.runner), str(folder / "cases.json")]
    with (
        (folder / "stderr.txt").open("w+", encoding="utf-8") as errors,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=os.environ | threads) as work,
    ):
        assert work.stdout is not None
        for line in work.stdout:
            if line.strip() in files:
                told(line.strip())
        code = work.wait()
        errors.seek(0)
        last = " ".join(errors.read().split())[-300:]
    missing = [name for name, file in files.items() if not file.is_file()]
    if code or missing:
        left = f"{missing[0]!r} was not answered; " if missing else ""
        raise EngineDied(f"{engine.name} ended with code {code}; {left}its last words: {last}")
    return {name: read_dump(file) for name, file in files.items()}


def note(dump: Dump, name: str, usual: Any = None) -> Any:
    """A note of a runner as plain values."""
    return json.loads(dump.notes[name]) if name in dump.notes else usual


def versions(dumps: Mapping[str, Dump]) -> dict[str, str]:
    """What computed these dumps."""
    return next((note(dump, "versions", {}) for dump in dumps.values()), {})
