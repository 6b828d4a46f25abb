"""Counterexamples: what a failed claim was given, in one file that anybody can run again.

`keep` is called by the pytest hook for every failure of a run that is recorded. It writes one JSON file, whole or not
at all: the claim, the values that it was given (configs, seeds, shapes), hypothesis' reproduction blob, versions and
commit. `arm` makes a collected claim run that blob and nothing else. No tensor is stored: seeds and configs make them.
"""

import importlib.metadata
import json
import os
import platform
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

from harness.record import RecordError
from harness.ulid import new_run_id

FORMAT = "draftproof-counterexample/1"
FOLDER = "counterexamples"
BLOB = re.compile(r"@reproduce_failure\('([^']+)', b'([^']+)'\)")
DECIDES = ("torch", "hypothesis", "numpy", "triton", "transformers")
"""packages that may turn a failure into a pass"""
MOST = 64
"""items of a list that are kept"""
LONGEST = 300
"""signs of the line that says what was given"""


class CounterexampleError(RecordError):
    """A file that is no counterexample, or cannot be run here."""


@dataclass(frozen=True, kw_only=True)
class Counterexample:
    """One failure of one claim."""

    claim: str
    """pytest node id"""
    pair: str
    profile: str
    reason: str
    given: Mapping[str, Any] = field(default_factory=dict)
    """argument of the claim -> plain value; a tensor is its shape"""
    blob: str = ""
    """of hypothesis; empty where an example was pinned or nothing was drawn"""
    hypothesis: str = ""
    """version that wrote the blob"""
    shares: Mapping[str, float] = field(default_factory=dict)
    """tensor -> share of its error budget, as far as the claim came"""
    versions: Mapping[str, Any] = field(default_factory=dict)
    source: Mapping[str, Any] = field(default_factory=dict)
    """commit, and whether files differed from it"""

    @property
    def line(self) -> str:
        """What was given, in one line."""
        return shortened(", ".join(f"{name}={said(value)}" for name, value in self.given.items()))


def shortened(text: str) -> str:
    return text if len(text) <= LONGEST else text[: LONGEST - 3] + "..."


def versions() -> dict[str, Any]:
    """What may decide whether a claim passes here."""
    here: dict[str, Any] = {"python": platform.python_version(), "machine": platform.machine()}
    for name in DECIDES:
        try:
            here[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            here[name] = None
    return here


def write(folder: Path, found: Counterexample) -> Path:
    """One new file, whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{new_run_id()}.json"
    draft = path.with_suffix(".part")
    draft.write_text(json.dumps({"format": FORMAT, **asdict(found)}, indent=2, default=str) + "\n", encoding="utf-8")
    os.replace(draft, path)
    return path


def read(path: str | os.PathLike[str]) -> Counterexample:
    """Read a counterexample; errors: CounterexampleError that names the file and what is wrong."""
    file = Path(path)
    try:
        facts = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CounterexampleError(f"{file}: cannot be read as JSON ({error})") from error
    if not isinstance(facts, dict) or facts.get("format") != FORMAT:
        raise CounterexampleError(f"{file}: is no counterexample; {FORMAT!r} is expected under 'format'")
    known = {f.name: facts[f.name] for f in fields(Counterexample) if f.name in facts}
    lacking = [name for name in ("claim", "pair", "profile", "reason") if not isinstance(known.get(name), str)]
    if lacking:
        raise CounterexampleError(f"{file}: key {lacking[0]!r} is missing or no text")
    if not isinstance(known.get("given", {}), dict) or not isinstance(known.get("blob", ""), str):
        raise CounterexampleError(f"{file}: 'given' is a mapping and 'blob' a text")
    return Counterexample(**known)


def notes(error: BaseException) -> Iterator[str]:
    """What hypothesis and others noted on an error and on those that it groups."""
    yield from getattr(error, "__notes__", ())
    for inner in getattr(error, "exceptions", ()):
        yield from notes(inner)


def blob_of(error: BaseException) -> tuple[str, str]:
    """(version of hypothesis, blob) of a failure, empty where none was told."""
    found = BLOB.search("\n".join(notes(error)))
    return (found[1], found[2]) if found else ("", "")


def given(error: BaseException, file: Path) -> dict[str, Any]:
    """What the claim was called with: the first frame of its file behind the last one of hypothesis."""
    while inner := getattr(error, "exceptions", ()):
        error = inner[0]
    frames: list[FrameType] = []
    trace = error.__traceback__
    while trace is not None:
        frames.append(trace.tb_frame)
        trace = trace.tb_next
    drawn = [i for i, frame in enumerate(frames) if "/hypothesis/" in frame.f_code.co_filename]
    behind = frames[drawn[-1] + 1 if drawn else 0 :]
    called = next((frame for frame in behind if frame.f_code.co_filename == str(file)), None)
    if called is None:
        return {}
    values = {name: called.f_locals[name] for name in arguments(called.f_code) if name in called.f_locals}
    return {name: plain(value) for name, value in values.items()}


def arguments(code: CodeType) -> tuple[str, ...]:
    """Names of a function's arguments, those of `*` and `**` included."""
    number = code.co_argcount + code.co_kwonlyargcount + bool(code.co_flags & 4) + bool(code.co_flags & 8)
    return code.co_varnames[:number]


def plain(value: Any) -> Any:
    """A value as JSON knows it: dataclasses and tuples with names by their fields, tensors by their shape."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return {"type": "Tensor", "shape": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}
    if hasattr(value, "_fields"):
        return {"type": type(value).__name__, **{name: plain(getattr(value, name)) for name in value._fields}}
    # a class that hides its fields says itself what it is
    if is_dataclass(value) and not isinstance(value, type) and _tells_fields(value):
        return {"type": type(value).__name__, **{f.name: plain(getattr(value, f.name)) for f in fields(value)}}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in list(value.items())[:MOST]}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in list(value)[:MOST]]
    return repr(value)[:LONGEST]


def _tells_fields(value: Any) -> bool:
    """Whether a dataclass prints its fields."""
    return bool(type(value).__dataclass_params__.repr)


def said(value: Any) -> str:
    """A plain value in few words."""
    if isinstance(value, Mapping):
        name, rest = str(value.get("type", "")), {key: item for key, item in value.items() if key != "type"}
        if name == "Drawn":
            config = json.loads(rest["config"])
            return f"Drawn({config.get('model_type')}, seed {rest['seed']})"
        return f"{name}({', '.join(f'{key}={said(item)}' for key, item in rest.items())})"
    return f"[{', '.join(map(said, value))}]" if isinstance(value, list) else str(value)


def drawn(value: Any) -> Iterator[tuple[dict[str, Any], int]]:
    """(config, seed) of every checkpoint among plain values, in their order."""
    if isinstance(value, Mapping):
        if value.get("type") == "Drawn":
            yield json.loads(value["config"]), int(value["seed"])
        for item in value.values():
            yield from drawn(item)
    elif isinstance(value, list):
        for item in value:
            yield from drawn(item)


def arm(item: Any, found: Counterexample) -> None:
    """Make a collected claim run the blob alone."""
    from hypothesis import given as draw
    from hypothesis import reproduce_failure

    if not found.blob:
        return
    once = reproduce_failure(found.hypothesis, found.blob.encode())
    if getattr(item.obj, "is_hypothesis_test", False):
        once(item.obj)
    else:
        # a claim that builds its property when it runs asks its own module for `given`
        item.module.given = lambda *args, **kwargs: lambda prove: once(draw(*args, **kwargs)(prove))
