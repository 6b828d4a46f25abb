"""Claim: a comparison passes what rounding explains, and nothing else.

Born of tolerances typed into tests until they passed, and of NaN logits that compared as equal.
"""

import math

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from harness import compare, strategies
from harness.compare import MARGIN, MEASURED, C, Mismatch, bit_equal, budget, calibrate, first_divergence, hold

pytestmark = pytest.mark.correctness

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
SIZE = {"depth": 4, "width": 64}


def draw(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("dtype", DTYPES[1:])
@given(seed=strategies.seeds())
def test_rounding_passes_and_a_wrong_row_does_not(dtype, seed):
    want = draw(seed, 6, 8)

    assert 0 <= hold("x", want.to(dtype), want, **SIZE).used <= 1
    with pytest.raises(Mismatch, match=r"x: at \["):
        hold("x", want.roll(1, 0).to(dtype), want, **SIZE)


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_the_recorded_constants_hold_the_layers_they_were_measured_on(dtype):
    assert max(calibrate(dtype, depth, 64, seed) for depth in (1, 8) for seed in range(2)) <= MEASURED[dtype]
    assert C[dtype] == MARGIN * MEASURED[dtype]


@given(strategies.seeds(), st.integers(0, 47))
def test_the_budget_is_the_border(seed, place):
    want = draw(seed, 6, 8)
    scale = max(float(want.square().mean().sqrt()), float(want.flatten()[place].abs()))
    error = torch.zeros_like(want)
    error.view(-1)[place] = budget(torch.float32, 4, 64, scale)

    inside = hold("x", want + 0.9 * error, want, dtype=torch.float32, **SIZE)
    assert inside.worst == (place // 8, place % 8)
    assert inside.used == pytest.approx(0.9)
    with pytest.raises(Mismatch, match=rf"x: at \[{place // 8}, {place % 8}\] .* 1.1 times the budget, 1 of 48"):
        hold("x", want + 1.1 * error, want, dtype=torch.float32, **SIZE)


def test_a_budget_grows_with_the_root_of_depth_and_width():
    assert budget(torch.float32, 8, 512, 3.0) == pytest.approx(8 * budget(torch.float32, 1, 64, 3.0))
    assert budget(torch.bfloat16, 1, 1, 1.0) > budget(torch.float16, 1, 1, 1.0) > budget(torch.float32, 1, 1, 1.0)


def test_the_coarser_of_two_dtypes_is_judged():
    want = draw(0, 64)

    assert hold("x", want.bfloat16(), want.float(), **SIZE).used <= 1
    with pytest.raises(Mismatch, match=r"torch\.float32"):
        hold("x", want.bfloat16(), want, dtype=torch.float32, **SIZE)


@pytest.mark.parametrize("got", [math.nan, math.inf, -math.inf])
def test_nan_and_infinity_never_pass_for_a_number(got):
    want = torch.ones(3)
    with pytest.raises(Mismatch, match=r"at \[1\]"):
        hold("x", torch.tensor([1.0, got, 1.0]), want, **SIZE)
    with pytest.raises(Mismatch, match=r"at \[1\]"):
        hold("x", want, torch.tensor([1.0, got, 1.0]), **SIZE)


def test_nan_passes_for_nan_only_where_it_is_allowed():
    both = torch.tensor([1.0, math.nan])
    with pytest.raises(Mismatch):
        hold("x", both, both, **SIZE)

    assert hold("x", both, both, nan_equal=True, **SIZE).used == 0
    assert hold("x", torch.tensor([1.0, math.inf]), torch.tensor([1.0, math.inf]), **SIZE).used == 0
    with pytest.raises(Mismatch):
        hold("x", both, torch.tensor([math.nan, math.nan]), nan_equal=True, **SIZE)


def test_zeros_must_be_zeros():
    assert hold("x", torch.zeros(3), torch.zeros(3), **SIZE).used == 0
    with pytest.raises(Mismatch, match="inf times"):
        hold("x", torch.full((3,), 1e-30), torch.zeros(3), **SIZE)


def test_shapes_and_dtypes_without_a_budget_are_refused():
    with pytest.raises(Mismatch, match=r"x: shape \(3, 1\), wanted \(3,\)"):
        hold("x", torch.zeros(3, 1), torch.zeros(3), **SIZE)
    with pytest.raises(ValueError, match=r"torch\.int64; compare integers"):
        hold("x", torch.zeros(3).long(), torch.zeros(3), **SIZE)
    with pytest.raises(ValueError, match="depth and width"):
        budget(torch.float32, 0, 64, 1.0)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.int64, torch.int8, torch.bool])
@given(seed=strategies.seeds())
def test_a_move_is_held_to_its_bits(dtype, seed):
    want = draw(seed, 4, 5).mul(4).to(dtype)
    got = want.clone()
    bit_equal("x", got, want)
    bit_equal("x", got.T, want.T)
    bit_equal("x", got[:1, 0], want[:1, 0])

    got[2, 3] = 1 - got[2, 3].to(torch.float64)
    with pytest.raises(Mismatch, match=r"x: at \[2, 3\] .* 1 of 20 elements differ"):
        bit_equal("x", got, want)


def test_bits_tell_zeros_and_nans_apart():
    bit_equal("x", torch.tensor([math.nan, -0.0]), torch.tensor([math.nan, -0.0]))
    with pytest.raises(Mismatch, match="0x80000000"):
        bit_equal("x", torch.tensor([-0.0]), torch.tensor([0.0]))
    other = torch.tensor([0x7FC00001], dtype=torch.int32).view(torch.float32)
    with pytest.raises(Mismatch, match="0x7fc00001"):
        bit_equal("x", other, torch.tensor([math.nan]))
    with pytest.raises(Mismatch, match=r"dtype torch\.float64"):
        bit_equal("x", torch.zeros(1).double(), torch.zeros(1))
    with pytest.raises(Mismatch, match="shape"):
        bit_equal("x", torch.zeros(1, 1), torch.zeros(1))


@given(st.integers(0, 7), st.sampled_from([1e-9, 1e-2]))
@example(place=0, gap=1e-9)
def test_a_divergence_is_excused_only_where_two_logits_are_near(place, gap):
    a = torch.arange(8)
    logits = torch.nn.functional.one_hot(a, 10).double()
    b = a.clone()
    b[place] = 9
    logits[place, 9] = 1 - gap

    assert first_divergence(a, a, logits, **SIZE) is None
    found = first_divergence(a, b, logits, dtype=torch.float32, **SIZE)

    assert (found.position, found.token_a, found.token_b) == (place, place, 9)
    assert found.margin == pytest.approx(gap)
    assert found.excused == (gap < 1e-6)


def test_near_first_logits_do_not_excuse_a_third_token():
    logits = torch.tensor([[1.0, 1.0, 0.0]])
    assert first_divergence(torch.tensor([0]), torch.tensor([1]), logits, **SIZE).excused
    assert not first_divergence(torch.tensor([0]), torch.tensor([2]), logits, **SIZE).excused


def test_an_early_end_is_never_excused():
    logits = torch.zeros(2, 4)
    assert not first_divergence(torch.tensor([1, -1]), torch.tensor([1, 2]), logits, **SIZE).excused
    short = first_divergence(torch.tensor([1, 2]), torch.tensor([1]), logits, **SIZE)
    assert (short.position, short.token_b, short.excused) == (1, -1, False)


def test_the_log_keeps_the_largest_share_of_each_claim():
    compare.reset()
    want = draw(0, 64)
    far = hold("log", want.half(), want, **SIZE).used
    hold("log", want, want, dtype=torch.float16, **SIZE)

    claims = compare.log()
    compare.reset()

    claim = next(iter(claims))
    assert claim.endswith("test_compare.py::test_the_log_keeps_the_largest_share_of_each_claim")
    assert claims[claim]["log"] == far > 0
    assert compare.log() == {}
