"""Runs that measured the same thing under other conditions: told before anything else on the page."""

from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

from harness.record import Run
from reports.panels import counted
from reports.store import Records

CLOCKS = 0.02
"""share by which the middle clocks of two runs may differ"""
FACTS: dict[str, Callable[[Mapping[str, Any]], Any]] = {
    "GPU": lambda env: ", ".join(str(d.get("name")) for d in env.get("gpu", {}).get("devices", ())) or "none",
    "GPU settings": lambda env: sorted({(str(d.get("vbios")), str(d.get("ecc")), str(d.get("mig")))
                                        for d in env.get("gpu", {}).get("devices", ())}),
    "driver": lambda env: env.get("gpu", {}).get("driver") or "none",
    "processor": lambda env: env.get("cpu", {}).get("name"),
    "cores": lambda env: env.get("cpu", {}).get("cores"),
    "system": lambda env: env.get("system"),
    "environment": lambda env: ", ".join(f"{k}={v}" for k, v in sorted(env.get("env", {}).items())) or "none",
    "seeds": lambda env: ", ".join(f"{k}={v}" for k, v in sorted(env.get("seeds", {}).items())) or "none",
}  # fmt: skip


def warnings(every: Records) -> list[str]:
    """One line a fact in which runs differ that measured the same thing; none where each run asked something else."""
    asked = _asked(every)
    runs = sorted((run for run in every.runs if run.run in asked), key=lambda run: run.run)
    if len(runs) < 2:
        return []
    told: list[tuple[str, dict[str, Any]]] = [
        (name, {r.run: of(r.environment) for r in runs}) for name, of in FACTS.items()
    ]
    told += [
        (name, {r.run: _versions(r).get(name) for r in runs})
        for name in sorted({n for r in runs for n in _versions(r)})
    ]
    told.append(("profile", {run.run: run.profile or "none" for run in runs}))
    found = [line for name, values in told if (line := _line(name, values))]
    dirty = [run.run for run in runs if run.environment.get("source", {}).get("dirty") is not False]
    if dirty:
        found.append(f"{counted(len(dirty), 'run')} of {len(runs)} had uncommitted changes, or did not say")
    return [*found, *_clocks(every, asked), *_datasets(every, asked)]


def _asked(every: Records) -> set[str]:
    """Runs that share a question with another run."""
    runs: dict[tuple[str, ...], set[str]] = {}
    for check in every.checks:
        runs.setdefault(("claim", check.claim, check.pair), set()).add(check.run)
    for sample in every.samples:
        runs.setdefault(("metric", sample.case.pair, sample.metric), set()).add(sample.run)
    for accept in every.accepts:
        runs.setdefault(("acceptance", accept.case.pair, accept.dataset), set()).add(accept.run)
    return {run for found in runs.values() if len(found) > 1 for run in found}


def _line(name: str, values: dict[str, Any]) -> str:
    """What differs, the oldest first; empty where nothing does."""
    runs: dict[str, int] = {}
    for value in values.values():
        words = "not recorded" if value is None else str(value)
        runs[words] = runs.get(words, 0) + 1
    if len(runs) < 2:
        return ""
    return f"{name}: " + "; ".join(f"{words} in {counted(n, 'run')}" for words, n in runs.items())


def _versions(run: Run) -> dict[str, Any]:
    return dict(run.environment.get("versions", {}))


def _clocks(every: Records, asked: set[str]) -> list[str]:
    """The middle clock of each run, where they lie apart."""
    seen: dict[str, list[float]] = {}
    for s in every.samples:
        clock = (s.telemetry.get("sm_mhz") or {}).get("median") if s.run in asked else None
        if clock:
            seen.setdefault(s.run, []).append(clock)
    middles = sorted(median(clocks) for clocks in seen.values())
    if len(middles) < 2 or middles[-1] <= middles[0] * (1 + CLOCKS):
        return []
    return [f"clocks: the middle SM clock of a run lies between {middles[0]:.0f} and {middles[-1]:.0f} MHz"]


def _datasets(every: Records, asked: set[str]) -> list[str]:
    """Data sets of one name whose prompts are not the same."""
    prompts: dict[tuple[str, str], set[str]] = {}
    for accept in every.accepts:
        if accept.run in asked:
            prompts.setdefault((accept.case.pair, accept.dataset), set()).add(accept.case.prompts_sha256)
    return [
        f"prompts: {pair} answered {len(hashes)} different sets of prompts named {dataset}"
        for (pair, dataset), hashes in sorted(prompts.items())
        if len(hashes) > 1
    ]
