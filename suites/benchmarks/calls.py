"""The operations that a model really calls, with what they are called with."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor

from optimized.ops.table import Ops

NAMES = tuple(name for name in dir(Ops) if not name.startswith("_") and name != "pack")
"""every operation of the table; packing a weight is none that a step does"""


class Called(NamedTuple):
    """One call of one operation."""

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    result: Any

    @property
    def tensors(self) -> list[Tensor]:
        """Every tensor that went in."""
        return [value for value in (*self.args, *self.kwargs.values()) if isinstance(value, Tensor)]


@contextmanager
def noted(ops: Any, names: Sequence[str] = NAMES) -> Iterator[list[Called]]:
    """Note calls of a form's operations in order, not those that an operation makes of another."""
    found: list[Called] = []
    inside = [False]

    def noting(name: str, call: Any) -> Any:
        def noted_call(*args: Any, **kwargs: Any) -> Any:
            if inside[0]:
                return call(*args, **kwargs)
            inside[0] = True
            try:
                result = call(*args, **kwargs)
            finally:
                inside[0] = False
            found.append(Called(name, args, kwargs, result))
            return result

        return noted_call

    for name in names:
        setattr(ops, name, noting(name, getattr(ops, name)))
    try:
        yield found
    finally:
        for name in names:
            delattr(ops, name)
