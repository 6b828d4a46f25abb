"""The commits between a good one and a bad one, as git tells them; the repository is read and never written."""

import subprocess
from dataclasses import dataclass
from pathlib import Path

from suites.commands.desk import UsageFault


@dataclass(frozen=True)
class History:
    """What is reachable from the bad end and not from the good one; merges keep all their parents."""

    good: str
    bad: str
    commits: tuple[tuple[str, str], ...]
    """sha and subject, parents before children; the last one is `bad`"""
    parents: tuple[tuple[int, ...], ...]
    """places of those parents of each commit that are candidates themselves"""


def git(repository: Path, *arguments: str) -> str:
    """What git prints; UsageFault with git's own words where it refuses."""
    command = ["git", "--no-optional-locks", "-C", str(repository), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode:
        raise UsageFault(f"{repository}: git {arguments[0]}: {done.stderr.strip() or done.returncode}")
    return done.stdout


def sha_of(repository: Path, name: str) -> str:
    """The commit that a name means."""
    return git(repository, "rev-parse", "--verify", "--quiet", "--end-of-options", f"{name}^{{commit}}").strip()


def top(folder: Path) -> Path:
    """The repository that a folder belongs to."""
    return Path(git(folder, "rev-parse", "--show-toplevel").strip())


def history(repository: Path, good: str, bad: str) -> History:
    """The candidates; UsageFault where `good` is no ancestor of `bad`."""
    old, new = sha_of(repository, good), sha_of(repository, bad)
    if old == new or git(repository, "merge-base", old, new).strip() != old:
        raise UsageFault(f"{good} is no ancestor of {bad}, so there is no first bad commit between them")
    text = git(repository, "log", "--topo-order", "--reverse", "--format=%H%x00%P%x00%s", new, f"^{old}")
    rows = [line.split("\0") for line in text.splitlines()]
    places = {sha: place for place, (sha, _, _) in enumerate(rows)}
    parents = (tuple(places[p] for p in above.split() if p in places) for _, above, _ in rows)
    return History(old, new, tuple((sha, subject) for sha, _, subject in rows), tuple(parents))
