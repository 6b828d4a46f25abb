"""Two config files, the keys that differ, and any mixture of them."""

import json
from pathlib import Path
from typing import Any

from suites.commands.desk import UsageFault

ABSENT = "(absent)"
"""in tables, for a key that one side does not have; no JSON text reads like this"""

Keys = tuple[str, ...]


def read_config(place: Path) -> dict[str, Any]:
    """The JSON object of a file, or of the config.json of a folder."""
    file = place / "config.json" if place.is_dir() else place
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageFault(f"{file}: {error}") from error
    if not isinstance(found, dict):
        raise UsageFault(f"{file}: a config is a JSON object, got {type(found).__name__}")
    return found


def differences(good: dict[str, Any], bad: dict[str, Any]) -> dict[str, tuple[Keys, str, str]]:
    """Dotted key -> its path and what it says on either side; objects are entered where both sides have one."""
    return {".".join(path): (path, told(good, path), told(bad, path)) for path in sorted(_paths(good, bad))}


def mixed(good: dict[str, Any], bad: dict[str, Any], moved: list[Keys]) -> dict[str, Any]:
    """The good config with some keys as the bad one has them."""
    found: dict[str, Any] = json.loads(json.dumps(good))
    for path in moved:
        inside, there = found, bad
        for key in path[:-1]:
            inside, there = inside[key], there[key]
        if path[-1] in there:
            inside[path[-1]] = there[path[-1]]
        else:
            del inside[path[-1]]
    return found


def told(config: dict[str, Any], path: Keys) -> str:
    """The value at a path as JSON."""
    for key in path[:-1]:
        config = config[key]
    return json.dumps(config[path[-1]]) if path[-1] in config else ABSENT


def _paths(good: dict[str, Any], bad: dict[str, Any], above: Keys = ()) -> list[Keys]:
    found: list[Keys] = []
    for key in good | bad:
        old, new = good.get(key, ABSENT), bad.get(key, ABSENT)
        if isinstance(old, dict) and isinstance(new, dict):
            found += _paths(old, new, (*above, key))
        elif json.dumps(old) != json.dumps(new):
            found.append((*above, key))
    return found
