"""The operations as PyTorch calls. Signatures and shapes: `optimized/ops/table.py`.

Natural shapes are for speed: few calls, weights packed for oneDNN where that makes four rows cost what one costs.
BLAS bits, however, depend on the number of rows and, on some machines, on the slot of a row in its tile, and those of
silu on the place in the vector. `exact` therefore computes every row in one constant shape: tiles of 16 rows after
`probe` found that their slots agree on this machine for this shape of weight, one row a call where they do not;
activations padded to 64 columns; attention one query at a time over the whole key buffer.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from optimized.ops.angles import Angles
from optimized.ops.chance import uniform
from optimized.ops.slots import checked

TILE_ROWS = 16
TILE_COLUMNS = 64
# below this many numbers the packed product's longer way to the kernel costs more than it saves (float32)
PACK_FROM = 1 << 17


class Aten:
    """PyTorch calls; on a CPU with natural shapes, or with `exact` by the chain rule."""

    def __init__(self, exact: bool = False) -> None:
        self.exact = exact
        self._angles = Angles()

    def pack(self, weight: Tensor) -> Tensor:
        """weight [N, K] -> [N, K]"""
        return weight if self.exact or not _packs(weight) else torch.ops.mkldnn._reorder_linear_weight(weight, 4)

    def embed(self, ids: Tensor, table: Tensor, first: int | None = None) -> Tensor:
        """ids [M], table [Vr, H] -> [M, H]"""
        if first is None:
            return table.index_select(0, ids)
        row = ids - first
        outside = (row < 0) | (row >= table.shape[0])
        return table.index_select(0, row.clamp_(0, table.shape[0] - 1)).masked_fill_(outside[:, None], 0)

    def add_rmsnorm(self, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """x [M, H], residual [M, H] or None, weight [H] -> [M, H], [M, H]"""
        total = x if residual is None else x + residual
        return self._rows(lambda rows: _rmsnorm(rows, weight, eps), total), total

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [M, K], weight [N, K], bias [N] or None -> [M, N]"""
        return self._rows(lambda rows: _linear(rows, weight, bias), x, weight)

    def gate_up_act(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [M, K], weight [2I, K], bias [2I] or None -> [M, I]"""
        gate, up = self.linear(x, weight, bias).chunk(2, -1)
        if not self.exact:
            return F.silu(gate).mul_(up)
        width = gate.shape[1]
        return self._rows(lambda rows: F.silu(F.pad(rows, (0, -width % TILE_COLUMNS)))[:, :width], gate) * up

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
        """qkv [M, (N+2G)*D], positions [M], slots [M], caches [B, S, G, D] -> q [M, N, D]"""
        num_slots, kv_heads, width = k_cache.shape[1:]
        slots = checked(slots, qkv.shape[0])
        heads = qkv.view(qkv.shape[0], -1, width)  # [M, N+2G, D]
        q_heads = heads.shape[1] - 2 * kv_heads
        x = heads[:, : q_heads + kv_heads]
        if q_norm is not None or k_norm is not None:
            x = torch.cat([self._headnorm(x[:, :q_heads], q_norm, eps), self._headnorm(x[:, q_heads:], k_norm, eps)], 1)
        turns = self._angles(inv_freq, rope_scale, num_slots, width, qkv.dtype)
        cos, sin = turns.cos_sin.index_select(0, positions.clamp_min(0))[:, :, None].unbind(1)  # [M, 1, D] each
        whole = 2 * inv_freq.shape[0] == width
        partner = x.roll(width // 2, -1) if whole else x.index_select(-1, turns.partner)
        turned = x * cos + partner * sin if self.exact else torch.addcmul(x * cos, partner, sin)
        k_cache.view(-1, kv_heads, width).index_copy_(0, slots, turned[:, q_heads:])
        v_cache.view(-1, kv_heads, width).index_copy_(0, slots, heads[:, q_heads + kv_heads :])
        return turned[:, :q_heads]

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
        """q [B, T, N, D], caches [B, S, G, D], positions [B, T] -> [B, T, N*D]"""
        if self.exact:
            return _attend_by_query(q, k_cache, v_cache, _visible(positions, k_cache.shape[1], window), scale)
        num_slots = min(num_slots or k_cache.shape[1], k_cache.shape[1])
        seen = _visible(positions, num_slots, window)
        k, v = k_cache[:, :num_slots].transpose(1, 2), v_cache[:, :num_slots].transpose(1, 2)
        out = F.scaled_dot_product_attention(
            q.transpose(1, 2), k, v, attn_mask=seen[:, None], scale=scale, enable_gqa=True
        )
        return out.transpose(1, 2).flatten(2)

    def head_argmax(self, x: Tensor, weight: Tensor, rows: int, scale: float = 1.0) -> tuple[Tensor, Tensor]:
        """x [M, H], weight [Vr, H] -> value [M], index [M]"""
        logits = self.linear(x, weight)[:, :rows]
        value, index = (logits if scale == 1.0 else logits * scale).max(-1)
        return (value if value.dtype == torch.float64 else value.float()), index

    def argmax(self, logits: Tensor) -> Tensor:
        """logits [M, V] -> [M]"""
        # `max` promises the first of equal values on every device
        return logits.max(-1).indices

    def accept_greedy(self, drafted: Tensor, chosen: Tensor) -> Tensor:
        """drafted [B, K], chosen [B, K+1] -> [B]"""
        return (drafted == chosen[:, :-1]).cumprod(-1).sum(-1)

    def gather_rows(self, x: Tensor, index: Tensor) -> Tensor:
        """x [B, T, C], index [B] -> [B, C]"""
        return x.gather(1, index.view(-1, 1, 1).expand(-1, 1, x.shape[2]))[:, 0]

    def uniform(self, seed: Tensor, sequence: Tensor, position: Tensor, stream: int) -> Tensor:
        """seed [1], sequence [B], position [B] or [B, T] -> like position"""
        return uniform(seed, sequence, position, stream)

    def _headnorm(self, x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
        """x [M, N, D], weight [D] or None -> [M, N, D]"""
        if weight is None:
            return x
        return self._rows(lambda rows: _rmsnorm(rows, weight, eps), x.flatten(0, 1)).view_as(x)

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


def _packs(weight: Tensor) -> bool:
    if weight.device.type != "cpu" or weight.is_mkldnn or not torch.backends.mkldnn.is_available():
        return False
    if weight.dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return weight.dtype == torch.float32 and weight.numel() >= PACK_FROM


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if weight.is_mkldnn:
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


def _rmsnorm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    # the weight stays outside: inside, half precision would round once instead of twice
    return F.rms_norm(x, weight.shape, None, eps) * weight


@functools.lru_cache(maxsize=64)
def _slot_numbers(num_slots: int, device: torch.device) -> Tensor:
    return torch.arange(num_slots, device=device)


def _visible(positions: Tensor, num_slots: int, window: int | None) -> Tensor:
    """positions [B, T] -> [B, T, S]"""
    slot, last = _slot_numbers(num_slots, positions.device), positions[..., None]
    seen = slot <= last
    return seen if window is None else seen & (slot > last - window)


def _attend_by_query(q: Tensor, k_cache: Tensor, v_cache: Tensor, seen: Tensor, scale: float) -> Tensor:
    """q [B, T, N, D], caches [B, S, G, D], seen [B, T, S] -> [B, T, N*D]"""
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    kv_heads, out = k_cache.shape[2], torch.empty_like(q)
    for b in range(q.shape[0]):
        # copies, so that every sequence's keys begin at an aligned address
        k, v = (cache[b].transpose(0, 1).to(wide, copy=True).contiguous() for cache in (k_cache, v_cache))  # [G, S, D]
        for t in range(q.shape[1]):
            query = q[b, t].unflatten(0, (kv_heads, -1)).to(wide, copy=True)  # [G, N/G, D]
            score = (torch.bmm(query, k.transpose(1, 2)) * scale).masked_fill(~seen[b, t], float("-inf"))
            # a query that sees nothing has the softmax of nothing; the second fill makes it zero
            weight = score.softmax(-1).masked_fill(~seen[b, t], 0)
            out[b, t] = torch.bmm(weight, v).flatten(0, 1).to(q.dtype)
    return out.flatten(2)
