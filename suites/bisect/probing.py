"""One question put to one tree: good, bad, or no evidence.

    claim     pytest, in a process of its own: it passed, it failed, or it could not be asked (collection, a fixture)
    command   the contract of `git bisect run`: 0 good, 125 cannot be tested, other codes below 128 bad; a signal, or a
              command that is not there, says nothing about the tree

A metric is asked in `measuring.py`. What could not be asked is never bad.
"""

import os
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

from harness.record import Probe
from harness.runner import Outcome, run

LOST = ("ImportError", "ModuleNotFoundError", "AttributeError", "TypeError", "NameError")
"""how today's question ends in a tree that does not have what it asks about"""
UNTESTABLE, NOT_RUN = 125, (126, 127)
SIGNAL = 128
SAID = 300
"""characters of a reason"""


class Site(NamedTuple):
    """Where a question is put."""

    name: str
    """of what is probed: a commit, or what was moved"""
    tree: Path
    python: Path
    environment: Mapping[str, str] = {}
    is_todays: bool = False
    """today's suite lies over the commit's own"""

    def variables(self) -> dict[str, str]:
        """The environment of its processes: the tree comes before whatever is installed."""
        before = self.environment.get("PYTHONPATH", "")
        path = os.pathsep.join(filter(None, [str(self.tree), before]))
        return {**self.environment, "PYTHONPATH": path, "DRAFTPROOF_PYTHON": str(self.python)}


class Question(Protocol):
    """Anything that can be put to a site."""

    @property
    def text(self) -> str:
        """It in one line, the same every time."""

    def ask(self, site: Site) -> Probe:
        """The answer there."""


@dataclass(frozen=True)
class Claim:
    """A test of the suite, by its node id."""

    node: str
    profile: str = "pinned"
    timeout: float = 3600.0

    @property
    def text(self) -> str:
        return f"claim {self.node}"

    def ask(self, site: Site) -> Probe:
        """Run it there."""
        start = time.monotonic()
        outcome = run(
            [self.node],
            options=(f"--profile={self.profile}", "-n0"),
            environment=site.variables(),
            timeout=self.timeout,
            root=site.tree,
            python=str(site.python),
        )
        answer, reason = self.judge(outcome, site.is_todays)
        reason = " ".join(reason.split())[:SAID]
        return Probe(candidate=site.name, answer=answer, reason=reason, duration_s=time.monotonic() - start)

    @staticmethod
    def judge(outcome: Outcome, is_todays: bool) -> tuple[str, str]:
        """Good, bad or untestable, and why."""
        if outcome.is_green:
            return "good", f"{outcome.num('passed')} passed"
        failed = [result for result in outcome.results if result.status == "failed"]
        if is_todays:
            failed = [result for result in failed if not result.message.startswith(LOST)]
        if outcome.is_red and failed:
            return "bad", f"{len(failed)} failed: {failed[0].message}"
        last = (outcome.text.strip().splitlines() or ["nothing was said"])[-1]
        return "untestable", f"{outcome.exit.name.lower()}: {outcome.first_failure or last}"


@dataclass(frozen=True)
class Command:
    """Any shell command; it finds its interpreter in DRAFTPROOF_PYTHON."""

    line: str
    timeout: float = 3600.0

    @property
    def text(self) -> str:
        return f"command {self.line}"

    def ask(self, site: Site) -> Probe:
        """Run it there."""
        start = time.monotonic()
        try:
            done = subprocess.run(
                self.line,
                shell=True,
                cwd=site.tree,
                env={**os.environ, **site.variables()},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                timeout=self.timeout,
                check=False,
            )
            code, said = done.returncode, (done.stdout.strip().splitlines() or [""])[-1]
        except subprocess.TimeoutExpired:
            code, said = SIGNAL, f"given up after {self.timeout:.0f} s"
        return Probe(
            candidate=site.name,
            answer=meaning(code),
            reason=f"exit {code}: {said}"[:SAID],
            duration_s=time.monotonic() - start,
        )


def meaning(code: int) -> str:
    """An exit code as `git bisect run` reads it, but for those that say nothing about the commit."""
    if code == 0:
        return "good"
    return "bad" if 0 < code < SIGNAL and code not in (UNTESTABLE, *NOT_RUN) else "untestable"
