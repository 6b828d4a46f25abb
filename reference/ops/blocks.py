"""Blocks of tokens that see each other both ways: the tokens of one image among text."""

import torch
from torch import Tensor


def later_of_block(blocks: Tensor, slots: Tensor, positions: Tensor, slot_positions: Tensor) -> Tensor:
    """Slots of a token's own block that lie ahead of it: what a causal rule hides from it and its image should not.

    A block comes in one forward pass: slots written by earlier passes belong to none.

    blocks          [B, T]     number of the block, -1 for text
    slots           [B, T]
    positions       [B, T]
    slot_positions  [B, S]
    ->              [B, T, S]
    """
    row = torch.arange(len(blocks), device=blocks.device)[:, None]
    slot_blocks = torch.full_like(slot_positions, -1).index_put((row, slots), blocks.to(slot_positions.dtype))
    same = (slot_blocks[:, None, :] == blocks[:, :, None]) & (blocks >= 0)[:, :, None]
    return same & (slot_positions[:, None, :] > positions[:, :, None])


def runs(inside: Tensor) -> Tensor:
    """The number of the run of true values that a token stands in, -1 outside of any.

    inside  [B, T]
    ->      [B, T]
    """
    before = torch.cat((torch.zeros_like(inside[:, :1]), inside[:, :-1]), 1)
    return ((inside & ~before).long().cumsum(1) - 1).masked_fill(~inside, -1)
