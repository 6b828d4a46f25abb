"""Planting one bug in the code that runs.

A bug names a dotted place and makes the replacement from what stands there:

    reference.ops.norm.RMSNorm.forward          a method, function, property or class
    optimized.drafts.eagle3.rotate              a function imported by name: replaced where it is used, that is, here
    optimized.drafts.eagle3.CHECKPOINT_NAMES    a tuple, list or dict
    optimized.drafts.eagle3.TP_PLAN['fc.weight']   one entry of a table

A bug that is never reached proves nothing, so every reach is counted. Callables count their calls, classes the
objects made of them. Tables are replaced by a copy whose class counts reads (an entry counts reads of its key and
walks over the table). Attributes of classes become descriptors that count. A module's plain number or string is read
by the interpreter itself, where nothing can count: plant the function that reads it instead; PlantingError says so.
Modules of this process alone are changed: a bug does not travel into spawned ranks.
"""

import ast
import functools
import importlib
import inspect
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FunctionType, ModuleType
from typing import Any


class PlantingError(ValueError):
    """A bug that has no place to be planted, or could not be counted there."""


@dataclass(frozen=True)
class Bug:
    """One wrong line, and who must notice it."""

    name: str
    origin: str
    """where it was seen: an issue, a pull request, a commit"""
    at: str
    """dotted place in the code that runs"""
    make: Callable[[Any], Any]
    """original -> replacement"""
    claim: str
    """pytest node id of the claim that must turn red"""
    harmless: bool = False
    """a change that is not a bug: its claim must stay green"""


class Planted:
    """A bug in the ground, and how often it was reached."""

    def __init__(self, bug: Bug) -> None:
        self.bug, self.reached = bug, 0
        self._lock = threading.Lock()

    def reach(self) -> None:
        """Count one more."""
        with self._lock:
            self.reached += 1


@dataclass(frozen=True)
class Place:
    """A name in an owner: a module or a class."""

    owner: Any
    name: str
    key: Any = None
    is_entry: bool = False

    @property
    def stands(self) -> Any:
        """What the owner holds, descriptors unbound."""
        return inspect.getattr_static(self.owner, self.name)


def find(at: str) -> Place:
    """The place a dotted name means; PlantingError where it does not exist."""
    path, key, is_entry = at, None, False
    if found := re.fullmatch(r"([\w.]+)\[(.+)\]", at):
        path, is_entry = found[1], True
        try:
            key = ast.literal_eval(found[2])
        except (SyntaxError, ValueError):
            raise PlantingError(
                f"{at}: the entry {found[2]} is not a literal; write TABLE['key'] or TABLE[0]"
            ) from None
    parts = path.split(".")
    owner, rest = _module(parts, at)
    for part in rest[:-1]:
        if not hasattr(owner, part):
            raise PlantingError(f"{at}: {_name(owner)} has no {part}")
        owner = getattr(owner, part)
    if not rest or not hasattr(owner, rest[-1]):
        raise PlantingError(f"{at}: {_name(owner)} has no {rest[-1] if rest else 'name to replace in it'}")
    if not isinstance(owner, ModuleType | type):
        raise PlantingError(f"{at}: {_name(owner)} is neither a module nor a class")
    return Place(owner, rest[-1], key, is_entry)


def _module(parts: list[str], at: str) -> tuple[Any, list[str]]:
    """The longest prefix that is a module, and the names that are left."""
    for end in range(len(parts), 0, -1):
        prefix = ".".join(parts[:end])
        try:
            return importlib.import_module(prefix), parts[end:]
        except ModuleNotFoundError as error:
            # a missing module inside the page is the page's own fault, not a wrong name
            if error.name is None or not (prefix == error.name or prefix.startswith(error.name + ".")):
                raise
    raise PlantingError(f"{at}: there is no module {parts[0]}")


def _name(owner: Any) -> str:
    return getattr(owner, "__qualname__", None) or getattr(owner, "__name__", None) or repr(owner)


@contextmanager
def planted(bug: Bug) -> Iterator[Planted]:
    """Plant a bug for the time of a `with`; the place is restored whatever happens."""
    place, bed = find(bug.at), Planted(bug)
    stands = place.stands
    # an inherited name is replaced for this class alone, and taken away again
    own = place.name in vars(place.owner)
    replacement = _entry(place, bed) if place.is_entry else _attribute(place, bed)
    setattr(place.owner, place.name, replacement)
    try:
        yield bed
    finally:
        if own:
            setattr(place.owner, place.name, stands)
        else:
            delattr(place.owner, place.name)


def _attribute(place: Place, bed: Planted) -> Any:
    stands, make = place.stands, bed.bug.make
    if isinstance(stands, staticmethod | classmethod):
        return type(stands)(_counting_call(make(stands.__func__), bed))
    if inspect.isclass(stands):
        return _counting_class(make(stands), bed)
    in_class = isinstance(place.owner, type)
    # in a class only a function binds to its instance, and a wrapper is a function
    if isinstance(stands, FunctionType) or (inspect.isroutine(stands) and not in_class):
        return _counting_call(make(stands), bed)
    new = make(stands)
    if in_class:
        return _CountingAttribute(new, bed)
    if callable(stands):
        return _CountingObject(new, bed)
    return _counting_table(new, bed, place, None)


def _entry(place: Place, bed: Planted) -> Any:
    table, at = place.stands, bed.bug.at
    if not isinstance(table, dict | list | tuple):
        raise PlantingError(f"{at}: {place.name} is a {type(table).__name__}, not a table")
    try:
        original = table[place.key]
    except (LookupError, TypeError) as error:
        raise PlantingError(f"{at}: {place.name} has no entry {place.key!r}") from error
    new = bed.bug.make(original)
    if isinstance(table, dict):
        return _counting_table({**table, place.key: new}, bed, place, place.key)
    items = list(table)
    items[place.key] = new
    return _counting_table(type(table)(items), bed, place, place.key % len(items))


def _counting_call(function: Any, bed: Planted) -> Any:
    if not callable(function):
        raise PlantingError(f"{bed.bug.at}: the replacement of a callable is a {type(function).__name__}")

    @functools.wraps(function)
    def counted(*args: Any, **kwargs: Any) -> Any:
        bed.reach()
        return function(*args, **kwargs)

    return counted


def _counting_class(new: Any, bed: Planted) -> Any:
    if not inspect.isclass(new):
        return _counting_call(new, bed)

    def make(cls: type, *args: Any, **kwargs: Any) -> Any:
        bed.reach()
        return new.__new__(cls) if new.__new__ is object.__new__ else new.__new__(cls, *args, **kwargs)

    # a subclass, so that isinstance and subclassing go on working
    names = {"__new__": make, "__module__": new.__module__, "__qualname__": new.__qualname__, "__doc__": new.__doc__}
    metaclass: Any = type(new)
    return metaclass(new.__name__, (new,), names)


class _CountingObject:
    """A callable object whose calls and look-ups are counted; a Triton kernel is launched through its `[grid]`."""

    def __init__(self, value: Any, bed: Planted) -> None:
        self._value, self._bed = value, bed

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self._bed.reach()
        return self._value(*args, **kwargs)

    def __getitem__(self, key: Any) -> Any:
        self._bed.reach()
        return self._value[key]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._value, name)


class _CountingAttribute:
    """A class attribute (or property) whose reads are counted."""

    def __init__(self, value: Any, bed: Planted) -> None:
        self.value, self.bed = value, bed

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        self.bed.reach()
        getter = getattr(type(self.value), "__get__", None)
        return self.value if getter is None else getter(self.value, instance, owner)


def _counting_table(new: Any, bed: Planted, place: Place, key: Any) -> Any:
    """A copy of a table whose class counts reads; of one key and of walks, if a key is given."""
    kind = next((k for k in (dict, list, tuple) if type(new) is k), None)
    if kind is None:
        raise PlantingError(
            f"{bed.bug.at}: reads of a {type(new).__name__} in a {type(place.owner).__name__} cannot be counted; "
            f"plant the function that reads it"
        )

    def walk(name: str) -> Callable[..., Any]:
        original = getattr(kind, name)

        @functools.wraps(original)
        def counted(self: Any, *args: Any) -> Any:
            bed.reach()
            return original(self, *args)

        return counted

    def look_up(name: str) -> Callable[..., Any]:
        original = getattr(kind, name)

        @functools.wraps(original)
        def counted(self: Any, at: Any, *default: Any) -> Any:
            index = at + len(self) if kind is not dict and isinstance(at, int) and at < 0 else at
            if key is None or isinstance(at, slice) or index == key:
                bed.reach()
            return original(self, at, *default)

        return counted

    walks = ("__iter__", "items", "values", "keys") if kind is dict else ("__iter__", "__add__", "index", "count")
    looks = ("__getitem__", "get", "__contains__") if kind is dict else ("__getitem__",)
    names = {**{name: walk(name) for name in walks}, **{name: look_up(name) for name in looks}}
    return type(f"Counting{kind.__name__.title()}", (kind,), names)(new)
