"""Bugs of counting and of statistics: numbers that look right, and verdicts that nothing supports."""

from dataclasses import replace
from typing import Any

import numpy as np

from harness.planting import Bug

STATISTICS = "suites/selftest/test_statistics.py"
VERDICTS = "suites/selftest/test_regressions.py"
STORE = "suites/selftest/test_store.py"
HISTORY = "suites/selftest/test_history.py"


def pooled(timed: Any) -> Any:
    """Every call its own process."""

    def wrong(*args: Any) -> Any:
        return {
            key: one._replace(
                processes={(*name, i): [v] for name, values in one.processes.items() for i, v in enumerate(values)},
                rigs={(*name, i): one.rigs[name] for name, values in one.processes.items() for i in range(len(values))},
            )
            for key, one in timed(*args).items()
        }

    return wrong


def unequal(decide: Any) -> Any:
    """More is better, whatever the metric says."""
    return lambda found, e, q, alpha: decide(found._replace(better="up"), e, q, alpha)._replace(series=found)


def satisfied(decide: Any) -> Any:
    """No evidence of a change taken for evidence of none."""

    def wrong(found: Any, e: Any, q: float, alpha: float) -> Any:
        one = decide(found, e, q, alpha)
        return one._replace(verdict="SAME") if one.verdict == "UNCLEAR" and q > alpha and not e.enough else one

    return wrong


def one_sided(decide: Any) -> Any:
    """One of the two one-sided tests, the one that looks for a gain."""
    return lambda found, e, q, alpha: decide(found, e._replace(inner=(0.0, e.inner[1])), q, alpha)


def mixed(permutation_p: Any) -> Any:
    """Labels dealt across all strata, each still about its own mean."""

    def wrong(logs: Any, layout: Any, *args: Any, **kwargs: Any) -> Any:
        return permutation_p(logs, layout._replace(stratum=(0,) * len(layout.stratum)), *args, **kwargs)

    return wrong


def by_place(reached: Any) -> Any:
    """The n-th prompt of one side against the n-th of the other."""

    def wrong(arm: Any, names: list[str]) -> Any:
        own = [name for name in arm.steps if name in names]
        return reached(arm, own)

    return wrong


def mean_of_ratios(ratio_interval: Any) -> Any:
    """Every prompt weighs the same, however many steps it took."""

    def wrong(numerators: Any, denominators: Any) -> Any:
        ratios = np.asarray(numerators, float) / np.asarray(denominators, float)
        return ratio_interval(ratios, np.ones(len(ratios)))

    return wrong


def one_by_one(positions: Any) -> Any:
    """Each position against its own distribution, as if it were the only one."""

    def wrong(old: Any, new: Any, draws: Any) -> Any:
        columns = [np.r_[0, i] for i in range(1, old.shape[1])]
        return tuple(positions(old[:, c], new[:, c], draws[:, c[1] - 1 : c[1]])[0] for c in columns)

    return wrong


def untold(certify: Any) -> Any:
    """A certificate that never looks at what could have been seen."""
    return lambda family, found, gates: certify(family, [replace(v, visible=0.0) for v in found], gates)


BUGS = (
    Bug(
        "statistics-calls-as-processes",
        'newton #2534: two states of a start-up, 11 to 14 % "regressions" between runs of one program',
        "reports.sides.timed",
        pooled,
        f"{VERDICTS}::test_the_unit_is_the_process_and_not_the_call",
    ),
    Bug(
        "statistics-more-is-always-better",
        "TensorRT-LLM perf_regression.py lists time per output token under larger is better",
        "reports.regressions.decide",
        unequal,
        f"{VERDICTS}::test_the_verdict_of_one_look",
    ),
    Bug(
        "statistics-unclear-is-same",
        "a test that is not significant read as no change",
        "reports.regressions.decide",
        satisfied,
        f"{VERDICTS}::test_the_verdict_of_one_look",
    ),
    Bug(
        "statistics-one-of-two-one-sided-tests",
        "equivalence claimed from an upper bound alone",
        "reports.regressions.decide",
        one_sided,
        f"{VERDICTS}::test_the_verdict_of_one_look",
    ),
    Bug(
        "statistics-worse-at-first-sight",
        "react_on_rails #3169: 42 to 72 alerts a run, no two runs alike",
        "reports.regressions.settle",
        lambda _: lambda first, second: list(first),
        f"{VERDICTS}::test_worse_is_said_when_fresh_processes_say_it_again",
    ),
    Bug(
        "statistics-strata-mixed",
        "fast_mail_parser #128: 0.3 % within a job and 26 % between jobs",
        "reports.noise.permutation_p",
        mixed,
        f"{VERDICTS}::test_labels_are_dealt_inside_a_stratum",
    ),
    Bug(
        "statistics-p-of-zero",
        "a permutation test that forgets the order it saw (Phipson and Smyth 2010)",
        "reports.noise._share",
        lambda share: lambda centred, layout, deals, own: share(centred, layout, deals, 0),
        f"{VERDICTS}::test_no_p_is_smaller_than_what_was_tried",
    ),
    Bug(
        "statistics-effect-upside-down",
        "baseline over candidate",
        "reports.noise.effect",
        lambda effect: lambda logs, layout: -effect(logs, layout),
        f"{VERDICTS}::test_an_effect_is_candidate_over_baseline_with_what_could_be_seen",
    ),
    Bug(
        "statistics-throttled-counts",
        "flashinfer-bench records no clocks: a throttled run is a regression",
        "reports.sides._fault",
        lambda _: lambda was, now, gate: "",
        f"{VERDICTS}::test_what_cannot_be_compared_is_invalid",
    ),
    Bug(
        "statistics-prompts-paired-by-place",
        "Spec-Bench equal.py compares answers with zip",
        "reports.paired._reached",
        by_place,
        f"{VERDICTS}::test_prompts_are_paired_by_name",
    ),
    Bug(
        "statistics-positions-one-by-one",
        "K positions tested at 5 % each",
        "reports.paired.positions",
        one_by_one,
        f"{VERDICTS}::test_positions_err_together_as_often_as_one",
    ),
    Bug(
        "statistics-no-correction",
        "500 metrics tested at 1 % each: five alarms on a quiet night",
        "reports.statistics.benjamini_hochberg",
        lambda _: lambda p: list(p),
        f"{STATISTICS}::test_benjamini_hochberg_gives_the_textbook_q_values",
    ),
    Bug(
        "statistics-mean-of-ratios",
        "acceptance length averaged over prompts, so that a short answer weighs as much as a long one",
        "reports.statistics.ratio_interval",
        mean_of_ratios,
        f"{STATISTICS}::test_acceptance_length_counts_the_target_token_and_weighs_steps",
    ),
    Bug(
        "statistics-cut-step-counted",
        "SGLang #34145: a ratio falls because generation stopped earlier",
        "reports.history.complete_steps",
        lambda _: lambda accepted, truncated: tuple(accepted),
        f"{HISTORY}::test_a_night_is_the_median_of_its_processes",
    ),
    Bug(
        "statistics-visits-as-processes",
        "a process that was visited twice counted twice",
        "reports.history._timed",
        lambda timed: lambda table, pair, metric: timed(table.assign(process=range(len(table))), pair, metric),
        f"{HISTORY}::test_a_night_is_the_median_of_its_processes",
    ),
    Bug(
        "statistics-dirty-baseline",
        "a baseline that nobody can check out again",
        "reports.baselines._is_clean",
        lambda _: lambda run: True,
        f"{HISTORY}::test_a_flawed_run_is_refused_and_nothing_is_written",
    ),
    Bug(
        "statistics-blind-certificate",
        "a noise run that passes because nothing moved, on a machine where nothing could be seen to move",
        "reports.baselines._certificate",
        untold,
        f"{HISTORY}::test_a_certificate_fails_where_something_moved_or_nothing_could_be_seen",
    ),
    Bug(
        "records-torn-line-left-open",
        "a line that grows out of a killed writer's piece and a living writer's record",
        "harness.lines.Lines._closing",
        lambda _: lambda self: "",
        f"{STORE}::test_a_piece_of_a_line_spoils_nobody_elses",
    ),
)
