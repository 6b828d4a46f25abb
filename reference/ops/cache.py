"""Keys and values by slot: the whole memory of a decoder.

A token at position p lives in slot p. A query at position p sees slots 0..p. A rejected token therefore needs
no erasing: its slot lies beyond every later query until the right token is written over it.
Trees and teacher-forced unrolling place several tokens at one position; they name slots and visibility themselves.
"""

import torch
from torch import Tensor

EMPTY = 2**62
"""position of a slot that holds nothing: beyond every query"""


class Cache:
    """One pair of tensors a layer, [B, S, G, D]."""

    def __init__(self, layers: int, batch: int, num_slots: int) -> None:
        self.batch, self.num_slots = batch, num_slots
        self.positions = torch.full((batch, num_slots), EMPTY)
        self.keys: list[Tensor | None] = [None] * layers
        self.values: list[Tensor | None] = [None] * layers

    def place(self, slots: Tensor, positions: Tensor) -> Tensor:
        """Note which position each slot is about to hold.

        slots      [B, T]
        positions  [B, T]
        ->         [B, S]
        """
        row = torch.arange(self.batch, device=slots.device)[:, None]
        self.positions = self.positions.to(slots.device).index_put((row, slots), positions)
        return self.positions

    def write(self, layer: int, k: Tensor, v: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Put new keys and values into their slots and return all of the layer's.

        k      [B, T, G, D]
        v      [B, T, G, Dv]
        slots  [B, T]
        ->     [B, S, G, D], [B, S, G, Dv]
        """
        keys, values = self.keys[layer], self.values[layer]
        if keys is None or values is None:
            keys = k.new_zeros(self.batch, self.num_slots, *k.shape[2:])
            values = v.new_zeros(self.batch, self.num_slots, *v.shape[2:])
        row = torch.arange(self.batch, device=slots.device)[:, None]
        # out of place: a teacher-forced unroll is differentiated through the cache
        self.keys[layer] = keys.index_put((row, slots), k)
        self.values[layer] = values.index_put((row, slots), v)
        return self.keys[layer], self.values[layer]  # type: ignore[return-value]

    def compact(self, first: Tensor, path: Tensor) -> None:
        """Move the nodes of a tree, node v in slot first + v, so that those of a path stand side by side.

        first  [B]
        path   [B, P]
        """
        row = torch.arange(self.batch, device=path.device)[:, None]
        source, into = first[:, None] + path, first[:, None] + torch.arange(path.shape[1], device=path.device)
        self.positions = self.positions.to(path.device).index_put((row, into), into)
        for layer, (keys, values) in enumerate(zip(self.keys, self.values, strict=True)):
            if keys is None or values is None:
                continue
            self.keys[layer] = keys.index_put((row, into), keys[row, source])
            self.values[layer] = values.index_put((row, into), values[row, source])

    def roll_back(self, lengths: Tensor) -> None:
        """Forget every slot at or beyond each sequence's length.

        lengths  [B]
        """
        beyond = torch.arange(self.num_slots, device=lengths.device) >= lengths[:, None]
        self.positions = self.positions.to(lengths.device).masked_fill(beyond, EMPTY)
        for layer, (keys, values) in enumerate(zip(self.keys, self.values, strict=True)):
            if keys is None or values is None:
                continue
            gone = beyond[..., None, None]
            self.keys[layer], self.values[layer] = keys.masked_fill(gone, 0), values.masked_fill(gone, 0)
