"""Claim: callables that are compared take turns, every raw number is kept, and a warm-up that never settles says so."""

import itertools
import time

import pytest

from harness import telemetry, timing
from reports.statistics import paired_ratio

pytestmark = pytest.mark.correctness


class Clock:
    """A clock that stands still unless a call moves it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.at = 0.0
        monkeypatch.setattr(timing.time, "perf_counter", lambda: self.at)

    def spend(self, seconds: float) -> None:
        self.at += seconds


def test_turns_read_there_and_back_and_each_block_begins_with_another(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, order = Clock(monkeypatch), []
    calls = {name: lambda name=name: (order.append(name), clock.spend(1.0)) for name in "ab"}

    timing.interleave(calls, blocks=2, repeats=1)

    assert "".join(order[-8:]) == "abbabaab"


def test_every_call_is_one_number(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)

    found = timing.interleave({"a": lambda: clock.spend(1.0), "b": lambda: clock.spend(2.0)}, blocks=3, repeats=4)

    assert found.settled == {"a": True, "b": True}
    assert [(v.block, len(v.seconds)) for v in found.visits["b"]] == [(b, 4) for b in (0, 0, 1, 1, 2, 2)]
    assert {s for v in found.visits["b"] for s in v.seconds} == {2.0}
    assert {v.wall for v in found.visits["a"]} == {4.0}
    assert sorted(v.order for name in "ab" for v in found.visits[name] if v.block == 0) == [0, 1, 2, 3]


def test_a_drift_of_the_machine_cancels_within_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    calls = {
        "a": lambda: clock.spend(1.0 * (1 + clock.at / 2000)),
        "b": lambda: clock.spend(1.1 * (1 + clock.at / 2000)),
    }

    visits = timing.interleave(calls, blocks=10, repeats=1, agree=0.05).visits

    blocks = {n: {b: [s for v in visits[n] if v.block == b for s in v.seconds] for b in range(10)} for n in "ab"}
    assert paired_ratio(blocks["a"], blocks["b"]).value == pytest.approx(1.1, rel=2e-4)


def test_a_call_that_never_settles_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, growing = Clock(monkeypatch), itertools.count(1)

    found = timing.interleave({"a": lambda: clock.spend(2.0 ** next(growing))}, blocks=1, repeats=1, warm_up_s=5.0)

    assert found.settled == {"a": False}


def test_warm_up_leaves_a_slow_start_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, slow = Clock(monkeypatch), iter([9.0, 5.0, 2.0])

    found = timing.interleave({"a": lambda: clock.spend(next(slow, 1.0))}, blocks=1, repeats=2)

    assert {s for v in found.visits["a"] for s in v.seconds} == {1.0}


def test_real_seconds_are_seconds() -> None:
    with timing.stopwatch() as elapsed:
        (seconds,) = timing.time_calls(lambda: time.sleep(0.02), 1)

    assert 0.02 <= seconds <= elapsed() < 2.0
    assert elapsed() == elapsed()


def test_nothing_to_time_is_an_error() -> None:
    with pytest.raises(ValueError, match="a callable"):
        timing.interleave({})


def test_telemetry_asks_ten_times_a_second_and_sums_up(monkeypatch: pytest.MonkeyPatch) -> None:
    library, energy = telemetry.pynvml, itertools.count(1000, 500)
    answers = {
        "nvmlInit": lambda: None,
        "nvmlShutdown": lambda: None,
        "nvmlDeviceGetHandleByIndex": lambda index: index,
        "nvmlDeviceGetPowerUsage": lambda device: 350_000,
        "nvmlDeviceGetClockInfo": lambda device, kind: 1980,
        "nvmlDeviceGetTemperature": lambda device, kind: refuse(),
        "nvmlDeviceGetCurrentClocksThrottleReasons": lambda device: 0x5,
        "nvmlDeviceGetTotalEnergyConsumption": lambda device: next(energy),
    }

    def refuse() -> None:
        raise library.NVMLError(library.NVML_ERROR_NOT_SUPPORTED)

    for name, answer in answers.items():
        monkeypatch.setattr(library, name, answer)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    with telemetry.Telemetry(hz=200) as sampler:
        time.sleep(0.05)

    summary = sampler.summary()
    assert summary["available"]
    assert summary["readings"] >= 3
    assert summary["power_w"] == {"low": 350.0, "median": 350.0, "high": 350.0}
    assert summary["temperature_c"] is None
    assert (summary["throttled"], summary["throttle_reasons"]) == (1.0, ["software power cap"])
    assert summary["energy_j"] == pytest.approx(0.5 * (summary["readings"] - 1))
