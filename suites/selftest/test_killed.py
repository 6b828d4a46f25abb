"""Claim: a writer that is killed loses nothing that it was told is written, and leaves a record that all can read.

Born of result files that are rewritten whole: a kill in the middle of a night costs the night.
"""

import random
import signal
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness.lines import TORN
from harness.record import Check, Recorder, new_run_id, read
from harness.runner import ROOT
from reports.store import load

pytestmark = pytest.mark.correctness

WRITERS = 4
WRITER = """
import sys
from harness.record import Check, Recorder
path, run, name, first = *sys.argv[1:4], int(sys.argv[4])
with Recorder(path, run) as recorder:
    for number in range(first, first + 100_000):
        # long lines, so that a kill can meet one that is being written
        recorder.append(Check(claim=f"{name} {number}", pair="p", status="skipped", reason="x" * (number % 7 * 4000)))
        sys.stdout.write(f"{name} {number}\\n")
        sys.stdout.flush()
"""


def written(path: Path, run: str, name: str, first: int) -> subprocess.Popen[str]:
    """A writer in a process of its own; it says each line's name once the line is acknowledged."""
    command = [sys.executable, "-S", "-c", WRITER, str(path), run, name, str(first)]
    return subprocess.Popen(command, cwd=ROOT, env={"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True)


def killed(path: Path, run: str, number: int, pause: float) -> Iterator[str]:
    """What four writers had acknowledged when they were killed at a random moment."""
    writers = [written(path, run, f"writer {i}", number * 100_000) for i in range(WRITERS)]
    first = [writer.stdout.readline() for writer in writers if writer.stdout]
    time.sleep(pause)
    for writer in writers:
        writer.send_signal(signal.SIGKILL)
    for begun, writer in zip(first, writers, strict=True):
        rest = writer.communicate()[0]
        # the last line may be cut by the kill; what is whole was acknowledged
        yield from (begun + rest).splitlines()[: (begun + rest).count("\n")]


def test_writers_that_are_killed_lose_nothing_that_was_acknowledged(tmp_path: Path, profile: str) -> None:
    chance, run, acknowledged = random.Random(0), new_run_id(), defaultdict[Path, list[str]](list)

    for number in range(100 if profile == "nightly" else 4):
        path = tmp_path / f"{number // 10}.jsonl"
        acknowledged[path] += killed(path, run, number, chance.uniform(0, 0.05))

    claims = {path: [line.claim for line in read(path) if isinstance(line, Check)] for path in acknowledged}
    assert all(names and set(names) <= set(claims[path]) for path, names in acknowledged.items())
    assert len(load(tmp_path)["check"]) == sum(map(len, claims.values()))


def test_a_piece_that_a_kill_left_is_closed_by_the_next_writer(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    with Recorder(path) as recorder:
        recorder.append(Check(claim="whole", pair="p", status="passed"))
    with path.open("ab") as file:
        file.write(b'{"schema": "draftproof/1", "type": "check", "cla')

    with Recorder(path, recorder.run_id) as recorder:
        recorder.append(Check(claim="after", pair="p", status="passed"))

    assert [line.claim for line in read(path) if isinstance(line, Check)] == ["whole", "after"]
    assert path.read_text().count(TORN) == 1
