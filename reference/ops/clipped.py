"""A linear map between two clamps, as the towers of Gemma 4 have it.

y = clamp(W clamp(x, input_min, input_max), output_min, output_max)         plain W x where nothing is clipped
"""

import torch
from torch import Tensor, nn


class ClippedLinear(nn.Module):
    """The map; its four bounds are stored beside the weight."""

    def __init__(self, into: int, out: int, clipped: bool) -> None:
        super().__init__()
        self.clipped = clipped
        self.linear = nn.Linear(into, out, bias=False)
        if clipped:
            for side in ("input", "output"):
                self.register_buffer(f"{side}_min", torch.tensor(-float("inf")))
                self.register_buffer(f"{side}_max", torch.tensor(float("inf")))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., X] -> [..., Y]"""
        if not self.clipped:
            return self.linear(x)
        return self.linear(x.clamp(self.input_min, self.input_max)).clamp(self.output_min, self.output_max)
