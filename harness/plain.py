"""Arrays and numbers of numpy or torch as plain values of Python, without importing either."""

from typing import Any


def frozen(value: Any) -> Any:
    """Arrays and lists become tuples of plain numbers; mappings stay as they are."""
    if type(value) in (float, int, str, bool, type(None)):  # most of what a record holds
        return value
    if hasattr(value, "tolist"):
        value = value.tolist()
    return tuple(frozen(v) for v in value) if isinstance(value, (list, tuple)) else value


def plain(value: Any) -> Any:
    """Numbers of numpy as numbers of Python, for json.dumps."""
    if hasattr(value, "item"):
        return value.item()
    raise TypeError(f"{type(value).__name__} is not a plain value")
