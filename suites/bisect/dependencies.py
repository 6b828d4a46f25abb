"""Two lists of pinned packages, and any mixture of them.

The packages that both lists share are one environment, that of the good list; each package that differs lies in a
folder of its own for either version, and a mixture is a PYTHONPATH. So n packages that differ cost 2 n small
installations and not 2^n environments.
"""

import fcntl
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from importlib.metadata import distributions
from pathlib import Path

from suites.bisect.environments import INSTALL_S, Unbuildable, kept, made
from suites.commands.desk import UsageFault

PIN = re.compile(r"(?P<name>[A-Za-z0-9][A-Za-z0-9._-]*)(?:\[[^\]]*\])?\s*==\s*(?P<version>[^\s;#]+)")

Pins = dict[str, str]


def read_pins(file: Path) -> Pins:
    """name -> version of every `name==version` line, names as PEP 503 spells them."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UsageFault(
            f"{file}: {error.strerror}; give a file of name==version lines, as pip freeze writes"
        ) from error
    found = {canonical(m["name"]): m["version"] for line in lines if (m := PIN.match(line.strip()))}
    if not found:
        raise UsageFault(f"{file}: holds no name==version line, as pip freeze writes them")
    return found


def canonical(name: str) -> str:
    """One spelling of a package's name."""
    return re.sub(r"[-_.]+", "-", name).lower()


def differences(good: Pins, bad: Pins) -> dict[str, tuple[str, str]]:
    """name -> version on either side, empty where that side has none."""
    return {name: (good.get(name, ""), bad.get(name, "")) for name in sorted(good | bad)
            if good.get(name) != bad.get(name)}  # fmt: skip


def shared_python(good: Pins, moving: Mapping[str, tuple[str, str]]) -> Path:
    """An interpreter with what both lists share: ours if it has just that, else one made for the good list."""
    ours = {canonical(d.metadata["Name"]): d.version for d in distributions() if d.metadata["Name"]}
    if all(ours.get(name) == version for name, version in good.items() if name not in moving):
        return Path(sys.executable)
    return made([f"{name}=={version}" for name, version in sorted(good.items())], "")


def folders(moving: Mapping[str, tuple[str, str]], moved: frozenset[str]) -> str:
    """The PYTHONPATH of a mixture; Unbuildable where a version cannot be installed."""
    versions = {name: both[name in moved] for name, both in moving.items()}
    return os.pathsep.join(str(package(name, version)) for name, version in versions.items() if version)


def package(name: str, version: str) -> Path:
    """The folder of one version of one package, without what it depends on, installed once."""
    tag = f"{sys.implementation.cache_tag}-{name}-{version}"
    folder = kept() / "packages" / tag
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "ready").is_file():
            command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--upgrade", "--target",
                       str(folder / "site"), f"{name}=={version}"]  # fmt: skip
            done = subprocess.run(command, capture_output=True, text=True, timeout=INSTALL_S, check=False)
            if done.returncode:
                raise Unbuildable(f"{name}=={version}: {(done.stderr.strip().splitlines() or ['failed'])[-1]}")
            (folder / "ready").touch()
    return folder / "site"
