"""Claim: acceptance length counts the target's own token once, and no truncated step.

Born of two engines that count differently (SGLang's accept_lens includes the bonus token, its num_correct_drafts does
not) and of conditional rates published as unconditional ones.
"""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness import strategies
from harness.acceptance import count, emitted

pytestmark = pytest.mark.correctness


def test_a_step_emits_what_it_accepted_and_one_more():
    assert [emitted(a) for a in (0, 1, 3)] == [1, 2, 4]
    assert count([[0, 0], [0]], 3).length == 1.0
    assert count([[3, 3]], 3).length == 4.0


def test_counts_of_a_run_written_out_by_hand():
    found = count([[2, 0], [1, 2]], 2)

    assert (found.length, found.rate) == (9 / 4, 5 / 8)
    assert found.unconditional == (3 / 4, 2 / 4)
    assert found.conditional == (3 / 4, 2 / 3)
    assert found.histogram == (1, 1, 2)
    assert found.per_sequence == ((4, 2), (5, 2))


@given(strategies.acceptance_patterns())
def test_length_is_one_more_than_the_sum_of_unconditional_rates(spec):
    found = count(spec.rows, spec.num_draft_tokens)

    assert found.length == pytest.approx(1 + sum(found.unconditional))
    assert found.rate == pytest.approx((found.length - 1) / spec.num_draft_tokens)


@given(strategies.acceptance_patterns())
def test_conditional_rates_multiply_to_unconditional_ones(spec):
    found = count(spec.rows, spec.num_draft_tokens)

    product = 1.0
    for conditional, unconditional in zip(found.conditional, found.unconditional, strict=True):
        product *= conditional or 0.0
        assert product == pytest.approx(unconditional)


@given(strategies.acceptance_patterns(), st.data())
def test_a_truncated_last_step_takes_time_but_does_not_count(spec, data):
    # a step that accepted something can be cut: its last tokens did not fit
    rows = [(*row, 1) for row in spec.rows]
    full = [1 + sum(emitted(a) for a in row) for row in rows]
    cut = [data.draw(st.booleans()) for _ in rows]
    num_emitted = [n - c for n, c in zip(full, cut, strict=True)]

    found = count(rows, spec.num_draft_tokens, num_emitted=num_emitted)
    kept = count([row[:-1] if c else row for row, c in zip(rows, cut, strict=True)], spec.num_draft_tokens)

    assert found.steps_run == sum(map(len, rows))
    assert (found.steps, found.length, found.histogram) == (kept.steps, kept.length, kept.histogram)


def test_steps_are_sorted_by_the_output_position_they_began_at():
    found = count([[2, 0, 2, 2]], 2, bucket=4)

    # the steps begin at output positions 1, 4, 5 and 8
    assert [(b.first, b.last, b.steps, b.length) for b in found.by_output_position] == [
        (0, 3, 1, 3.0),
        (4, 7, 2, 2.0),
        (8, 11, 1, 3.0),
    ]


def test_a_mean_over_nothing_is_none():
    assert count([[]], 2).length is None
    assert count([[2]], 2, num_emitted=[3]).length is None
    assert count([[0, 0]], 1).conditional == (0.0,)
    assert count([[0, 0]], 2).conditional == (0.0, None)
    assert count([[0]], 0).rate is None


@pytest.mark.parametrize(
    ("accepted", "num_emitted", "message"),
    [
        ([[3]], None, "accepted 3 of 2"),
        ([[-1]], None, "accepted -1 of 2"),
        ([[1]], [4], "give 3 tokens, not 4"),
        ([[1, 1]], [3], "before the last of 2 steps"),
        ([[1]], [3, 3], "1 sequences, but num_emitted of 2"),
    ],
)
def test_impossible_counts_are_refused(accepted, num_emitted, message):
    with pytest.raises(ValueError, match=message):
        count(accepted, 2, num_emitted=num_emitted)
