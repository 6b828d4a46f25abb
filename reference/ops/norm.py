"""RMS normalisation as Llama-shaped checkpoints mean it, and as Gemma's do.

    y = round(x / sqrt(mean(x^2) + eps)) * w          Llama: the bracket in float32 (float64 stays float64)
    y = round(x / sqrt(mean(x^2) + eps) * (1 + w))    Gemma up to its third generation: all of it
    y = round(x / sqrt(mean(x^2) + eps) * w)          Gemma 4: all of it; no w where a norm has no weight

Sources: arXiv 1910.07467; transformers `LlamaRMSNorm` (cast to the weight's dtype first, then times w),
`Gemma3RMSNorm` (times 1 + w in float32, then cast: a weight of zeros changes nothing) and `Gemma4RMSNorm`.
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


class WideRMSNorm(nn.Module):
    """Root mean square norm that rounds once, after its weight; without a width it has no weight."""

    def __init__(self, width: int | None, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = None if width is None else nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., H] -> [..., H]"""
        wide = x if x.dtype == torch.float64 else x.float()
        normed = wide * (wide.pow(2).mean(-1, keepdim=True) + self.eps).pow(-0.5)
        return (normed if self.weight is None else normed * self.weight.to(wide.dtype)).to(x.dtype)


class GemmaRMSNorm(nn.Module):
    """Root mean square norm whose weight is stored as its distance from one."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., H] -> [..., H]"""
        wide, weight = (t if t.dtype == torch.float64 else t.float() for t in (x, self.weight))
        return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps) * (1 + weight)).to(x.dtype)
