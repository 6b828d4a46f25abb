"""The command lines of `draftproof bisect`."""

import sys
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from suites.commands.desk import answer
from suites.commands.options import GATES, RUNS, ZOO, Gates, Json, Profile, Runs

bisect_app = typer.Typer(help="Which commit, package, key or layer made it bad.", no_args_is_help=True)


class Suite(StrEnum):
    """Whose claims and instruments a commit is asked with."""

    own = "own"
    today = "today"
    missing = "missing"


Claim = Annotated[str, typer.Option(help="A claim, as pytest names it: FILE::TEST.")]
Metric = Annotated[str, typer.Option(help="A metric with a gate: acceptance_length, decode, ...")]
Command = Annotated[str, typer.Option(help="A shell command: 0 good, 125 cannot be tested, other codes below 128 bad.")]
Pair = Annotated[str, typer.Option(help="Only this pair's metric.")]
Bench = Annotated[str, typer.Option(help='What `bench` is asked for the metric, such as "decode --blocks 5".')]
Check = Annotated[str, typer.Option(help='What `check` is asked once a tree, such as "llama-eagle3 --profile quick".')]
Processes = Annotated[int, typer.Option(help="Bench processes of one look at the metric.")]
Budget = Annotated[int, typer.Option(help="Probes in all.")]
Timeout = Annotated[float, typer.Option(help="Seconds until a probe counts as one that cannot be tested.")]
Resume = Annotated[str, typer.Option(metavar="RUN", help="Go on with a search that was killed; the same line again.")]
Repository = Annotated[Path, typer.Option("--repo", help="The checkout that is searched; it is read, never written.")]


@bisect_app.command("commits")
def commits(
    good: Annotated[str, typer.Option(help="A commit that was good.")] = "",
    bad: Annotated[str, typer.Option(help="A commit that is bad.")] = "HEAD",
    claim: Claim = "",
    metric: Metric = "",
    command: Command = "",
    pair: Pair = "",
    bench: Bench = "",
    processes: Processes = 1,
    check: Check = "",
    against: Annotated[str, typer.Option(help="Records of the good end, in the place of measuring them first.")] = "",
    suite: Annotated[
        Suite, typer.Option(help="missing: today's where a commit does not know the claim.")
    ] = Suite.missing,
    repo: Repository = Path(),
    confidence: Annotated[float, typer.Option(help="Probability at which a commit is the culprit.")] = 0.95,
    budget: Budget = 40,
    profile: Annotated[Profile, typer.Option(help="Of the claim.")] = Profile.pinned,
    timeout: Timeout = 3600.0,
    resume: Resume = "",
    as_git_run: Annotated[
        bool, typer.Option("--as-git-run", help="Ask the commit that is checked out: exit 0, 1, 125 or 128.")
    ] = False,
    gates: Gates = GATES,
    runs: Runs = RUNS,
    json: Json = False,
) -> int:
    """The first bad commit, though a probe may be wrong and a commit may not run."""
    from suites.commands.bisect import ABORT, Options, git_run
    from suites.commands.bisect import commits as work
    from suites.commands.desk import UsageFault
    from suites.commands.runs import begin

    def asked() -> Options:
        if not (good or as_git_run):
            raise UsageFault("--good is missing: a commit that was good")
        return Options(
            good=good,
            bad=bad,
            claim=claim,
            metric=metric,
            command=command,
            pair=pair,
            bench=bench,
            processes=processes,
            check=check,
            against=against,
            suite=suite,
            repository=repo,
            confidence=confidence,
            budget=budget,
            profile=profile,
            timeout=timeout,
            resume=resume,
            gates=gates,
        )

    if not as_git_run:
        return answer(json, lambda desk: work(desk, partial(begin, runs, profile), asked(), runs))
    try:
        return git_run(asked(), runs)
    except UsageFault as error:
        sys.stderr.write(f"draftproof: {error}\n")
        return ABORT


@bisect_app.command("deps")
def deps(
    good: Annotated[str, typer.Option(help="Pins that are good: name==version lines, as pip freeze writes them.")],
    bad: Annotated[str, typer.Option(help="Pins that are bad.")],
    claim: Claim = "",
    metric: Metric = "",
    command: Command = "",
    pair: Pair = "",
    bench: Bench = "",
    processes: Processes = 1,
    check: Check = "",
    repo: Repository = Path(),
    budget: Budget = 40,
    timeout: Timeout = 3600.0,
    resume: Resume = "",
    gates: Gates = GATES,
    runs: Runs = RUNS,
    json: Json = False,
) -> int:
    """The fewest packages whose versions make it bad."""
    from suites.commands.bisect import Options
    from suites.commands.bisect import deps as work
    from suites.commands.runs import begin

    def asked() -> Options:
        return Options(good, bad, claim, metric, command, pair, bench, processes, check, repository=repo, budget=budget,
                       timeout=timeout, resume=resume, gates=gates)  # fmt: skip

    return answer(json, lambda desk: work(desk, partial(begin, runs), asked(), runs))


@bisect_app.command("config")
def config(
    good: Annotated[str, typer.Option(help="A config that is good: a file, or the folder of a config.json.")],
    bad: Annotated[str, typer.Option(help="A config that is bad.")],
    metric: Metric = "",
    command: Command = "",
    claim: Claim = "",
    pair: Pair = "",
    bench: Bench = "",
    processes: Processes = 1,
    check: Check = "",
    checkpoint: Annotated[Path, typer.Option(help="The folder whose config is replaced.")] = ZOO / "llama-eagle3",
    budget: Budget = 40,
    timeout: Timeout = 3600.0,
    resume: Resume = "",
    gates: Gates = GATES,
    runs: Runs = RUNS,
    json: Json = False,
) -> int:
    """The fewest keys of a config that make it bad."""
    from suites.commands.bisect import Options
    from suites.commands.bisect import config as work
    from suites.commands.runs import begin

    def asked() -> Options:
        return Options(good, bad, claim, metric, command, pair, bench, processes, check, budget=budget, timeout=timeout,
                       resume=resume, gates=gates)  # fmt: skip

    return answer(json, lambda desk: work(desk, partial(begin, runs), asked(), runs, checkpoint))
