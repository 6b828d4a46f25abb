"""A metric asked of a tree: `bench` there, compared with what the good end measured tonight.

An UNCLEAR comparison is given more runs before it counts as no evidence; a red gate brings no numbers, so a tree whose
claims fail cannot be tested for speed.
"""

import json
import os
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from harness.record import Case, Probe
from harness.runner import Exit
from reports import store
from reports.gates import Gates
from reports.regressions import Judged, look
from reports.sides import series
from reports.store import Frames
from suites.bisect.probing import SAID, Site

ROUNDS = 3
"""of measuring before an UNCLEAR metric is left alone"""
UNRECORDED = ("doctor",)
"""commands that keep no run"""


@dataclass
class Metric:
    """A metric of `bench`, against what the good end measured."""

    metric: str
    bench: Sequence[str]
    """the line of `bench` that measures it, without --json and --runs"""
    gates: Gates
    runs: Path
    claims: Sequence[str] = ()
    """the line of `check` that opens the gate of each tree; none: `bench` holds its own claims in each process"""
    pair: str = ""
    processes: int = 1
    """bench processes of one look"""
    timeout: float = 3600.0
    baseline: list[str] = field(default_factory=list)
    """records of the good end; the first site that is asked fills them in"""
    ignored: str = ""
    """a fact of the case that differs between the sites on purpose"""

    @property
    def text(self) -> str:
        return f"metric {self.metric} of bench {' '.join(self.bench)}"

    def ask(self, site: Site) -> Probe:
        """Measure there, and again while the comparison is UNCLEAR."""
        start, records, judged = time.monotonic(), list[str](), list[Judged]()
        try:
            bench = gated(site, self.claims, self.bench, self.runs, self.timeout)
            for _ in range(ROUNDS):
                records += [measure(site, bench, self.runs, self.timeout) for _ in range(self.processes)]
                if not self.baseline:
                    self.baseline += records
                    return self._probe(
                        site, start, records, "good", "measured as the side that others are held against"
                    )
                judged = self.judge(store.load(*self.baseline), store.load(*records))
                if not any(one.verdict == "UNCLEAR" for one in judged):
                    break
        except NotMeasured as error:
            return self._probe(site, start, records, "untestable", str(error))
        answer, reason = decide(judged)
        estimates = [one.estimate.effect for one in judged if one.estimate is not None]
        worst = max(estimates, key=abs, default=None)
        return self._probe(site, start, records, answer, reason, worst)

    def judge(self, good: Frames, here: Frames) -> list[Judged]:
        """The verdicts of one look at this metric."""
        if self.ignored:
            good, here = (alike(side, self.ignored) for side in (good, here))
        found = [s for s in series(good, here, self.gates) if s.key.metric == self.metric]
        return look([s for s in found if self.pair in ("", s.pair)])

    def _probe(
        self, site: Site, start: float, records: list[str], answer: str, reason: str, value: float | None = None
    ) -> Probe:
        ids = tuple(Path(record).parent.name for record in records)
        seconds = time.monotonic() - start
        return Probe(candidate=site.name, answer=answer, reason=reason[:SAID], value=value, records=ids,
                     duration_s=seconds)  # fmt: skip


def alike(side: Frames, ignored: str) -> Frames:
    """The same numbers under cases that are named by all of their facts but one."""
    facts = [f.name for f in fields(Case) if f.name not in ("run", "extra", ignored)]
    return {
        kind: frame.assign(case=frame[facts].astype(str).agg("|".join, axis=1))
        if kind in ("sample", "accept") and len(frame)
        else frame
        for kind, frame in side.items()
    }


class NotMeasured(RuntimeError):
    """A bench that brought no numbers, and why."""


def decide(judged: Sequence[Judged]) -> tuple[str, str]:
    """What the verdicts of one look mean for a commit."""
    if not judged:
        return "untestable", "it measured nothing that a gate judges"
    for verdict, answer in (("WORSE", "bad"), ("INVALID", "untestable"), ("UNCLEAR", "unclear")):
        if some := [one for one in judged if one.verdict == verdict]:
            return answer, f"{some[0].series.pair} {verdict}: {some[0].reasons[0]}"
    return "good", f"{judged[0].verdict}: {judged[0].reasons[0]}"


def gated(site: Site, claims: Sequence[str], bench: Sequence[str], runs: Path, timeout: float) -> list[str]:
    """The line of `bench` for a tree whose claims were held first, once for all of its processes."""
    if not claims:
        return list(bench)
    code, facts, said = command(site, ["check", *claims], runs, timeout)
    if code != Exit.PASSED:
        raise NotMeasured(f"no numbers: its claims ended with {code}: {said}")
    return [*bench, f"--believe={(runs / facts['run']).resolve()}"]


def measure(site: Site, bench: Sequence[str], runs: Path, timeout: float) -> str:
    """The record of one bench process in a tree; NotMeasured where it refuses or fails."""
    code, facts, said = command(site, ["bench", *bench], runs, timeout)
    if failures := facts.get("failures"):
        raise NotMeasured(f"no numbers from a red gate: {failures[0]}")
    if "records" not in facts:
        raise NotMeasured(f"bench ended with {code}: {said}")
    return str(facts["records"])


def command(site: Site, words: Sequence[str], runs: Path, timeout: float) -> tuple[int, dict[str, Any], str]:
    """One command line of a tree: its exit code, its JSON, and what it said last."""
    kept = [] if words[0] in UNRECORDED else ["--runs", str(runs.resolve())]
    line = [str(site.python), "-m", "suites.cli", *words, "--json", *kept]
    try:
        done = subprocess.run(
            line,
            cwd=site.tree,
            env={**os.environ, **site.variables()},
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout,
            check=False,
        )
    except subprocess.TimeoutExpired as late:
        raise NotMeasured(f"{words[0]} was given up after {timeout:.0f} s") from late
    facts = answered(done.stdout)
    last = (done.stderr.strip().splitlines() or [f"{words[0]} said nothing"])[-1]
    return done.returncode, facts, str(facts.get("error") or last)


def answered(text: str) -> dict[str, Any]:
    """The JSON object that a command left on stdout; empty where it left none."""
    try:
        return dict(json.loads(text.strip().splitlines()[-1]))
    except (ValueError, IndexError):
        return {}
