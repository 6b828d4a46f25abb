"""Bugs of reading a running engine: counters, words that mean something else, and tries that are counted twice."""

from dataclasses import replace
from typing import Any

from harness.planting import Bug

CLAIMS = "suites/correctness/test_engine_metrics.py"
COUNTED = f"{CLAIMS}::test_an_engine_is_read_as_its_steps_are_counted"
TRIES = f"{CLAIMS}::test_a_fault_that_passes_changes_no_number"
WRONG = f"{CLAIMS}::test_an_engine_that_cannot_be_read_is_an_error_in_words"
VERDICT = f"{CLAIMS}::test_a_verdict_needs_an_interval_on_one_side_of_the_bound"


def with_the_bonus(steps: Any) -> Any:
    """Every accepted count taken with the target's own token."""
    return lambda self, details: tuple(a + 1 for a in steps(self, details))


def swapped(between: Any) -> Any:
    """What was read after the answer stands as what was read before it."""
    return lambda self, before, after: between(self, after, before)


def since_the_start(between: Any) -> Any:
    """The counters themselves, not what an answer added to them."""

    def all_of_it(self: Any, before: Any, after: Any) -> Any:
        none = replace(before, drafts=0, drafted=0, accepted=0, reached=(0,) * len(before.reached), generated=0)
        return between(self, none, after)

    return all_of_it


def not_by_difference(between: Any) -> Any:
    """Steps that reached a position read as steps that ended there."""

    def reached(self: Any, before: Any, after: Any) -> Any:
        between(self, before, after)
        counts = [new - old for old, new in zip(before.reached, after.reached, strict=True)]
        return tuple(sorted(place for place, count in enumerate(counts, 1) for _ in range(count)))

    return reached


def at_once(_: Any) -> Any:
    """The counters read when the answer is there, which they are not yet."""
    return lambda self, before, emitted: self.read()


def first_engine(_: Any) -> Any:
    """Only the first line of a metric, as if one engine served."""
    return lambda samples, model: samples[:1]


def once(_: Any) -> Any:
    """The first try is the only one."""
    return lambda self, work: work()


def cut_is_whole(_: Any) -> Any:
    """Whatever came is the answer."""
    return lambda answer, until: answer.read1(2**20)


def any_overlap(hold: Any) -> Any:
    """AGREE wherever the interval touches the bound."""

    def lenient(reference: Any, engine: Any, within: float) -> Any:
        found = hold(reference, engine, within)
        return found._replace(word=type(found.word).AGREE)

    return lenient


BUGS = (
    Bug(
        "probe-length-with-the-bonus",
        "SGLang accept_lens include the bonus token, its num_correct_drafts do not (multi_layer_eagle_worker_v2.py)",
        "suites.probe.sglang.Sglang.steps",
        with_the_bonus,
        f"{COUNTED}[sglang]",
    ),
    Bug(
        "probe-before-and-after-swapped",
        "a difference of counters the wrong way round",
        "suites.probe.vllm.Vllm.between",
        swapped,
        f"{COUNTED}[vllm]",
    ),
    Bug(
        "probe-counters-since-the-start",
        "lifetime totals of a server taken as those of a run, as SGLang's avg_spec_accept_length invites",
        "suites.probe.vllm.Vllm.between",
        since_the_start,
        f"{COUNTED}[vllm]",
    ),
    Bug(
        "probe-positions-not-divided-by-drafts",
        "vLLM's counters by position are of steps that reached it, not of steps that ended there",
        "suites.probe.vllm.Vllm.between",
        not_by_difference,
        f"{COUNTED}[vllm]",
    ),
    Bug(
        "probe-counters-read-at-once",
        "vLLM writes its counters after the answer is sent",
        "suites.probe.vllm.Vllm._settled",
        at_once,
        f"{COUNTED}[vllm]",
    ),
    Bug(
        "probe-one-engine-of-several",
        "data-parallel engines have a label each",
        "suites.probe.vllm.of_model",
        first_engine,
        WRONG,
    ),
    Bug(
        "probe-a-try-is-the-last",
        "a 503 while a server loads taken for the end",
        "suites.probe.wire.Wire.again",
        once,
        TRIES,
    ),
    Bug(
        "probe-cut-answers-are-whole",
        "http.client reads a body of known length to wherever it ends when it is read in parts",
        "suites.probe.wire._whole",
        cut_is_whole,
        TRIES,
    ),
    Bug(
        "probe-agrees-with-everything",
        "a verdict that is drawn from the point alone",
        "suites.probe.verdict.hold",
        any_overlap,
        VERDICT,
    ),
)
