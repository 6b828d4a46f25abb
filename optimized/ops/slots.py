"""Where keys and values are written: flat slots b * S + j of a cache [B, S, G, D]."""

import torch
from torch import Tensor


class SlotError(ValueError):
    """Slots that a kernel would read wrongly: expanded, strided, of another type or number."""


def checked(slots: Tensor, num_rows: int) -> Tensor:
    """The slots, or SlotError; reads shape, stride and type only, never a value.

    slots  [M]
    ->     [M]
    """
    if slots.dtype != torch.int64:
        raise SlotError(f"slots are {slots.dtype}, expected torch.int64")
    if slots.dim() != 1 or slots.shape[0] != num_rows:
        raise SlotError(f"slots have shape {tuple(slots.shape)}, expected ({num_rows},): one for each row")
    if num_rows > 1 and slots.stride(0) != 1:
        raise SlotError(f"slots have stride {slots.stride()}, expected (1,): pass slots.contiguous()")
    return slots
