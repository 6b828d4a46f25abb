"""Who sees whom where the tokens of one pass are no chain but the branches of a tree.

A bound on slots goes from the loop through every model down to `attend`. A `Sight` is such a bound and tells `attend`
more, so no model needs to know whether its tokens are a chain or a tree.
"""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

MOST_NODES = 64
"""bits of a word"""


class Sight(int):
    """A bound on slots which also knows a tree: slot `first` + j of a sequence holds node j.

    A query sees the slots below `first` by its position and window, and beyond them its own line alone.
    """

    first: Tensor
    """[B]"""
    line: tuple[Tensor, ...]
    """[B, T] each: the node itself, its parent, and so on; a root is its own parent"""
    num_nodes: int
    _words: dict[int, Tensor]

    def __new__(cls, num_slots: int, first: Tensor, line: Sequence[Tensor], num_nodes: int) -> "Sight":
        sight = super().__new__(cls, num_slots)
        sight.first, sight.line, sight.num_nodes = first, tuple(line), num_nodes
        sight._words = {}
        return sight

    def words(self, window: int | None = None) -> Tensor:
        """Bit j: sees node j. A window counts positions, and a node's line has one node a position.

        ->  [B, T]
        """
        reach = min(window or len(self.line), len(self.line))
        if reach not in self._words:
            bits = [1 << node for node in self.line[:reach]]
            self._words[reach] = functools.reduce(torch.bitwise_or, bits).contiguous()
        return self._words[reach]


def sight_of(num_slots: int | None) -> Sight | None:
    """The sight that a bound is, if it is one."""
    return num_slots if isinstance(num_slots, Sight) else None
