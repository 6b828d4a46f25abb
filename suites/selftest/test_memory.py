"""What a rank would hold of a published size, told without holding it."""

import pytest

from suites.catalog import PAIRS
from suites.commands.memory import RANKS, held, published
from suites.families.llama import PUBLISHED
from suites.shells import count_parameters, without_memory

pytestmark = pytest.mark.correctness

LLAMA = PAIRS["llama"].read_config(PUBLISHED["Llama-3.1-8B"])


def test_one_rank_holds_two_bytes_a_parameter() -> None:
    with without_memory():
        parameters = count_parameters(PAIRS["llama"].reference(LLAMA))

    assert parameters == 8_030_261_248
    assert held(PAIRS["llama"], LLAMA, 1) == 2 * parameters


def test_ranks_share_all_but_what_is_replicated() -> None:
    whole, *shares = (held(PAIRS["llama"], LLAMA, ranks) for ranks in RANKS)
    replicated = 2 * 65 * LLAMA.hidden  # the norms, in bfloat16

    assert shares == [(whole - replicated) // ranks + replicated for ranks in RANKS[1:]]


def test_ranks_that_do_not_divide_the_heads_hold_nothing() -> None:
    assert held(PAIRS["llama"], LLAMA, 3) is None


def test_every_family_with_a_twin_has_a_published_size() -> None:
    sizes = {pair.name for _, pair, _ in published()}

    assert {pair.name for pair in PAIRS.values() if pair.kind == "target"} <= sizes
