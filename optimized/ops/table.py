"""Every operation of the optimized models: one signature, two forms.

`Aten` calls PyTorch and runs anywhere; `Triton` launches the kernels of `optimized/ops/kernels`. A model holds the
form that `choose` gave it and never asks which one it is.

The chain rule: for up to 64 rows the bits of a row depend on the row alone, never on how many rows there are, on its
place among them or on its company. `Triton` keeps it by fixed tiles, `Aten(exact=True)` by fixed shapes; plain `Aten`
takes natural shapes, is faster and does not promise it. No operation makes the host wait for its device.
Letters: reference/README.md; M = B*T rows.
"""

import importlib
from typing import Protocol

import torch
from torch import Tensor

from optimized.ops.aten import Aten
from optimized.ops.kinds import LLAMA, NormKind


class Ops(Protocol):
    """What both forms offer. Rows are contiguous unless a line says otherwise."""

    def pack(self, weight: Tensor) -> Tensor:
        """The layout of a weight that this form multiplies by soonest; what `linear`, `gate_up_act` and `head_argmax`
        accept beside the plain weight. Call it once, after loading.

        weight  [N, K]
        ->      [N, K]
        """

    def embed(self, ids: Tensor, table: Tensor, first: int | None = None, scale: float | None = None) -> Tensor:
        """Rows of a table, or of the shard of a table that begins at row `first`: ids of other shards give zeros.

        ids    [M]  int64; with first=None the table is whole and every id lies inside
        table  [Vr, H]
        scale  a factor, rounded to the table's dtype before it multiplies
        ->     [M, H]
        """

    def add_rmsnorm(
        self,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        eps: float,
        kind: NormKind = LLAMA,
        scale: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """r' = round(round(x + r) * scale); y = the norm of r' as `kind` rounds it, in float32 (float64 stays).

        x         [M, H]
        residual  [M, H]  None: r' = x
        weight    [H]  None: a norm without weight
        scale     [1]  None: no factor
        ->        y [M, H], r' [M, H]
        """

    def sandwich_norm(
        self,
        branch: Tensor,
        residual: Tensor,
        post: Tensor | None,
        pre: Tensor | None,
        eps: float,
        kind: NormKind,
        scale: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """`add_rmsnorm` of the normed branch: r' = round(round(norm_post(branch) + r) * scale); y = norm_pre(r').

        branch    [M, H]
        residual  [M, H]
        post      [H]  None: a norm without weight
        pre       [H]
        scale     [1]  Gemma 4's `layer_scalar`
        ->        y [M, H], r' [M, H]
        """

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """x       [M, K]
        weight  [N, K]
        bias    [N]
        ->      [M, N]
        """

    def gate_up_act(self, x: Tensor, weight: Tensor, bias: Tensor | None = None, act: str = "silu") -> Tensor:
        """act(W_gate x) * W_up x.

        x       [M, K]
        weight  [2I, K]  gate rows first
        bias    [2I]
        act     "silu" or "gelu_tanh"
        ->      [M, I]
        """

    def act_mul(self, gate: Tensor, up: Tensor, act: str = "silu") -> Tensor:
        """act(gate) * up; rows of both may lie apart.

        gate  [M, I]
        up    [M, I]
        ->    [M, I]
        """

    def qk_rope_kv_write(
        self,
        qkv: Tensor,
        positions: Tensor,
        slots: Tensor,
        inv_freq: Tensor,
        rope_scale: float,
        k_cache: Tensor,
        v_cache: Tensor,
        q_norm: Tensor | None,
        k_norm: Tensor | None,
        eps: float,
        kind: NormKind = LLAMA,
        v_normed: bool = False,
        k_eq_v: bool = False,
        interleaved: bool = False,
    ) -> Tensor:
        """Norm heads where the model does, turn queries and keys, write keys and values in place.

        Partners are halves apart (x_i, x_{i + R/2}), or neighbours when interleaved; a frequency 0 turns by nothing.

        qkv        [M, (N+2G)*D] or [M, (N+G)*D]
        positions  [M]  below S; a row of position -1 turns by nothing
        slots      [M]  flat in 0..B*S, int64 and contiguous, or SlotError
        inv_freq   [R/2]  float32; the first R features of a head turn
        k_cache    [B, S, G, D]
        v_cache    [B, S, G, D]
        q_norm     [D]  None: no norm
        k_norm     [D]
        v_normed   values are normed too, without a weight
        k_eq_v     qkv holds no values: they are the keys as projected, before norm and turn
        ->         [M, N, D]
        """

    def q_rope(
        self,
        q: Tensor,
        positions: Tensor,
        inv_freq: Tensor,
        rope_scale: float,
        num_positions: int,
        q_norm: Tensor | None,
        eps: float,
        kind: NormKind = LLAMA,
        interleaved: bool = False,
    ) -> Tensor:
        """The queries' part of `qk_rope_kv_write` alone, for layers that read keys which others wrote.

        q              [M, N, D]  rows and heads may lie apart
        positions      [M]  below num_positions
        inv_freq       [R/2]
        num_positions  how many angles to hold: the S of the cache
        q_norm         [D]
        ->             [M, N, D]
        """

    def attend(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        positions: Tensor,
        scale: float,
        window: int | None = None,
        num_slots: int | None = None,
        ends: Tensor | None = None,
    ) -> Tensor:
        """Softmax attention over the slots j <= position (and j > position - window); position -1 gives zeros.

        q          [B, T, N, D]  D up to 512
        k_cache    [B, S, G, D]  finite everywhere below num_slots
        v_cache    [B, S, G, D]
        positions  [B, T]
        num_slots  a bound on position + 1, and on end + 1, that the host knows; None: S. A `Sight` (ops/sight.py) says
                   as well which slots of a tree each query sees: those of its own line, as far as the window counts
        ends       [B, T]  the last slot that a query sees in place of its own: an image sees ahead to its end.
                   The window still counts from the position. None: the positions
        ->         [B, T, N*D]
        """

    def head_argmax(self, x: Tensor, weight: Tensor, rows: int, scale: float = 1.0) -> tuple[Tensor, Tensor]:
        """The largest logit and its lowest index; logits are rounded to the dtype of x before they are compared.

        x       [M, H]
        weight  [Vr, H]  rows from `rows` on are padding
        ->      value [M] float32 (float64 for float64), index [M] int64
        """

    def argmax(self, logits: Tensor) -> Tensor:
        """Lowest index of the largest logit.

        logits  [M, V]
        ->      [M]
        """

    def accept_greedy(self, drafted: Tensor, chosen: Tensor) -> Tensor:
        """How many leading drafts the target chose too.

        drafted  [B, K]
        chosen   [B, K+1]
        ->       [B]  int64
        """

    def gather_rows(self, x: Tensor, index: Tensor) -> Tensor:
        """x      [B, T, C]
        index  [B]
        ->     [B, C]
        """

    def compact(self, x: Tensor, first: Tensor, path: Tensor) -> None:
        """Move the rows first + path_j to first + j, in place and all at once.

        x      [B, S, C]  contiguous
        first  [B]
        path   [B, P]  distinct; every row that is read or written lies inside
        """

    def softcap(self, logits: Tensor, cap: float) -> Tensor:
        """cap * tanh(logits / cap), which moves no logit past another: only sampling needs it.

        logits  [M, V]
        ->      [M, V]
        """

    def route_softmax(
        self,
        scores: Tensor,
        num_chosen: int,
        renormalise: bool,
        scale: Tensor | None = None,
        wide: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """The P likeliest experts, best first, lowest number among equals, and their weights.

        scores       [M, E]
        renormalise  weights sum to one before the scale
        scale        [E]  a factor of each expert
        wide         weights stay float32 (float64); otherwise they are rounded to the dtype of scores
        ->           ids [M, P] int64, weights [M, P]
        """

    def route_grouped(
        self,
        scores: Tensor,
        bias: Tensor | None,
        groups: int,
        top_groups: int,
        num_chosen: int,
        renormalise: bool,
        scaling: float,
        kind: str,
    ) -> tuple[Tensor, Tensor]:
        """P experts out of the best groups; the bias helps to choose and is no part of a weight.

        scores  [M, E]
        bias    [E]
        kind    "softmax": a group is as good as its best expert; "sigmoid": as the sum of its best two
        ->      ids [M, P] int64, weights [M, P] float32 (float64), times `scaling`
        """

    def experts(
        self,
        x: Tensor,
        ids: Tensor,
        weights: Tensor,
        gate_up: Tensor,
        down: Tensor,
        act: str = "silu",
        first: int | None = None,
    ) -> Tensor:
        """sum_p weight_p * down_p (act(gate_p x) * up_p x), added in the order of p in float32 (float64).

        x        [M, H]
        ids      [M, P]
        weights  [M, P]
        gate_up  [E, 2I, H]  gate rows first; contiguous
        down     [E, H, I]  contiguous
        first    the number of this rank's first expert; others give zeros. None: 0
        ->       [M, H]
        """

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
    ) -> None:
        """Norm the latent, turn the other features, write both in place as one row of the cache.

        kv_a         [M, R+Dr]  rows may lie apart
        norm_weight  [R]
        positions    [M]
        slots        [M]  flat in 0..B*S, int64 and contiguous, or SlotError
        inv_freq     [Dr/2]
        cache        [B, S, R+Dr]
        """

    def attend_latent(
        self,
        q_latent: Tensor,
        q_rope: Tensor,
        cache: Tensor,
        positions: Tensor,
        scale: float,
        num_slots: int | None = None,
    ) -> Tensor:
        """Attention of all heads to one latent a slot, which is key (with its turned features) and value.

        q_latent   [B, T, N, R]
        q_rope     [B, T, N, Dr]
        cache      [B, S, R+Dr]  finite everywhere below num_slots
        positions  [B, T]
        num_slots  a bound on position + 1 that the host knows; None: S. A `Sight` as for `attend`
        ->         [B, T, N, R]
        """

    def absorb(self, q_nope: Tensor, w_uk: Tensor) -> Tensor:
        """Queries as latents: q_n W_n of each head.

        q_nope  [M, N, Dn]  rows and heads may lie apart
        w_uk    [N, Dn, R]  contiguous
        ->      [M, N, R]
        """

    def expand(self, o: Tensor, w_uv: Tensor) -> Tensor:
        """Latents as values: o_n W_n of each head.

        o     [M, N, R]  rows and heads may lie apart
        w_uv  [N, R, Dv]  contiguous
        ->    [M, N, Dv]
        """

    def uniform(self, seed: Tensor, sequence: Tensor, position: Tensor, stream: int) -> Tensor:
        """One number in [0, 1) for each (seed, sequence, position, stream), whatever the batch and the history.

        seed      [1]  int64
        sequence  [B]  int64
        position  [B] or [B, T]  int64
        ->        like position, float64
        """


def choose(device: torch.device | str, form: str | None = None, exact: bool = False, num_rows: int = 16) -> Ops:
    """The form that serves a device.

    form      "aten" or "triton"; None: Triton on CUDA, Aten elsewhere
    exact     hold the chain rule; Triton always does
    num_rows  the most rows a step will have, decode and verify alike: picks the row bucket of the tile table
    """
    form = form or ("triton" if torch.device(device).type == "cuda" else "aten")
    if form == "aten":
        return Aten(exact)
    if form != "triton":
        raise ValueError(f'form {form!r} is neither "aten" nor "triton"')
    # triton is imported only where it is asked for: it does not exist on every machine that runs the Aten form
    return importlib.import_module("optimized.ops.launch").Triton(num_rows)
