"""Verify steps of a record as arms: one a case and data set."""

from collections.abc import Sequence
from typing import NamedTuple

from harness.record import Accept, Case
from reports import statistics
from reports.labels import key_of, labels
from reports.statistics import Arm
from reports.store import Records


class Measured(NamedTuple):
    """One arm and where it comes from."""

    label: str
    case: Case
    dataset: str
    arm: Arm


def arms(accepts: Sequence[Accept]) -> list[Measured]:
    """Acceptances of one case and data set belong together; a prompt that was answered twice is one cluster."""
    cases: dict[tuple[str, str, str], Case] = {}
    steps: dict[tuple[str, str, str], dict[str, tuple[int, ...]]] = {}
    for accept in accepts:
        key = (*key_of(accept.case), accept.dataset)
        cases.setdefault(key, accept.case)
        kept = steps.setdefault(key, {})
        done = statistics.complete_steps(accept.accepted, accept.truncated)
        kept[accept.prompt] = kept.get(accept.prompt, ()) + done
    names = labels(list(cases.values()), ("sampling",))
    several = len({dataset for _, _, dataset in cases}) > 1
    return [
        Measured(
            names[key[:2]] + (f", {key[2]}" if several else ""),
            case,
            key[2],
            Arm(case.num_draft_tokens, steps[key]),
        )
        for key, case in cases.items()
    ]


def drafted(records: Records) -> list[Measured]:
    """Arms that drafted something, as published where that was measured."""
    accepts = [a for a in records.accepts if a.num_draft_tokens]
    found = arms([a for a in accepts if not a.case.variant] or accepts)
    return [m for m in found if any(m.arm.steps.values())]
