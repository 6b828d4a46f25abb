"""One rank in a process of its own: the work of `open_speculation(tp_size=W)` without the threads.

A module apart, because a spawned process imports what its function lives in: nothing here needs transformers.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from harness.contracts import Group
from optimized.parallel import DistributedGroup
from reference.decoding import Generation
from suites.catalog import open_speculation


def speak_as_a_rank(
    group: Group, folders: tuple[Path, Path], prompts: Sequence[Tensor], num_tokens: int, num_draft_tokens: int
) -> tuple[Generation, Tensor]:
    """What this rank says after the prompts, and its target's aux states of the first one.

    ->  generation, [1, T, A, H]
    """
    torch.set_num_threads(1)
    speculation = open_speculation(*folders, side="optimized", dtype=torch.float64, tp_size=group.size)
    # the shares of all ranks are open here; this process sits down in one place, behind the real group
    speculation.target.ranks.seats[group.rank].group = DistributedGroup()
    said = speculation.engines[group.rank].generate(prompts, num_tokens, num_draft_tokens)
    with torch.no_grad():
        out = speculation.target.modules[group.rank](prompts[0][None], None, speculation.draft.capture_points)
    return said, out.aux
