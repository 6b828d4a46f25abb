"""The gated feed-forward block.

y = W_down (act(W_gate x) * W_up x)         Source: arXiv 2002.05202 (SwiGLU; GeGLU with `gelu`).
"""

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional as F


def gelu(x: Tensor) -> Tensor:
    """The tanh form of GELU, as Gemma checkpoints mean it.

    x   [..., I]
    ->  [..., I]
    """
    return F.gelu(x, approximate="tanh")


class MLP(nn.Module):
    """SwiGLU, or what another activation makes of it."""

    def __init__(
        self, hidden: int, intermediate: int, bias: bool = False, act: Callable[[Tensor], Tensor] = F.silu
    ) -> None:
        super().__init__()
        self.act = act
        self.gate_proj = nn.Linear(hidden, intermediate, bias=bias)
        self.up_proj = nn.Linear(hidden, intermediate, bias=bias)
        self.down_proj = nn.Linear(intermediate, hidden, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, T, H] -> [B, T, H]"""
        return self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))
