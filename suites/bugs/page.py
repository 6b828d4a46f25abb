"""Bugs of the page: numbers and colours that read well and say something else than the record."""

from dataclasses import replace
from itertools import count
from typing import Any

from harness.planting import Bug

PAGE = "suites/selftest/test_page.py"
SECTIONS = "suites/selftest/test_page_sections.py"
KERNELS = "suites/selftest/test_page_kernels.py"
REPORT = "suites/selftest/test_report.py"
SERIAL = count()


def inverted(cell: Any) -> Any:
    """The share that is left in the place of the share that was used."""

    def wrong(checks: Any) -> Any:
        found = cell(checks)
        return found and found._replace(heat=1.0 - found.heat)

    return wrong


def skips_pass(cell: Any) -> Any:
    """A check that did not run, shown as one that passed."""
    return lambda checks: cell([replace(c, status="passed") if c.status == "skipped" else c for c in checks])


def quiet_ledger(skips: Any) -> Any:
    """What was skipped is owed by nobody."""
    return lambda records: []


def neighbour(build: Any) -> Any:
    """Each verdict with the interval of the one before it."""

    def wrong(found: Any) -> Any:
        kept = build(found)
        before = [kept[-1], *kept[:-1]]
        return [replace(v, low=b.low, high=b.high) for v, b in zip(kept, before, strict=True)]

    return wrong


def serial(inline: Any) -> Any:
    """Ids that count up for as long as the process lives."""
    return lambda svg, name, alt: inline(svg, f"{name}-{next(SERIAL)}", alt)


def any_machine(machine: Any) -> Any:
    """A green run of one machine hides a red one of another."""
    return lambda run: ()


def own_replay(replay: Any) -> Any:
    """The claim's line, though the failing example was kept."""
    return lambda check: check.replay


def never_differs(line: Any) -> Any:
    """Runs of two drivers that look like one."""
    return lambda name, values: ""


def gains_first(ranked: Any) -> Any:
    """The best night in front."""
    return lambda *args: ranked(*args)[::-1]


def no_spills(sentence: Any) -> Any:
    """Every kernel is said to fit its registers."""
    return lambda compiled: sentence({name: {**of, "spills": 0.0} for name, of in compiled.items()})


def unclear_is_red(legal: Any) -> Any:
    """No evidence told to a CI server as a regression."""
    return "failure"


def loud(text: Any) -> Any:
    """Words as others wrote them."""
    return lambda words: words


BUGS: tuple[Bug, ...] = (
    Bug("page: heat is the share that is left", "seeded", "reports.sections.claims._cell", inverted,
        f"{SECTIONS}::test_a_heat_is_the_largest_share_and_a_skip_is_no_pass"),
    Bug("page: a skip counts as a pass", "vLLM #41281", "reports.sections.claims._cell", skips_pass,
        f"{SECTIONS}::test_a_heat_is_the_largest_share_and_a_skip_is_no_pass"),
    Bug("page: skips are left out of what did not run", "seeded", "reports.sections.ledger._skips", quiet_ledger,
        f"{SECTIONS}::test_a_night_tells_its_steps_and_since_when_a_claim_is_owed"),
    Bug("page: the interval of another metric", "seeded", "reports.sections.compared.ordered", neighbour,
        f"{SECTIONS}::test_verdicts_come_gravest_first_with_their_own_intervals"),
    Bug("page: ids count up between renderings", "seeded", "reports.drawing._inline", serial,
        f"{PAGE}::test_the_same_record_gives_the_same_bytes"),
    Bug("page: green on one machine hides red on another", "seeded", "reports.newest.machine", any_machine,
        f"{SECTIONS}::test_a_later_run_replaces_the_same_question_on_the_same_machine_alone"),
    Bug("page: the replay line forgets the counterexample", "seeded", "reports.sections.failures.replay", own_replay,
        f"{SECTIONS}::test_a_failure_card_holds_example_explanation_ladder_and_replay"),
    Bug("page: two drivers compared without a word", "seeded", "reports.sections.comparable._line", never_differs,
        f"{SECTIONS}::test_conditions_are_compared_where_runs_asked_the_same"),
    Bug("page: the history puts gains first", "seeded", "reports.sections.history.ranked", gains_first,
        f"{SECTIONS}::test_history_ranks_losses_in_units_of_the_nights_own_spread"),
    Bug("page: a kernel that spills is told as sound", "seeded", "reports.sections.kernels.compiled_sentence",
        no_spills, f"{KERNELS}::test_a_spill_is_named_and_half_a_configuration_is_none"),
    Bug("junit: UNCLEAR is a failure", "seeded", "reports.junit.DECIDED['UNCLEAR']", unclear_is_red,
        f"{REPORT}::test_every_check_is_one_case_with_its_outcome_and_reason"),
    Bug("markdown: words go in as they are", "seeded", "reports.markdown._text", loud,
        f"{REPORT}::test_a_pull_request_is_told_verdict_regressions_and_what_did_not_run"),
)  # fmt: skip
