"""`draftproof check`: run claims, record them, say what they proved; also the gate of everything that is measured."""

import os
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from harness import pinning
from harness.record import Check, Recorder, read
from harness.runner import ROOT, Exit, Outcome, run
from suites.commands.desk import Answer, Desk, MissingCapability, UsageFault

PROFILES = ("pinned", "quick", "ci", "nightly")
HOURS = {"pinned": 0.5, "quick": 0.5, "ci": 2, "nightly": 24}
"""after which a profile is given up"""
CAPABILITIES = {"gpu": 1, "multi_gpu": 2}
"""what `--require` takes -> NVIDIA GPUs it means"""
SHOWN = 5
"""failures printed; the record has all of them"""
LOOK_S = 0.25


def check(
    desk: Desk,
    begin: Callable[[], Recorder],
    pairs: Sequence[str] = (),
    profile: str = "ci",
    required: Sequence[str] = (),
    keyword: str = "",
    root: Path = ROOT,
    draws: int | None = None,
) -> Answer:
    """Hold the pairs (none: everything) to their claims; `begin` opens the record once the question makes sense."""
    if profile not in PROFILES:
        raise UsageFault(f"profile {profile!r} is none of {', '.join(PROFILES)}")
    hold_capabilities(required)
    chosen = [f"--pair={name}" for name in expand(pairs)]
    recorder = begin()
    # with "=": until it knows the project's options, pytest would take a value that stands alone for a path
    options = ["-m", "correctness", f"--profile={profile}", f"--records={recorder.path.resolve()}"]
    options += [f"--run-id={recorder.run_id}", *chosen, *(["-k", keyword] if keyword else workers(profile))]
    options += [f"--require={','.join(required)}"] if required else []
    options += [f"--draws={draws}"] if draws else []
    outcome = watched(desk, recorder, options, HOURS[profile] * 3600, root)
    checks = [o for o in read(recorder.path) if isinstance(o, Check) and o.run == recorder.run_id]
    return told(desk, recorder, outcome, checks)


def expand(names: Sequence[str]) -> list[str]:
    """Names that claims speak about; a speculation stands for itself, its target and its draft."""
    if not names:
        return []
    from suites.catalog import PAIRS, SPECULATIONS

    found: list[str] = []
    for name in names:
        if name in SPECULATIONS:
            found += [name, SPECULATIONS[name].target, SPECULATIONS[name].draft]
        elif name in PAIRS:
            found.append(name)
        else:
            raise UsageFault(f"{name!r} is no pair and no speculation; known are {', '.join([*PAIRS, *SPECULATIONS])}")
    return list(dict.fromkeys(found))


def workers(profile: str) -> list[str]:
    """Two processes, where there are two cores and enough work to pay for a second start; or one for each GPU."""
    if os.environ.get(pinning.SWITCH) == pinning.EACH:
        return ["-n", str(max(1, pinning.counted())), "--dist", "worksteal"]
    if os.environ.get(pinning.SWITCH) == pinning.ALL:
        return []
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return ["-n", "2", "--dist", "worksteal"] if cores > 1 and profile != "pinned" else []


def hold_capabilities(required: Sequence[str]) -> None:
    """MissingCapability where this machine has less than is required of it."""
    unknown = [name for name in required if name not in CAPABILITIES]
    if unknown:
        raise UsageFault(f"--require {unknown[0]} is not known; it takes {', '.join(CAPABILITIES)}")
    if not required:
        return
    import torch

    have = torch.cuda.device_count() if torch.cuda.is_available() else 0
    short = [f"{name} needs {CAPABILITIES[name]}" for name in required if CAPABILITIES[name] > have]
    if short:
        raise MissingCapability(f"required and missing: {', '.join(short)} NVIDIA GPU(s), this machine has {have}")


def watched(desk: Desk, recorder: Recorder, options: Sequence[str], timeout: float, root: Path) -> Outcome:
    """Run claims in a process of their own while the bar counts the lines they write."""
    with desk.progress() as progress, ThreadPoolExecutor(1) as pool:
        bar = progress.add_task("claims", total=None)
        before = num_lines(recorder.path)
        running = pool.submit(run, (), options=options, timeout=timeout, root=root)
        while not running.done():
            progress.update(bar, completed=num_lines(recorder.path) - before)
            time.sleep(LOOK_S)
    return running.result()


def num_lines(path: Path) -> int:
    """Whole lines of a record that others are writing."""
    return path.read_bytes().count(b"\n")


def told(desk: Desk, recorder: Recorder, outcome: Outcome, checks: Sequence[Check]) -> Answer:
    """Tables for people, facts for machines."""
    by_pair: dict[str, Counter[str]] = {}
    for done in checks:
        by_pair.setdefault(done.pair or "(instruments)", Counter())[done.status] += 1
    statuses = ("passed", "failed", "error", "skipped")
    rows = [(pair, *(count[status] for status in statuses)) for pair, count in sorted(by_pair.items())]
    if rows:
        desk.table("Claims", ("pair", *statuses), rows)
    bad = [done for done in checks if done.status in ("failed", "error")]
    for done in bad[:SHOWN]:
        desk.say(f"{done.status}: {done.claim}\n  {done.reason}\n  again: {done.replay}")
    if len(bad) > SHOWN:
        desk.say(f"and {len(bad) - SHOWN} more in {recorder.path}")
    if outcome.exit not in (Exit.PASSED, Exit.GATE_FAILED) or (outcome.is_red and not bad):
        desk.say(outcome.text.strip()[-2000:])
    count = Counter(done.status for done in checks)
    desk.say(f"run {recorder.run_id}: {count['passed']} passed, {len(bad)} failed, {count['skipped']} skipped "
             f"in {outcome.seconds:.0f} s")  # fmt: skip
    return Answer(
        outcome.exit,
        {
            "run": recorder.run_id,
            "records": str(recorder.path),
            "seconds": round(outcome.seconds, 1),
            "statuses": dict(count),
            "failures": [{"claim": c.claim, "pair": c.pair, "reason": c.reason, "replay": c.replay} for c in bad],
        },
    )


def gate(desk: Desk, recorder: Recorder, pairs: Sequence[str], profile: str) -> Answer:
    """Is every pair's correctness proven in this run? Checks that the run holds already are believed."""
    names = expand(pairs)
    held = [o for o in read(recorder.path) if isinstance(o, Check) and o.run == recorder.run_id and o.pair in names]
    if {o.pair for o in held if o.status == "passed"} == set(names):
        bad = [o.claim for o in held if o.status in ("failed", "error")]
        return Answer(Exit.GATE_FAILED if bad else Exit.PASSED, {"run": recorder.run_id, "failures": bad})
    return check(desk, lambda: recorder, names, profile)
