"""Holding two results together. The only file with tolerance numbers.

    budget = c(dtype) * u(dtype) * sqrt(depth * width) * scale        for each element

u is the unit roundoff, depth the number of layers the value passed, width the features each layer sums over, and
scale the larger of the wanted tensor's root mean square and the wanted element itself: errors come in with the
neighbours that a sum adds up, and with the rounding of the element as it is stored.

c absorbs what the formula leaves out (how many roundings a layer has, how much softmax and norms amplify). It is
measured, not chosen: `calibrate` runs random pre-norm transformer layers in the dtype and in float64 and returns the
largest share seen; C is that number over depths 1..16, widths 32..256 and 16 seeds (`measure`), times MARGIN. The
margin is there because two results of one dtype may err in opposite directions (2), and because a page may round more
often than the random layer does, with a mixture of experts or a softcap (2).

Moves (shards, loads, captures, masks) are not held to a budget: `bit_equal`.
"""

import math
import os
import threading
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

UNIT_ROUNDOFF = {
    torch.float64: 2.0**-53,
    torch.float32: 2.0**-24,
    torch.float16: 2.0**-11,
    torch.bfloat16: 2.0**-8,
}

MARGIN = 4.0
# what `measure` returned with torch 2.13 on a CPU, rounded up; float64 cannot be its own witness and takes float32's
# number, since it rounds at the same places. Half types round a sum once, in float32, so they use less of sqrt(width).
MEASURED = {torch.float64: 5.1, torch.float32: 5.1, torch.float16: 1.3, torch.bfloat16: 1.5}
C = {dtype: MARGIN * share for dtype, share in MEASURED.items()}


class Mismatch(AssertionError):
    """Two results that are not the same within their budget."""


class Comparison(NamedTuple):
    """How near two results were."""

    name: str
    used: float
    """share of the budget at the worst element: 1 is the limit"""
    worst: tuple[int, ...]
    max_abs: float
    rel: float
    """largest difference over the root mean square of what was wanted"""
    budget: float
    """at the worst element"""
    at_worst: float = 0.0
    """the difference there"""
    rms: float = 0.0
    """of what was wanted"""
    beyond: int = 0
    """elements over their budget"""


@dataclass(frozen=True)
class Divergence:
    """The first place where two token sequences part."""

    position: int
    token_a: int
    token_b: int
    margin: float
    """top logit minus the lower of the two tokens' logits; infinite where one sequence ended"""
    budget: float
    excused: bool
    """the margin is under the budget: rounding may have chosen either"""


def budget(dtype: torch.dtype, depth: int, width: int, scale: float) -> float:
    """The largest difference that rounding in `dtype` may explain."""
    if dtype not in UNIT_ROUNDOFF:
        raise ValueError(f"no tolerance is known for {dtype}; compare integers and packed types with bit_equal")
    if depth < 1 or width < 1:
        raise ValueError(f"depth and width count layers and features, got {depth} and {width}")
    return C[dtype] * UNIT_ROUNDOFF[dtype] * math.sqrt(depth * width) * scale


def hold(
    name: str,
    got: Tensor,
    want: Tensor,
    *,
    dtype: torch.dtype | None = None,
    depth: int,
    width: int,
    nan_equal: bool = False,
) -> Comparison:
    """Hold `got` to `want`; Mismatch beyond the budget.

    dtype       the arithmetic that is judged; None: the coarser of the two tensors'
    nan_equal   a NaN on both sides agrees; otherwise a NaN never passes
    """
    comparison = _note(weigh(name, got, want, dtype=dtype, depth=depth, width=width, nan_equal=nan_equal))
    if comparison.used <= 1.0:
        return comparison
    worst, (a, b) = comparison.worst, (float(x[comparison.worst]) for x in (got, want))
    dtype = dtype or _coarser(got.dtype, want.dtype)
    raise Mismatch(
        f"{name}: at {list(worst)} got {a:.9g}, wanted {b:.9g}; difference {comparison.at_worst:.3g}, "
        f"budget {comparison.budget:.3g} ({dtype}, depth {depth}, width {width}, rms {comparison.rms:.3g}); "
        f"{comparison.used:.3g} times the budget, {comparison.beyond} of {got.numel()} elements beyond it"
    )


def weigh(
    name: str,
    got: Tensor,
    want: Tensor,
    *,
    dtype: torch.dtype | None = None,
    depth: int,
    width: int,
    nan_equal: bool = False,
) -> Comparison:
    """How near two results are, without a verdict and without a note in the log; arguments: `hold`."""
    if got.shape != want.shape:
        raise Mismatch(f"{name}: shape {tuple(got.shape)}, wanted {tuple(want.shape)}")
    unit = budget(dtype or _coarser(got.dtype, want.dtype), depth, width, 1.0)
    a, b = (x.detach().to("cpu", torch.float64) for x in (got, want))
    if a.numel() == 0:
        return Comparison(name, 0.0, (), 0.0, 0.0, 0.0)
    finite = b[b.isfinite()]
    rms = float(finite.square().mean().sqrt()) if finite.numel() else 0.0
    same = (a == b) | (a.isnan() & b.isnan() if nan_equal else torch.zeros_like(a, dtype=torch.bool))
    error = torch.where(same, 0.0, (a - b).abs().nan_to_num(nan=math.inf, posinf=math.inf))
    limit = unit * b.abs().where(b.isfinite(), 0.0).clamp(min=rms)
    # an infinite error over a zero limit is still infinite; an exact zero uses nothing
    share = torch.where(error == 0, 0.0, error / limit)
    at = int(share.argmax())
    worst = tuple(int(i) for i in torch.unravel_index(torch.tensor(at), a.shape))
    found, used, allowed = float(error.max()), float(share.flatten()[at]), float(limit.flatten()[at])
    beyond = int((share > 1).sum())
    return Comparison(name, used, worst, found, _over(found, rms), allowed, float(error[worst]), rms, beyond)


def bit_equal(name: str, got: Tensor, want: Tensor) -> None:
    """Hold a move: dtype, shape and every bit, NaN patterns and the sign of zero included."""
    if got.dtype != want.dtype:
        raise Mismatch(f"{name}: dtype {got.dtype}, wanted {want.dtype}")
    if got.shape != want.shape:
        raise Mismatch(f"{name}: shape {tuple(got.shape)}, wanted {tuple(want.shape)}")
    # cloned: one element counts as contiguous whatever its stride, and only a stride of one can be viewed as bytes
    a, b = (x.detach().cpu().clone(memory_format=torch.contiguous_format).reshape(-1) for x in (got, want))
    size = got.element_size()
    differ = (a.view(torch.uint8) != b.view(torch.uint8)).view(-1, size).any(-1).nonzero().flatten()
    if differ.numel():
        at = int(differ[0])
        index = [int(i) for i in torch.unravel_index(torch.tensor(at), got.shape)]
        raise Mismatch(
            f"{name}: at {index} got {a[at].item()!r} (bits {_bits(a, at)}), "
            f"wanted {b[at].item()!r} (bits {_bits(b, at)}); {differ.numel()} of {a.numel()} elements differ"
        )
    _note(Comparison(name, 0.0, (), 0.0, 0.0, 0.0))


def first_divergence(
    tokens_a: Tensor,
    tokens_b: Tensor,
    logits: Tensor,
    *,
    dtype: torch.dtype | None = None,
    depth: int,
    width: int,
) -> Divergence | None:
    """Where two greedy continuations part, and whether rounding explains it; None if they never do.

    tokens_a  [T]
    tokens_b  [T]
    logits    [T, V]  what token t of `tokens_a` was chosen from
    """
    a, b = tokens_a.tolist(), tokens_b.tolist()
    for position, (token_a, token_b) in enumerate(zip(a, b, strict=False)):
        if token_a == token_b:
            continue
        row = logits[position].detach().to("cpu", torch.float64)
        rms = float(row[row.isfinite()].square().mean().sqrt())
        # both sides err, so the order of two logits may turn over within twice the budget
        limit = 2 * budget(dtype or logits.dtype, depth, width, max(rms, float(row.max().abs())))
        ended = min(token_a, token_b) < 0
        margin = math.inf if ended else float(row.max() - min(row[token_a], row[token_b]))
        return Divergence(position, token_a, token_b, margin, limit, margin <= limit)
    if len(a) != len(b):
        short = min(len(a), len(b))
        token_a, token_b = (x[short] if short < len(x) else -1 for x in (a, b))
        return Divergence(short, token_a, token_b, math.inf, 0.0, False)
    return None


_lock = threading.Lock()
_log: dict[str, dict[str, float]] = {}


def log() -> dict[str, dict[str, float]]:
    """The largest share of the budget used so far: claim (a test's node id) -> tensor name -> share."""
    with _lock:
        return {claim: dict(names) for claim, names in _log.items()}


def reset() -> None:
    """Forget the log."""
    with _lock:
        _log.clear()


def _note(comparison: Comparison) -> Comparison:
    # pytest says which test runs, in this variable, for all threads of the process
    claim = os.environ.get("PYTEST_CURRENT_TEST", "").rsplit(" (", 1)[0]
    with _lock:
        names = _log.setdefault(claim, {})
        names[comparison.name] = max(names.get(comparison.name, 0.0), comparison.used)
    return comparison


def _coarser(a: torch.dtype, b: torch.dtype) -> torch.dtype:
    for dtype in (a, b):
        if dtype not in UNIT_ROUNDOFF:
            raise ValueError(f"no tolerance is known for {dtype}; compare integers and packed types with bit_equal")
    return max(a, b, key=UNIT_ROUNDOFF.__getitem__)


def _over(part: float, whole: float) -> float:
    if part == 0:
        return 0.0
    return part / whole if whole else math.inf


def _bits(flat: Tensor, at: int) -> str:
    return "0x" + bytes(flat[at : at + 1].view(torch.uint8).tolist())[::-1].hex()


HEAD_DIM = 16


def random_layers(x: Tensor, depth: int, seed: int) -> Tensor:
    """Random pre-norm layers (causal attention, gated feed-forward), weights rounded to float16's grid for every dtype.

    x   [T, H]
    ->  [T, H]
    """
    width = x.shape[-1]
    generator = torch.Generator().manual_seed(seed)

    def weight(rows: int, columns: int) -> Tensor:
        # bfloat16 and float16 both hold these numbers, so the weights themselves carry no error
        return (torch.randn(rows, columns, generator=generator) * columns**-0.5).bfloat16().half().to(x.dtype)

    def norm(y: Tensor) -> Tensor:
        wide = y if y.dtype == torch.float64 else y.float()
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)).to(y.dtype)

    future = torch.ones(x.shape[0], x.shape[0], dtype=torch.bool).triu(1)
    for _ in range(depth):
        n = norm(x)
        q, k, v = (F.linear(n, weight(width, width)).unflatten(-1, (-1, HEAD_DIM)).transpose(0, 1) for _ in range(3))
        score = (q @ k.mT * HEAD_DIM**-0.5).masked_fill(future, -math.inf)
        wide = score if score.dtype == torch.float64 else score.float()
        x = x + F.linear((wide.softmax(-1).to(x.dtype) @ v).transpose(0, 1).flatten(1), weight(width, width))
        n = norm(x)
        gated = F.silu(F.linear(n, weight(2 * width, width))) * F.linear(n, weight(2 * width, width))
        x = x + F.linear(gated, weight(width, 2 * width))
    return norm(x)


def calibrate(dtype: torch.dtype, depth: int, width: int, seed: int) -> float:
    """The share of the budget, at c = 1, that random layers in `dtype` use against float64."""
    x = torch.randn(24, width, generator=torch.Generator().manual_seed(seed)).bfloat16().half()
    want = random_layers(x.double(), depth, seed)
    got = random_layers(x.to(dtype), depth, seed).double()
    limit = UNIT_ROUNDOFF[dtype] * math.sqrt(depth * width) * want.abs().clamp(min=float(want.square().mean().sqrt()))
    return float(((got - want).abs() / limit).max())


def measure() -> dict[torch.dtype, float]:
    """What MEASURED records: the largest share over depths, widths and seeds."""
    sizes = [(depth, width) for depth in (1, 2, 4, 8, 16) for width in (32, 64, 128, 256)]
    return {
        dtype: max(calibrate(dtype, depth, width, seed) for depth, width in sizes for seed in range(16))
        for dtype in (torch.float32, torch.float16, torch.bfloat16)
    }
