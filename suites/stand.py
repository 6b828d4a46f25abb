"""Drafts on the stand: written to a folder as their trainers write them, opened, and the folder gone again."""

import tempfile
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from harness.checkpoints import save_checkpoint
from suites.catalog import open_draft
from suites.draws import Drawn, eagle3_weights
from suites.opened import OpenDraft, OpenTarget


def stand(drawn: Drawn, target: OpenTarget, own_embedding: bool = True, **facts: Any) -> OpenDraft:
    """A drawn draft, opened beside its target on the target's side; `facts` go to the opener."""
    return stand_as(drawn.keys, eagle3_weights(drawn, own_embedding), target, **facts)


def stand_as(
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    target: OpenTarget,
    max_shard: int | None = None,
    **facts: Any,
) -> OpenDraft:
    """The same for any config and tensors, in files of at most `max_shard` bytes."""
    with tempfile.TemporaryDirectory() as folder:
        save_checkpoint(folder, config, tensors, max_shard)
        return open_draft(folder, target, side=target.side.name, dtype=target.side.dtype, **facts)
