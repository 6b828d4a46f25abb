"""Bugs of searches, kills and nights: a culprit that is none, work lost or done twice, a lock that locks nothing."""

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from harness.planting import Bug

SEARCH = "suites/selftest/test_bisect.py"
DIFFERENCES = "suites/selftest/test_differences.py"
KILLED = "suites/selftest/test_killed.py"
NIGHT = "suites/selftest/test_nightly.py"


def failing(meaning: Any) -> Any:
    """Whatever does not end well is bad."""
    return lambda code: "bad" if code else "good"


def accused(judge: Any) -> Any:
    """A claim that could not even be asked has failed."""

    def wrong(outcome: Any, is_todays: bool) -> Any:
        answer, reason = judge(outcome, is_todays)
        return ("bad" if answer == "untestable" else answer), reason

    return staticmethod(wrong)


def certain(believe: Any) -> Any:
    """No answer is ever wrong: the first one that is decides for good."""

    def wrong(found: Any, good: Any, bad: Any) -> Any:
        belief = believe(found, good, bad)
        refuted = (found.bad & (good > 0)).any(axis=1) | (~found.bad & (bad > 0)).any(axis=1)
        kept = np.where(refuted, 0.0, found.prior)
        return belief._replace(posterior=kept / kept.sum()) if kept.any() else belief

    return wrong


def as_line(graph: Any) -> Any:
    """Every commit comes from the one above it in the log."""
    return lambda parents, *rest: graph([[i - 1] if i else [] for i in range(len(parents))], *rest)


def other_days(unseen_ends: Any) -> Any:
    """What was good and bad when it was reported still is."""
    return lambda asked, probes: []


def forgetful(opened: Any) -> Any:
    """A search that goes on begins anew."""

    def wrong(*args: Any) -> Any:
        asked, _, recorder = opened(*args)
        return asked, [], recorder

    return wrong


def greedy_half(smaller: Any) -> Any:
    """Stop at the first smaller set that is bad."""

    def wrong(answers: Any) -> Iterator[Any]:
        yield from list(smaller(answers))[:1]

    return wrong


def open_door(hold: Any) -> Any:
    """A note without a lock."""

    @contextlib.contextmanager
    def wrong(*args: Any, **kwargs: Any) -> Iterator[Any]:
        with contextlib.suppress(OSError), hold(*args, **kwargs) as held:
            yield held
            return
        yield None

    return wrong


def repeated(ended: Any) -> Any:
    """A night that goes on does everything again."""
    return lambda file, head: {}


def forgiven(debts: Any) -> Any:
    """A debt is as old as tonight."""
    return lambda records, tonight: [replace(debt, nights=1, last_run="", last="") for debt in debts(records, tonight)]


def hurried(append: Any) -> Any:
    """A line is told before it is written: it waits for the next one."""

    def wrong(self: Any, line: str) -> None:
        waiting = getattr(self, "waiting", None)
        if waiting is not None:
            append(self, waiting)
        self.waiting = line

    return wrong


def trusting(believed: Any) -> Any:
    """Claims that were held on other files are believed."""

    def wrong(folder: Any) -> Any:
        from harness.record import Check, read

        return [line for line in read(folder / "records.jsonl") if isinstance(line, Check)]

    return wrong


BUGS: tuple[Bug, ...] = (
    Bug("bisect: untestable is bad", "pybroker #287", "suites.selftest.test_bisect.meaning", failing,
        f"{SEARCH}::test_exit_codes_mean_what_git_says_they_mean"),
    Bug("bisect: unasked claim is bad", "tt-metal #49266", "suites.bisect.probing.Claim.judge", accused,
        f"{SEARCH}::test_a_claim_that_could_not_be_asked_is_no_answer"),
    Bug("bisect: answers are never wrong", "asv find", "suites.bisect.searching.believe", certain,
        f"{SEARCH}::test_sixty_four_commits_and_one_wrong_probe_in_twenty"),
    Bug("bisect: merges drawn as a line", "git bisect before 1.5", "suites.selftest.test_bisect.graph", as_line,
        f"{SEARCH}::test_a_history_with_merges_is_asked_as_it_is"),
    Bug("bisect: ends taken on trust", "pytorch/benchmark #2148", "suites.bisect.searching.unseen_ends", other_days,
        f"{SEARCH}::test_both_ends_are_measured_before_anything_else"),
    Bug("bisect: resume repeats probes", "a search that is killed", "suites.commands.bisect.opened", forgetful,
        f"{SEARCH}::test_a_search_that_was_killed_goes_on_and_repeats_no_probe"),
    Bug("bisect: first smaller set wins", "delta debugging", "suites.bisect.differences.smaller", greedy_half,
        f"{DIFFERENCES}::test_the_smallest_set_of_differences_is_found"),
    Bug("nightly: lock ignored", "flashinfer-bench tools/gpu-lock", "suites.selftest.test_nightly.hold", open_door,
        f"{NIGHT}::test_the_gpus_have_one_owner_at_a_time"),
    Bug("nightly: resume repeats steps", "a night that is killed", "suites.selftest.test_nightly.ended", repeated,
        f"{NIGHT}::test_a_night_that_was_killed_goes_on_and_repeats_no_step"),
    Bug("nightly: debts forgotten", "vLLM #41281", "suites.selftest.test_nightly.debts", forgiven,
        f"{NIGHT}::test_a_debt_says_since_when_a_claim_has_not_run"),
    Bug("nightly: gate of other files", "draftproof's own rule", "suites.commands.runs.believed", trusting,
        f"{NIGHT}::test_claims_are_believed_over_the_very_same_files_only"),
    Bug("record: a line waits for the next", "buffered writers", "harness.lines.Lines.append", hurried,
        f"{KILLED}::test_a_piece_that_a_kill_left_is_closed_by_the_next_writer"),
)  # fmt: skip
