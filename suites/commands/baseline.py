"""`draftproof baseline`: promote a certified run, by a file that a person reviews and commits."""

from datetime import UTC, datetime
from pathlib import Path

from harness.runner import Exit
from reports import store
from reports.baselines import Refused
from reports.baselines import promote as write
from reports.gates import read_gates
from suites.commands.compare import FOLDER, place
from suites.commands.desk import Answer, Desk


def promote(
    desk: Desk, name: str, certificate: str, reason: str, label: str, runs: Path, gates: Path, folder: Path = FOLDER
) -> Answer:
    """Write `LABEL.jsonl` from a run; GATE_FAILED with every reason against it, and nothing written."""
    records = store.gather(place(name, runs))
    certificates = store.gather(place(certificate, runs)).certificates if certificate else []
    now = datetime.now(UTC).isoformat(timespec="seconds")
    out = folder / f"{label}.jsonl"
    try:
        write(records, certificates, read_gates(gates), out, reason, now)
    except Refused as against:
        desk.say(f"refused: {against}")
        return Answer(Exit.GATE_FAILED, {"refused": str(against).split("; ")})
    desk.say(f"{out}: review it, then commit it with its reason; later: draftproof compare baseline:{label} RUN")
    return Answer(Exit.PASSED, {"baseline": str(out), "runs": [run.run for run in records.runs]})
