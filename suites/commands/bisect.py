"""`draftproof bisect commits|deps|config`: which commit, package or key made a claim or a metric bad.

0 where it is found, 4 where it is not (not reproduced tonight, suspects that cannot be told apart, no probe left). The
search is one run; `--resume RUN` goes on with one that was killed and repeats no probe.
"""

import contextlib
import json
import shlex
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.progress import Progress, TaskID

from harness.environment import ROOT
from harness.record import Bisection, Probe, Recorder, RecordError, read
from harness.runner import Exit
from suites.bisect import configs, dependencies, differences, searching
from suites.bisect.commits import history, sha_of, top
from suites.bisect.environments import Unbuildable, python_of
from suites.bisect.probing import UNTESTABLE, Claim, Command, Question, Site
from suites.bisect.worktrees import Worktrees, lay_over
from suites.commands.desk import Answer, Desk, UsageFault
from suites.commands.options import GATES
from suites.commands.runs import RECORDS

ABORT = 128
"""tells `git bisect run` to stop"""


@dataclass(frozen=True)
class Options:
    """What a search is asked for; exactly one of claim, metric and command."""

    good: str
    bad: str
    claim: str = ""
    metric: str = ""
    command: str = ""
    pair: str = ""
    bench: str = ""
    """the line of `bench` that measures the metric"""
    processes: int = 1
    check: str = ""
    """the line of `check` that opens the gate of each tree; none: each bench process holds its own claims"""
    against: str = ""
    """records of the good end; measured tonight when absent"""
    suite: str = "missing"
    """whose claims and instruments: own, today, or today's where the commit does not have the claim"""
    repository: Path = ROOT
    confidence: float = searching.CONFIDENCE
    budget: int = searching.BUDGET
    profile: str = "pinned"
    timeout: float = 3600.0
    resume: str = ""
    gates: Path = GATES

    def __post_init__(self) -> None:
        if sum(map(bool, (self.claim, self.metric, self.command))) != 1:
            raise UsageFault("ask one question: --claim NODE, --metric NAME, or --command LINE")
        if not 0.5 < self.confidence < 1 or self.budget < 2 or self.processes < 1:
            raise UsageFault("needs 0.5 < --confidence < 1, --budget of at least 2, and --processes of at least 1")

    def question(self, runs: Path) -> Question:
        """It, ready to be asked."""
        if self.claim:
            return Claim(self.claim, self.profile, self.timeout)
        if self.command:
            return Command(self.command, self.timeout)
        # pandas and scipy are loaded for a metric alone
        from reports.gates import read_gates
        from suites.bisect.measuring import Metric
        from suites.commands.compare import place

        part = "acceptance" if self.metric == "acceptance_length" else "decode"
        line = shlex.split(self.bench) or [part, *([f"--pair={self.pair}"] if self.pair else []), "--profile=pinned"]
        known = [str(place(self.against, runs))] if self.against else []
        gates, claims = read_gates(self.gates), shlex.split(self.check)
        return Metric(self.metric, line, gates, runs, claims, self.pair, self.processes, self.timeout, known)


def commits(desk: Desk, begin: Callable[[], Recorder], options: Options, runs: Path) -> Answer:
    """The first bad commit."""
    repository = top(options.repository)
    found = history(repository, options.good, options.bad)
    question = options.question(runs)
    asked = searching.begin(found, question.text)
    asked, probes, recorder = opened(asked, begin, options.resume, runs)
    _remember(question, probes, asked.good, runs)
    desk.say(f"{len(asked.candidates)} commits, {len(probes)} probes so far; run {recorder.run_id}")
    with Worktrees(repository) as trees, desk.progress() as progress:
        bar = progress.add_task("probes", total=options.budget, completed=len(probes))

        def ask(sha: str) -> Probe:
            progress.update(bar, description=f"probe of {sha[:12]}")
            return look_at(trees, sha, question, options)

        ending = searching.search(
            asked,
            probes,
            ask,
            recorder,
            options.confidence,
            options.budget,
            lambda probe, state: _tell(desk, progress, bar, probe, state),
        )
    recorder.close()
    show(desk, ending)
    return told(recorder, ending)


def git_run(options: Options, runs: Path) -> int:
    """The commit that is checked out here, in the codes of `git bisect run`: 0 good, 1 bad, 125 skip, 128 abort."""
    try:
        if options.metric and not options.against:
            raise UsageFault("--as-git-run needs --against RUN with --metric: the records of the good end")
        repository = top(options.repository)
        with Worktrees(repository) as trees:
            probe = look_at(trees, sha_of(repository, "HEAD"), options.question(runs), options)
    except (Exception, KeyboardInterrupt) as error:
        sys.stderr.write(f"draftproof: {error}\n")
        return ABORT
    sys.stderr.write(f"{probe.candidate[:12]} {probe.answer}: {probe.reason}\n")
    return {"good": 0, "bad": 1}.get(probe.answer, UNTESTABLE)


def look_at(trees: Worktrees, sha: str, question: Question, options: Options) -> Probe:
    """One probe of one commit; what cannot be built is untestable."""
    with trees.at(sha) as tree:
        try:
            python = python_of(tree)
            is_todays = options.suite == "today" or (options.suite == "missing" and lacks(tree, options))
            if is_todays:
                lay_over(tree)
            return question.ask(Site(sha, tree, python, is_todays=is_todays))
        except Unbuildable as error:
            return Probe(candidate=sha, answer="untestable", reason=f"no environment: {error}")


def lacks(tree: Path, options: Options) -> bool:
    """Whether a commit does not know what is asked: its claim, or, since a metric needs one instrument, its bench."""
    if options.command:
        return False
    file, _, test = options.claim.partition("::")
    name = test.rpartition("::")[2].partition("[")[0]
    held = tree / file
    return bool(options.metric) or not held.is_file() or name not in held.read_text(encoding="utf-8", errors="replace")


def deps(desk: Desk, begin: Callable[[], Recorder], options: Options, runs: Path) -> Answer:
    """The packages between two lists of pins."""
    good, bad = (dependencies.read_pins(Path(name)) for name in (options.good, options.bad))
    moving = dependencies.differences(good, bad)
    rows = tuple((name, f"{old or 'absent'} -> {new or 'absent'}") for name, (old, new) in moving.items())
    python = dependencies.shared_python(good, moving)
    question, tree = options.question(runs), top(options.repository)

    def ask(name: str, moved: frozenset[str]) -> Probe:
        try:
            path = dependencies.folders(moving, moved)
        except Unbuildable as error:
            return Probe(candidate=name, answer="untestable", reason=str(error))
        return question.ask(Site(name, tree, python, {"PYTHONPATH": path}))

    return narrowed(desk, begin, "deps", rows, question, ask, options, runs)


def config(desk: Desk, begin: Callable[[], Recorder], options: Options, runs: Path, checkpoint: Path) -> Answer:
    """The keys between two configs; `checkpoint` is the folder whose config.json is replaced.

    A command finds a copy of that folder in DRAFTPROOF_CHECKPOINT; a metric measures a zoo that holds it.
    """
    if options.claim:
        raise UsageFault("a claim reads no config of yours; ask --metric or --command")
    good, bad = (configs.read_config(Path(name)) for name in (options.good, options.bad))
    moving = configs.differences(good, bad)
    rows = tuple((key, f"{old} -> {new}") for key, (_, old, new) in moving.items())
    question, tree = options.question(runs), top(options.repository)

    def ask(name: str, moved: frozenset[str]) -> Probe:
        with with_config(checkpoint, configs.mixed(good, bad, [moving[key][0] for key in moved])) as folder:
            there: Any = question
            if options.metric:
                # a copy that shares the yardstick, and names a case by all of its facts but the config
                there = replace(there, bench=[*there.bench, f"--zoo={folder.parent}"], ignored="config_sha256")
            found: Probe = there.ask(Site(name, tree, Path(sys.executable), {"DRAFTPROOF_CHECKPOINT": str(folder)}))
            return found

    return narrowed(desk, begin, "config", rows, question, ask, options, runs)


@contextlib.contextmanager
def with_config(checkpoint: Path, config: dict[str, Any]) -> Iterator[Path]:
    """A copy of a checkpoint that says something else, among links to its neighbours."""
    with tempfile.TemporaryDirectory() as parent:
        # as a Hub cache lies: its links are the only ones out of a folder that are followed
        (Path(parent) / "blobs").symlink_to(checkpoint.resolve())
        folder = Path(parent) / "snapshots" / checkpoint.name
        folder.mkdir(parents=True)
        for neighbour in checkpoint.resolve().parent.iterdir():
            if neighbour.name != checkpoint.name:
                (folder.parent / neighbour.name).symlink_to(neighbour)
        for file in checkpoint.resolve().iterdir():
            if file.name != "config.json":
                (folder / file.name).symlink_to(file)
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
        yield folder


def narrowed(
    desk: Desk,
    begin: Callable[[], Recorder],
    kind: str,
    rows: tuple[tuple[str, str], ...],
    question: Question,
    ask: Callable[[str, frozenset[str]], Probe],
    options: Options,
    runs: Path,
) -> Answer:
    """The smallest set of differences that is bad."""
    if not rows:
        raise UsageFault(f"{options.good} and {options.bad} do not differ")
    order = [name for name, _ in rows]
    asked = Bisection(kind=kind, question=question.text, good=options.good, bad=options.bad, candidates=rows)
    asked, probes, recorder = opened(asked, begin, options.resume, runs)
    _remember(question, probes, differences.NOTHING, runs)
    with desk.progress() as progress:
        bar = progress.add_task("probes", total=options.budget, completed=len(probes))
        answers = differences.Asked(
            order,
            lambda moved: ask(differences.name_of(moved, order), moved),
            recorder,
            probes,
            options.budget,
            lambda probe: _tell(desk, progress, bar, probe, asked),
        )
        ending = differences.search(asked, answers, recorder)
    recorder.close()
    show(desk, ending)
    return told(recorder, ending)


def opened(
    asked: Bisection, begin: Callable[[], Recorder], resume: str, runs: Path
) -> tuple[Bisection, list[Probe], Recorder]:
    """A new record with its first line, or that of a search which goes on with the probes that it has."""
    if not resume:
        recorder = begin()
        recorder.append(asked)
        return asked, [], recorder
    file = runs / resume / RECORDS
    if not file.is_file():
        raise UsageFault(f"{file}: no such run to go on with")
    lines = read(file)
    first = next((line for line in lines if isinstance(line, Bisection)), None)
    if first is None or replace(first, run="") != asked:
        raise RecordError(
            f"{resume} asks something else, so its probes are no answers here; repeat its own command line"
        )
    return asked, [line for line in lines if isinstance(line, Probe)], Recorder(file, resume)


def _remember(question: Question, probes: list[Probe], good: str, runs: Path) -> None:
    """What the good end measured in the part of a search that is done."""
    baseline: list[str] | None = getattr(question, "baseline", None)
    if baseline == []:
        done = next((probe for probe in probes if probe.candidate == good and probe.answer == "good"), None)
        baseline += [str(runs / run) for run in (done.records if done else ())]


def _tell(desk: Desk, progress: Progress, bar: TaskID, probe: Probe, state: Bisection) -> None:
    progress.advance(bar)
    share = f"; likeliest {state.confidence:.0%}" if state.confidence is not None else ""
    desk.say(f"{probe.candidate[:60]} {probe.answer}: {probe.reason}{share}")


def show(desk: Desk, ending: Bisection) -> None:
    """The answer, and the candidates that matter."""
    names = dict(ending.candidates)
    shares = dict(zip(names, ending.posterior, strict=True)) if ending.posterior else dict.fromkeys(ending.culprits)
    likely = sorted(shares, key=lambda name: -(shares[name] or 0.0))[:5]
    rows = [(name[:12] if ending.kind == "commits" else name,
             "" if shares[name] is None else f"{shares[name]:.1%}", names[name]) for name in likely]  # fmt: skip
    desk.table(f"{ending.question}: {ending.status.replace('_', ' ')}", ("candidate", "probability", ""), rows)
    if ending.reason:
        desk.say(ending.reason)
    if ending.error_rates is not None:
        alarms, misses = ending.error_rates
        desk.say(
            f"{ending.num_probes} probes; of good commits {alarms:.0%} look bad, of bad ones {misses:.0%} look good"
        )


def told(recorder: Recorder, ending: Bisection) -> Answer:
    """For machines."""
    names = ("kind", "question", "status", "culprits", "confidence", "num_probes", "reason", "unchanged", "already")
    facts = {name: getattr(ending, name) for name in names}
    facts |= {"run": recorder.run_id, "records": str(recorder.path)}
    return Answer(Exit.PASSED if ending.status == "found" else Exit.INCONCLUSIVE, facts)
