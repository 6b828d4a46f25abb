"""Claim: the floor of a shape counts every parameter that a step reads, once, and no key that it does not see.

Born of quoted shares of a bandwidth whose bytes nobody could repeat: gpt-fast multiplies all parameters, the looked-up
table among them, by tokens/s (generate.py), and a tied head is the table.
"""

import itertools

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from suites.benchmarks import roofline
from suites.benchmarks.roofline import Ceilings, Pass, Traffic, distinct
from suites.benchmarks.shapes import SHAPES, Built, Shape, build, small
from suites.shells import count_parameters, without_memory

pytestmark = pytest.mark.correctness

EVERYTHING = Pass(1, 10**9, 1)
"""so many rows that every row of a table and every expert is read"""
LLAMA, GEMMA3 = "Llama-3.1-8B-eagle3", "gemma-3-12b-eagle3"
BYTES = 2


def numbers_of_reference(shape: Shape) -> int:
    """Numbers of the reference's text model, as its modules hold them."""
    with without_memory():
        module = shape.pairs[0].reference(shape.configs[0])
    text = getattr(module, "language_model", module)
    return count_parameters(text) + sum(b.numel() for b in text.buffers() if b.is_floating_point())


def on_meta(name: str) -> Built:
    return build(SHAPES[name], "meta")


@pytest.mark.parametrize("name", SHAPES)
def test_a_pass_that_touches_everything_reads_every_parameter_once(name: str) -> None:
    shape = small(SHAPES[name])

    read = roofline.target_pass(build(shape, "meta"), EVERYTHING).weights

    assert read == BYTES * numbers_of_reference(shape)


def test_a_published_size_is_read_but_for_the_table_of_which_one_row_is() -> None:
    table = 128_256 * 4096
    layer = 4096 * (4096 + 2 * 1024) + 4096 * 4096 + 3 * 4096 * 14_336 + 2 * 4096

    step = roofline.target_pass(on_meta(LLAMA), Pass(1, 1, 2048))

    assert step.weights == BYTES * (32 * layer + 4096 + table + 4096)
    assert step.weights == BYTES * (numbers_of_reference(SHAPES[LLAMA]) - table + 4096)
    assert step.keys == 2048 * 32 * 2 * 8 * 128 * BYTES
    matrices = 32 * (layer - 2 * 4096) + table
    assert step.flops == pytest.approx(2 * matrices, rel=1e-4)


def test_a_sliding_layer_reads_the_keys_within_its_window() -> None:
    read = roofline.target_pass(on_meta(GEMMA3), Pass(3, 4, 2048)).keys

    slot = 2 * 8 * 256 * BYTES
    assert read == 3 * slot * (8 * 2048 + 40 * 1024)


def test_states_are_fused_once_a_cycle() -> None:
    _, first, *later = roofline.cycle(on_meta(LLAMA), 1, 3)

    # the fused projection, and the rows of three columns more
    assert first.weights - later[0].weights == BYTES * (3 * 4096 * 4096 + 3 * 4096)
    assert later[0] == later[1]


def test_a_head_that_a_draft_shares_is_read_in_every_step() -> None:
    built = on_meta("Qwen3-30B-A3B-mtp")

    step = roofline.draft_pass(built, Pass(1, 1, 2048), is_first=False)

    assert step.weights > BYTES * 151_936 * 2048
    assert step.weights < roofline.draft_pass(built, Pass(1, 4, 2048), is_first=True).weights


@given(experts=st.integers(1, 5), chosen=st.integers(1, 5), rows=st.integers(1, 3))
@example(experts=5, chosen=2, rows=2)
def test_expected_experts_are_the_mean_over_every_choice(experts: int, chosen: int, rows: int) -> None:
    ways = list(itertools.combinations(range(experts), min(chosen, experts)))
    choices = list(itertools.product(ways, repeat=rows))

    counted = sum(len(set().union(*choice)) for choice in choices) / len(choices)

    assert distinct(experts, min(chosen, experts), rows) == pytest.approx(counted)


def test_shared_experts_are_read_by_every_row() -> None:
    built = on_meta("DeepSeek-V2-Lite-eagle3-mla")

    few, many = (roofline.target_pass(built, Pass(1, rows, 1)).weights for rows in (1, 10**9))

    # 26 layers of 64 experts, of which one row reads 6; and the rest of the table
    expert = 3 * 2048 * 1408
    assert many - few == pytest.approx(BYTES * (26 * (64 - 6) * expert + (102_400 - 1) * 2048))


def test_the_larger_of_reading_and_computing_is_the_floor() -> None:
    ceilings = Ceilings(copy=10.0, read=99.0, matmul=1000.0)

    assert Traffic(15.0, 5.0, 100.0).floor(ceilings) == 2.0
    assert Traffic(15.0, 5.0, 5000.0).floor(ceilings) == 5.0
    assert roofline.floor((Traffic(10.0, 0.0, 0.0), Traffic(0.0, 0.0, 2000.0)), ceilings) == 3.0
