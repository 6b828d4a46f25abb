"""Where a command speaks: tables for people, one JSON object for machines, progress beside both.

With `--json` stdout holds the result and nothing else; tables and progress go to stderr. Without it tables go to
stdout. Faults that a user can repair are one line; which exit code they mean is decided here, once.
"""

import contextlib
import json
import math
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from harness.runner import Exit

# by name, along the bases of an error: their modules would load torch before `--help` is printed
FAULTS = {
    "CheckpointError": Exit.USAGE,
    "RecordError": Exit.USAGE,
    "PromptError": Exit.USAGE,
    "UsageFault": Exit.USAGE,
    "ChangedText": Exit.GATE_FAILED,
    "NothingSelected": Exit.NOTHING_SELECTED,
    "MissingCapability": Exit.CAPABILITY_MISSING,
    "OSError": Exit.MACHINE_FAILED,
    "OutOfMemoryError": Exit.MACHINE_FAILED,
    "AcceleratorError": Exit.MACHINE_FAILED,
    "BrokenExecutor": Exit.MACHINE_FAILED,
    "KeyboardInterrupt": Exit.MACHINE_FAILED,
}

WIDTH = 120
"""of tables that go into a file"""


class UsageFault(ValueError):
    """Something was asked for that does not exist; the message names what does."""


class NothingSelected(ValueError):
    """What was asked for is legal and empty."""


class MissingCapability(RuntimeError):
    """This machine cannot do what was required of it."""


@dataclass(frozen=True)
class Answer:
    """How a command ended and what it found, as plain values."""

    exit: Exit
    facts: Mapping[str, Any] = field(default_factory=dict)


class Desk:
    """The two consoles of one command."""

    def __init__(self, is_json: bool = False) -> None:
        self.out, self.err = (
            Console(stderr=stderr, soft_wrap=True, width=None if stream.isatty() else WIDTH)
            for stderr, stream in ((is_json, sys.stderr if is_json else sys.stdout), (True, sys.stderr))
        )

    def say(self, text: str) -> None:
        """One line for people."""
        self.out.print(text, highlight=False, markup=False)

    def table(self, title: str, head: tuple[str, ...], rows: list[tuple[Any, ...]]) -> None:
        """A table for people."""
        # as Text: brackets in a name are no markup
        table = Table(title=Text(title), title_justify="left")
        for name in head:
            table.add_column(Text(name), overflow="fold")
        for row in rows:
            table.add_row(*(Text(str(value)) for value in row))
        self.out.print(table)

    def progress(self) -> Progress:
        """A bar on stderr that is gone when its work is done."""
        columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        return Progress(*columns, TimeElapsedColumn(), console=self.err, transient=True)


def answer(is_json: bool, work: Callable[[Desk], Answer]) -> int:
    """Do the work, print its result, and give the exit code."""
    desk = Desk(is_json)
    with contextlib.redirect_stdout(sys.stderr) if is_json else contextlib.nullcontext():
        try:
            found = work(desk)
        except (Exception, KeyboardInterrupt) as error:
            found = fault(error)
            desk.err.print(f"draftproof: {found.facts['error']}", highlight=False, markup=False)
    if is_json:
        sys.stdout.write(json.dumps(finite({"exit": int(found.exit), **found.facts}), allow_nan=False) + "\n")
    return int(found.exit)


def finite(value: Any) -> Any:
    """The same plain value with None for every number that JSON cannot say."""
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def fault(error: BaseException) -> Answer:
    """One line for what a user can repair; what only we can repair keeps its traceback and concludes nothing."""
    for kind in type(error).__mro__:
        if kind.__name__ in FAULTS:
            said = " ".join(str(error).split()) or kind.__name__
            return Answer(FAULTS[kind.__name__], {"error": said})
    traceback.print_exception(error, file=sys.stderr)
    return Answer(Exit.MACHINE_FAILED, {"error": f"{type(error).__name__}: {error}"})
