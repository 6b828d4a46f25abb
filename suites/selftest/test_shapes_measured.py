"""Claim: the figures of a shape are those of its text, its rates and its energy, or there are none.

Born of benchmarks that took unconditional rates for conditional ones, that drew one coin for a whole batch (SGLang's
spec_utils.py), and that kept the samples of a throttled card.
"""

import itertools
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from harness import timing
from harness.record import Check, Recorder, Sample, read
from harness.telemetry import Reading, Telemetry
from suites.benchmarks import baselines, forced, measure, notes, phases, summary
from suites.benchmarks.measure import DRY, Bench
from suites.benchmarks.phases import Costs
from suites.benchmarks.roofline import Ceilings
from suites.benchmarks.shapes import SHAPES, Built, build, small
from suites.benchmarks.steady import ChangedText, Steady
from suites.commands.bench import Options, operations
from suites.commands.desk import Desk

pytestmark = pytest.mark.correctness

LLAMA = small(SHAPES["Llama-3.1-8B-eagle3"])
SPEEDS = Ceilings(copy=1e9, read=1e9, matmul=1e9)
CHECK = Path(measure.__file__).with_name("gpu_check.sh")


@pytest.fixture(scope="module")
def built() -> Built:
    return build(LLAMA, "cpu", torch.float32)


def bench(built: Built, telemetry: Telemetry | None = None) -> Bench:
    return Bench(built, 2, replace(DRY, energy_s=0.02), "passed", telemetry or Telemetry(), SPEEDS)


def test_forced_rates_are_drawn_by_condition_and_apart_for_each_sequence(built: Built) -> None:
    running = Steady(built, 32, forced.RATES, num_cycles=4)

    drawn = running.hold_rates(256)

    assert forced.conditional(forced.RATES) == pytest.approx((0.730, 0.714, 0.681), abs=5e-4)
    assert forced.length(forced.RATES) == pytest.approx(2.606)
    assert drawn == pytest.approx(2.606, abs=5 * forced.deviation(forced.RATES) / 256**0.5)
    assert len({tuple(row) for row in running.kept()}) > 16


@pytest.mark.parametrize(
    ("accepted", "used", "word"),
    [
        ([[3] * 100] * 2, forced.conditional(forced.RATES), "2.606 were to be forced"),
        ([[0, 2] * 40] * 2, forced.RATES, "by condition"),
        ([[0, 3, 2, 1, 3, 0, 2, 3, 0, 2, 1, 3] * 8] * 4, forced.conditional(forced.RATES), "one coin"),
    ],
)
def test_other_rates_than_the_stated_ones_are_refused(
    accepted: list[list[int]], used: tuple[float, ...], word: str
) -> None:
    with pytest.raises(forced.NotForced, match=word):
        forced.hold(accepted, forced.RATES, used)


def test_a_visit_says_what_was_said_untimed(built: Built) -> None:
    running = Steady(built, 2, forced.RATES, num_cycles=3)

    first, second = running.visit(), running.visit()

    assert len(first) == len(second) == 3
    running.said = running.said + 1
    with pytest.raises(ChangedText, match="while it was timed"):
        running.visit()


def test_the_speed_up_is_the_product_of_its_factors() -> None:
    costs = Costs(plain=4.0, draft=0.5, verify=4.4, accept=0.1, cycle=5.02)

    product = 1.0
    for factor in costs.factors(2.606).values():
        product *= factor

    assert product == pytest.approx(2.606 * 4.0 / 5.02)
    assert costs.share == pytest.approx(5.0 / 5.02)
    assert costs.break_even == pytest.approx(5.02 / 4.0)


def test_phases_in_turn_are_a_cycle(built: Built) -> None:
    running = Steady(built, 2, forced.RATES, num_cycles=3)

    parts = running.split()

    assert set(parts) == set(phases.NAMES)
    assert {len(seconds) for seconds in parts.values()} == {3}
    assert torch.equal(running.text(), running.said)


def test_energy_is_shared_by_committed_tokens(built: Built) -> None:
    running = Steady(built, 2, forced.RATES, num_cycles=4)
    running.begin(seed=3)
    for _ in range(4):
        running.step()

    assert measure.committed(running) == sum(a + 1 for row in running.kept() for a in row)


def test_energy_is_told_where_the_device_tells_it(built: Built) -> None:
    class Counting(Telemetry):
        @contextmanager
        def window(self) -> Iterator[dict[str, Any]]:
            yield {"energy_j": 12.0}

    running = Steady(built, 2, forced.RATES, num_cycles=2)

    [told] = bench(built, Counting()).energy(running, bench(built).case(forced.RATES, "forced"))
    silent = list(bench(built).energy(running, bench(built).case(forced.RATES, "forced")))

    assert (told.metric, told.unit) == ("energy", "J/token")
    assert 0 < told.values[0] < 12.0
    assert silent == []


def test_a_throttled_visit_is_made_again_and_is_invalid_if_it_stays_so() -> None:
    throttled = iter([1.0, 1.0, 0.0, *[1.0] * 9])
    seen: list[int] = []

    @contextmanager
    def watch() -> Iterator[dict[str, Any]]:
        yield {"throttled": next(throttled)}

    found = timing.interleave(
        {"a": lambda: seen.append(0) or 1.0}, 2, 1, warm_up_s=0.0, clock=timing.own_seconds, watch=watch
    ).visits["a"]

    assert [(visit.tries, visit.valid) for visit in found] == [(3, True), *[(3, False)] * 3]
    assert found[0].telemetry() == {"wall_s": found[0].wall, "valid": True, "tries": 3, "throttled": 0.0}
    assert len(seen) == 3 + 12


def test_a_window_looks_at_the_device_where_it_begins_and_ends() -> None:
    telemetry, seconds = Telemetry(), itertools.count()
    telemetry.available = True

    def look() -> None:
        at = next(seconds)
        telemetry.readings.append(Reading(at, 1980.0, 3201.0, 100.0 + at, 40.0, 0, None))

    telemetry._look = look

    telemetry._look()
    with telemetry.window() as meanwhile:
        telemetry._look()

    assert meanwhile["readings"] == 3
    assert meanwhile["power_w"] == {"low": 101.0, "median": 102.0, "high": 103.0}
    assert meanwhile["energy_j"] == pytest.approx(101.5 + 102.5)
    assert meanwhile["throttled"] == 0.0


def test_the_first_word_of_transformers_is_no_decode_step() -> None:
    stamps = baselines.Stamps()
    stamps.at = [0.0, 5.0, 5.5, 6.5]

    assert stamps.steps == (0.5, 1.0)


@pytest.mark.parametrize(
    ("checks", "gate"),
    [
        ([], "not_run"),
        ([("llama", "passed")], "not_run"),
        ([("llama", "passed"), ("eagle3", "passed")], "passed"),
        ([("llama-eagle3", "passed")], "passed"),
        ([("llama-eagle3", "passed"), ("eagle3", "failed")], "failed"),
        ([("llama-eagle3", "passed"), ("llama", "error")], "failed"),
        ([("gemma3", "failed"), ("llama-eagle3", "passed")], "passed"),
    ],
)
def test_no_speed_is_measured_of_a_shape_whose_claims_are_not_green(
    tmp_path: Path, checks: list[tuple[str, str]], gate: str, capsys: pytest.CaptureFixture[str]
) -> None:
    claims, record = tmp_path / "claims.jsonl", tmp_path / "record.jsonl"
    with Recorder(claims) as recorder:
        for pair, status in checks:
            recorder.append(Check(claim="c", pair=pair, status=status, reason="r", replay="again"))

    assert measure.gate_of(LLAMA, claims) == gate
    if gate != "passed":
        assert measure.main(["Llama-3.1-8B-eagle3", "--dry-run", "--record", f"{record}", "--claims", f"{claims}"]) == 1
        assert "no speed is measured" in capsys.readouterr().err
        assert not record.exists()


def test_a_dry_run_writes_every_metric_and_says_that_it_is_one(tmp_path: Path) -> None:
    claims, record = tmp_path / "claims.jsonl", tmp_path / "dry-llama.jsonl"
    with Recorder(claims) as recorder:
        recorder.append(Check(claim="c", pair="llama-eagle3", status="passed"))
    where = ["--record", f"{record}", "--claims", f"{claims}", "--baselines", "none", "--batch", "2"]

    code = measure.main(["Llama-3.1-8B-eagle3", "--dry-run", *where])

    found = read(record)
    samples = [o for o in found if isinstance(o, Sample)]
    of_shape = [s for s in samples if s.case.pair == LLAMA.name]
    assert code == 0
    assert {s.metric for s in of_shape} >= {
        *("decode", "cycle", "utilisation", "floor", "bytes_weights", "bytes_keys", "length", "draft", "verify"),
        *("accept", "phase_sum", "break_even", "speedup", "factor_acceptance", "factor_verify", "factor_draft"),
        *("factor_accept", "factor_gap"),
    }
    assert {s.metric for s in samples} >= {"ceiling_copy", "ceiling_read", "ceiling_matmul"}
    assert all(s.case.variant.startswith("dry run") for s in of_shape)
    assert {(s.case.acceptance, s.case.num_draft_tokens) for s in of_shape} == {
        ("real", 0), ("forced", 3), ("oracle", 1)}  # fmt: skip
    assert isinstance(found[-1], Check)
    assert (found[-1].status, found[-1].pair) == ("passed", LLAMA.name)
    [row] = summary.rows(samples).values()
    assert row.is_dry
    assert row.ratio("drafting", "plain") is not None
    assert notes.measured([record])[1] == {}


def test_operations_are_timed_as_the_shape_calls_them(tmp_path: Path) -> None:
    with Recorder(tmp_path / "ops.jsonl") as recorder:
        told = operations(Desk(is_json=True), recorder, [SHAPES["Qwen3-30B-A3B-mtp"]], Options(blocks=1))

    assert {row["op"] for row in told} >= {"embed", "linear", "attend", "experts", "route_softmax", "head_argmax"}
    assert {row["form"] for row in told} == {"aten"}
    assert all(row["us"] > 0 and row["bandwidth"] > 0 for row in told)


def test_the_notes_are_what_the_records_say() -> None:
    assert notes.text(sorted(notes.RECORDS.glob("gpu-*.jsonl"))) == notes.NOTES.read_text(encoding="utf-8")


def test_the_script_asks_for_shapes_that_exist(tmp_path: Path) -> None:
    words = CHECK.read_text(encoding="utf-8").split()

    assert {word for word in words if word.endswith(("-eagle3", "-assistant", "-mtp", "-mla"))} >= set(SHAPES)
    assert subprocess.run(["bash", "-n", CHECK], check=False).returncode == 0
    assert subprocess.run(["bash", CHECK, "4", tmp_path], capture_output=True, check=False).returncode == 2


def test_two_ranks_of_torchrun_say_one_text_and_write_one_record(tmp_path: Path) -> None:
    claims, record = tmp_path / "claims.jsonl", tmp_path / "ranks.jsonl"
    with Recorder(claims) as recorder:
        recorder.append(Check(claim="c", pair="llama-eagle3", status="passed"))
    ranks = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "suites.benchmarks.decode"]
    asked = [LLAMA.name, "--dry-run", "--record", f"{record}", "--claims", f"{claims}"]

    done = subprocess.run([sys.executable, *ranks, *asked], capture_output=True, text=True, check=False, timeout=500)

    assert done.returncode == 0, done.stderr[-2000:]
    samples = [o for o in read(record) if isinstance(o, Sample) and o.case.pair == LLAMA.name]
    assert {s.case.tp for s in samples} == {2}
    assert {s.metric for s in samples} >= {"decode", "cycle", "draft", "verify", "accept", "floor"}
