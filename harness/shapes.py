"""Holds a call to the shape lines of its docstring.

A shape line names a parameter and its dims; results stand after an arrow:

    tokens     [B, T]
    hidden     [B, T, H]     meaning, if not obvious
    ->         logits [B, T, Vd], feedback [B, T, H]

or all on one line, `x [B, T, H] -> [B, T, H]`. A dim is a number, a letter, arithmetic of them (`2H`, `A*H`, `V/W`,
`K+1`, `(N+2G)*D`), or `...` for any number of dims. Letters are bound anew in every call; a word that is also an
integer argument (`num_steps`) is bound to it. `[B] or [B, T]` allows either; None is allowed for an argument, and for
a result where its line says None. What is not a tensor is not judged.

`watch(module, ..)` wraps every function and method with shape lines that the modules define, for the time of a `with`.
"""

import ast
import functools
import inspect
import operator
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from types import FunctionType, ModuleType
from typing import Any

from torch import Tensor

BRACKET = re.compile(r"(?:\b(?!or\b)(?P<name>\w+)\s*)?\[(?P<dims>[^\[\]]*)\]")
LINE = re.compile(r"^\s*(?P<names>\w+(?:\s*,\s*\w+)*)\s+\[(?P<dims>[^\[\]]*)\](?P<rest>.*)$")
NONE = re.compile(r"\s*(?:\||or)\s*None\b")
ARITHMETIC: dict[type, Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}

Shape = tuple[int, ...]
Bindings = dict[str, Fraction]


class ShapeError(AssertionError):
    """A tensor that is not as its docstring declares."""


class ShapeLineError(ValueError):
    """A shape line that cannot be read."""


@dataclass(frozen=True)
class Declared:
    """One name and the shapes it may have, each a tuple of dims as written."""

    name: str
    shapes: tuple[tuple[str, ...], ...]
    optional: bool = False

    def __str__(self) -> str:
        return " or ".join(f"[{', '.join(shape)}]" for shape in self.shapes)


@dataclass(frozen=True)
class Signature:
    """All shape lines of one function."""

    arguments: tuple[Declared, ...]
    results: tuple[Declared, ...]


@dataclass
class Watch:
    """What was held while watching: calls by function, 0 for one that was never reached."""

    calls: dict[str, int] = field(default_factory=dict)


def declared(function: Callable[..., Any]) -> Signature | None:
    """The shape lines of a function's docstring; None where it has none."""
    text = inspect.getdoc(function)
    if not text or "[" not in text:
        return None
    parameters = set(inspect.signature(function).parameters)
    arguments: list[Declared] = []
    results: list[Declared] = []
    for line in text.splitlines():
        left, arrow, right = line.partition("->")
        if arrow:
            results.extend(_results(right))
        found = LINE.match(left)
        if found is None or not parameters.issuperset(_names(found["names"])):
            continue
        for bracket in BRACKET.finditer(left) if arrow else [found]:
            names = bracket["name"] if arrow else bracket["names"]
            if names is None or not parameters.issuperset(_names(names)):
                continue
            shapes = (_dims(bracket["dims"]), *(() if arrow else _alternatives(found["rest"])))
            arguments.extend(Declared(name, shapes, True) for name in _names(names))
    return Signature(tuple(arguments), tuple(results)) if arguments or results else None


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",")]


def _dims(text: str) -> tuple[str, ...]:
    return tuple(dim.strip() for dim in text.split(",")) if text.strip() else ()


def _alternatives(rest: str) -> tuple[tuple[str, ...], ...]:
    found = re.match(r"\s+or\s+\[([^\[\]]*)\](.*)$", rest)
    return (_dims(found[1]), *_alternatives(found[2])) if found else ()


def _results(text: str) -> list[Declared]:
    """`[B, T], [B] or None` and `logits [B, T, V], feedback [B, T, H]  meaning`."""
    results: list[Declared] = []
    end = 0
    for found in BRACKET.finditer(text):
        between = text[end : found.start()].strip()
        if between not in ("", ",", "or"):
            break  # prose after the dims
        none = NONE.match(text, found.end())
        shapes: tuple[tuple[str, ...], ...] = (_dims(found["dims"]),)
        name = found["name"] or ""
        if between == "or" and results:
            last = results.pop()
            name, shapes = last.name, last.shapes + shapes
        results.append(Declared(name, shapes, none is not None))
        end = none.end() if none else found.end()
    return results


def evaluate(dim: str, bound: Mapping[str, Fraction]) -> Fraction | None:
    """The value of a dim; None while one of its letters is unbound."""
    return _value(_parse(dim), bound)


@functools.cache
def _parse(dim: str) -> ast.expr:
    # 2H and 2(G+1) multiply
    spelled = re.sub(r"(\d)\s*(?=[A-Za-z_(])", r"\1*", dim)
    try:
        return ast.parse(spelled, mode="eval").body
    except SyntaxError:
        raise ShapeLineError(f"dim {dim!r} is not a number, a letter or arithmetic of them") from None


def _value(node: ast.expr, bound: Mapping[str, Fraction]) -> Fraction | None:
    if isinstance(node, ast.Constant) and isinstance(node.value, int):
        return Fraction(node.value)
    if isinstance(node, ast.Name):
        return bound.get(node.id)
    if isinstance(node, ast.BinOp) and type(node.op) in ARITHMETIC:
        left, right = _value(node.left, bound), _value(node.right, bound)
        return None if left is None or right is None else ARITHMETIC[type(node.op)](left, right)
    raise ShapeLineError(f"dim {ast.unparse(node)!r} is not a number, a letter or arithmetic of them")


def _solve(node: ast.expr, size: Fraction, bound: Mapping[str, Fraction]) -> tuple[str, Fraction] | None:
    """The one unbound letter of a dim, and the value that makes it `size`; None if it has more than one."""
    if isinstance(node, ast.Name):
        return node.id, size
    if not isinstance(node, ast.BinOp):
        return None
    left, right = _value(node.left, bound), _value(node.right, bound)
    if left is None and right is None:
        return None
    known, unknown = (right, node.left) if left is None else (left, node.right)
    assert known is not None
    if isinstance(node.op, ast.Add):
        return _solve(unknown, size - known, bound)
    if isinstance(node.op, ast.Sub):
        return _solve(unknown, size + known if left is None else known - size, bound)
    if isinstance(node.op, ast.Mult):
        return _solve(unknown, size / known, bound) if known else None
    if left is None:
        return _solve(unknown, size * known, bound)
    return _solve(unknown, known / size, bound) if size else None


class Call:
    """The letters of one call."""

    def __init__(self, where: str, arguments: Mapping[str, Any]) -> None:
        self.where = where
        self.bound: Bindings = {name: Fraction(value) for name, value in arguments.items() if type(value) is int}
        self.pending: list[tuple[Declared, Shape]] = []

    def hold(self, declared: Declared, value: Any, label: str = "") -> None:
        """Bind or check one value."""
        if value is None and not declared.optional:
            raise ShapeError(f"{self.where}: {label or declared.name}: declared {declared}, got None")
        if isinstance(value, Tensor):
            named = Declared(label or declared.name, declared.shapes)
            self.pending.append((named, tuple(value.shape)))

    def settle(self) -> None:
        """Match what was held so far, plain letters first, until nothing new is learned."""
        while self.pending:
            waiting, before = [], len(self.bound)
            for declared, shape in self.pending:
                if not self._match(declared, shape):
                    waiting.append((declared, shape))
            if len(waiting) == len(self.pending) and len(self.bound) == before:
                return
            self.pending = waiting

    def _match(self, declared: Declared, shape: Shape) -> bool:
        """Whether everything about this shape is known; ShapeError where no declared shape fits."""
        fits = [fit for dims in declared.shapes if (fit := self._fit(dims, shape)) is not None]
        if not fits:
            letters = ", ".join(f"{k}={v}" for k, v in sorted(self.bound.items()) if k in _letters(declared))
            known = f" with {letters}" if letters else ""
            raise ShapeError(f"{self.where}: {declared.name}: declared {declared}, got {shape}{known}")
        bound, complete = fits[0]
        self.bound.update(bound)
        return complete

    def _fit(self, dims: tuple[str, ...], shape: Shape) -> tuple[Bindings, bool] | None:
        if "..." in dims:
            at, rest = dims.index("..."), len(dims) - 1
            if len(shape) < rest:
                return None
            dims, shape = dims[:at] + dims[at + 1 :], shape[:at] + shape[len(shape) - rest + at :]
        if len(dims) != len(shape):
            return None
        bound, complete = dict(self.bound), True
        for dim, size in sorted(zip(dims, shape, strict=True), key=lambda pair: not pair[0].isalnum()):
            value = evaluate(dim, bound)
            if value is None:
                solved = _solve(_parse(dim), Fraction(size), bound)
                if solved is None:
                    complete = False
                    continue
                if solved[1].denominator != 1 or solved[1] < 0:
                    return None
                bound[solved[0]] = solved[1]
            elif value != size:
                return None
        return bound, complete


def _letters(declared: Declared) -> set[str]:
    return {name for shape in declared.shapes for dim in shape for name in re.findall(r"[A-Za-z_]\w*", dim)}


def hold(function: Callable[..., Any], watched: Watch | None = None) -> Callable[..., Any]:
    """The function, with every call held to its shape lines; unchanged where it has none."""
    signature = declared(function)
    if signature is None:
        return function
    parameters = inspect.signature(function)
    where = f"{function.__module__}.{function.__qualname__}"
    if watched is not None:
        watched.calls[where] = 0

    @functools.wraps(function)
    def held(*args: Any, **kwargs: Any) -> Any:
        arguments = parameters.bind(*args, **kwargs).arguments
        call = Call(where, arguments)
        for line in signature.arguments:
            call.hold(line, arguments.get(line.name))
        call.settle()
        result = function(*args, **kwargs)
        _hold_results(call, signature.results, result)
        call.settle()
        if watched is not None:
            watched.calls[where] += 1
        return result

    return held


def _hold_results(call: Call, lines: tuple[Declared, ...], result: Any) -> None:
    if not lines:
        return
    if isinstance(result, Tensor) or result is None:
        if len(lines) > 1:
            raise ShapeError(f"{call.where}: {len(lines)} results declared, got {'None' if result is None else 'one'}")
        call.hold(lines[0], result, lines[0].name or "result")
    elif all(line.name for line in lines):
        for line in lines:
            if isinstance(result, Mapping) and line.name in result:
                call.hold(line, result[line.name])
            elif hasattr(result, line.name):
                call.hold(line, getattr(result, line.name))
            elif isinstance(result, tuple) and len(result) == len(lines):
                call.hold(line, result[lines.index(line)])
            else:
                raise ShapeError(f"{call.where}: {line.name}: declared {line}, but the result has no {line.name}")
    elif isinstance(result, tuple):
        if len(result) != len(lines):
            raise ShapeError(f"{call.where}: {len(lines)} results declared, got {len(result)}")
        for index, (line, value) in enumerate(zip(lines, result, strict=True)):
            call.hold(line, value, line.name or f"result {index}")


@contextmanager
def watch(*modules: ModuleType) -> Iterator[Watch]:
    """Hold every function and method that these modules define and give shape lines, also where one of the modules
    imported it from another by name; everything is as before afterwards."""
    watched = Watch()
    undo: list[tuple[Any, str, Any]] = []
    held: dict[FunctionType, Callable[..., Any]] = {}

    def put(owner: Any, name: str, value: Any) -> None:
        undo.append((owner, name, vars(owner)[name]))
        setattr(owner, name, value)

    try:
        for module in modules:
            for value in list(vars(module).values()):
                if isinstance(value, FunctionType) and value.__module__ == module.__name__:
                    held[value] = hold(value, watched)
                elif inspect.isclass(value) and value.__module__ == module.__name__:
                    for method, raw in list(vars(value).items()):
                        inner = raw.__func__ if isinstance(raw, staticmethod | classmethod) else raw
                        if isinstance(inner, FunctionType) and (wrapped := hold(inner, watched)) is not inner:
                            put(value, method, type(raw)(wrapped) if inner is not raw else wrapped)
        for module in modules:
            for name, value in list(vars(module).items()):
                if isinstance(value, FunctionType) and held.get(value, value) is not value:
                    put(module, name, held[value])
        yield watched
    finally:
        for owner, name, value in reversed(undo):
            setattr(owner, name, value)
