"""The residual stream of a decoder: where its tokens sit, and what is captured of it."""

from collections.abc import Sequence

import torch
from torch import Tensor

from reference.ops.attention import causal
from reference.ops.cache import Cache


def seat(
    tokens: Tensor, positions: Tensor | None, cache: Cache | None, slots: Tensor | None, visible: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """What a forward pass assumes where its caller says nothing: positions 0..T-1, slot = position, causal sight.

    tokens     [B, T]
    positions  [B, T]
    slots      [B, T]
    visible    [B, T, S]
    ->         positions [B, T], slots [B, T], visible [B, T, S]
    """
    if positions is None:
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    slots = positions if slots is None else slots
    # noted even where the caller says who sees whom: sliding layers narrow it by position
    held = positions if cache is None else cache.place(slots, positions)
    visible = causal(positions, held) if visible is None else visible
    return positions, slots, visible


def captured(stream: Sequence[Tensor], points: Sequence[int]) -> Tensor:
    """The stream at the capture points, in their order; a new tensor, never a view.

    stream  L + 1 states [B, T, H]
    ->      [B, T, A, H]
    """
    if not points:
        return stream[0].new_zeros(*stream[0].shape[:2], 0, stream[0].shape[2])
    return torch.stack([stream[c] for c in points], 2)
