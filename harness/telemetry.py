"""What the GPU did meanwhile: clocks, power, temperature, throttling and energy, sampled through NVML.

Where there is no driver nothing is invented: `available` is False and `reason` says why. A quantity that a device
does not report is None, never zero.
"""

import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from types import TracebackType
from typing import Any

import pynvml

# bits of NVML's clock event reasons that mean "slower than asked"; idle and user-set clocks are not among them
THROTTLE = {
    0x004: "software power cap",
    0x008: "hardware slowdown",
    0x020: "software thermal slowdown",
    0x040: "hardware thermal slowdown",
    0x080: "hardware power brake",
}


class NoGpu(RuntimeError):
    """NVML has nothing to say here; the message says why."""


@dataclass(frozen=True)
class Reading:
    """One look at the device."""

    at_s: float
    """since the sampler started"""
    sm_mhz: float | None
    memory_mhz: float | None
    power_w: float | None
    temperature_c: float | None
    throttle: int | None
    """bits, see THROTTLE"""
    energy_j: float | None
    """total since the driver was loaded"""


@contextmanager
def nvml() -> Iterator[None]:
    """NVML for the length of the block, or NoGpu."""
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        absent = (pynvml.NVML_ERROR_LIBRARY_NOT_FOUND, pynvml.NVML_ERROR_DRIVER_NOT_LOADED)
        raise NoGpu("no NVIDIA driver" if error.value in absent else f"NVML does not start: {error}") from error
    try:
        yield
    finally:
        pynvml.nvmlShutdown()


def handle(device: int) -> Any:
    """The NVML handle of the device that this process calls cuda:`device`.

    NVML does not know CUDA_VISIBLE_DEVICES, so the list is read here.
    """
    visible = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    if visible and device >= len(visible):
        raise NoGpu(f"cuda:{device} is hidden by CUDA_VISIBLE_DEVICES={','.join(visible)}")
    try:
        if visible and not visible[device].isdigit():
            return pynvml.nvmlDeviceGetHandleByUUID(visible[device])
        return pynvml.nvmlDeviceGetHandleByIndex(int(visible[device]) if visible else device)
    except pynvml.NVMLError as error:
        raise NoGpu(f"cuda:{device} is not known to NVML: {error}") from error


def ask(query: Callable[..., Any], *args: Any) -> Any:
    """The device's answer, or None where it does not report this."""
    try:
        return query(*args)
    except pynvml.NVMLError:
        return None


class Telemetry:
    """Samples the device in a thread while the block runs.

    with Telemetry() as telemetry:
        with telemetry.window() as meanwhile:
            work()
    meanwhile is what a record says of this part, telemetry.summary() of the whole
    """

    def __init__(self, device: int = 0, hz: float = 10.0) -> None:
        self.device, self.period_s = device, 1.0 / hz
        self.available, self.reason = False, "not started"
        self.readings: list[Reading] = []
        self._look: Callable[[], None] = lambda: None
        self._stop = threading.Event()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="telemetry", daemon=True)

    def __enter__(self) -> "Telemetry":
        self._thread.start()
        self._ready.wait()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    @contextmanager
    def window(self) -> Iterator[dict[str, Any]]:
        """Gives a summary that is filled in when the block ends; the device is looked at where it begins and ends."""
        first, found = len(self.readings), dict[str, Any]()
        self._look()
        try:
            yield found
        finally:
            self._look()
            found |= self.summary(first)

    def summary(self, first: int = 0) -> dict[str, Any]:
        """What goes into the record: ranges, the share of throttled readings, the energy of the block.

        first   reading to begin with
        """
        if not self.available:
            return {"available": False, "reason": self.reason}
        readings = self.readings[first:]
        kept = [r for r in readings if r.throttle is not None]
        bits = {bit for r in kept for bit in THROTTLE if (r.throttle or 0) & bit}
        slowed = sum(any((r.throttle or 0) & bit for bit in THROTTLE) for r in kept)
        return {
            "available": True,
            "readings": len(readings),
            **{name: _range([getattr(r, name) for r in readings]) for name in _RANGED},
            "throttled": slowed / len(kept) if kept else None,
            "throttle_reasons": [THROTTLE[bit] for bit in sorted(bits)],
            "energy_j": _spent(readings),
        }

    def _sample(self) -> None:
        try:
            with nvml():
                device, start = handle(self.device), time.perf_counter()
                self._look = lambda: self.readings.append(_reading(device, time.perf_counter() - start))
                self.available, self.reason = True, ""
                self._look()
                self._ready.set()
                while not self._stop.wait(self.period_s):
                    self._look()
                self._look()
        except (NoGpu, pynvml.NVMLError) as error:
            self.available, self.reason = False, str(error)
        finally:
            self._look = lambda: None
            self._ready.set()


def is_throttled(summary: Mapping[str, Any]) -> bool:
    """Whether the device was slower than asked at any look."""
    return bool(summary.get("throttled"))


def _spent(readings: Sequence[Reading]) -> float | None:
    """Joules between the first reading and the last: the device's own count, else its power over the time."""
    counted = [r.energy_j for r in readings if r.energy_j is not None]
    if len(counted) > 1:
        return counted[-1] - counted[0]
    power = [(r.at_s, r.power_w) for r in readings if r.power_w is not None]
    if len(power) < 2:
        return None
    return sum((b[0] - a[0]) * (a[1] + b[1]) / 2 for a, b in pairwise(power))


def _range(values: Sequence[float | None]) -> dict[str, float] | None:
    known = [v for v in values if v is not None]
    return {"low": min(known), "median": median(known), "high": max(known)} if known else None


_RANGED = ("sm_mhz", "memory_mhz", "power_w", "temperature_c")


def _reading(device: Any, at_s: float) -> Reading:
    power = ask(pynvml.nvmlDeviceGetPowerUsage, device)
    energy = ask(pynvml.nvmlDeviceGetTotalEnergyConsumption, device)
    return Reading(
        at_s=at_s,
        sm_mhz=ask(pynvml.nvmlDeviceGetClockInfo, device, pynvml.NVML_CLOCK_SM),
        memory_mhz=ask(pynvml.nvmlDeviceGetClockInfo, device, pynvml.NVML_CLOCK_MEM),
        power_w=None if power is None else power / 1000,
        temperature_c=ask(pynvml.nvmlDeviceGetTemperature, device, pynvml.NVML_TEMPERATURE_GPU),
        throttle=ask(pynvml.nvmlDeviceGetCurrentClocksThrottleReasons, device),
        energy_j=None if energy is None else energy / 1000,
    )
