"""Cosines and sines by position, computed once and looked up afterwards.

A feature x_i and its partner x'_i (i + R/2 in the first half, i - R/2 in the second) turn as

    y_i = x_i cos_i + x'_i sin_i        sin_i negative in the first half; cos_i = 1, sin_i = 0 for i >= R

Interleaved, the partner of x_2i is x_{2i+1}, and sin is negative at even features.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Turns(NamedTuple):
    """The table of one rope."""

    cos_sin: Tensor
    """[S, 2, D]"""
    partner: Tensor
    """[D] int64: the feature that each one turns with"""


class Angles:
    """Tables by (frequencies, scale, shape, type). The frequencies are held, so their identity is a sound key."""

    def __init__(self) -> None:
        self._tables: dict[tuple, tuple[Tensor, Turns]] = {}

    def __call__(
        self,
        inv_freq: Tensor,
        scale: float,
        num_positions: int,
        width: int,
        dtype: torch.dtype,
        interleaved: bool = False,
    ) -> Turns:
        """inv_freq  [R/2]
        ->        Turns for positions 0..num_positions-1 and heads of `width` features
        """
        # dynamic ropes write new frequencies in place; inference tensors do not count their versions
        version = 0 if inv_freq.is_inference() else inv_freq._version
        key = (id(inv_freq), version, scale, num_positions, width, dtype, interleaved)
        if key not in self._tables:
            self._tables[key] = (inv_freq, build(inv_freq, scale, num_positions, width, dtype, interleaved))
        return self._tables[key][1]


def build(
    inv_freq: Tensor, scale: float, num_positions: int, width: int, dtype: torch.dtype, interleaved: bool = False
) -> Turns:
    """Angles are float32, as transformers computes them, in every dtype of the model.

    inv_freq  [R/2]
    """
    half, device = inv_freq.shape[0], inv_freq.device
    angle = torch.arange(num_positions, device=device).float()[:, None] * inv_freq.float()
    cos, sin = angle.cos() * scale, angle.sin() * scale
    rest = cos.new_zeros(num_positions, width - 2 * half)
    feature = torch.arange(width, device=device)
    if interleaved:
        both = [cos.repeat_interleave(2, 1), torch.stack([-sin, sin], -1).flatten(1)]
        turning = feature[: 2 * half] ^ 1
    else:
        both = [torch.cat([cos, cos], 1), torch.cat([-sin, sin], 1)]
        turning = feature[: 2 * half].roll(half)
    rows = [torch.cat([both[0], rest + 1], 1), torch.cat([both[1], rest], 1)]
    return Turns(torch.stack(rows, 1).to(dtype), torch.cat([turning, feature[2 * half :]]))
