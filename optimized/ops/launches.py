"""What every launch of a kernel needs to know: the row bucket, the tiles, the tables of angles."""

from collections.abc import Mapping

import torch
import triton
from torch import Tensor
from torch.nn import functional as F

from optimized.ops.angles import Angles
from optimized.ops.aten import Aten
from optimized.ops.kernels.linear import linear_kernel
from optimized.ops.tiles import BUCKETS, ROUTER_BYTES, Choice, Key, KeyTile, Tile, bucket, frozen, tile

# beyond the largest bucket a step is a prefill, where cuBLAS is at home and the chain rule asks nothing
PREFILL_FROM = BUCKETS[-1] + 1


class Launches:
    """`tile`, `key_tile`, `router_bytes` and `choices` override the tables: for tests, and for who measures."""

    def __init__(
        self,
        num_rows: int = 16,
        tile: Tile | None = None,
        key_tile: KeyTile | None = None,
        router_bytes: int = ROUTER_BYTES,
        choices: Mapping[Key, Choice] | None = None,
    ) -> None:
        self.bucket = bucket(num_rows)
        self._tile, self._key_tile, self._router_bytes = tile, key_tile, router_bytes
        self._choices = frozen() if choices is None else choices
        self._prefill = Aten()
        self._angles = Angles()

    def _choice_of(self, num_out: int, weight: Tensor, products: int = 1) -> Choice:
        if self._tile is not None:
            return Choice(self._tile)
        size, num_in = weight.element_size(), weight.shape[1]
        choice = self._choices.get((size, num_out, num_in, self.bucket))
        return Choice(tile(num_out, num_in, self.bucket, size, products)) if choice is None else choice

    def _product(self, x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        """x [M, K], weight [N, K], bias [N] or None -> [M, N] of this dtype, which is x's or wider"""
        if x.shape[0] >= PREFILL_FROM:
            wide = (None if t is None else t.to(dtype) for t in (x, weight, bias))
            return self._prefill.linear(*wide)
        choice = self._choice_of(weight.shape[0], weight)
        if choice.library and dtype == x.dtype:
            return self._by_library(x, weight, bias)
        y, t = x.new_empty(x.shape[0], weight.shape[0], dtype=dtype), choice.tile
        grid = (triton.cdiv(weight.shape[0], t.block_n), triton.cdiv(x.shape[0], t.block_m))
        linear_kernel[grid](
            *(x, weight, bias, y, x.shape[0], *weight.shape),
            HAS_BIAS=bias is not None,
            **meta(t, x.shape[1]),
            **start(choice.early),
        )
        return y

    def _by_library(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """x [M, K], weight [N, K], bias [N] or None -> [M, N]; always as many rows a call as the bucket has"""
        rows = F.pad(x, (0, 0, 0, -x.shape[0] % self.bucket)).split(self.bucket)
        return torch.cat([F.linear(tile, weight, bias) for tile in rows])[: x.shape[0]]


def start(early: bool) -> dict[str, bool]:
    """Whether a kernel's programs may be resident before the kernel ahead has ended."""
    return {"EARLY": early} | ({"launch_pdl": True} if early else {})


def meta(t: Tile, num_in: int) -> dict[str, int | bool]:
    """What a product's kernel is told of its tile."""
    blocks = {"BLOCK_M": t.block_m, "BLOCK_N": t.block_n, "BLOCK_K": t.block_k}
    return blocks | {"STAGES": t.num_stages, "WHOLE": num_in % t.block_k == 0, "num_warps": t.num_warps}
