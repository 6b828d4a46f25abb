"""Muon: matrices move by the orthogonal factor of their momentum, so a small budget of steps goes further than Adam's.

    (1)  m <- beta m + g
    (2)  d = g + beta m                              Nesterov
    (3)  w <- w - lr sqrt(max(1, rows / columns)) orthogonal(d)

orthogonal(d) is U V' of the singular value decomposition, by five steps of a Newton-Schulz polynomial that only brings
the singular values near 1.  Source: Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024.
"""

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor

POLYNOMIAL = (3.4445, -4.7750, 2.0315)
"""of the published optimizer: steep at 0, so few steps are enough"""
STEPS = 5


def orthogonal(matrices: Tensor) -> Tensor:
    """Every matrix with its singular values brought near 1.

    matrices  [N, R, C]
    ->        [N, R, C]
    """
    a, b, c = POLYNOMIAL
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(STEPS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Takes parameters [..., R, C]; leading axes (experts in one tensor) count as matrices of their own."""

    def __init__(
        self, parameters: Iterable[Tensor], lr: float = 0.02, momentum: float = 0.95, decay: float = 0.0
    ) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "decay": decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Equations (1) to (3); matrices of one shape are taken together, which is most of the speed on a CPU."""
        for group in self.param_groups:
            shaped = defaultdict(list)
            for w in group["params"]:
                if w.grad is None:
                    continue
                state = self.state[w]
                momentum = state.setdefault("momentum", torch.zeros_like(w))
                momentum.mul_(group["momentum"]).add_(w.grad)
                shaped[w.shape[-2:]].append((w, w.grad + group["momentum"] * momentum))
            for (rows, columns), entries in shaped.items():
                found = orthogonal(torch.cat([d.reshape(-1, rows, columns) for _, d in entries]))
                pace = group["lr"] * max(1.0, rows / columns) ** 0.5
                counts = [w.numel() // (rows * columns) for w, _ in entries]
                for (w, _), update in zip(entries, found.split(counts), strict=True):
                    w.mul_(1 - group["lr"] * group["decay"]).sub_(update.reshape(w.shape), alpha=pace)
