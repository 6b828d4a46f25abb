"""The operations of mixtures of experts: signatures.

Letters: reference/README.md; M = B*T rows. Forms and rules: `optimized/ops/table.py`.
"""

from typing import Protocol

from torch import Tensor


class MixtureOps(Protocol):
    """What both forms offer to routers and experts."""

    def route_softmax(
        self,
        x: Tensor,
        weight: Tensor,
        num_chosen: int,
        renormalise: bool,
        scale: Tensor | None = None,
        wide: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """The P experts of the largest scores W x, best first, lowest number among equals, and their weights.

        x            [M, H]  scores are rounded to its dtype
        weight       [E, H]
        renormalise  weights sum to one before the scale
        scale        [E]  a factor of each expert
        wide         weights stay float32 (float64); otherwise they are rounded to the dtype of x
        ->           ids [M, P] int64, weights [M, P]
        """

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
        """P experts out of the best groups; the bias helps to choose and is no part of a weight.

        x           [M, H]
        weight      [E, H]  packed wide: scores are float32 (float64)
        bias        [E]
        kind        "softmax": a group is as good as its best expert; "sigmoid": as the sum of its best two
        num_shared  experts E, E + 1, ... that every row chooses besides, with weight one
        ->          ids [M, P+num_shared] int64, weights [M, P+num_shared] float32 (float64), times `scaling`
        """

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
        """sum_p weight_p * down_p (act(gate_p x) * up_p x), added in the order of p in float32 (float64).

        x        [M, H]
        ids      [M, P]
        weights  [M, P]
        gate_up  [E, 2I, H]  gate rows first; contiguous
        down     [E, H, I]  contiguous
        first    the number of this rank's first expert; others give zeros. None: 0
        ->       [M, H]
        """
