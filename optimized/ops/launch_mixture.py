"""Mixtures of experts as Triton kernels. Signatures and shapes: `optimized/ops/table.py`."""

import torch
import triton
from torch import Tensor

from optimized.ops.kernels.experts import experts_down_kernel, experts_gate_up_kernel
from optimized.ops.kernels.routing import route_kernel
from optimized.ops.kinds import ACTIVATIONS, ROUTERS, choosable, one_of
from optimized.ops.launches import PREFILL_FROM, Launches
from optimized.ops.mixture import groupable
from optimized.ops.rows import wide_type
from optimized.ops.tiles import EXPERT_TILE


class TritonMixture(Launches):
    """Routers and experts."""

    def route_softmax(
        self,
        scores: Tensor,
        num_chosen: int,
        renormalise: bool,
        scale: Tensor | None = None,
        wide: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """scores [M, E], scale [E] or None -> [M, P], [M, P]"""
        dtype = wide_type(scores.dtype) if wide else scores.dtype
        return _route(scores, None, scale, (1, 1), num_chosen, renormalise, 1.0, False, dtype)

    def route_grouped(
        self,
        scores: Tensor,
        bias: Tensor | None,
        groups: int,
        top_groups: int,
        num_chosen: int,
        renormalise: bool,
        scaling: float,
        kind: str,
    ) -> tuple[Tensor, Tensor]:
        """scores [M, E], bias [E] or None -> [M, P], [M, P]"""
        sigmoid = one_of(kind, ROUTERS, "kind") == "sigmoid"
        dtype = wide_type(scores.dtype)
        return _route(scores, bias, None, (groups, top_groups), num_chosen, renormalise, scaling, sigmoid, dtype)

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


def _route(
    scores: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    groups: tuple[int, int],
    num_chosen: int,
    renormalise: bool,
    scaling: float,
    sigmoid: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """scores [M, E], bias [E] or None, scale [E] or None -> [M, P], [M, P]"""
    num_rows, num_experts = scores.shape
    size = choosable(num_experts, *groups, num_chosen)
    ids = torch.empty(num_rows, num_chosen, dtype=torch.int64, device=scores.device)
    weights = torch.empty(num_rows, num_chosen, dtype=dtype, device=scores.device)
    route_kernel[(num_rows,)](
        *(scores.contiguous(), bias, scale, ids, weights, num_chosen, scaling),
        SIGMOID=sigmoid,
        HAS_BIAS=bias is not None,
        HAS_SCALE=scale is not None,
        RENORMALISE=renormalise,
        GROUPS=groups[0],
        SIZE=size,
        TOP_GROUPS=groups[1],
        BLOCK_G=triton.next_power_of_2(groups[0]),
        BLOCK_E=triton.next_power_of_2(size),
        BLOCK_P=triton.next_power_of_2(num_chosen),
    )
    return ids, weights
