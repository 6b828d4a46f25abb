"""Where runs are kept: one folder a run, one record in it, and every line only ever appended."""

import sys
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from harness.environment import ROOT, describe
from harness.record import Recorder, Run, new_run_id
from harness.runner import Exit
from suites.commands.desk import Answer, Desk

RUNS = ROOT / "runs"
RECORDS = "records.jsonl"


def begin(folder: Path, profile: str = "") -> Recorder:
    """A new run: its folder, and the line that says where everything after it comes from."""
    run = new_run_id()
    recorder = Recorder(folder / run / RECORDS, run)
    now = datetime.now(UTC).isoformat(timespec="seconds")
    argv = ("draftproof", *sys.argv[1:])
    recorder.append(Run(started=now, version=version("draftproof"), argv=argv, profile=profile, environment=describe()))
    return recorder


def report(desk: Desk, names: list[str], out: Path, folder: Path = RUNS) -> Answer:
    """One page of the records that `names` mean: run ids, record files or folders of them."""
    from reports.page import render

    paths = [folder / name if (folder / name).is_dir() else Path(name) for name in names]
    page = render(list(paths), out)
    desk.say(f"{page.resolve()}")
    return Answer(Exit.PASSED, {"page": str(page.resolve())})
