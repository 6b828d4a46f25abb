"""The operations around a cache of latents: signatures.

Letters: reference/README.md; M = B*T rows. Forms and rules: `optimized/ops/table.py`.
"""

from typing import Protocol

from torch import Tensor


class LatentOps(Protocol):
    """What both forms offer to multi-head latent attention."""

    def latent_write(
        self,
        kv_a: Tensor,
        norm_weight: Tensor,
        eps: float,
        positions: Tensor,
        slots: Tensor,
        inv_freq: Tensor,
        rope_scale: float,
        cache: Tensor,
        interleaved: bool = True,
        q_a: Tensor | None = None,
        q_norm: Tensor | None = None,
    ) -> Tensor:
        """Norm the latent, turn the other features, write both in place as one row of the cache; norm a query's latent.

        kv_a         [M, R+Dr]  rows may lie apart
        norm_weight  [R]
        positions    [M]
        slots        [M]  flat in 0..B*S, int64 and contiguous, or SlotError
        inv_freq     [Dr/2]
        cache        [B, S, R+Dr]
        q_a          [M, Q]  rows may lie apart
        q_norm       [Q]
        ->           [M, Q]  Q = 0 where no query was given
        """

    def attend_latent(
        self,
        q_latent: Tensor,
        q_rope: Tensor,
        cache: Tensor,
        positions: Tensor,
        scale: float,
        w_uv: Tensor,
        num_slots: int | None = None,
    ) -> Tensor:
        """Attention of all heads to one latent a slot, which is key (with its turned features) and value; what a head
        read is multiplied by its w_uv.

        q_latent   [B, T, N, R]
        q_rope     [B, T, N, Dr]
        cache      [B, S, R+Dr]  finite everywhere below num_slots
        positions  [B, T]
        w_uv       [N, R, Dv]  contiguous
        num_slots  a bound on position + 1 that the host knows; None: S. A `Sight` as for `attend`
        ->         [B, T, N*Dv]
        """

    def absorb(
        self,
        q: Tensor,
        w_uk: Tensor,
        positions: Tensor,
        inv_freq: Tensor,
        rope_scale: float,
        num_positions: int,
        interleaved: bool = True,
    ) -> tuple[Tensor, Tensor]:
        """Queries as latents, q_n W_n of each head; their last features turned.

        q              [M, N, Dn+Dr]  rows and heads may lie apart
        w_uk           [N, Dn, R]  contiguous
        positions      [M]  below num_positions
        inv_freq       [Dr/2]
        num_positions  how many angles to hold: the S of the cache
        ->             [M, N, R], [M, N, Dr]
        """
