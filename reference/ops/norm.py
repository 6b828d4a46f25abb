"""RMS normalisation as Llama-shaped checkpoints mean it.

    y = round(x / sqrt(mean(x^2) + eps)) * w          the bracket in float32 (float64 stays float64)

Source: arXiv 1910.07467; transformers `LlamaRMSNorm` (cast to the weight's dtype first, then times w).
"""

import torch
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """Root mean square norm over the last dimension, with a learned weight."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., H] -> [..., H]"""
        wide = x if x.dtype == torch.float64 else x.float()
        return self.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)
