"""Working trees of single commits, far from the repository that they come from.

They belong to a clone of our own that borrows the repository's objects, so the repository itself is never written: no
worktree is listed in it, and nothing is left in it by a process that is killed. Everything lies in one folder, which a
lock marks as alive; whoever begins next removes the folders of the dead.
"""

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

from harness.environment import ROOT
from suites.bisect.commits import git

PREFIX = "draftproof-trees-"
LOCK = "lock"
INSTRUMENTS = ("suites", "harness", "reports", "conftest.py", "pyproject.toml")
"""today's, where a commit is asked a question that it does not know"""


class Worktrees:
    """Trees of one repository; removed at the end, and by the next one after a crash."""

    def __init__(self, repository: Path, folder: Path | None = None) -> None:
        self.parent = folder or Path(tempfile.gettempdir())
        sweep(self.parent)
        self.folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=self.parent))
        self._lock = os.open(self.folder / LOCK, os.O_CREAT | os.O_RDWR)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        self.clone = self.folder / "clone"
        git(repository, "clone", "--quiet", "--shared", "--no-checkout", str(repository.resolve()), str(self.clone))
        # commits that no branch of the clone names are still there: the objects are shared
        git(self.clone, "config", "gc.auto", "0")

    @contextlib.contextmanager
    def at(self, sha: str) -> Iterator[Path]:
        """A tree of one commit while it is needed."""
        tree = Path(tempfile.mkdtemp(prefix=f"{sha[:12]}-", dir=self.folder))
        try:
            git(self.clone, "worktree", "add", "--quiet", "--force", "--detach", str(tree), sha)
            yield tree
        finally:
            shutil.rmtree(tree, ignore_errors=True)
            git(self.clone, "worktree", "prune")

    def close(self) -> None:
        """Remove everything; closing twice is harmless."""
        shutil.rmtree(self.folder, ignore_errors=True)
        with contextlib.suppress(OSError):
            os.close(self._lock)

    def __enter__(self) -> "Worktrees":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def sweep(folder: Path) -> list[Path]:
    """Remove the trees of processes that were killed, and say which."""
    gone = []
    for dead in sorted(folder.glob(f"{PREFIX}*")):
        with contextlib.suppress(OSError), (dead / LOCK).open("rb") as lock:
            # the system takes a lock back from a process that dies
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(dead, ignore_errors=True)
            gone.append(dead)
    return gone


def lay_over(tree: Path, instruments: Path = ROOT) -> None:
    """Put today's questions and instruments into the tree of another commit; its models stay what they are."""
    for name in INSTRUMENTS:
        old, new = tree / name, instruments / name
        if new.is_dir():
            shutil.rmtree(old, ignore_errors=True)
            shutil.copytree(new, old, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(new, old)
