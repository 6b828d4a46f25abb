"""What a section of the page is made of, and the words that all sections share."""

import math
import re
from typing import Any, NamedTuple

from reports.drawing import Plot
from reports.statistics import Interval

# a test's node id: the file is the claim, the name a true sentence, what stands in brackets one case of it
NODE_ID = re.compile(r"(?:.*/)?test_(?P<file>\w+)\.py::(?:\w+::)*test_(?P<test>\w+)(?:\[(?P<case>.*)\])?", re.DOTALL)


class Panel(NamedTuple):
    """Plots and a table, or the reason why there are none."""

    missing: str = ""
    head: tuple[str, ...] = ()
    rows: tuple[tuple[str, ...], ...] = ()
    plots: tuple[Plot, ...] = ()
    title: str = ""
    note: str = ""
    folded: bool = False
    """the table opens on request"""
    words: bool = False
    """its columns are sentences, not numbers"""


class Section(NamedTuple):
    """One part of the page: `templates/NAME.html` shows its facts."""

    name: str
    title: str
    facts: dict[str, Any]
    link: str = ""
    """in the navigation; the title where empty"""
    template: str = "panels.html"


def panels(name: str, title: str, *found: Panel, link: str = "", row: str = "") -> Section:
    """A section that is a row of panels; `row`: what the first column of their tables holds."""
    return Section(name, title, {"panels": found, "row": row or title}, link)


def claim_of(name: str) -> str:
    """The claim that a check belongs to: the words of its file's name, or its own name where that is no node id."""
    found = NODE_ID.fullmatch(name)
    return found["file"].replace("_", " ") if found else name


def sentence_of(name: str) -> str:
    """The claim and the sentence that a test proves of it."""
    found = NODE_ID.fullmatch(name)
    return f"{claim_of(name)}: {found['test'].replace('_', ' ')}" if found else name


def place_of(name: str) -> str:
    """The same with the one case that was drawn or listed."""
    found = NODE_ID.fullmatch(name)
    return sentence_of(name) + (f" [{found['case']}]" if found and found["case"] else "")


def share(used: float | None) -> str:
    """A share of the error budget, as people read it."""
    if used is None:
        return "exact"
    if math.isinf(used):
        return "not finite"
    if used >= 10:
        return f"{used:.3g}x"
    return f"{100 * used:.0f} %" if used == 0 or used >= 0.01 else "< 1 %"


def counted(number: int, noun: str) -> str:
    """A number and its noun."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def number(interval: Interval) -> str:
    """The value of an estimate."""
    return f"{interval.value:.2f}" if math.isfinite(interval.value) else "not known"


def span(interval: Interval) -> str:
    """Where the true value lies."""
    return f"{interval.low:.2f} to {interval.high:.2f}" if interval.known else "needs two units"
