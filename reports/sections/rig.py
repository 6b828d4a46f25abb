"""The machine of the newest run: what it is, what it ran at, and how quiet it was."""

from collections import Counter
from typing import Any

from harness.record import Sample
from reports.panels import Section
from reports.sections.clocks import told_of
from reports.store import Records


def build(now: Records, every: Records) -> Section:
    """Facts, and a badge for each thing that makes a speed comparable."""
    return Section("rig", "The machine", {"rig": rig(now), "badges": badges(now)}, template="rig.html")


def badges(records: Records) -> list[tuple[str, str, str]]:
    """(good, bad or unsure; name; what is so) of everything that a comparison of speeds rests on."""
    if not records.runs:
        return []
    source = max(records.runs, key=lambda run: run.run).environment.get("source", {})
    told = [t for s in records.samples if (t := told_of(s)).get("available")]
    throttled = max((t.get("throttled") or 0.0 for t in told), default=None)
    found = [
        ("bad", "source", "uncommitted changes")
        if source.get("dirty") is not False
        else ("good", "source", "one clean commit"),
        ("unsure", "clocks", "not watched: no GPU was read")
        if throttled is None
        else ("bad", "clocks", f"throttled in up to {100 * throttled:.0f} % of readings")
        if throttled
        else ("good", "clocks", "never throttled"),
    ]
    for c in records.certificates:
        seen = "no change could have been seen" if c.visible is None else f"changes from {c.visible:.2g} on are seen"
        why = "; ".join(c.reasons[:1])
        tone = "good" if c.status == "passed" else "bad"
        found.append((tone, f"certificate of {c.family}", why or f"{c.processes} units a side; {seen}"))
    if not records.certificates:
        found.append(("unsure", "certificate", "none: one commit was not compared with itself (compare --certify)"))
    return found


def rig(records: Records) -> list[tuple[str, str]]:
    """The machine of the newest run, fact by fact; what was not recorded says so."""
    if not records.runs:
        return [("run", "not recorded")]
    env = max(records.runs, key=lambda run: run.run).environment
    source, cpu, gpu = env.get("source", {}), env.get("cpu", {}), env.get("gpu", {})
    commit = source.get("commit")
    state = {True: "dirty", False: "clean", None: "state not known"}[source.get("dirty")]
    facts = [
        ("commit", f"{commit[:12]}, {state}" if commit else f"not known: {source.get('reason', 'not recorded')}"),
        ("processor", f"{cpu.get('name', 'not recorded')}, {cpu.get('cores', '?')} cores"),
        ("GPU", _gpu_words(gpu)),
    ]
    versions = {name: number for name, number in env.get("versions", {}).items() if number}
    facts.append(("versions", ", ".join(f"{name} {number}" for name, number in versions.items()) or "not recorded"))
    facts.append(("clocks", _clock_words([s for s in records.samples if s.telemetry])))
    return facts


def gpu_of(run: Any) -> dict[str, Any]:
    return dict(run.environment.get("gpu", {}))


def has_gpu(gpu: dict[str, Any]) -> bool:
    return bool(gpu.get("available"))


def _gpu_words(gpu: dict[str, Any]) -> str:
    if not has_gpu(gpu):
        return f"no GPU: not measured ({gpu.get('reason') or 'not recorded'})"
    names = Counter(device.get("name") or "unnamed" for device in gpu.get("devices", []))
    devices = ", ".join(f"{count} x {name}" for name, count in names.items())
    return f"{devices}, driver {gpu.get('driver') or 'not known'}"


def _clock_words(samples: list[Sample]) -> str:
    told = [told_of(s) for s in samples]
    seen = [t for t in told if t.get("available")]
    if not seen:
        reasons = {t.get("reason") or "no reason recorded" for t in told} or {"no telemetry in this record"}
        return f"not measured ({', '.join(sorted(reasons))})"
    clocks = [t["sm_mhz"] for t in seen if t.get("sm_mhz")]
    span = (
        f"SM {min(c['low'] for c in clocks):.0f} to {max(c['high'] for c in clocks):.0f} MHz"
        if clocks
        else "SM unknown"
    )
    throttled = [t["throttled"] for t in seen if t.get("throttled") is not None]
    return (
        f"{span}, throttled in up to {100 * max(throttled):.0f} % of readings"
        if throttled and max(throttled) > 0
        else span
    )
