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
from optimized.ops.table_latent import LatentOps
from optimized.ops.table_mixture import MixtureOps


class Ops(MixtureOps, LatentOps, Protocol):
    """What both forms offer. Rows are contiguous unless a line says otherwise."""

    def pack(self, weight: Tensor, wide: bool = False) -> Tensor:
        """The layout of a weight that this form multiplies by soonest; what `linear`, `gate_up_act`, `head_argmax` and
        routers accept beside the plain weight. Call it once, after loading.

        weight  [N, K]
        wide    its products stay float32 (float64), whatever the dtype of the rows
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

    def linear_scaled(
        self, x: Tensor, weight: Tensor, scales: Tensor, block: tuple[int, int], bias: Tensor | None = None
    ) -> Tensor:
        """`linear` of a float8 weight as checkpoints hold it: each block of rows and columns has its own scale.

        x       [M, K]
        weight  [N, K]  float8_e4m3fn, contiguous
        scales  [N/b, K/c]  float32, rounded up; one for the whole weight where the block is the weight
        block   b rows, c columns, of whole K steps of a tile: a multiple of 64, or K
        bias    [N]
        ->      [M, N]  products and sums in float32 (float64)
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

    def score_rows(self, x: Tensor, table: Tensor, ids: Tensor, first: int | None = None) -> Tensor:
        """Products with some rows of a table alone, or of the shard that begins at row `first`; others give zeros.

        x      [M, H]
        table  [Vr, H]
        ids    [M, Z]  int64
        ->     [M, Z]
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

    def uniform(self, seed: Tensor, sequence: Tensor, position: Tensor, stream: int) -> Tensor:
        """One number in [0, 1) for each (seed, sequence, position, stream), whatever the batch and the history.

        seed      [1]  int64
        sequence  [B]  int64
        position  [B] or [B, T]  int64
        ->        like position, float64
        """


def choose(device: torch.device | str, form: str | None = None, exact: bool = False, num_rows: int = 16) -> Ops:
    """The form that serves a device.

    form      "aten", "triton" or "blind": Aten whose host looks at nothing; None: Triton on CUDA, Aten elsewhere
    exact     hold the chain rule; Triton always does
    num_rows  the most rows a step will have, decode and verify alike: picks the row bucket of the tile table
    """
    form = form or ("triton" if torch.device(device).type == "cuda" else "aten")
    if form in ("aten", "blind"):
        return Aten(exact, form == "blind")
    if form != "triton":
        raise ValueError(f'form {form!r} is none of "aten", "blind" and "triton"')
    # triton is imported only where it is asked for: it does not exist on every machine that runs the Aten form
    return importlib.import_module("optimized.ops.launch").Triton(num_rows)
