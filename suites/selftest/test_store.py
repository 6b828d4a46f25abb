"""Claim: a store gives back every acknowledged record, whoever was killed, wherever it lies, however it is packed."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import fsspec
import numpy as np
import pandas as pd
import pytest

from harness.environment import ROOT
from harness.lines import TORN
from harness.record import Accept, Case, Check, Observation, Recorder, RecordError, Run, Sample, new_run_id, read
from reports import store

pytestmark = pytest.mark.correctness

# of a nightly profile on a machine that does other things as well
LONG = pytest.mark.timeout(3600)
WRITERS = 4
KILLS = {"pinned": 3, "quick": 3, "ci": 3, "nightly": 100}
NIGHTS = {"pinned": 10, "quick": 10, "ci": 20, "nightly": 1000}
METRICS = 500
START_S, NIGHT_S = 10.0, 0.05
"""processor seconds allowed: to import pandas, scipy and matplotlib, and of each night"""
GIB = 2.0
PAGE_BYTES = 2_000_000

# appends for ever; a number goes to the second file once its record is acknowledged
WRITER = """
import os, sys
from harness.record import Check, Recorder
path, run, name, told = sys.argv[1:]
told = os.open(told, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
recorder = Recorder(path, run)
for i in range(10**9):
    recorder.append(Check(claim=f"{name}-{i}", pair="p" * (1 if i % 3 else 300_000), status="passed"))
    os.write(told, f"{name}-{i}\\n".encode())
"""
# loads a folder, judges the last ten nights against the ten before, sums up the history, renders the page
JUDGE = """
import json, resource, sys, time
from itertools import chain
from pathlib import Path
from reports import history, store
from reports.gates import read_gates
from reports.page import html
from reports.regressions import judge
records = store.gather(sys.argv[1])
frames = store.frames(chain(*records))
runs = sorted(frames["run"]["run"])
def nights(names):
    return {kind: table[table["run"].isin(names)] for kind, table in frames.items()}
verdicts = judge(nights(runs[-20:-10]), nights(runs[-10:]), read_gates())
series = history.summary(history.nights(frames))
Path(sys.argv[2]).write_text(html(records))
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps([len(verdicts), len(series), int(series["nights"].min()), time.process_time(), peak / 2**20]))
"""


def some() -> list[Observation]:
    """Observations whose cells are of every kind."""
    case = Case(pair="p", gate="passed", num_draft_tokens=2, capture_points=(1, 2))
    other = Case(pair="q", gate="passed", num_draft_tokens=2, acceptance="forced", forced_rates=(0.5, 0.25))
    return [
        Run(started="2026-01-02", argv=("a", "b"), environment={"gpu": {"devices": [{"name": "g"}]}}),
        Sample(case=case, metric="m", unit="ms", better="down", values=(1.5, 2.0), telemetry={"throttled": 0.5}),
        Sample(case=other, metric="m", unit="ms", better="none", values=(3.0,), process=1, extra={"later": [1]}),
        Accept(case=case, prompt="a", dataset="d", num_draft_tokens=2, accepted=(2, 0), emitted=5, truncated=True),
        Check(claim="c", pair="p", status="failed", used=float("inf"), worst=("t", (1, 2)), replay="again"),
        Check(claim="c", pair="p", status="passed"),
    ]


@contextlib.contextmanager
def writing(path: Path, run: str, told: Path) -> Iterator[list[subprocess.Popen]]:
    """Four processes that write into one record until they are killed."""
    command = [sys.executable, "-c", WRITER, str(path), run]
    found = [subprocess.Popen([*command, f"{new_run_id()}", str(told)], cwd=ROOT) for _ in range(WRITERS)]
    try:
        yield found
    finally:
        for process in found:
            process.send_signal(signal.SIGKILL)
            process.wait()


@LONG
def test_no_acknowledged_record_is_lost_to_a_kill(tmp_path: Path, profile: str) -> None:
    rng, run = np.random.default_rng(0), new_run_id()
    for i in range(KILLS[profile]):
        path, told = tmp_path / f"{i}.jsonl", tmp_path / "told"
        told.write_text("")
        with writing(path, run, told) as processes:
            while told.stat().st_size == 0:
                time.sleep(0.005)
            for process in rng.permutation(processes):
                time.sleep(float(rng.uniform(0, 0.02)))
                process.send_signal(signal.SIGKILL)
                process.wait()

        kept = {o.claim for o in read(path) if isinstance(o, Check)}
        # a number that was being written when its writer died has no end
        acknowledged = told.read_text().split("\n")[:-1]
        assert acknowledged
        assert set(acknowledged) <= kept
        assert len(store.load(path)["check"]) == len(kept)
        path.unlink()


def test_a_piece_of_a_line_spoils_nobody_elses(tmp_path: Path) -> None:
    path, run = tmp_path / "run.jsonl", new_run_id()
    with Recorder(path, run) as first, Recorder(path, run) as second:
        first.append(Check(claim="before", pair="p", status="passed"))
        # what a writer leaves that is killed in the middle, while others hold the file open
        with path.open("a") as file:
            file.write('{"schema": "draftproof/1", "type": "chec')
        second.append(Check(claim="after", pair="p", status="passed"))
        first.append(Check(claim="later", pair="p", status="passed"))

    assert [o.claim for o in read(path) if isinstance(o, Check)] == ["before", "after", "later"]
    assert path.read_text().count(TORN) == 1


def test_a_disk_that_is_full_leaves_whole_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, write = tmp_path / "run.jsonl", os.write
    with Recorder(path) as recorder:
        monkeypatch.setattr(os, "write", lambda file, data: write(file, data[:20]))
        with pytest.raises(OSError, match="not written whole"):
            recorder.append(Check(claim="lost", pair="p", status="passed"))
        monkeypatch.undo()
        recorder.append(Check(claim="kept", pair="p", status="passed"))

    assert [o.claim for o in read(path) if isinstance(o, Check)] == ["kept"]


def test_a_store_may_lie_behind_any_url(tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    for name in ("a", "b"):
        with Recorder(tmp_path / name / "run.jsonl") as recorder:
            recorder.append(*some())
        memory.pipe(f"/selftest/{name}/run.jsonl", (tmp_path / name / "run.jsonl").read_bytes())

    here, there = store.load(tmp_path), store.load("memory://selftest")
    one = store.load(f"file://{tmp_path}/a/run.jsonl")

    for kind, table in here.items():
        pd.testing.assert_frame_equal(table, there[kind])
        assert len(one[kind]) * 2 == len(table)
    with pytest.raises(RecordError, match="no such record"):
        store.load("memory://nowhere")


def test_rows_carry_the_facts_of_their_case(tmp_path: Path) -> None:
    with Recorder(tmp_path / "run.jsonl") as recorder:
        recorder.append(*some())

    frames = store.load(tmp_path)

    sample, (first, second) = frames["sample"], frames["case"]["id"]
    assert list(sample["case"]) == [first, second]
    assert list(sample["pair"]) == ["p", "q"]
    assert list(sample["forced_rates"]) == [(), (0.5, 0.25)]
    assert list(sample["run"]) == [recorder.run_id] * 2
    assert list(sample["extra"]) == [{}, {"later": [1]}]


def test_parquet_gives_back_the_same_tables(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow", reason="Parquet needs pyarrow")
    with Recorder(tmp_path / "a" / "run.jsonl") as recorder:
        recorder.append(*some())
    frames = store.load(tmp_path / "a")

    store.pack(frames, tmp_path / "packed")

    for kind, table in store.load(tmp_path / "packed").items():
        assert json.dumps(table.to_dict("list"), default=str) == json.dumps(frames[kind].to_dict("list"), default=str)
    both = store.load(tmp_path / "packed", tmp_path / "a")
    assert len(both["check"]) == 2 * len(frames["check"])


@LONG
def test_a_store_of_many_nights_is_loaded_judged_and_rendered_in_time(tmp_path: Path, profile: str) -> None:
    rng, nights = np.random.default_rng(0), NIGHTS[profile] + 10
    cases = [Case(pair=f"pair {i}", gate="passed") for i in range(METRICS // 10)]
    for night in range(nights):
        values = 10 * np.exp(rng.normal(0, 0.01, (METRICS, 10)))
        with Recorder(tmp_path / f"{night:04}" / "records.jsonl") as recorder:
            recorder.append(Run(started=f"night {night}"))
            recorder.append(
                *(
                    Sample(case=cases[i // 10], metric=f"kernel_{i % 10}", unit="ms", better="down", values=row)
                    for i, row in enumerate(values.tolist())
                )
            )

    command = [sys.executable, "-c", JUDGE, str(tmp_path), str(tmp_path / "page.html")]
    done = subprocess.run(command, check=True, cwd=ROOT, capture_output=True, text=True)

    verdicts, series, fewest, seconds, gib = json.loads(done.stdout)
    assert (verdicts, series, fewest) == (METRICS, METRICS, nights)
    assert seconds < START_S + NIGHT_S * NIGHTS[profile]
    assert gib < GIB
    assert (tmp_path / "page.html").stat().st_size < PAGE_BYTES
