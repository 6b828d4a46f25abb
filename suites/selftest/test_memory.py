"""What a rank would hold of a published size, told without holding it."""

from typing import Any

import pytest
from torch import nn

from suites.catalog import PAIRS
from suites.commands.memory import RANKS, held, published
from suites.families import gemma3
from suites.families.llama import PUBLISHED
from suites.shells import count_parameters, towers_of, without_memory

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


@pytest.mark.parametrize("ranks", [1, 8])
def test_towers_are_whole_on_every_rank(ranks: int) -> None:
    pair, config = PAIRS["gemma3_mm"], PAIRS["gemma3_mm"].read_config(gemma3.PUBLISHED["gemma-3-4b"])
    with without_memory():
        whole, text = count_parameters(pair.reference(config)), count_parameters(PAIRS["gemma3"].reference(config.text))

    towers = 2 * count_parameters(towers_of(pair, config))

    assert towers == 2 * (whole - text)
    assert held(pair, config, ranks) == held(PAIRS["gemma3"], config.text, ranks) + towers


def test_ranks_that_do_not_divide_the_heads_hold_nothing() -> None:
    assert held(PAIRS["llama"], LLAMA, 3) is None


def test_every_family_with_a_twin_has_a_published_size() -> None:
    sizes = {pair.name for _, pair, _ in published()}

    assert {pair.name for pair in PAIRS.values() if pair.kind == "target"} <= sizes


BILLIONS = {
    "Llama-3.1-8B": 8.03,
    "gemma-3-1b": 1.00,
    "gemma-3-4b": 4.30,
    "gemma-3-12b": 12.2,
    "gemma-3-27b": 27.4,
    "gemma-4-E2B": 5.1,
    "gemma-4-E4B": 8.0,
    "gemma-4-12B": 11.95,
    "gemma-4-26B-A4B": 25.2 + 0.55,
    "gemma-4-31B": 30.7 + 0.55,
    "Qwen3-30B-A3B": 30.5,
    "DeepSeek-V2-Lite": 15.7,
    "DeepSeek-V2": 236,
    "DeepSeek-V3": 671,
}
"""parameters as model cards, papers and the hub's own counts of safetensors give them; Gemma 4 counts towers apart"""
TEXTS = {"gemma-3-12b": 11.77, "gemma-4-26B-A4B": 25.2, "gemma-4-31B": 30.7}
"""of the text model alone, where the card counts it"""


def whole(size: str) -> Any:
    """The reference of a published size, with all its towers."""
    # a size with towers is published once more as its text model
    pair, keys = [(pair, keys) for name, pair, keys in published() if name == size][-1]
    config = pair.read_config(keys)
    with without_memory():
        return pair.reference(config)


def billions(module: nn.Module) -> float:
    return count_parameters(module) / 1e9


@pytest.mark.parametrize("size", BILLIONS)
def test_a_published_size_has_its_published_total(size: str) -> None:
    assert billions(whole(size)) == pytest.approx(BILLIONS[size], rel=0.01)


@pytest.mark.parametrize("size", TEXTS)
def test_the_text_model_within_has_its_published_total(size: str) -> None:
    assert billions(whole(size).language_model) == pytest.approx(TEXTS[size], rel=0.01)


def test_every_published_size_has_a_total() -> None:
    # a trillion is all that is said of Kimi K2.5
    assert {size for size, _, _ in published()} == {*BILLIONS, "Kimi-K2.5"}


def test_the_large_vision_tower_has_the_numbers_that_were_cut_out_of_it() -> None:
    tower = whole("gemma-4-31B").vision_tower

    # with what standardizes: the count that rnagabh/gemma4-vision-encoder states of google/gemma-4-31B-it
    assert count_parameters(tower) + sum(buffer.numel() for buffer in tower.buffers()) == 569_550_384
