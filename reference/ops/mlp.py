"""The gated feed-forward block.

y = W_down (silu(W_gate x) * W_up x)         Source: arXiv 2002.05202 (SwiGLU).
"""

from torch import Tensor, nn
from torch.nn import functional as F


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, hidden: int, intermediate: int, bias: bool = False) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, intermediate, bias=bias)
        self.up_proj = nn.Linear(hidden, intermediate, bias=bias)
        self.down_proj = nn.Linear(intermediate, hidden, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, T, H] -> [B, T, H]"""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
