"""What an engine tells about one prompt, and what every engine can be asked."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from suites.commands.desk import UsageFault
from suites.probe.wire import BadAnswer, Wire

LARGEST = 10_000_000
"""verify steps that one answer can have taken"""


class Crowded(Exception):
    """The engine answered others meanwhile, and its counters do not say whom they count."""


class Told(NamedTuple):
    """One answered prompt."""

    steps: tuple[int, ...]
    """accepted drafts of each verify step, smallest first: engines count steps and do not order them"""
    emitted: int
    """tokens of the answer, the first one (from the prompt's own pass) included"""
    is_whole: bool
    """ended by itself or at the limit, not broken off"""


@dataclass(frozen=True)
class Asked:
    """How every prompt is answered."""

    num_tokens: int = 256
    temperature: float = 0.0


class Engine(Protocol):
    """One running engine."""

    name: str
    num_draft_tokens: int
    """drafts that a verify step can accept; of a tree, its depth"""
    tree: Mapping[str, int]
    """topk, num_steps and num_draft_tokens of a tree; empty for chains"""

    def ask(self, prompt: str | list[int], asked: Asked) -> Told:
        """Have one prompt answered; errors: EngineGone, BadAnswer, Crowded."""

    def facts(self) -> Mapping[str, Any]:
        """What the engine says about itself."""


def only_model(wire: Wire, wanted: str) -> str:
    """The model to ask; errors: UsageFault where several are served and none is named."""
    cards = wire.again(lambda: wire.json("/v1/models")).get("data")
    if not isinstance(cards, list) or not all(isinstance(card, dict) and "id" in card for card in cards):
        raise BadAnswer(f"{wire.url}/v1/models: 'data' should list models with their ids")
    names = [str(card["id"]) for card in cards]
    if wanted and wanted not in names:
        raise UsageFault(f"{wire.url} serves no model {wanted!r}; it serves {', '.join(names)}")
    # an adapter names the model that it stands on
    base = [str(card["id"]) for card in cards if card.get("parent") is None]
    if not wanted and len(base) != 1:
        raise UsageFault(f"{wire.url} serves {', '.join(names) or 'no model'}; name one: --model")
    return wanted or base[0]


def request(model: str, prompt: str | list[int], asked: Asked) -> dict[str, Any]:
    """The body of `/v1/completions`; both engines take text or token ids."""
    return {
        "model": model,
        "prompt": prompt,
        "max_tokens": asked.num_tokens,
        "temperature": asked.temperature,
        "stream": False,
    }


def ending(answer: Mapping[str, Any], where: str) -> tuple[int, bool]:
    """(tokens emitted, whether the answer is whole); errors: BadAnswer."""
    try:
        choice, emitted = answer["choices"][0], answer["usage"]["completion_tokens"]
        is_whole = choice["finish_reason"] in ("stop", "length")
    except (KeyError, IndexError, TypeError) as error:
        raise BadAnswer(f"{where}: is no completion: {error!r} is missing in {str(answer)[:120]}") from error
    if not isinstance(emitted, int) or emitted < 0:
        raise BadAnswer(f"{where}: usage.completion_tokens is {emitted!r}")
    return emitted, is_whole


def steps_of(histogram: Any, where: str) -> tuple[int, ...]:
    """Verify steps from how many of them accepted 0, 1, .. drafts; errors: BadAnswer."""
    if not isinstance(histogram, list) or not all(isinstance(count, int) and count >= 0 for count in histogram):
        raise BadAnswer(f"{where}: a histogram counts the steps that accepted 0, 1, .. drafts, got {histogram!r}")
    if sum(histogram) > LARGEST:
        raise BadAnswer(f"{where}: {sum(histogram)} verify steps in one answer")
    return tuple(accepted for accepted, count in enumerate(histogram) for _ in range(count))
