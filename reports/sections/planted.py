"""Planted bugs: the score of the harness itself."""

from typing import NamedTuple

from harness.record import Planted
from reports.panels import Section, place_of
from reports.store import Records


class Score(NamedTuple):
    caught: int
    bugs: int
    quiet: int
    """harmless changes that stayed green"""
    harmless: int
    rows: list[tuple[Planted, str, bool]]
    """what was planted, the outcome in words, whether it is the right one"""


def build(now: Records, every: Records) -> Section:
    """Each planted change with its outcome."""
    return Section("planted", "Planted bugs", {"score": score(now), "place_of": place_of}, template="planted.html")


def score(records: Records) -> Score:
    """Bugs that must be caught, and harmless changes that must not be."""
    bugs = [p for p in records.planted if not p.harmless]
    harmless = [p for p in records.planted if p.harmless]
    rows = []
    for planted in sorted(records.planted, key=lambda p: (p.harmless, p.caught)):
        if planted.harmless:
            outcome = "false alarm" if planted.caught else "stayed green"
        else:
            outcome = "caught" if planted.caught else "missed"
        rows.append((planted, outcome, planted.caught is not planted.harmless))
    return Score(sum(p.caught for p in bugs), len(bugs), sum(not p.caught for p in harmless), len(harmless), rows)
