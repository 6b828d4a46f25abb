"""EAGLE-3 with latent attention, fast: the equations of `reference/drafts/eagle3_mla.py` with attention absorbed.

The draft is that of `optimized/drafts/eagle3.py`, its attention and its cache those of `optimized/targets/deepseek.py`:
a slot holds R + Dr numbers that all heads read, on every rank alike, and ranks cut heads.
Letters: reference/README.md and reference/ops/mla.py.
"""

from optimized.drafts.eagle3 import Eagle3Draft, Eagle3Layer
from optimized.targets.deepseek import Attention, LatentCache


class Eagle3MlaLayer(Eagle3Layer):
    """Equations (3) to (6)."""

    attention = Attention


class Eagle3MlaDraft(Eagle3Draft):
    """One rank's share of the whole draft."""

    layer = Eagle3MlaLayer

    def new_cache(self, batch: int, num_slots: int) -> LatentCache:
        """Room for the latents of `num_slots` tokens of each of `batch` sequences."""
        c, at = self.c, self.at
        return LatentCache(c.layers, batch, num_slots, c.kv_rank + c.rope_dim, at.dtype, at.device)
