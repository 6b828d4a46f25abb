"""Bugs of reading weights in eight bits."""

from typing import Any

import torch
from torch import Tensor

from harness.planting import Bug

CLAIMS = "suites/correctness/test_scales.py"
EACH = f"{CLAIMS}::test_each_number_is_multiplied_by_the_scale_of_its_block"
HOLDS = f"{CLAIMS}::test_a_target_in_eight_bits_holds_what_they_stand_for"
EXPAND = "harness.scales.BlockScales.expand"


def by_index(q: Tensor, scale: Tensor, down: Tensor, across: Tensor) -> Tensor:
    """Every weight times the scale at its row's and its column's index, the last one where there are no more."""
    rows, columns = (index.clamp(max=size - 1) for index, size in zip((down, across), scale.shape, strict=True))
    return q.float() * scale[rows][:, columns]


def lying(_: Any) -> Any:
    """Blocks laid on their side."""

    def expand(self: Any, q: Tensor, scale: Tensor) -> Tensor:
        return by_index(q, scale, torch.arange(len(q)) // self.columns, torch.arange(q.shape[1]) // self.rows)

    return expand


def counted(_: Any) -> Any:
    """Blocks of a size that makes all of them equal, the last one too."""

    def expand(self: Any, q: Tensor, scale: Tensor) -> Tensor:
        down, across = (-(-size // blocks) for size, blocks in zip(q.shape, scale.shape, strict=True))
        return by_index(q, scale, torch.arange(len(q)) // down, torch.arange(q.shape[1]) // across)

    return expand


BUGS = (
    Bug(
        "scales-left-out",
        "float8 copied into the weight as if it were the weight",
        EXPAND,
        lambda _: lambda self, q, scale: q.float(),
        HOLDS,
    ),
    Bug(
        "scales-divide",
        "`weight_scale_inv` taken at its word",
        EXPAND,
        lambda expand: lambda self, q, scale: expand(self, q, 1 / scale),
        HOLDS,
    ),
    Bug("scales-of-blocks-on-their-side", "rows and columns of a block swapped", EXPAND, lying, EACH),
    Bug(
        "scales-of-equal-blocks",
        "transformers 5.17 takes the size of a block from the number of blocks",
        EXPAND,
        counted,
        EACH,
    ),
)
