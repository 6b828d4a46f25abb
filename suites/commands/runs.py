"""Where runs are kept: one folder a run, one record in it, and every line only ever appended."""

import sys
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from harness.environment import ROOT, describe, source
from harness.record import Check, Recorder, RecordError, Run, new_run_id, read
from harness.runner import Exit
from suites.commands.desk import Answer, Desk

RUNS = ROOT / "runs"
RECORDS = "records.jsonl"


def begin(folder: Path, profile: str = "", believe: str = "") -> Recorder:
    """A new run: its folder, and the line that says where everything after it comes from.

    believe   an earlier run over these very files, whose checks this one takes over
    """
    checks = believed(Path(believe)) if believe else []
    run = new_run_id()
    recorder = Recorder(folder / run / RECORDS, run)
    # a checkout runs without being installed
    about, now = describe(), datetime.now(UTC).isoformat(timespec="seconds")
    argv, version = ("draftproof", *sys.argv[1:]), about["versions"]["draftproof"] or ""
    recorder.append(Run(started=now, version=version, argv=argv, profile=profile, environment=about), *checks)
    return recorder


def believed(folder: Path) -> list[Check]:
    """The checks of an earlier run; RecordError where it ran on other files than those that lie here."""
    file = folder / RECORDS
    lines = read(file) if file.is_file() else []
    over = [{**run.environment.get("source", {}), "reason": ""} for run in lines if isinstance(run, Run)]
    here = {**source(), "reason": ""}
    if not here["commit"] or over[:1] != [here]:
        raise RecordError(f"{file}: its claims were held on other files than these, so they are not believed here")
    return [replace(line, extra={**line.extra, "held_in": line.run}) for line in lines if isinstance(line, Check)]


def report(
    desk: Desk, names: list[str], out: Path, folder: Path = RUNS, md: Path | None = None, junit: Path | None = None
) -> Answer:
    """One page of the records that `names` mean: run ids, record files or folders of them, or URLs.

    md     also a summary for a pull request
    junit  also the checks and verdicts as JUnit XML
    """
    from reports import junit as xml
    from reports import markdown, page
    from reports.store import gather

    records = gather(
        *(name if "://" in name else folder / name if (folder / name).is_dir() else name for name in names)
    )
    wanted = (("page", out, page.html), ("md", md, markdown.summary), ("junit", junit, xml.xml))
    written: dict[str, str] = {}
    for kind, path, text in wanted:
        if path is not None:
            written[kind] = str(page.write(text(records), path).resolve())
            desk.say(written[kind])
    return Answer(Exit.PASSED, written)
