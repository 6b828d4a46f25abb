"""SGLang, as its release 0.5.23 counts (`srt/managers/tokenizer_manager.py`, `srt/entrypoints/openai/protocol.py`).

Every answer can carry its own counts: `return_spec_tokens_details` asks for `sglext.spec_tokens_details`, which are the
fields of `meta_info`. Their `spec_accept_length` is another quantity than the acceptance length: it divides the tokens
of the answer, the prompt's own included and those after the end left out, by the verify steps.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from suites.commands.desk import MissingCapability
from suites.probe.told import Asked, Told, ending, only_model, request, steps_of
from suites.probe.wire import BadAnswer, Wire

PATH = "/v1/completions"


@dataclass(frozen=True)
class Sglang:
    """One SGLang server; errors: MissingCapability where it does not speculate."""

    wire: Wire
    model: str
    algorithm: str
    num_nodes: int
    """D: draft tokens of one verify with the root"""
    num_draft_tokens: int
    tree: Mapping[str, int]
    name: str = "sglang"

    @classmethod
    def at(cls, wire: Wire, model: str) -> "Sglang":
        info = wire.again(lambda: server_info(wire))
        algorithm, nodes = info.get("speculative_algorithm"), info.get("speculative_num_draft_tokens")
        if not algorithm:
            raise MissingCapability(f"{wire.url} does not speculate; start SGLang with --speculative-algorithm")
        topk = info.get("speculative_eagle_topk") or 1
        steps = info.get("speculative_num_steps") if topk != 1 else nodes and nodes - 1
        if not all(isinstance(n, int) and n >= 1 for n in (nodes, topk, steps)):
            raise BadAnswer(f"{wire.url}: {nodes!r} draft tokens, topk {topk!r}, {steps!r} steps; all are at least 1")
        tree = {} if topk == 1 else {"topk": topk, "num_steps": steps, "num_draft_tokens": nodes}
        return cls(wire, only_model(wire, model), str(algorithm), nodes, steps, tree)

    def facts(self) -> dict[str, Any]:
        """With the engine's own mean over its life: of all requests, as of its last log line."""
        info = self.wire.again(lambda: server_info(self.wire))
        states = [state for state in info.get("internal_states") or () if isinstance(state, dict)]
        lengths = [state["avg_spec_accept_length"] for state in states if "avg_spec_accept_length" in state]
        facts = {"model": self.model, "version": info.get("version", ""), "algorithm": self.algorithm}
        return facts | {"avg_spec_accept_length": lengths}

    def ask(self, prompt: str | list[int], asked: Asked) -> Told:
        return self.wire.again(lambda: self._ask(prompt, asked))

    def _ask(self, prompt: str | list[int], asked: Asked) -> Told:
        body = request(self.model, prompt, asked) | {"return_spec_tokens_details": True}
        answer = self.wire.json(PATH, body)
        emitted, is_whole = ending(answer, f"{self.wire.url}{PATH}")
        details = (answer.get("sglext") or {}).get("spec_tokens_details")
        if details is None and emitted > 1:
            raise BadAnswer(
                f"{self.wire.url}{PATH}: no sglext.spec_tokens_details in an answer of {emitted} tokens; releases "
                "before 0.5.23 may not send it"
            )
        return Told(self.steps(details or {}), emitted, is_whole)

    def steps(self, details: Mapping[str, Any]) -> tuple[int, ...]:
        """The verify steps of one answer; errors: BadAnswer where its counts contradict each other."""
        histogram = details.get("spec_correct_drafts_histogram", [])
        steps = steps_of(histogram, f"{self.wire.url}{PATH}")
        counts = (details.get("spec_verify_ct", 0), details.get("spec_num_correct_drafts", 0))
        proposed = details.get("spec_num_proposed_drafts", 0)
        held = (len(steps), sum(steps)) == counts and proposed == len(steps) * (self.num_nodes - 1)
        if not held or max(steps, default=0) > self.num_draft_tokens:
            raise BadAnswer(
                f"{self.wire.url}{PATH}: counts contradict each other: {counts[0]} verify steps, {counts[1]} correct "
                f"of {proposed} drafts, histogram {histogram}, {self.num_nodes} draft tokens a step with the root"
            )
        return steps


def server_info(wire: Wire) -> dict[str, Any]:
    """`/server_info`, under its older name where an engine knows only that; errors: Passing, BadAnswer."""
    try:
        return wire.json("/server_info")
    except BadAnswer:
        return wire.json("/get_server_info")
