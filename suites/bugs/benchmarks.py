"""Bugs of measuring: figures that nobody would doubt, of something else than what they say."""

from collections.abc import Callable
from typing import Any

from harness.planting import Bug
from optimized.parallel import VocabEmbedding

TIMING = "suites/selftest/test_timing.py"
ROOFLINE = "suites/correctness/test_roofline.py"
MEASURED = "suites/selftest/test_shapes_measured.py"


def twice(part: Callable[..., tuple[float, float]]) -> Any:
    """A tied head read as a head, and once more as a table."""

    def wrong(held: Any, c: Any, rows: float, head_rows: float, is_head: bool) -> tuple[float, float]:
        size, flops = part(held, c, rows, head_rows, is_head)
        return (2 * size, flops) if is_head and isinstance(held, VocabEmbedding) else (size, flops)

    return wrong


BUGS = (
    Bug(
        "bench-aabb",
        "arms timed one after another: a clock that falls meets the second alone",
        "harness.timing._turns",
        lambda _: lambda names, block: [name for name in names for _ in range(2)],
        f"{TIMING}::test_turns_read_there_and_back_and_each_block_begins_with_another",
    ),
    Bug(
        "bench-ratio-upside-down",
        "a log-ratio of baseline over candidate: every slower version reads as a faster one",
        "reports.statistics.log_ratios",
        lambda logs: lambda baseline, candidate: -logs(baseline, candidate),
        f"{TIMING}::test_a_drift_of_the_machine_cancels_within_a_block",
    ),
    Bug(
        "bench-throttled-kept",
        "nightly figures of a card at its power cap, kept beside those of a cool one",
        "harness.timing.is_throttled",
        lambda _: lambda summary: False,
        f"{MEASURED}::test_a_throttled_visit_is_made_again_and_is_invalid_if_it_stays_so",
    ),
    Bug(
        "roofline-tied-head-twice",
        "gpt-fast generate.py: the model's size times tokens/s, whatever the table is read for",
        "suites.benchmarks.roofline._part",
        twice,
        f"{ROOFLINE}::test_a_pass_that_touches_everything_reads_every_parameter_once",
    ),
    Bug(
        "roofline-every-expert",
        "all experts counted as read in every step, so that a mixture looks faster than its memory",
        "suites.benchmarks.roofline.distinct",
        lambda _: lambda experts, chosen, rows: experts,
        f"{ROOFLINE}::test_shared_experts_are_read_by_every_row",
    ),
    Bug(
        "roofline-no-window",
        "keys of sliding layers counted over the whole text",
        "suites.benchmarks.roofline._layers",
        lambda layers: lambda model, text: ((size, None) for size, _ in layers(model, text)),
        f"{ROOFLINE}::test_a_sliding_layer_reads_the_keys_within_its_window",
    ),
    Bug(
        "forced-unconditional-taken-for-conditional",
        "vLLM's measured rates are unconditional; as conditional ones 2.606 tokens a step become 2.245",
        "optimized.cycle.conditional",
        lambda _: lambda rates: list(rates),
        f"{MEASURED}::test_forced_rates_are_drawn_by_condition_and_apart_for_each_sequence",
    ),
    Bug(
        "bench-energy-per-draft",
        "joules shared among all drafts, the rejected ones too",
        "suites.benchmarks.measure.committed",
        lambda _: lambda running: running.num_cycles * running.num_drafts * running.session.plan.batch,
        f"{MEASURED}::test_energy_is_shared_by_committed_tokens",
    ),
    Bug(
        "bench-gap-forgotten",
        "phases that add up to less than the cycle, and a waterfall that does not say so",
        "suites.benchmarks.phases.Costs.factors",
        lambda factors: lambda costs, length: {**factors(costs, length), "gap": 1.0},
        f"{MEASURED}::test_the_speed_up_is_the_product_of_its_factors",
    ),
    Bug(
        "bench-text-unchecked",
        "KernelBench's unit tests of its own judge: a run that computes nothing is the fastest",
        "suites.benchmarks.steady.Steady.text",
        lambda _: lambda running: running.said if hasattr(running, "said") else running.session.state.output.cpu(),
        f"{MEASURED}::test_a_visit_says_what_was_said_untimed",
    ),
    Bug(
        "bench-prompt-timed",
        "gpt-fast generate.py: tokens/s over the whole call, the prompt's own pass among it",
        "suites.benchmarks.baselines.Stamps.steps",
        lambda steps: property(lambda stamps: tuple(b - a for a, b in zip(stamps.at, stamps.at[1:], strict=False))),
        f"{MEASURED}::test_the_first_word_of_transformers_is_no_decode_step",
    ),
    Bug(
        "bench-red-gate",
        "a speed of something that computes something else",
        "suites.benchmarks.measure.gate_of",
        lambda _: lambda shape, claims: "passed",
        f"{MEASURED}::test_no_speed_is_measured_of_a_shape_whose_claims_are_not_green",
    ),
)
