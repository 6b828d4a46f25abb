"""Claim: history and baselines say what was measured, and no run becomes a baseline by itself or with a flaw."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from harness.record import Accept, Case, Certificate, Check, Observation, Planted, Recorder, Run, Sample, Verdict, read
from harness.runner import Exit
from reports import history, store
from reports.baselines import Refused, certify, one_commit, promote
from reports.gates import read_gates
from suites import cli
from suites.commands.compare import verdict

pytestmark = pytest.mark.correctness

GATES = read_gates()
CASE = Case(pair="llama-eagle3", gate="passed", num_draft_tokens=2)
CLEAN = {"source": {"commit": "c" * 40, "dirty": False}, "cpu": "c", "gpu": "g"}
DIRTY = {"source": {"commit": "c" * 40, "dirty": True}}
PROCESSES = 8


def night(
    path: Path,
    seed: int,
    factor: float = 1.0,
    environment: dict[str, Any] | None = None,
    more: tuple[Observation, ...] = (),
    telemetry: dict[str, Any] | None = None,
) -> str:
    """A record of one run: eight processes of one speed, twenty prompts."""
    rng, drafts = np.random.default_rng(seed), np.random.default_rng(0)
    with Recorder(path) as recorder:
        recorder.append(Run(started=f"2026-01-{seed:02}", environment=environment or CLEAN), *more)
        for process in range(PROCESSES):
            values = 100 * factor * np.exp(rng.normal(0, 0.002) + rng.normal(0, 0.002, 5))
            recorder.append(
                Sample(case=CASE, metric="decode", unit="tokens/s", better="up", values=values, process=process,
                       telemetry=telemetry or {}),
            )  # fmt: skip
        for prompt in range(20):
            accepted = drafts.integers(0, 3, 40)
            recorder.append(
                Accept(case=CASE, prompt=str(prompt), dataset="d", num_draft_tokens=2, accepted=accepted, emitted=9)
            )
    return recorder.run_id


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, Any]]:
    code = cli.run([*arguments, "--json"])
    return code, json.loads(capsys.readouterr().out)


def certificate(*runs: str, family: str = "speed", status: str = "passed") -> Certificate:
    return Certificate(family=family, status=status, compared=runs, metrics=1, processes=8, needed=6)


def test_a_night_is_the_median_of_its_processes(tmp_path: Path) -> None:
    with Recorder(tmp_path / "run.jsonl") as recorder:
        recorder.append(Run(started="2026-01-02"))
        # process 0 was visited twice and its calls are one pool: medians 2, 7, 9
        for process, values in ((0, (1.0, 1.0)), (0, (2.0, 3.0, 50.0)), (1, (7.0,)), (2, (9.0, 9.0))):
            recorder.append(
                Sample(case=CASE, metric="verify", unit="ms", better="down", values=values, process=process)
            )
        accepted = (2, 0, 0)
        recorder.append(
            Accept(case=CASE, prompt="a", dataset="d", num_draft_tokens=2, accepted=accepted, emitted=6, truncated=True)
        )

    found = history.nights(store.load(tmp_path))

    rows = found[["metric", "value", "units", "started"]].to_dict("split")["data"]
    assert rows == [["acceptance_length d", 2.0, 1, "2026-01-02"], ["verify", 7.0, 3, "2026-01-02"]]
    assert len(history.nights(store.load(tmp_path), metric="verify")) == 1
    assert len(history.nights(store.load(tmp_path), pair="nobody")) == 0


def test_the_last_night_is_held_against_those_before(tmp_path: Path) -> None:
    for seed, factor in enumerate((1.0, 1.0, 1.0, 0.5), 1):
        night(tmp_path / f"{seed}.jsonl", seed, factor)

    found = history.summary(history.nights(store.load(tmp_path)))

    speed = found[found["metric"] == "decode"].iloc[0]
    assert (speed["nights"], len(speed["recent"])) == (4, 4)
    assert speed["change"] == pytest.approx(-0.5, abs=0.01)
    assert found[found["metric"] == "acceptance_length d"]["change"].iloc[0] == 0.0


def test_a_new_level_is_found_and_noise_is_none() -> None:
    pytest.importorskip("ruptures", reason="change points need ruptures")
    rng = np.random.default_rng(0)
    still = [history.change_points(100 * np.exp(rng.normal(0, 0.01, 90))) for _ in range(50)]
    moved = [history.change_points(100 * np.exp(rng.normal(0, 0.01, 90) + 0.03 * (np.arange(90) >= 60)))
             for _ in range(50)]  # fmt: skip

    assert sum(map(bool, still)) <= 2
    assert np.mean([len(found) == 1 and abs(found[0] - 60) <= 2 for found in moved]) >= 0.9
    assert history.change_points([1.0] * 9) == []
    assert history.change_points([1.0] * 20 + [2.0] * 20) == [20]


def test_history_lists_series_and_the_nights_of_one(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    runs = [night(tmp_path / "runs" / str(seed) / "records.jsonl", seed) for seed in (1, 2)]

    code, every = said(capsys, "history", "--runs", str(tmp_path / "runs"))
    one_code, one = said(capsys, "history", *map(str, (tmp_path / "runs").glob("*")), "--metric", "decode")

    assert (code, one_code) == (0, 0)
    assert [s["metric"] for s in every["series"]] == ["acceptance_length d", "decode"]
    assert sorted(n["run"] for n in one["nights"]) == sorted(runs)
    assert said(capsys, "history", str(tmp_path / "runs"), "--metric", "nosuch")[0] == Exit.NOTHING_SELECTED
    assert said(capsys, "history", str(tmp_path / "nosuch"))[0] == Exit.USAGE


@pytest.mark.parametrize(("option", "library"), [(("--moved",), "ruptures"), (("--pack", "folder"), "pyarrow")])
def test_what_an_extra_brings_is_a_capability(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, option: tuple[str, ...], library: str
) -> None:
    monkeypatch.setattr("suites.commands.history.find_spec", lambda name: None)

    code, found = said(capsys, "history", *option)

    assert (code, library in found["error"]) == (Exit.CAPABILITY_MISSING, True)


@pytest.mark.parametrize(
    ("factors", "code", "kind"),
    [((1.0, 1.0), 0, "SAME"), ((1.1, 1.1), 0, "BETTER"), ((0.9, 0.9), 1, "WORSE"), ((0.9, 1.0), 4, "UNCLEAR"),
     ((0.9, None), 4, "UNCLEAR")],
)  # fmt: skip
def test_compare_ends_with_the_code_of_its_verdict(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, factors: tuple[float, float | None], code: int, kind: str
) -> None:
    first, second = factors
    names = [str(tmp_path / f"{name}.jsonl") for name in "abcd"]
    for seed, (name, factor) in enumerate(zip(names, (1.0, first, 1.0, second or 1.0), strict=True), 1):
        night(Path(name), seed, factor)
    again = ["--again", *names[2:]] if second else []

    ended, found = said(capsys, "compare", *names[:2], *again, "--runs", str(tmp_path / "runs"))

    assert ended == code
    kinds = {v["metric"]: v["verdict"] for v in found["verdicts"]}
    assert kinds == {"decode": kind, "acceptance_length d": "SAME"}
    lines = [o for o in read(found["records"]) if isinstance(o, Verdict)]
    assert {v.metric: v.verdict for v in lines} == kinds
    assert all(v.better == "up" and v.reasons and v.visible is not None for v in lines)


def test_compare_concludes_nothing_from_other_machines_or_from_nothing(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    night(tmp_path / "a.jsonl", 1)
    night(tmp_path / "b.jsonl", 2, environment=CLEAN | {"gpu": "other", "versions": {"torch": "2"}})
    with Recorder(tmp_path / "empty.jsonl") as recorder:
        recorder.append(Run(started=""))
    runs = ["--runs", str(tmp_path / "runs")]

    code, found = said(capsys, "compare", str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl"), *runs)

    assert (code, found["differences"]) == (Exit.INCONCLUSIVE, ["versions None -> versions torch 2"])
    invalid = [v for v in found["verdicts"] if v["verdict"] == "INVALID"]
    assert [v["metric"] for v in invalid] == ["decode"]
    names = str(tmp_path / "empty.jsonl"), str(tmp_path / "a.jsonl")
    assert said(capsys, "compare", *names, *runs)[0] == Exit.NOTHING_SELECTED
    assert said(capsys, "compare", "nosuch", names[1], *runs)[0] == Exit.USAGE
    assert said(capsys, "compare", "baseline:nosuch", names[1], *runs)[0] == Exit.USAGE


@pytest.mark.parametrize(
    ("verdicts", "code"),
    [
        ([("WORSE", "fail"), ("INVALID", "fail")], Exit.GATE_FAILED),
        ([("WORSE", "tell"), ("SAME", "fail")], Exit.PASSED),
        ([("INVALID", "fail"), ("SAME", "tell")], Exit.MACHINE_FAILED),
        ([("INVALID", "fail"), ("SAME", "fail")], Exit.INCONCLUSIVE),
        ([("UNCLEAR", "tell"), ("BETTER", "fail")], Exit.PASSED),
        ([("UNCLEAR", "fail"), ("BETTER", "fail")], Exit.INCONCLUSIVE),
    ],
)
def test_only_gates_that_can_stop_something_decide_the_code(verdicts: list[tuple[str, str]], code: Exit) -> None:
    assert verdict([Verdict(metric="m", verdict=v, extra={"on_worse": on}) for v, on in verdicts]) == code


def test_a_certified_run_is_promoted_and_compared_with(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    names = [tmp_path / "runs" / name / "records.jsonl" for name in ("one", "two")]
    ids = [night(name, seed) for seed, name in enumerate(names, 1)]
    runs = ["--runs", str(tmp_path / "runs")]
    code, certified = said(capsys, "compare", "one", "two", "--certify", *runs)
    assert (code, {c["status"] for c in certified["certificates"]}) == (0, {"passed"})
    records, seal = store.gather(names[0]), store.gather(certified["records"]).certificates

    out = promote(records, seal, GATES, tmp_path / "h100.jsonl", "first night on this machine", "2026-01-03")

    assert all(ids[0] in c.compared and ids[1] in c.compared for c in seal)
    (run,) = store.gather(out).runs
    assert (run.run, run.extra["promoted"]["reason"]) == (ids[0], "first night on this machine")
    assert store.gather(out).certificates == seal
    assert store.gather(out).samples == records.samples
    assert said(capsys, "compare", str(out), "two", *runs)[0] == 0
    uncertified = said(capsys, "baseline", "promote", "one", "--as", "x", "--reason", "r", *runs)
    assert uncertified[0] == Exit.GATE_FAILED
    assert all("uncertified" in reason for reason in uncertified[1]["refused"])


@pytest.mark.parametrize(
    ("changed", "reason", "words"),
    [
        ({"environment": DIRTY}, "r", "dirty"),
        ({"environment": {"source": {"commit": None, "dirty": None}}}, "r", "dirty"),
        ({"telemetry": {"throttled": 0.2}}, "r", "throttled"),
        ({"more": (Check(claim="c", pair="p", status="failed", replay="r"),)}, "r", "failed: 1 claims, c first"),
        ({"more": (Planted(bug="b", origin="o", claim="c", caught=False),)}, "r", "failed: the planted change b"),
        ({}, "", "needs a reason"),
    ],
)
def test_a_flawed_run_is_refused_and_nothing_is_written(
    tmp_path: Path, changed: dict[str, Any], reason: str, words: str
) -> None:
    run = night(tmp_path / "run.jsonl", 1, **changed)
    seal = [certificate(run, family=family) for family in ("speed", "acceptance")]

    with pytest.raises(Refused, match=words):
        promote(store.gather(tmp_path / "run.jsonl"), seal, GATES, tmp_path / "out.jsonl", reason, "now")

    assert [file.name for file in tmp_path.iterdir()] == ["run.jsonl"]


@pytest.mark.parametrize(
    "change",
    [
        lambda seal: replace(seal, status="failed"),
        lambda seal: replace(seal, compared=("another run",)),
        lambda seal: replace(seal, family="memory"),
    ],
)
def test_a_certificate_covers_its_own_family_and_runs(
    tmp_path: Path, change: Callable[[Certificate], Certificate]
) -> None:
    run = night(tmp_path / "run.jsonl", 1)
    seal = [certificate(run, family="acceptance"), change(certificate(run))]

    with pytest.raises(Refused, match="uncertified: no passed certificate of speed"):
        promote(store.gather(tmp_path / "run.jsonl"), seal, GATES, tmp_path / "out.jsonl", "r", "now")


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"verdict": "BETTER"}, "though nothing changed"),
        ({"verdict": "INVALID"}, "though nothing changed"),
        ({"visible": 0.2}, "nothing below 0.2"),
        ({"visible": None}, "no change would have been seen"),
    ],
)
def test_a_certificate_fails_where_something_moved_or_nothing_could_be_seen(
    changed: dict[str, Any], words: str
) -> None:
    quiet = Verdict(
        metric="decode", verdict="SAME", family="speed", visible=0.02, sides=(("a",), ("b",)), reasons=("why",),
        method="ratio of medians", extra={"units": 8},
    )  # fmt: skip

    (good,) = certify([quiet], GATES)
    (bad,) = certify([replace(quiet, **changed)], GATES)

    assert (good.status, good.visible, good.processes, good.compared) == ("passed", 0.02, 8, ("a", "b"))
    assert (bad.status, words in bad.reasons[0]) == ("failed", True)


def test_a_certificate_is_of_one_clean_commit() -> None:
    clean = Run(started="", environment=CLEAN)
    other = Run(started="", environment={"source": {"commit": "d" * 40, "dirty": False}})

    assert one_commit([clean, clean]) == "c" * 40
    for runs in ([clean, other], [clean, Run(started="", environment=DIRTY)], [Run(started="")]):
        with pytest.raises(ValueError, match="one clean commit"):
            one_commit(runs)
