"""Claim: a record gives back what was written, survives a killed writer, and refuses a number from a red gate."""

import json
import math
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from pathlib import Path

import jsonschema
import numpy as np
import pytest

from harness import environment
from harness.lines import TORN
from harness.record import (
    SCHEMA_FILE,
    TYPES,
    Accept,
    Audit,
    Bisection,
    Case,
    Certificate,
    Check,
    Debt,
    Observation,
    Planted,
    Probe,
    Recorder,
    RecordError,
    Run,
    Sample,
    Step,
    Verdict,
    new_run_id,
    read,
)
from harness.telemetry import Telemetry
from reports.store import load

pytestmark = pytest.mark.correctness

SEARCH = {"kind": "commits", "question": "q", "good": "a", "bad": "c", "candidates": (("b", ""), ("c", ""))}
CASE = Case(pair="eagle3-llama", gate="passed", num_draft_tokens=3, capture_points=(2, 4, 5))


def every_type() -> list[Observation]:
    return [
        Run(started="2026-01-02T03:04:05Z", argv=("draftproof", "demo"), environment={"cpu": {"cores": 2}}),
        Check(claim="weights", pair="p", status="passed", used=0.25, worst=("logits", (0, 3)), seed=7),
        Check(claim="lossless", pair="p", status="failed", used=math.inf, replay="draftproof replay cx.json"),
        Check(claim="graphs", pair="p", status="skipped", reason="no GPU"),
        CASE,
        Sample(case=CASE, metric="decode", unit="tokens/s", better="up", values=(10.0, 11.5), block=1, order=2),
        Accept(case=CASE, prompt="a", dataset="d", num_draft_tokens=3, accepted=(3, 0, 2), emitted=8, truncated=True),
        Planted(bug="ceil shard", origin="SGLang #23976", claim="sharding", caught=True, caught_by="sharding"),
        Verdict(metric="decode", verdict="SAME", effect=1.0, low=0.99, high=1.01, p=0.4, reasons=("inside 2 %",)),
        Certificate(family="speed", status="passed", compared=("a",), metrics=9, processes=8, needed=8, visible=0.1),
        Bisection(
            kind="commits",
            question="claim weights",
            good="a1",
            bad="c3",
            candidates=(("b2", "Pack"), ("c3", "Split")),
            status="found",
            posterior=(0.01, 0.97),
            unchanged=0.01,
            already=0.01,
            culprits=("c3",),
            confidence=0.97,
            num_probes=5,
            error_rates=(0.05, 0.1),
        ),
        Probe(candidate="b2", answer="untestable", reason="the claim is not in this commit", records=("R",)),
        Step(name="doctor", status="skipped", exit=6, reason="no GPU", duration_s=0.5, runs=("R",)),
        Audit(target="t", draft="d", pair="eagle3", outcome="failed", facts={"faults": ["engines"]}),
        Debt(what="graphs", pair="p", reason="no GPU", last_run="R", last="2026-01-01T03:04:05Z", nights=12),
    ]


def test_reading_gives_back_what_was_written(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"

    with Recorder(path) as recorder:
        recorder.append(*every_type())

    found = read(path)
    assert {o.run for o in found} == {recorder.run_id}
    blank = [replace(o, run="", **({"case": CASE} if hasattr(o, "case") else {})) for o in found]
    assert blank == every_type()


def test_every_line_obeys_the_shipped_schema(tmp_path: Path) -> None:
    with Recorder(tmp_path / "run.jsonl") as recorder:
        recorder.append(*every_type())

    schema = json.loads(SCHEMA_FILE.read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    for line in (tmp_path / "run.jsonl").read_text().splitlines():
        validator.validate(json.loads(line))


@pytest.mark.parametrize("name", TYPES)
def test_schema_and_dataclass_name_the_same_fields(name: str) -> None:
    described = set(json.loads(SCHEMA_FILE.read_text())["$defs"][name]["properties"]) - {"type", "id"}

    assert described == {f.name for f in fields(TYPES[name])} - {"run", "extra"}


@pytest.mark.parametrize("gate", ["failed", "not_run"])
def test_no_number_comes_from_a_gate_that_is_not_green(gate: str) -> None:
    red = Case(pair="p", gate=gate, num_draft_tokens=1)

    with pytest.raises(RecordError, match="numbers only if the gate passed"):
        Sample(case=red, metric="decode", unit="tokens/s", better="up", values=(1.0,))
    with pytest.raises(RecordError, match="numbers only if the gate passed"):
        Accept(case=red, prompt="a", dataset="d", num_draft_tokens=1, accepted=(1,), emitted=2)


def test_acceptance_that_was_chosen_is_not_recorded_as_measured() -> None:
    forced = replace(CASE, acceptance="forced", forced_rates=(0.7, 0.5, 0.3))

    with pytest.raises(RecordError, match="forced acceptance is chosen"):
        Accept(case=forced, prompt="a", dataset="d", num_draft_tokens=3, accepted=(3,), emitted=4)


@pytest.mark.parametrize(
    ("drafts", "acceptance", "rates"),
    [(2, "forced", (0.5,)), (2, "forced", ()), (0, "forced", ()), (1, "real", (0.5,)), (1, "oracle", (1.0,))],
)
def test_forced_acceptance_has_a_rate_a_draft_and_nothing_else_has_one(
    drafts: int, acceptance: str, rates: tuple[float, ...]
) -> None:
    with pytest.raises(RecordError, match="forced rates"):
        Case(pair="p", gate="passed", num_draft_tokens=drafts, acceptance=acceptance, forced_rates=rates)


def test_a_forged_line_with_a_red_gate_is_refused_on_reading(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    with Recorder(path) as recorder:
        recorder.append(Sample(case=CASE, metric="m", unit="s", better="down", values=(1.0,)))

    path.write_text(path.read_text().replace('"gate": "passed"', '"gate": "failed"'))

    with pytest.raises(RecordError, match="numbers only if the gate passed"):
        read(path)


@pytest.mark.parametrize(
    ("kind", "facts", "message"),
    [
        (Case, {"pair": "p", "gate": "green"}, "gate is one of"),
        (Check, {"claim": "c", "pair": "p", "status": "skipped"}, "states its reason"),
        (Check, {"claim": "c", "pair": "p", "status": "failed"}, "how to run it again"),
        (Check, {"claim": "c", "pair": "p", "status": "passed", "used": -0.1}, "share of a budget"),
        (Sample, {"case": CASE, "metric": "m", "unit": "s", "better": "up", "values": ()}, "at least one"),
        (Sample, {"case": CASE, "metric": "m", "unit": "s", "better": "up", "values": (math.nan,)}, "finite"),
        (Sample, {"case": CASE, "metric": "m", "unit": "s", "better": "up", "values": (0.0,)}, "above zero"),
        (Verdict, {"metric": "m", "verdict": "FINE"}, "verdict is one of"),
        (Probe, {"candidate": "a1", "answer": "perhaps"}, "answer is one of"),
        (Probe, {"candidate": "a1", "answer": "untestable"}, "states its reason"),
        (Step, {"name": "doctor", "status": "failed"}, "states its reason"),
        (Bisection, {**SEARCH, "status": "found"}, "has a name"),
        (Bisection, {**SEARCH, "posterior": (1.0,)}, "2 candidates, 1 probabilities"),
    ],
)
def test_an_observation_that_means_nothing_cannot_be_built(kind: type, facts: dict, message: str) -> None:
    with pytest.raises(RecordError, match=message):
        kind(**facts)


@pytest.mark.parametrize(("num_draft_tokens", "accepted"), [(2, (1,)), (3, (4,)), (3, (-1,))])
def test_accepted_drafts_must_fit_the_case(num_draft_tokens: int, accepted: tuple[int, ...]) -> None:
    with pytest.raises(RecordError):
        Accept(case=CASE, prompt="a", dataset="d", num_draft_tokens=num_draft_tokens, accepted=accepted, emitted=1)


def test_an_output_that_is_not_a_number_uses_up_every_budget() -> None:
    assert Check(claim="c", pair="p", status="failed", used=math.nan, replay="x").used == math.inf


def test_arrays_are_written_as_plain_numbers(tmp_path: Path) -> None:
    case = Case(pair="p", gate="passed", num_draft_tokens=np.int64(2))
    with Recorder(tmp_path / "run.jsonl") as recorder:
        recorder.append(
            Sample(case=case, metric="m", unit="s", better="down", values=np.ones(2), telemetry={"w": np.float32(1)}),
            Accept(case=case, prompt="a", dataset="d", num_draft_tokens=2, accepted=np.array([1, 2]), emitted=5),
        )

    _, sample, accept = read(recorder.path)

    assert (sample.values, sample.telemetry, accept.accepted) == ((1.0, 1.0), {"w": 1.0}, (1, 2))


def test_a_torn_last_line_is_left_out_and_the_next_writer_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    with Recorder(path) as recorder:
        recorder.append(*every_type())
    whole = len(read(path))
    path.write_bytes(path.read_bytes()[:-40])

    assert len(read(path)) == whole - 1

    with Recorder(path, recorder.run_id) as recorder:
        recorder.append(Check(claim="after", pair="p", status="passed"))
    assert TORN in path.read_text()
    assert [o.claim for o in read(path) if isinstance(o, Check)][-1] == "after"
    assert len(read(path)) == whole


def test_a_broken_line_in_the_middle_is_an_error_that_names_it(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    with Recorder(path) as recorder:
        recorder.append(*every_type())
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], lines[1][:20], *lines[2:]]) + "\n")

    with pytest.raises(RecordError, match=r"run\.jsonl:2: not a JSON line"):
        read(path)


def test_fields_of_a_later_version_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    with Recorder(path) as recorder:
        recorder.append(Planted(bug="b", origin="o", claim="c", caught=True, extra={"severity": "high"}))

    (found,) = read(path)

    assert found.extra == {"severity": "high"}
    with Recorder(tmp_path / "copy.jsonl", recorder.run_id) as copy:
        copy.append(found)
    assert (tmp_path / "copy.jsonl").read_text() == path.read_text()


def test_parallel_writers_lose_and_mix_no_line(tmp_path: Path) -> None:
    path, run_id = tmp_path / "run.jsonl", new_run_id()

    def write(worker: int) -> None:
        with Recorder(path, run_id) as recorder:
            for i in range(100):
                recorder.append(Check(claim=f"{worker}-{i}", pair="p" * 5000, status="passed"))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, range(4)))

    assert {o.claim for o in read(path) if isinstance(o, Check)} == {f"{w}-{i}" for w in range(4) for i in range(100)}


def test_a_killed_writer_leaves_every_line_it_finished(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    program = (
        "import os, signal, sys; from harness.record import Check, Recorder\n"
        "recorder = Recorder(sys.argv[1])\n"
        "[recorder.append(Check(claim=str(i), pair='p', status='passed')) for i in range(20)]\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )

    subprocess.run([sys.executable, "-c", program, str(path)], check=False, cwd=environment.ROOT)

    assert [o.claim for o in read(path) if isinstance(o, Check)] == [str(i) for i in range(20)]


def test_run_ids_sort_by_time_and_differ() -> None:
    ids = [new_run_id() for _ in range(50)]

    assert len(set(ids)) == 50
    assert [i[:10] for i in ids] == sorted(i[:10] for i in ids)


def test_record_and_reports_need_no_torch() -> None:
    program = "import sys, harness.record, reports.page; sys.exit('torch' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", program], check=False, cwd=environment.ROOT).returncode == 0


def test_frames_join_samples_with_their_case(tmp_path: Path) -> None:
    with Recorder(tmp_path / "a" / "run.jsonl") as recorder:
        recorder.append(*every_type())

    tables = load(tmp_path)

    assert set(tables) == set(TYPES)
    assert tables["sample"].loc[0, "pair"] == CASE.pair
    assert tables["accept"].loc[0, "case"] == tables["case"].loc[0, "id"] == CASE.id
    with pytest.raises(RecordError, match="no such record"):
        load(tmp_path / "missing")


def git(folder: Path, *args: str) -> None:
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", "-C", str(folder), *identity, *args], check=True, capture_output=True)


def test_the_source_says_commit_and_dirt_and_admits_what_it_does_not_know(tmp_path: Path) -> None:
    assert environment.source(tmp_path)["commit"] is None

    git(tmp_path, "init", "-q")
    (tmp_path / "a.txt").write_text("one")
    assert "no commit" in environment.source(tmp_path)["reason"]

    git(tmp_path, "add", "a.txt")
    git(tmp_path, "commit", "-qm", "first")
    clean = environment.source(tmp_path)
    assert len(clean["commit"]) == 40
    assert (clean["dirty"], clean["diff_sha256"]) == (False, None)

    (tmp_path / "new.txt").write_text("two")
    dirty = environment.source(tmp_path)
    (tmp_path / "new.txt").write_text("three")
    assert dirty["dirty"]
    assert dirty["diff_sha256"] != environment.source(tmp_path)["diff_sha256"]


def test_the_environment_is_plain_json_and_reads_only_allowed_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_SECRET_TOKEN", "do-not-write")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    found = environment.describe({"torch": 0})

    assert "do-not-write" not in json.dumps(found)
    assert found["env"]["OMP_NUM_THREADS"] == "1"
    assert found["cpu"]["cores"] == len(os.sched_getaffinity(0))
    assert found["gpu"]["available"] or found["gpu"]["reason"]


def test_telemetry_without_a_device_says_so_and_invents_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-00000000-0000-0000-0000-000000000000")

    with Telemetry() as telemetry:
        pass

    summary = telemetry.summary()
    assert summary["available"] is False
    assert summary["reason"]
    assert telemetry.readings == []
