"""Every operation of the optimized models: one signature, two forms.

`Aten` calls PyTorch and runs anywhere; `Triton` launches the kernels of `optimized/ops/kernels`. A model holds the
form that `choose` gave it and never asks which one it is.

The chain rule: for up to 64 rows the bits of a row depend on the row alone, never on how many rows there are, on its
place among them or on its company. `Triton` keeps it by fixed tiles, `Aten(exact=True)` by fixed shapes; plain `Aten`
takes natural shapes, is faster and does not promise it. No operation reads a number back from the device.
Letters: reference/README.md; M = B*T rows.
"""

import importlib
from typing import Protocol

import torch
from torch import Tensor

from optimized.ops.aten import Aten


class Ops(Protocol):
    """What both forms offer. Rows are contiguous unless a line says otherwise."""

    def pack(self, weight: Tensor) -> Tensor:
        """The layout of a weight that this form multiplies by soonest; what `linear`, `gate_up_act` and `head_argmax`
        accept beside the plain weight. Call it once, after loading.

        weight  [N, K]
        ->      [N, K]
        """

    def embed(self, ids: Tensor, table: Tensor, first: int | None = None) -> Tensor:
        """Rows of a table, or of the shard of a table that begins at row `first`: ids of other shards give zeros.

        ids    [M]  int64; with first=None the table is whole and every id lies inside
        table  [Vr, H]
        ->     [M, H]
        """

    def add_rmsnorm(self, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """r' = round(x + r); y = w * round(r' / sqrt(mean(r'^2) + eps)), the bracket in float32 (float64 stays).

        x         [M, H]
        residual  [M, H]  None: r' = x
        weight    [H]
        ->        y [M, H], r' [M, H]
        """

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """x       [M, K]
        weight  [N, K]
        bias    [N]
        ->      [M, N]
        """

    def gate_up_act(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """silu(W_gate x) * W_up x.

        x       [M, K]
        weight  [2I, K]  gate rows first
        bias    [2I]
        ->      [M, I]
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
    ) -> Tensor:
        """Norm queries and keys by head where the model does, turn them (halves), write keys and values in place.

        qkv        [M, (N+2G)*D]
        positions  [M]  below S; a row of position -1 turns by nothing
        slots      [M]  flat in 0..B*S, int64 and contiguous, or SlotError
        inv_freq   [R/2]  float32; the first R features of a head turn
        k_cache    [B, S, G, D]
        v_cache    [B, S, G, D]
        q_norm     [D]  None: no norm
        k_norm     [D]
        ->         [M, N, D]
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
    ) -> Tensor:
        """Softmax attention over the slots j <= position (and j > position - window); position -1 gives zeros.

        q          [B, T, N, D]
        k_cache    [B, S, G, D]  finite everywhere below num_slots
        v_cache    [B, S, G, D]
        positions  [B, T]
        num_slots  a bound on position + 1 that the host knows; None: S
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
