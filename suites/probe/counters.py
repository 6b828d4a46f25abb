"""Counters in the text format of Prometheus, version 0.0.4, as `/metrics` of an engine exposes them.

    # TYPE vllm:spec_decode_num_drafts_total counter
    vllm:spec_decode_num_drafts_total{engine="0",model_name="llama"} 12.0

Counters only ever grow within one life of a process, so what happened in between is a difference. One that shrank, or
whose `_created` moved, began anew: its process was started again.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from suites.probe.wire import BadAnswer, EngineGone

_SAMPLE = re.compile(r"^([A-Za-z_:][\w:]*)(?:\{(.*)\})?\s+(\S+)(?:\s+-?\d+)?$")
_LABEL = re.compile(r'\s*(\w+)="((?:[^"\\]|\\.)*)"\s*(?:,|$)')
_ESCAPES = {r"\\": "\\", r"\"": '"', r"\n": "\n"}


@dataclass(frozen=True)
class Sample:
    """One line."""

    labels: Mapping[str, str]
    value: float


Samples = dict[str, list[Sample]]


def parse(text: str, where: str) -> Samples:
    """Every sample by the name of its metric; errors: BadAnswer for a line that is none."""
    found: Samples = {}
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        match = _SAMPLE.match(line.strip())
        try:
            if match is None:
                raise ValueError("no sample")
            found.setdefault(match[1], []).append(Sample(_labels(match[2] or ""), float(match[3])))
        except ValueError as error:
            raise BadAnswer(f"{where}: line {number} is no metric ({error}): {line[:80]!r}") from error
    return found


def _labels(text: str) -> dict[str, str]:
    labels, at = {}, 0
    while at < len(text):
        match = _LABEL.match(text, at)
        if match is None:
            raise ValueError(f"labels {text!r}")
        labels[match[1]] = re.sub(r"\\[\\\"n]", lambda escape: _ESCAPES[escape[0]], match[2])
        at = match.end()
    return labels


def of_model(samples: list[Sample], model: str) -> list[Sample]:
    """The lines that speak of one model: every engine and rank that serves it."""
    return [sample for sample in samples if sample.labels.get("model_name", model) == model]


def total(samples: list[Sample], where: str) -> int:
    """The sum of counters; errors: BadAnswer for what counts nothing."""
    values = [sample.value for sample in samples]
    if not all(math.isfinite(value) and value >= 0 and value == int(value) for value in values):
        raise BadAnswer(f"{where}: counters are whole numbers, got {values}")
    return int(sum(values))


def grown(before: int, after: int, what: str) -> int:
    """What a counter gained; errors: EngineGone where it shrank."""
    if after < before:
        raise EngineGone(f"{what} fell from {before} to {after}: the engine was started again in between")
    return after - before
