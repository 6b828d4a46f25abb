"""Claim: a layer is few kernels, and nothing but kernels: what a captured cycle costs beside the bytes it reads.

A node of a CUDA graph costs more than a microsecond, so sparse models are bound by their number of launches. Two
counts of one pass: entries of the op table that the pages call, and kernels that the launcher is asked for, at
published sizes on a machine without a GPU; interpreted, tiny models launch what was counted. transformers launches 40
kernels a Llama layer, 84 to 86 a Gemma's, 77 a Qwen3-MoE's and 89 a DeepSeek's.

Born of a sum of shared experts and a cast of a router's input that were library calls between two kernels.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from harness.pairs import Pair
from harness.record import Case, Sample
from optimized.ops.tiles import ROUTER_BYTES
from suites.catalog import open_target
from suites.commands.memory import published
from suites.draws import folders, variant
from suites.families.deepseek import LITE, SIGMOID
from suites.families.qwen3_moe import RAW
from suites.launches import Launches, counted, launches, step

pytestmark = pytest.mark.correctness

# Kimi's layers are DeepSeek V3's, many times
SIZES = {(pair.name, size): (pair, keys) for size, pair, keys in published() if pair.name != "kimi_k25"}
EVERY = pytest.mark.parametrize(("pair", "size"), SIZES)
KERNELS = {"attend": 2, "attend_latent": 2, "experts": 2, "head_argmax": 2}
"""of the entries that are more than one kernel"""
MOST = {"llama": 9, "gemma3": 9, "gemma3_mm": 9, "gemma4": 9, "gemma4_mm": 9, "gemma4_unified": 9, "qwen3_moe": 10}
MOST["deepseek"] = 12
STATED = {"gemma-4-E2B": 13, "gemma-4-E4B": 13, "gemma-4-26B-A4B": 16}
"""inputs of their own for every layer, and experts beside a dense block"""
LARGE_ROUTERS = ("DeepSeek-V2", "DeepSeek-V3")
"""of more than a megabyte: reading one from a single SM would take longer than the launch that it saves"""


def limit(pair: str, size: str) -> int:
    """Kernels a layer."""
    return STATED.get(size, MOST[pair] + (size in LARGE_ROUTERS))


def entered(names: list[str], large: bool) -> int:
    """How many kernels these entries of the op table are."""
    return sum(KERNELS.get(name, 1) + (large and name.startswith("route_")) for name in names)


@EVERY
def test_a_layer_is_few_kernels_and_nothing_else(pair: str, size: str, keep: Callable[..., None]) -> None:
    found = launches(*SIZES[pair, size])

    for layer in found.layers:
        assert [launch.kernel for launch in layer.launches if not launch.module] == []
        assert len(layer.launches) == entered(layer.entries, size in LARGE_ROUTERS)
        assert len(layer.launches) <= limit(pair, size)
    case = Case(pair=pair, gate="passed", form="triton", dtype="bfloat16", device="meta", variant=size)
    counts = tuple(float(len(layer.launches)) for layer in found.layers)
    keep(Sample(case=case, metric="launches_per_layer", unit="launches", better="down", values=counts))


def test_large_routers_are_those_of_more_than_a_megabyte() -> None:
    large = set()
    for (_, size), (pair, keys) in SIZES.items():
        text = getattr(pair.read_config(keys), "text", pair.read_config(keys))
        if (getattr(text, "experts", None) or 0) * text.hidden * 2 > ROUTER_BYTES:
            large.add(size)

    assert large == set(LARGE_ROUTERS)


TINY = {
    "deepseek": variant(LITE, 3, num_hidden_layers=2, first_k_dense_replace=1),
    "deepseek, queries with a latent": variant(SIGMOID, 3, num_hidden_layers=1, first_k_dense_replace=0),
    "qwen3_moe": variant(RAW, 3, num_hidden_layers=1),
}


def all_of(found: Launches) -> list[str]:
    """Kernels below the head."""
    return [launch.kernel for part in (*(x.launches for x in found.layers), found.around) for launch in part]


@pytest.mark.parametrize("name", TINY)
def test_interpreted_kernels_are_those_that_were_counted(name: str) -> None:
    drawn, device = TINY[name], "cuda" if torch.cuda.is_available() else "cpu"
    with folders(drawn) as (path, _):
        target = open_target(path, side="optimized", form="triton", device=device)
    module: Any = target.module

    with counted() as names:
        module.states(*step(device), module.new_cache(1, 31))

    pair: Pair = target.pair
    assert sorted(names) == sorted(n for n in all_of(launches(pair, drawn.keys)) if n.endswith("_kernel"))
