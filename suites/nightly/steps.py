"""The steps of a night, in order.

doctor        the machine is what was asked for
correctness   every claim natively; what skips is a debt, or a failure where it is required
certificate   head against head: the smallest change that this machine can see tonight
speed         head against the last green commit, in turns; pairs with red claims are not timed
compare       a first look names suspects
again         suspects measured once more, in fresh processes: only then anybody is told
bisect        the culprit commit of every loss and of every red claim
report        one page, a job summary and JUnit
"""

import os
import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from harness.runner import Exit
from reports import store
from reports.regressions import ONCE
from suites.benchmarks.shipped import shipped
from suites.bisect.interleaved import race
from suites.commands.check import expand
from suites.nightly.debts import debts
from suites.nightly.night import Found, Night, Work

MOST_SEARCHES = 4
"""culprits that are looked for in one night"""
NO_PAIR = "no pair whose claims are green"


def doctor(night: Night) -> Found:
    """`draftproof doctor`."""
    code, facts, said = night.call("doctor", *required(night))
    return Found(code, said if code else "", {"cannot_run": facts.get("cannot_run", {})})


def correctness(night: Night) -> Found:
    """`draftproof check`; over several GPUs one worker each, then the claims that need them all."""
    runs, failures, codes = [], [], []
    for environment in fan_out():
        code, facts, said = night.call("check", *night.plan.check, *required(night), environment=environment)
        codes.append(code)
        runs += [facts["run"]] if "run" in facts else []
        failures += facts.get("failures", [])
        if "run" not in facts:
            return Found(code, said)
    records = store.gather(night.runs)
    owed = debts(records, runs)
    night.recorder.append(*owed)
    code = next((c for c in codes if c), Exit.PASSED)
    reason = f"{len(failures)} failed" if failures else f"{len(owed)} claims did not run" if owed else ""
    return Found(code, reason or code.name.lower(), {"failures": failures, "runs": runs}, tuple(runs))


def fan_out() -> list[dict[str, str]]:
    """One GPU a worker and then all of them together, where there are several."""
    import torch

    several = torch.cuda.is_available() and torch.cuda.device_count() > 1
    return [{"DRAFTPROOF_GPUS": "each"}, {"DRAFTPROOF_GPUS": "all"}] if several else [{}]


def certificate(night: Night) -> Found:
    """The commit against itself."""
    line = bench_line(night)
    if not line:
        return Found(Exit.PASSED, NO_PAIR, is_skipped=True)
    sides = raced(night, night.head, line)
    code, facts, said = night.call("compare", *sides, "--certify", "--gates", str(night.plan.gates))
    told = "; ".join(f"{c['family']} {c['status']}, sees {c['visible']}" for c in facts.get("certificates", ()))
    if code == Exit.INCONCLUSIVE and not night.plan.needs_certificate:
        return Found(Exit.PASSED, f"not quiet, and not asked to be: {told}", {"is_quiet": False}, ids(facts, *sides))
    return Found(code, told or said, {"is_quiet": code == Exit.PASSED}, ids(facts, *sides))


def speed(night: Night) -> Found:
    """Head and the last green commit in turns."""
    line = bench_line(night)
    if not line:
        return Found(Exit.PASSED, NO_PAIR, is_skipped=True)
    if not night.green:
        return Found(Exit.PASSED, "no night before this one was green", is_skipped=True)
    if night.plan.needs_certificate and not night.facts["certificate"].get("is_quiet"):
        return Found(Exit.INCONCLUSIVE, "no certificate: a change could not have been seen", is_skipped=True)
    sides = raced(night, night.green, line)
    return Found(Exit.PASSED, f"{night.green[:12]} and {night.head[:12]} in turns", {"sides": sides}, ids({}, *sides))


def compare(night: Night) -> Found:
    """A first look."""
    sides = night.facts["speed"].get("sides")
    if not sides:
        return Found(Exit.PASSED, "nothing was timed", is_skipped=True)
    _, facts, said = night.call("compare", *sides, "--gates", str(night.plan.gates))
    if "verdicts" not in facts:
        return Found(Exit.MACHINE_FAILED, said)
    suspects = [f"{v['pair']} {v['metric']}" for v in facts["verdicts"] if v["reasons"][0].startswith(ONCE)]
    told = f"{len(facts['verdicts'])} compared; suspects: {', '.join(suspects) or 'none'}"
    return Found(Exit.PASSED, told, {"suspects": suspects}, ids(facts))


def again(night: Night) -> Found:
    """Both sides in fresh processes, where the first look named suspects."""
    if not night.facts["compare"].get("suspects"):
        return Found(Exit.PASSED, "no suspects", is_skipped=True)
    first = night.facts["speed"]["sides"]
    fresh = raced(night, night.green, bench_line(night))
    code, facts, said = night.call("compare", *first, "--again", *fresh, "--gates", str(night.plan.gates))
    worse = [v for v in facts.get("verdicts", ()) if v["verdict"] == "WORSE" and v["on_worse"] == "fail"]
    lost = [{"pair": v["pair"], "metric": v["metric"].split(" ")[0], "effect": v["effect"]} for v in worse]
    told = ", ".join(f"{v['pair']} {v['metric']}" for v in worse)
    reason = f"worse twice: {told}" if worse else said if code == Exit.MACHINE_FAILED else "not worse again"
    return Found(code if worse or code == Exit.MACHINE_FAILED else Exit.PASSED, reason, {"lost": lost},
                 ids(facts, *fresh))  # fmt: skip


def bisect(night: Night) -> Found:
    """The commits behind what was lost; what was never green has no good end."""
    questions = list(dict.fromkeys([*lost(night), *red(night)]))[:MOST_SEARCHES]
    if not questions:
        return Found(Exit.PASSED, "nothing was lost", is_skipped=True)
    if not night.green:
        return Found(Exit.PASSED, "no good end: no night before this one was green", is_skipped=True)
    told, runs, codes = [], [], []
    ends = ("--good", night.green, "--bad", night.head, "--repo", str(night.repository))
    for question in questions:
        code, facts, said = night.call("bisect", "commits", *ends, *question)
        codes.append(code)
        runs += [facts["run"]] if "run" in facts else []
        named = ", ".join(sha[:12] for sha in facts.get("culprits", ()))
        told.append(f"{facts.get('status', 'error')}: {named or facts.get('reason') or said}")
    return Found(next((c for c in codes if c), Exit.PASSED), "; ".join(told), {}, tuple(runs))


def lost(night: Night) -> Iterable[tuple[str, ...]]:
    """A question for every metric that is worse."""
    for one in night.facts["again"].get("lost", ()):
        yield ("--metric", one["metric"], "--pair", one["pair"], "--bench", " ".join(bench_line(night)),
               "--check", shlex.join(night.plan.gate), "--processes", str(night.plan.processes),
               "--gates", str(night.plan.gates))  # fmt: skip


def red(night: Night) -> Iterable[tuple[str, ...]]:
    """A question for every claim that is red, one a test."""
    first: dict[str, str] = {}
    for failure in night.facts["correctness"].get("failures", ()):
        first.setdefault(failure["claim"].partition("[")[0], failure["claim"])
    for claim in first.values():
        yield ("--claim", claim)


def report(night: Night) -> Found:
    """The page, and the same facts for a pull request and for CI."""
    summary, junit = night.out.with_suffix(".md"), night.out.with_suffix(".xml")
    places = [place for run in (night.recorder.run_id, *night.ids) if (place := where(night, run))]
    words = ("report", *places, "--out", str(night.out), "--md", str(summary), "--junit", str(junit))
    code, facts, said = night.call(*words)
    if code == Exit.PASSED and (job := os.environ.get("GITHUB_STEP_SUMMARY")):
        with Path(job).open("a", encoding="utf-8") as page:
            page.write(summary.read_text(encoding="utf-8"))
    return Found(code, said if code else str(facts.get("page", night.out)), {"page": str(night.out)})


STEPS: tuple[tuple[str, Work], ...] = (
    ("doctor", doctor),
    ("correctness", correctness),
    ("certificate", certificate),
    ("speed", speed),
    ("compare", compare),
    ("again", again),
    ("bisect", bisect),
    ("report", report),
)


def required(night: Night) -> list[str]:
    """What this machine must have."""
    return [f"--require={name}" for name in night.require]


def bench_line(night: Night) -> list[str]:
    """The line of `bench` for the pairs that are green; empty where none is."""
    bad = {failure["pair"] for failure in night.facts["correctness"].get("failures", ())}
    asked = [word.removeprefix("--pair=") for word in night.plan.bench if word.startswith("--pair=")]
    green = [pair.name for pair in shipped(names=asked) if not bad & {"", *expand([pair.name])}]
    rest = [word for word in night.plan.bench if not word.startswith("--pair=")]
    return [*rest, f"--device={night.device}", *(f"--pair={name}" for name in green)] if green else []


def raced(night: Night, base: str, line: list[str]) -> list[str]:
    """Folders of the records of two sides."""
    total = 2 * night.plan.processes
    with night.desk.progress() as progress:
        bar = progress.add_task(f"{base[:12]} and {night.head[:12]}", total=total)
        found = race(night.repository, (base, night.head), line, night.runs, claims=night.plan.gate,
                     processes=night.plan.processes, advance=lambda: progress.advance(bar))  # fmt: skip
    return [str(found.a), str(found.b)]


def ids(facts: Mapping[str, Any], *folders: str) -> tuple[str, ...]:
    """Run ids of a command and of folders of runs."""
    own = [facts["run"]] if "run" in facts else []
    return (*own, *(run.name for folder in folders for run in sorted(Path(folder).iterdir())))


def where(night: Night, run: str) -> str:
    """The folder of a run, which may lie in that of a race."""
    return next((str(file.parent) for file in night.runs.glob(f"**/{run}/*.jsonl")), "")
