"""vLLM, as its release 0.33.0 counts (`vllm/v1/spec_decode/metrics.py`, `vllm/v1/metrics/loggers.py`).

Its counters speak of all requests together, so one prompt is asked at a time and the counters are read before and
after it. They are written after an answer was sent, and others may use the engine: the reading counts only once the
generated tokens grew by this answer's, and by no more. With `--per-request-spec-decode-metrics` the answer itself holds
a histogram, which is then taken in their place.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

from suites.commands.desk import MissingCapability
from suites.probe.counters import Samples, grown, of_model, parse, total
from suites.probe.told import Asked, Crowded, Told, ending, only_model, request, steps_of
from suites.probe.wire import BadAnswer, EngineGone, Wire

DRAFTS = "vllm:spec_decode_num_drafts"
DRAFTED = "vllm:spec_decode_num_draft_tokens"
ACCEPTED = "vllm:spec_decode_num_accepted_tokens"
PER_POSITION = "vllm:spec_decode_num_accepted_tokens_per_pos"
GENERATED = "vllm:generation_tokens"
BUSY = ("vllm:num_requests_running", "vllm:num_requests_waiting")
POLL = 0.05
"""seconds between two looks at counters that have not moved yet"""


@dataclass(frozen=True)
class Reading:
    """The counters of one model at one moment, over all engines that serve it."""

    drafts: int
    drafted: int
    accepted: int
    reached: tuple[int, ...]
    """steps that accepted draft position 1, 2, .. K"""
    generated: int
    busy: int
    """requests that run or wait"""
    born: tuple[float, ...]
    """when the counters were created, where that is exposed"""


@dataclass(frozen=True)
class Vllm:
    """One vLLM server; errors: MissingCapability where it does not speculate."""

    wire: Wire
    model: str
    num_draft_tokens: int = 0
    name: str = "vllm"
    tree: Mapping[str, int] = field(default_factory=dict)
    settle: float = 10.0
    """seconds that counters may lag behind an answer"""

    @classmethod
    def at(cls, wire: Wire, model: str) -> "Vllm":
        server = cls(wire, only_model(wire, model))
        return replace(server, num_draft_tokens=len(wire.again(server.read).reached))

    def facts(self) -> dict[str, Any]:
        return {"model": self.model, "version": self.wire.again(lambda: self.wire.json("/version")).get("version", "")}

    def ask(self, prompt: str | list[int], asked: Asked) -> Told:
        return self.wire.again(lambda: self._ask(prompt, asked))

    def _ask(self, prompt: str | list[int], asked: Asked) -> Told:
        before, path = self._quiet(), "/v1/completions"
        answer = self.wire.json(path, request(self.model, prompt, asked))
        emitted, is_whole = ending(answer, f"{self.wire.url}{path}")
        own = (answer.get("metrics") or {}).get("speculative_decoding")
        if own is not None:
            return Told(steps_of(own.get("acceptance_histogram"), f"{self.wire.url}{path}"), emitted, is_whole)
        if before.busy:
            raise Crowded(f"{self.wire.url} answers {before.busy} other requests")
        return Told(self.between(before, self._settled(before, emitted)), emitted, is_whole)

    def read(self) -> Reading:
        """One look at `/metrics`; errors: Passing, BadAnswer, MissingCapability."""
        where = f"{self.wire.url}/metrics"
        samples = {
            name: of_model(found, self.model) for name, found in parse(self.wire.text("/metrics"), where).items()
        }
        if not samples.get(f"{DRAFTS}_total"):
            raise MissingCapability(
                f"{where}: no {DRAFTS}_total of model {self.model!r}; start vLLM with --speculative-config and without "
                "--disable-log-stats"
            )
        return Reading(
            *(total(samples.get(f"{name}_total", []), f"{where} {name}") for name in (DRAFTS, DRAFTED, ACCEPTED)),
            reached=_by_position(samples, where),
            generated=total(samples.get(f"{GENERATED}_total", []), f"{where} {GENERATED}"),
            busy=sum(total(samples.get(name, []), f"{where} {name}") for name in BUSY),
            born=tuple(sorted(sample.value for sample in samples.get(f"{DRAFTS}_created", []))),
        )

    def _quiet(self) -> Reading:
        """The counters once nobody is being answered, or as they are where others never stop."""
        until = time.monotonic() + self.settle
        while (reading := self.read()).busy and time.monotonic() < until:
            time.sleep(POLL)
        return reading

    def _settled(self, before: Reading, emitted: int) -> Reading:
        """The counters once they hold this answer; errors: Crowded where they hold more, EngineGone where they stay."""
        until = time.monotonic() + self.settle
        while True:
            after = self.read()
            if after.born != before.born:
                raise EngineGone(f"{self.wire.url}: its counters began anew: the engine was started again in between")
            new = grown(before.generated, after.generated, f"{self.wire.url} {GENERATED}")
            if new > emitted:
                raise Crowded(f"{self.wire.url} generated {new} tokens during an answer of {emitted}")
            if new == emitted:
                return after
            if time.monotonic() > until:
                raise EngineGone(f"{self.wire.url}: {GENERATED} grew by {new} during an answer of {emitted} tokens")
            time.sleep(POLL)

    def between(self, before: Reading, after: Reading) -> tuple[int, ...]:
        """The verify steps between two readings; errors: BadAnswer where the counters contradict each other."""
        drafts = grown(before.drafts, after.drafts, DRAFTS)
        pairs = zip(before.reached, after.reached, strict=True)
        # position i is accepted only with all before it: a step that accepted a drafts reached positions 1..a
        reached = [drafts, *(grown(old, new, PER_POSITION) for old, new in pairs), 0]
        histogram = [more - fewer for more, fewer in pairwise(reached)]
        accepted, drafted = after.accepted - before.accepted, after.drafted - before.drafted
        if min(histogram) < 0 or accepted != sum(reached[1:]) or accepted > drafted:
            raise BadAnswer(
                f"{self.wire.url}: counters contradict each other: {drafts} steps drafted {drafted} tokens, accepted "
                f"{accepted}, by position {reached[1:-1]}"
            )
        return steps_of(histogram, self.wire.url)


def _by_position(samples: Samples, where: str) -> tuple[int, ...]:
    """Accepted tokens of positions 0, 1, ..; errors: BadAnswer where a position is absent."""
    found: dict[str, list[Any]] = {}
    for sample in samples.get(f"{PER_POSITION}_total", []):
        found.setdefault(sample.labels.get("position", ""), []).append(sample)
    places = [str(place) for place in range(len(found))]
    if set(places) != found.keys() or not found:
        raise BadAnswer(f"{where}: {PER_POSITION}_total has positions {sorted(found)}, 0.. are expected")
    return tuple(total(found[place], f"{where} {PER_POSITION}") for place in places)
