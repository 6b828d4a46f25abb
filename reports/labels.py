"""Cases in words: the pair, and the facts in which the cases of one plot differ."""

from collections.abc import Callable, Sequence

from harness.record import Case

# facts that a label names only where two labels would be equal without them
FACTS: dict[str, Callable[[Case], str]] = {
    "implementation": lambda c: c.impl,
    "sampling": lambda c: "greedy" if c.temperature == 0 else f"T={c.temperature:g}",
    "drafts": lambda c: f"K={c.num_draft_tokens}" if c.num_draft_tokens else "plain",
    "variant": lambda c: c.variant or "as published",
    "dtype": lambda c: c.dtype,
    "device": lambda c: c.device,
    "batch": lambda c: f"B={c.batch}",
    "ranks": lambda c: f"TP={c.tp}",
    "form": lambda c: c.form,
    "run": lambda c: c.run,
}


def labels(cases: Sequence[Case], always: tuple[str, ...] = ()) -> dict[tuple[str, str], str]:
    """(run, case) -> the pair and the facts in which the cases of this plot differ."""
    told = [f for f, say in FACTS.items() if f in always or len({say(case) for case in cases}) > 1]
    if "run" in told and len({(c.pair, *(FACTS[f](c) for f in told if f != "run")) for c in cases}) == len(cases):
        told.remove("run")
    found = {}
    for case in cases:
        facts = [FACTS[f](case) for f in told]
        found[key_of(case)] = ", ".join([case.pair, *filter(None, facts)])
    if len(set(found.values())) < len(found):  # cases that differ in hashes only
        found = {key: f"{label}, {key[1]}" for key, label in found.items()}
    return found


def key_of(case: Case) -> tuple[str, str]:
    """What a case is called within several runs."""
    return case.run, case.id
