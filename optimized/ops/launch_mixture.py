"""Mixtures of experts as Triton kernels. Signatures and shapes: `optimized/ops/table.py`."""

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from optimized.ops.kernels.experts import experts_down_kernel, experts_gate_up_kernel
from optimized.ops.kernels.routing import route_kernel, router_kernel
from optimized.ops.kinds import ACTIVATIONS, ROUTERS, choosable, one_of
from optimized.ops.launches import PREFILL_FROM, Launches
from optimized.ops.mixture import groupable
from optimized.ops.rows import wide_type
from optimized.ops.tiles import EXPERT_TILE, router_tile


class Choice(NamedTuple):
    """How a router chooses: what both of its operations tell its kernels."""

    groups: tuple[int, int]
    """how many there are, and how many of them are looked into"""
    num_chosen: int
    renormalise: bool
    scaling: float = 1.0
    sigmoid: bool = False
    num_shared: int = 0


class TritonMixture(Launches):
    """Routers and experts."""

    def route_softmax(
        self,
        x: Tensor,
        weight: Tensor,
        num_chosen: int,
        renormalise: bool,
        scale: Tensor | None = None,
        wide: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """x [M, H], weight [E, H], scale [E] or None -> [M, P], [M, P]"""
        how = Choice((1, 1), num_chosen, renormalise)
        return self._route(x, weight, None, scale, how, x.dtype, wide_type(x.dtype) if wide else x.dtype)

    def route_grouped(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        groups: int,
        top_groups: int,
        num_chosen: int,
        renormalise: bool,
        scaling: float,
        kind: str,
        num_shared: int = 0,
    ) -> tuple[Tensor, Tensor]:
        """x [M, H], weight [E, H], bias [E] or None -> [M, P+num_shared], [M, P+num_shared]"""
        sigmoid, dtype = one_of(kind, ROUTERS, "kind") == "sigmoid", wide_type(x.dtype)
        how = Choice((groups, top_groups), num_chosen, renormalise, scaling, sigmoid, num_shared)
        return self._route(x, weight, bias, None, how, dtype, dtype)

    def _route(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        scale: Tensor | None,
        how: Choice,
        scored: torch.dtype,
        written: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        """x [M, H], weight [E, H], bias, scale [E] or None -> [M, P+num_shared], [M, P+num_shared]

        scored   the dtype of scores
        written  the dtype of weights
        """
        num_rows, (num_experts, num_in), num_named = x.shape[0], weight.shape, how.num_chosen + how.num_shared
        size = choosable(num_experts, *how.groups, how.num_chosen)
        ids = torch.empty(num_rows, num_named, dtype=torch.int64, device=x.device)
        weights = torch.empty(num_rows, num_named, dtype=written, device=x.device)
        facts = {"SIGMOID": how.sigmoid, "HAS_BIAS": bias is not None, "HAS_SCALE": scale is not None}
        facts |= {"RENORMALISE": how.renormalise, "GROUPS": how.groups[0], "SIZE": size, "TOP_GROUPS": how.groups[1]}
        facts |= {"BLOCK_G": triton.next_power_of_2(how.groups[0]), "BLOCK_E": triton.next_power_of_2(size)}
        facts |= {"BLOCK_P": triton.next_power_of_2(num_named)}
        numbers = (how.num_chosen, how.num_shared, how.scaling)
        if num_rows < PREFILL_FROM and weight.nbytes <= self._router_bytes:
            t = router_tile(facts["BLOCK_G"] * facts["BLOCK_E"])
            blocks = {"BLOCK_K": t.block_k, "STAGES": t.num_stages, "num_warps": t.num_warps}
            router_kernel[(num_rows,)](
                *(x.contiguous(), weight, bias, scale, ids, weights, num_in, *numbers),
                ROUNDED=scored == x.dtype,
                WHOLE=num_in % t.block_k == 0,
                **facts,
                **blocks,
            )
        else:
            scores = self._product(x, weight, None, scored)
            route_kernel[(num_rows,)](scores, bias, scale, ids, weights, *numbers, **facts)
        return ids, weights

    def experts(
        self,
        x: Tensor,
        ids: Tensor,
        weights: Tensor,
        gate_up: Tensor,
        down: Tensor,
        act: str = "silu",
        first: int | None = None,
    ) -> Tensor:
        """x [M, H], ids [M, P], weights [M, P], gate_up [E, 2I, H], down [E, H, I] -> [M, H]"""
        # where the library has no grouped product the kernel serves a prefill too: right, if not fast
        if x.shape[0] >= PREFILL_FROM and (groupable(x, gate_up, down) or not x.is_cuda):
            return self._prefill.experts(x, ids, weights, gate_up, down, act, first)
        gelu = one_of(act, ACTIVATIONS, "act") == "gelu_tanh"
        (num_rows, num_chosen), (num_experts, hidden, width) = ids.shape, down.shape
        x, ids, weights = x.contiguous(), ids.contiguous(), weights.contiguous()
        t = self._tile or EXPERT_TILE
        blocks = {"BLOCK_N": t.block_n, "BLOCK_K": t.block_k, "STAGES": t.num_stages, "num_warps": t.num_warps}
        h, y = x.new_empty(num_rows, num_chosen, width), torch.empty_like(x)
        experts_gate_up_kernel[(num_rows * num_chosen, triton.cdiv(width, t.block_n))](
            *(x, ids, gate_up, h, first or 0, num_experts, num_chosen, width, hidden),
            GELU=gelu,
            WHOLE=hidden % t.block_k == 0,
            **blocks,
        )
        experts_down_kernel[(num_rows, triton.cdiv(hidden, t.block_n))](
            h, ids, weights, down, y, first or 0, num_experts, num_chosen, width, hidden, **blocks
        )
        return y
