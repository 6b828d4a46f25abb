"""One commit against another, each in processes of its own: A is REV, B is what is checked out here.

Processes take turns A B B A B A A B .., each in a worktree of its commit, so a drift of the machine meets both sides
alike; what a process keeps for itself (addresses, a first allocation, a clock that settled) is drawn anew each time.
`draftproof compare FOLDER/a FOLDER/b` judges the records. What is not committed takes no part, and the answer says so.
"""

import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from harness.environment import ROOT
from harness.runner import Exit
from harness.ulid import new_run_id
from suites.bisect.commits import git, sha_of
from suites.bisect.worktrees import Worktrees
from suites.commands.desk import Answer, Desk, UsageFault

HERE = "HEAD"
TIMEOUT_S = 3600
SAID = 2000
"""characters of a failed process that are shown"""


def order(processes: int) -> str:
    """Whose turn it is: so many processes a side, there and back, each block beginning with the other side."""
    blocks = ["abba" if i % 2 == 0 else "baab" for i in range(-(-processes // 2))]
    turns = "".join(blocks)
    return turns if processes % 2 == 0 else turns[: -len("abba")] + turns[-4:-2]


def race(desk: Desk, revision: str, arguments: Sequence[str], runs: Path, processes: int, root: Path = ROOT) -> Answer:
    """Run `python -m suites.cli ARGUMENTS` so many times a side; the gravest exit code of all."""
    if processes < 1:
        raise UsageFault("an A/B needs at least one process a side")
    sides = {"a": commit_of(revision, root), "b": commit_of(HERE, root)}
    folder, worst = (runs / f"ab-{new_run_id()}").resolve(), Exit.PASSED
    turns = order(processes)
    with (
        Worktrees(root) as trees,
        trees.at(sides["a"]) as old,
        trees.at(sides["b"]) as new,
        desk.progress() as progress,
    ):
        bar = progress.add_task("processes", total=len(turns))
        for turn in turns:
            code = one(new if turn == "b" else old, [*arguments, "--runs", str(folder / turn)], desk.say)
            worst = code if worst == Exit.PASSED else worst
            progress.advance(bar)
            if code not in (Exit.PASSED, Exit.INCONCLUSIVE):
                break
    if dirty(root):
        desk.say("what is not committed took no part in side b")
    desk.say(f"compare {folder / 'a'} {folder / 'b'}")
    records = {side: sorted(map(str, (folder / side).glob("*/*.jsonl"))) for side in sides}
    return Answer(worst, {**records, "order": turns, "commits": sides, "folder": str(folder)})


def one(tree: Path, arguments: Sequence[str], say: Callable[[str], None]) -> Exit:
    """One process in a worktree; what it said is shown where it failed."""
    command = [sys.executable, "-m", "suites.cli", *arguments]
    try:
        done = subprocess.run(
            command,
            cwd=tree,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        say(f"{tree}: given up after {TIMEOUT_S} s")
        return Exit.MACHINE_FAILED
    known = {int(code) for code in Exit}
    code = Exit(done.returncode) if done.returncode in known else Exit.MACHINE_FAILED
    if code != Exit.PASSED:
        say(f"{tree.name} ended with {done.returncode}:\n{done.stdout[-SAID:]}")
    return code


def commit_of(revision: str, root: Path) -> str:
    """The commit that a revision names; UsageFault where there is none."""
    try:
        return sha_of(root, revision)
    except UsageFault as error:
        raise UsageFault(f"{revision!r} names no commit of {root}") from error


def dirty(root: Path) -> bool:
    """Whether tracked files differ from their commit."""
    return bool(git(root, "status", "--porcelain", "--untracked-files=no"))
