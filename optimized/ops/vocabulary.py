"""A draft's vocabulary inside its target's, as `reference/ops/vocabulary.py` has it.  Letters: reference/README.md."""

from torch import Tensor


def over_vocabulary(logits: Tensor, ids: Tensor, vocab: int) -> Tensor:
    """Logits of some tokens over a whole vocabulary; the others cannot be proposed.

    logits  [B, T, Vd]
    ids     [Vd]        the target id of each, all different
    ->      [B, T, V]
    """
    wide = logits.new_full((*logits.shape[:2], vocab), float("-inf"))
    return wide.index_copy_(2, ids, logits)
