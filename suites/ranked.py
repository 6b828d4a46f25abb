"""One rank in a process of its own: the work of `open_speculation(tp_size=W)` without the threads.

A module apart, because a spawned process imports what its function lives in: nothing here needs transformers.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from harness.contracts import Group
from optimized.parallel import DistributedGroup
from reference.decoding import Generation
from suites.catalog import open_speculation


class Couple(NamedTuple):
    """A target and a draft on disk, and what they are asked."""

    folders: tuple[Path, Path]
    prompts: Sequence[Tensor]


class Said(NamedTuple):
    """What one rank says after the prompts."""

    generation: Generation
    aux: Tensor
    """[1, T, A, H]  the target's, of the first prompt"""


def speak_as_a_rank(group: Group, couples: Sequence[Couple], num_tokens: int, num_draft_tokens: int) -> list[Said]:
    """One couple after another: a process takes longer to start than to speak."""
    torch.set_num_threads(1)
    return [_speak(group, couple, num_tokens, num_draft_tokens) for couple in couples]


def _speak(group: Group, couple: Couple, num_tokens: int, num_draft_tokens: int) -> Said:
    speculation = open_speculation(*couple.folders, side="optimized", dtype=torch.float64, tp_size=group.size)
    # the shares of all ranks are open here; this process sits down in one place, behind the real group
    speculation.target.ranks.seats[group.rank].group = DistributedGroup()
    said = speculation.engines[group.rank].generate(couple.prompts, num_tokens, num_draft_tokens)
    with torch.no_grad():
        target, points = speculation.target.modules[group.rank], speculation.draft.capture_points
        return Said(said, target(couple.prompts[0][None], None, points).aux)
