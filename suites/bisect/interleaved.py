"""Two commits measured in turns on one machine: A B B A, a process each, so that drift meets both sides alike."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from harness.ulid import new_run_id
from suites.bisect.environments import python_of
from suites.bisect.measuring import gated, measure
from suites.bisect.probing import Site
from suites.bisect.worktrees import Worktrees, lay_over

TURNS = "abba"


class Raced(NamedTuple):
    """Where the records of the two sides lie: one folder of runs a side."""

    a: Path
    b: Path


def race(
    repository: Path,
    sides: tuple[str, str],
    bench: Sequence[str],
    runs: Path,
    *,
    claims: Sequence[str] = (),
    processes: int = 4,
    timeout: float = 3600.0,
    advance: Callable[[], None] = lambda: None,
) -> Raced:
    """Both trees are made first; then so many processes a side, each of one line of `bench`.

    sides   commits; the second one's claims and instruments measure both
    claims  the line of `check` that opens the gate of each tree, once; none: every process holds its own
    """
    folder = runs / f"ab-{new_run_id()}"
    with Worktrees(repository) as trees, trees.at(sides[0]) as old, trees.at(sides[1]) as new:
        if sides[0] != sides[1]:
            lay_over(old, new)
        sites = [Site(sha, tree, python_of(tree)) for sha, tree in zip(sides, (old, new), strict=True)]
        # one commit has one gate, however many trees it has
        commits = {site.name: site for site in sites}
        lines = {sha: gated(site, claims, bench, runs, timeout) for sha, site in commits.items()}
        for turn in range(2 * processes):
            side = TURNS[turn % len(TURNS)]
            site = sites["ab".index(side)]
            measure(site, lines[site.name], folder / side, timeout)
            advance()
    return Raced(folder / "a", folder / "b")
