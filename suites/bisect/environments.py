"""The Python that a commit runs with: ours where it has all that the commit asks for, else one made for its own list.

Environments are kept by the hash of what was asked for, so that all commits with one list share one.
"""

import fcntl
import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from functools import cache
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from packaging.requirements import InvalidRequirement, Requirement

PROJECT, PINS, READY = "pyproject.toml", "constraints.txt", "ready"
INSTALL_S = 3600.0


class Unbuildable(RuntimeError):
    """No environment can be made of what a commit asks for; that says nothing about the commit."""


def kept() -> Path:
    """Where environments are kept between searches: DRAFTPROOF_CACHE, or the user's cache folder."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("DRAFTPROOF_CACHE") or Path(home) / "draftproof")


def python_of(tree: Path) -> Path:
    """An interpreter with the packages that a tree asks for, in the versions that it was tested with."""
    needed, pins = packages(tree)
    return Path(sys.executable) if is_held([*needed, *pins.splitlines()]) else made(needed, pins)


def is_held(lines: Sequence[str]) -> bool:
    """Whether ours holds each requirement; a pin of a package that ours does not have asks for nothing."""
    for line in lines:
        text = line.partition("#")[0].strip()
        if not text:
            continue
        try:
            asked = Requirement(text)
        except InvalidRequirement:
            return False
        if asked.marker is not None and not asked.marker.evaluate():
            continue
        try:
            if not asked.specifier.contains(version(asked.name), prereleases=True):
                return False
        except PackageNotFoundError:
            if "==" not in text:
                return False
    return True


def packages(tree: Path) -> tuple[list[str], str]:
    """What a tree needs, and the versions that it was tested with."""
    try:
        project: dict[str, Any] = tomllib.loads((tree / PROJECT).read_text(encoding="utf-8")).get("project", {})
    except FileNotFoundError:
        return [], ""
    except tomllib.TOMLDecodeError as error:
        raise Unbuildable(f"{PROJECT}: {error}") from error
    tests = project.get("optional-dependencies", {}).get("test", [])
    pins = tree / PINS
    return [*project.get("dependencies", []), *tests], pins.read_text(encoding="utf-8") if pins.is_file() else ""


def made(needed: list[str], pins: str) -> Path:
    """The interpreter of an environment that holds these packages, made once."""
    key = sha256(json.dumps([sys.version, needed, pins]).encode()).hexdigest()[:16]
    return _made(kept() / "environments" / key, tuple(needed), pins)


@cache
def _made(folder: Path, needed: tuple[str, ...], pins: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    python = folder / "venv" / "bin" / "python"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / READY).is_file():
            (folder / PINS).write_text(pins, encoding="utf-8")
            _run(sys.executable, "-m", "venv", "--clear", str(folder / "venv"))
            _run(str(python), "-m", "pip", "install", "--quiet", "--constraint", str(folder / PINS), *needed)
            (folder / READY).touch()
    return python


def _run(*command: str) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=INSTALL_S, check=False)
    except subprocess.TimeoutExpired as late:
        raise Unbuildable(f"{' '.join(command[1:4])} took longer than {INSTALL_S:.0f} s") from late
    if done.returncode:
        raise Unbuildable(f"{' '.join(command[1:4])}: {(done.stderr.strip().splitlines() or ['failed'])[-1]}")
