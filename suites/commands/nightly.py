"""`draftproof nightly`: everything that a night on a GPU machine does, as one command that any scheduler can call."""

from collections.abc import Callable
from pathlib import Path

from harness.record import Recorder, Run, Step, read
from harness.runner import Exit
from suites.bisect.commits import git, sha_of, top
from suites.commands.check import hold_capabilities
from suites.commands.desk import Answer, Desk, UsageFault
from suites.commands.runs import RECORDS
from suites.nightly import lock
from suites.nightly.night import END, FULL, TINY, Night, ended, spend
from suites.nightly.steps import STEPS


def nightly(
    desk: Desk,
    begin: Callable[[str], Recorder],
    runs: Path,
    out: Path,
    root: Path,
    *,
    is_tiny: bool = False,
    green: str = "",
    require: tuple[str, ...] = (),
    hours: float = 10.0,
    wait_s: float = 0.0,
    resume: str = "",
) -> Answer:
    """Spend a night; `begin` opens its record for a profile."""
    plan, repository = TINY if is_tiny else FULL, top(root)
    if git(repository, "status", "--porcelain", "--untracked-files=no").strip():
        raise UsageFault(f"{repository} has changes that no commit holds; a night measures commits")
    hold_capabilities(require)
    head = sha_of(repository, "HEAD")
    good = sha_of(repository, green) if green else last_green(runs, head)
    with lock.hold(hours, wait_s) as held:
        if held.taken_over:
            desk.say(f"the lock of {held.taken_over} was left behind and is taken over")
        file = runs / resume / RECORDS
        if resume and not file.is_file():
            raise UsageFault(f"{file}: no such night to go on with")
        done = ended(file, head) if resume else {}
        recorder = Recorder(file, resume) if resume else begin(plan.profile)
        device = "cuda" if "gpu" in require else "cpu"
        night = Night(plan, repository, head, good, runs, out, require, desk, recorder, device)
        desk.say(f"night {recorder.run_id}: {head[:12]} against {good[:12] or 'nothing'}")
        code = spend(night, STEPS, held, done)
    with recorder:
        status = "passed" if code == Exit.PASSED else "failed"
        recorder.append(Step(name=END, status=status, exit=int(code), reason=code.name.lower().replace("_", " ")))
    rows = {line.name: line for line in read(recorder.path) if isinstance(line, Step)}
    desk.table("The night", ("step", "status", "s", ""),
               [(s.name, s.status, f"{s.duration_s or 0:.0f}", s.reason) for s in rows.values()])  # fmt: skip
    steps = {s.name: {"status": s.status, "exit": s.exit, "reason": s.reason, "runs": s.runs} for s in rows.values()}
    return Answer(code, {"run": recorder.run_id, "records": str(recorder.path), "page": str(out), "steps": steps})


def last_green(runs: Path, head: str) -> str:
    """The commit of the newest night that passed, another one than tonight's; empty where there is none."""
    for file in sorted(runs.glob(f"*/{RECORDS}"), reverse=True):
        if f'"name": "{END}"' not in file.read_text(encoding="utf-8", errors="replace"):
            continue
        lines = read(file)
        passed = any(line.name == END and line.status == "passed" for line in lines if isinstance(line, Step))
        commit = next((line.environment["source"]["commit"] for line in lines if isinstance(line, Run)), None)
        if passed and commit not in (None, head):
            return str(commit)
    return ""
