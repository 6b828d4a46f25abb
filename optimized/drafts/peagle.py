"""P-EAGLE, fast: `optimized/drafts/eagle3.py` and what it reads where the target has not been.

Equations: `reference/drafts/peagle.py`. The mask's state (1') is the same at every mask: it is fused once.
Letters: reference/README.md.
"""

import torch
from torch import Tensor

from optimized.drafting import Parallel
from optimized.drafts.eagle3 import Eagle3Draft
from optimized.ops.table import Ops
from optimized.parallel import Group, Part, Placement
from reference.drafts.peagle import PeagleConfig


class MaskHidden(Part):
    """What stands for the aux states of a position that the target has not read."""

    def __init__(self, width: int, at: Placement) -> None:
        super().__init__(at)
        self.weight = self.new(1, 1, width)
        self.place("mask_hidden", self.weight, (1, 1, width))


class PeagleDraft(Eagle3Draft):
    """One rank's share of the whole draft."""

    way = Parallel

    def __init__(
        self, c: PeagleConfig, ops: Ops, group: Group, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> None:
        super().__init__(c, ops, group, dtype, device)
        self.mask_hidden = self.own(MaskHidden(c.aux_states * c.aux_width, self.at))
        self._fused: Tensor | None = None

    def fuse_mask(self) -> Tensor:
        """Equation (1') of a mask: -> [1, 1, H]; made at first use after loading."""
        if self._fused is None:
            self._fused = self.fuse(self.mask_hidden.weight.unflatten(2, (self.c.aux_states, -1)))
        return self._fused
