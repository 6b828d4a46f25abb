"""What the PyTorch form computes row by row, and in which shape so that a row's bits are its own.

BLAS bits depend on the number of rows and, on some machines, on the slot of a row in its tile, and those of silu on
the place in the vector. `exact` therefore computes every row in one constant shape: tiles of 16 rows after `probe`
found that their slots agree on this machine for this shape of weight, one row a call where they do not; activations
padded to 64 columns; attention one query at a time over the whole key buffer.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from optimized.ops.angles import Angles
from optimized.ops.kinds import ACTIVATIONS, NormKind, one_of
from optimized.ops.sight import MOST_NODES, Sight

TILE_ROWS = 16
TILE_COLUMNS = 64


class Rows:
    """Calls on natural shapes, or with `exact` by the chain rule.

    blind  the host looks at nothing, as on a GPU: what a captured cycle does, on any machine
    """

    def __init__(self, exact: bool = False, blind: bool = False) -> None:
        self.exact, self.blind = exact, blind
        self._angles = Angles()

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [M, K], weight [N, K], bias [N] or None -> [M, N]"""
        return self._rows(lambda rows: _linear(rows, weight, bias), x, weight)

    def act_mul(self, gate: Tensor, up: Tensor, act: str = "silu") -> Tensor:
        """gate [M, I], up [M, I] -> [M, I]"""
        one_of(act, ACTIVATIONS, "act")
        if not self.exact:
            return _activation(gate, act).mul_(up)
        return self._elementwise(lambda rows: _activation(rows, act), gate) * up

    def _turn(
        self, x: Tensor, positions: Tensor, inv_freq: Tensor, scale: float, num_positions: int, interleaved: bool
    ) -> Tensor:
        """x [M, N, D], positions [M], inv_freq [R/2] -> [M, N, D]"""
        width = x.shape[2]
        turns = self._angles(inv_freq, scale, num_positions, width, x.dtype, interleaved)
        cos, sin = turns.cos_sin.index_select(0, positions.clamp_min(0))[:, :, None].unbind(1)  # [M, 1, D] each
        whole = 2 * inv_freq.shape[0] == width and not interleaved
        partner = x.roll(width // 2, -1) if whole else x.index_select(-1, turns.partner)
        return x * cos + partner * sin if self.exact else torch.addcmul(x * cos, partner, sin)

    def _normed(self, x: Tensor, weight: Tensor | None, eps: float, kind: NormKind) -> Tensor:
        """x [M, H], weight [H] or None -> [M, H]"""
        return self._rows(lambda rows: _rmsnorm(rows, weight, eps, kind), x)

    def _elementwise(self, call: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """x [M, I] -> [M, I]"""
        width = x.shape[1]
        if not self.exact:
            return call(x)
        return self._rows(lambda rows: call(F.pad(rows, (0, -width % TILE_COLUMNS)))[:, :width], x)

    def _rows(self, call: Callable[[Tensor], Tensor], x: Tensor, weight: Tensor | None = None) -> Tensor:
        """What `call` gives for x; exact: computed in one constant shape of rows.

        x       [M, K]
        weight  [N, K]  the factor of a product; None: `call` works row by row
        ->      [M, N]
        """
        if not self.exact:
            return call(x)
        # several threads would cut a tile by rows; a single row is cut the same way every time
        tiled = torch.get_num_threads() == 1 and (weight is None or probe(x.dtype, *weight.shape))
        size = TILE_ROWS if tiled else 1
        # padding copies, so that every tile begins at an aligned address
        tiles = F.pad(x, (0, 0, 0, -x.shape[0] % size)).split(size)
        return torch.cat([call(tile.clone()) for tile in tiles])[: x.shape[0]]


@functools.cache
def probe(dtype: torch.dtype, num_out: int = 64, num_in: int = 64) -> bool:
    """Whether a row of a 16-row product has the same bits in every slot and company here, with one thread.

    Asked for every shape of weight: the same library takes different paths for different shapes.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        noise = torch.Generator().manual_seed(num_out * num_in)
        weight = torch.randn(num_out, num_in, generator=noise).to(dtype)
        # another order of a sum shows in some of its results only, so narrow products are asked more often
        tries = max(2, min(64, 4096 // num_out))
        return all(
            _slots_agree(torch.randn(TILE_ROWS, num_in, generator=noise).to(dtype), weight) for _ in range(tries)
        )
    finally:
        torch.set_num_threads(threads)


def _slots_agree(tile: Tensor, weight: Tensor) -> bool:
    """tile [M, K], weight [N, K]"""
    alike = F.linear(tile[:1].repeat(TILE_ROWS, 1), weight)
    return torch.equal(alike, alike[:1].expand_as(alike)) and torch.equal(F.linear(tile, weight)[0], alike[0])


def wide_type(dtype: torch.dtype) -> torch.dtype:
    """What sums are kept in: float32, and float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def visible(
    positions: Tensor, num_slots: int, window: int | None, ends: Tensor | None = None, sight: Sight | None = None
) -> Tensor:
    """positions [B, T], ends [B, T] or None -> [B, T, S]"""
    slot, own = _slot_numbers(num_slots, positions.device), positions[..., None]
    seen = slot <= (own if ends is None else ends[..., None])
    seen = seen if window is None else seen & (slot > own - window)
    if sight is None:
        return seen
    node = slot - sight.first[:, None, None]  # [B, 1, S]
    named = (sight.words(window)[..., None] >> node.clamp(0, MOST_NODES - 1)) & 1
    return torch.where(node < 0, seen, (named == 1) & (node < MOST_NODES))


def attend_by_query(q: Tensor, k_cache: Tensor, v_cache: Tensor, seen: Tensor, scale: float) -> Tensor:
    """q [B, T, N, D], k_cache [B, S, G, D], v_cache [B, S, G, Dv], seen [B, T, S] -> [B, T, N, Dv]"""
    wide, kv_heads = wide_type(q.dtype), k_cache.shape[2]
    out = q.new_empty(*q.shape[:3], v_cache.shape[3])
    for b in range(q.shape[0]):
        # copies, so that every sequence's keys begin at an aligned address
        k, v = (cache[b].transpose(0, 1).to(wide, copy=True).contiguous() for cache in (k_cache, v_cache))  # [G, S, D]
        for t in range(q.shape[1]):
            query = q[b, t].unflatten(0, (kv_heads, -1)).to(wide, copy=True)  # [G, N/G, D]
            score = (torch.bmm(query, k.transpose(1, 2)) * scale).masked_fill(~seen[b, t], float("-inf"))
            # a query that sees nothing has the softmax of nothing; the second fill makes it zero
            weight = score.softmax(-1).masked_fill(~seen[b, t], 0)
            out[b, t] = torch.bmm(weight, v).flatten(0, 1).to(q.dtype)
    return out


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if weight.is_mkldnn:
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


def _activation(x: Tensor, act: str) -> Tensor:
    return F.silu(x) if act == "silu" else F.gelu(x, approximate="tanh")


def _rmsnorm(x: Tensor, weight: Tensor | None, eps: float, kind: NormKind) -> Tensor:
    width, wide = x.shape[-1:], wide_type(x.dtype)
    if weight is None:
        return F.rms_norm(x, width, None, eps)
    factor = weight.to(wide) + 1 if kind.plus_one else weight
    if kind.cast_first:
        # the weight stays outside: inside, half precision would round once instead of twice
        return (F.rms_norm(x, width, None, eps) * factor).to(x.dtype)
    return F.rms_norm(x.to(wide), width, factor.to(wide), eps).to(x.dtype)


@functools.lru_cache(maxsize=64)
def _slot_numbers(num_slots: int, device: torch.device) -> Tensor:
    return torch.arange(num_slots, device=device)
