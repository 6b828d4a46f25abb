"""Claim: estimates are what their definitions say, and an interval holds the truth about 95 times in 100."""

import numpy as np
import pytest

from reports import statistics
from reports.statistics import Arm, Interval

pytestmark = pytest.mark.correctness

TOY = Arm(2, {"a": (2, 0, 1), "b": (2, 2)})


@pytest.fixture
def few_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    """Coverage is a mean over many intervals, each of which may be coarse."""
    monkeypatch.setattr(statistics, "RESAMPLES", 500)


def answers(rng: np.random.Generator, prompts: int, rate: float, steps: int = 30) -> Arm:
    """Prompts that differ in how predictable they are: each draft is accepted with the prompt's own rate."""
    own = rng.beta(8 * rate, 8 * (1 - rate), prompts)
    accepted = np.cumprod(rng.random((prompts, steps, 3)) < own[:, None, None], axis=-1).sum(-1)
    lengths = rng.integers(steps // 2, steps + 1, prompts)
    return Arm(3, {str(i): tuple(accepted[i, : lengths[i]].tolist()) for i in range(prompts)})


def true_length(rate: float) -> float:
    """1 + E[q + q^2 + q^3] for q ~ Beta(8 rate, 8 (1 - rate)), from the moments of that law."""
    moments = np.cumprod([(8 * rate + i) / (8 + i) for i in range(3)])
    return 1 + float(moments.sum())


def covered(intervals: list[Interval], truth: float) -> float:
    return float(np.mean([i.low <= truth <= i.high for i in intervals]))


def test_acceptance_length_counts_the_target_token_and_weighs_steps() -> None:
    found = statistics.acceptance_length(TOY)

    assert found.value == pytest.approx(1 + 7 / 5)
    assert found.low <= found.value <= found.high
    assert found.units == 2


def test_a_cut_step_is_left_out() -> None:
    assert statistics.complete_steps((3, 1, 0), truncated=True) == (3, 1)
    assert statistics.complete_steps((3, 1, 0), truncated=False) == (3, 1, 0)


def test_rates_follow_their_definitions() -> None:
    (first, first_given), (second, second_given) = statistics.rates(TOY)

    assert first.value == first_given.value == pytest.approx(4 / 5)
    assert second.value == pytest.approx(3 / 5)
    assert second_given.value == pytest.approx(3 / 4)
    assert statistics.histogram(TOY) == [1, 1, 3]
    # the length is one more than the sum of the unconditional rates
    assert 1 + first.value + second.value == pytest.approx(statistics.acceptance_length(TOY).value)


def test_steps_fall_into_the_bucket_where_they_begin() -> None:
    found = statistics.length_by_position(Arm(2, {"a": (2, 0, 1), "b": (1, 1)}), bucket=4)

    # a begins its steps at tokens 1, 4, 5; b at 1, 3
    assert {first: i.value for first, i in found.items()} == pytest.approx({0: 1 + 4 / 3, 4: 1 + 1 / 2})


@pytest.mark.parametrize("arm", [Arm(2, {}), Arm(2, {"a": ()})])
def test_nothing_gives_nothing(arm: Arm) -> None:
    assert not statistics.acceptance_length(arm).known
    assert statistics.histogram(arm) == [0, 0, 0]
    assert statistics.length_by_position(arm) == {}
    assert [a.known for pair in statistics.rates(arm) for a in pair] == [False] * 4


def test_one_prompt_has_a_value_and_no_interval() -> None:
    found = statistics.acceptance_length(Arm(2, {"a": (1, 2)}))

    assert found.value == 2.5
    assert not found.known


def test_equal_prompts_leave_no_doubt() -> None:
    found = statistics.acceptance_length(Arm(3, {str(i): (3, 3) for i in range(9)}))

    assert (found.value, found.low, found.high) == (4, 4, 4)


@pytest.mark.usefixtures("few_resamples")
@pytest.mark.parametrize("prompts", [12, 60])
def test_the_interval_of_an_acceptance_length_holds_the_truth(prompts: int) -> None:
    rng = np.random.default_rng(1)

    found = [statistics.acceptance_length(answers(rng, prompts, 0.7)) for _ in range(400)]

    # binomial error of the estimate itself: 0.011
    assert 0.92 <= covered(found, true_length(0.7)) <= 0.975


@pytest.mark.usefixtures("few_resamples")
def test_the_interval_of_a_paired_difference_holds_the_truth_and_gains_from_pairing() -> None:
    rng = np.random.default_rng(2)
    found, lengths = [], []
    for _ in range(300):
        baseline = answers(rng, 40, 0.7)
        # the candidate loses every sixth draft, on the same prompts
        steps = {n: tuple(int(a) * int(rng.random() > 1 / 6) for a in s) for n, s in baseline.steps.items()}
        found.append(statistics.acceptance_difference(baseline, Arm(3, steps)))
        lengths.append(statistics.acceptance_length(baseline))

    assert 0.92 <= covered(found, -(true_length(0.7) - 1) / 6) <= 0.975
    assert np.mean([i.high - i.low for i in found]) < 0.8 * np.mean([i.high - i.low for i in lengths])


def test_the_interval_of_a_speed_ratio_holds_the_truth_under_drift() -> None:
    rng, found = np.random.default_rng(3), []
    for _ in range(250):
        drift = np.exp(np.cumsum(rng.normal(0, 0.05, 20)))
        baseline = {b: drift[b] * np.exp(rng.normal(0, 0.02, 5)) for b in range(20)}
        candidate = {b: 1.25 * drift[b] * np.exp(rng.normal(0, 0.02, 5)) for b in range(20)}
        found.append(statistics.paired_ratio(baseline, candidate))

    assert 0.92 <= covered(found, 1.25) <= 0.985
    assert max(i.high / i.low for i in found) < 1.05


def test_a_ratio_pairs_blocks_by_number() -> None:
    found = statistics.paired_ratio({0: [1.0], 1: [10.0], 7: [3.0]}, {1: [20.0], 0: [2.0], 9: [1.0]})

    assert found == Interval(pytest.approx(2.0), pytest.approx(2.0), pytest.approx(2.0), 2)
    with pytest.raises(ValueError, match="above zero"):
        statistics.paired_ratio({0: [0.0]}, {0: [1.0]})


def test_separation_is_a_mean_over_its_standard_error() -> None:
    baseline = Arm(3, {"a": (1,), "b": (1, 1), "c": (2,)})
    candidate = Arm(3, {"a": (2,), "b": (2, 3), "c": (2,), "d": (0,)})

    # differences 1, 1.5, 0: mean 5/6, standard deviation sqrt(7/12)
    assert statistics.separation(baseline, candidate) == pytest.approx((5 / 6) / np.sqrt(7 / 12 / 3))
    assert statistics.separation(baseline, baseline) == 0.0
    assert np.isnan(statistics.separation(baseline, Arm(3, {})))


def test_separation_of_equal_drafts_is_about_one() -> None:
    rng = np.random.default_rng(4)

    found = [statistics.separation(answers(rng, 30, 0.6), answers(rng, 30, 0.6)) for _ in range(300)]

    assert np.std(found) == pytest.approx(1.0, abs=0.15)
    assert np.mean(found) == pytest.approx(0.0, abs=0.2)


@pytest.mark.parametrize("units", [8, 20])
def test_a_p_value_is_uniform_where_nothing_changed(units: int) -> None:
    rng = np.random.default_rng(5)

    found = [statistics.sign_flip_p(rng.normal(size=units), draws=999) for _ in range(400)]

    assert np.mean(np.array(found) <= 0.05) == pytest.approx(0.05, abs=0.03)
    assert statistics.sign_flip_p(np.ones(8)) == pytest.approx(2 / 2**8)
    assert statistics.sign_flip_p([]) == 1.0


def test_benjamini_hochberg_gives_the_textbook_q_values() -> None:
    assert statistics.benjamini_hochberg([0.01, 0.04, 0.03, 0.5]) == pytest.approx([0.04, 0.16 / 3, 0.16 / 3, 0.5])
    assert statistics.benjamini_hochberg([]) == []


def test_the_same_data_give_the_same_bits() -> None:
    arms = [answers(np.random.default_rng(6), 20, 0.5) for _ in range(2)]

    assert statistics.acceptance_length(arms[0]) == statistics.acceptance_length(arms[1])
