"""What the GPU did meanwhile: clocks, power, temperature, throttling and energy, sampled through NVML.

Where there is no driver nothing is invented: `available` is False and `reason` says why. A quantity that a device
does not report is None, never zero.
"""

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
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
        work()
    telemetry.summary()
    """

    def __init__(self, device: int = 0, hz: float = 10.0) -> None:
        self.device, self.period_s = device, 1.0 / hz
        self.available, self.reason = False, "not started"
        self.readings: list[Reading] = []
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

    def summary(self) -> dict[str, Any]:
        """What goes into the record: ranges, the share of throttled readings, the energy of the block."""
        if not self.available:
            return {"available": False, "reason": self.reason}
        kept = [r for r in self.readings if r.throttle is not None]
        energy = [r.energy_j for r in self.readings if r.energy_j is not None]
        bits = {bit for r in kept for bit in THROTTLE if (r.throttle or 0) & bit}
        return {
            "available": True,
            "readings": len(self.readings),
            **{f.name: self._range(f.name) for f in fields(Reading) if f.name in _RANGED},
            "throttled": sum(any((r.throttle or 0) & bit for bit in THROTTLE) for r in kept) / len(kept)
            if kept
            else None,
            "throttle_reasons": [THROTTLE[bit] for bit in sorted(bits)],
            "energy_j": energy[-1] - energy[0] if len(energy) > 1 else None,
        }

    def _range(self, name: str) -> dict[str, float] | None:
        values = [v for v in (getattr(r, name) for r in self.readings) if v is not None]
        return {"low": min(values), "median": median(values), "high": max(values)} if values else None

    def _sample(self) -> None:
        try:
            with nvml():
                device = handle(self.device)
                self.available, self.reason = True, ""
                start = time.perf_counter()
                while True:
                    self.readings.append(_look(device, time.perf_counter() - start))
                    self._ready.set()
                    if self._stop.wait(self.period_s):
                        break
                self.readings.append(_look(device, time.perf_counter() - start))
        except (NoGpu, pynvml.NVMLError) as error:
            self.available, self.reason = False, str(error)
        finally:
            self._ready.set()


_RANGED = ("sm_mhz", "memory_mhz", "power_w", "temperature_c")


def _look(device: Any, at_s: float) -> Reading:
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
