"""Mixtures of experts as PyTorch calls. Signatures and shapes: `optimized/ops/table.py`.

An expert is read once for all rows that chose it. Which expert a row chose is known to the host on a CPU, where host
and device are one; on a GPU the rows are sorted by expert and multiplied in groups, and the host learns nothing.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from optimized.ops.kinds import ACTIVATIONS, ROUTERS, choosable, one_of
from optimized.ops.rows import Rows, wide_type

ALIGNED_BYTES = 64


class AtenMixture(Rows):
    """Routers and experts."""

    def route_softmax(
        self,
        x: Tensor,
        weight: Tensor,
        num_chosen: int,
        renormalise: bool,
        scale: Tensor | None = None,
        wide: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """x [M, H], weight [E, H], scale [E] or None -> [M, P], [M, P]"""
        choosable(weight.shape[0], 1, 1, num_chosen)
        scores = self.linear(x, weight)
        likely = self._rows(lambda rows: rows.softmax(-1), scores.to(wide_type(scores.dtype)))
        ids = _first_best(likely, num_chosen)
        weights = likely.gather(1, ids)
        if renormalise:
            weights = weights / _across(weights)[:, None]
        if scale is not None:
            weights = weights * scale[ids]
        return ids, weights if wide else weights.to(scores.dtype)

    def route_grouped(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        groups: int,
        top_groups: int,
        num_chosen: int,
        renormalise: bool,
        scaling: float,
        kind: str,
        num_shared: int = 0,
    ) -> tuple[Tensor, Tensor]:
        """x [M, H], weight [E, H], bias [E] or None -> [M, P+num_shared], [M, P+num_shared]"""
        size = choosable(weight.shape[0], groups, top_groups, num_chosen)
        sigmoid = one_of(kind, ROUTERS, "kind") == "sigmoid"
        logits = self.linear(x.to(wide_type(x.dtype)), weight)
        likely = self._elementwise(torch.sigmoid, logits) if sigmoid else self._rows(lambda r: r.softmax(-1), logits)
        choice = likely if bias is None else likely + bias
        if top_groups < groups:
            by_group = choice.unflatten(1, (groups, size))
            best = by_group.topk(min(2, size) if sigmoid else 1).values
            left = torch.ones(best.shape[:2], dtype=torch.bool, device=best.device)
            left.scatter_(1, _first_best(_across(best), top_groups), False)
            choice = by_group.masked_fill(left[:, :, None], float("-inf")).flatten(1)
        ids = _first_best(choice, num_chosen)
        weights = likely.gather(1, ids)
        if renormalise:
            weights = weights / (_across(weights)[:, None] + 1e-20)
        shared = torch.arange(weight.shape[0], weight.shape[0] + num_shared, device=x.device).expand(len(x), -1)
        return torch.cat([ids, shared], 1), F.pad(weights * scaling, (0, num_shared), value=1.0)

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
        """x [M, H], ids [M, P], weights [M, P], gate_up [E, 2I, H], down [E, H, I] -> [M, H]"""
        one_of(act, ACTIVATIONS, "act")
        local = ids if first is None else ids - first
        if not (x.is_cuda or self.blind):
            out = self._by_expert(x, local, gate_up, down, act)
        elif groupable(x, gate_up, down):
            out = self._by_group(x, local, gate_up, down, act)
        else:
            out = self._densely(x, local, gate_up, down, act)
        weighted = out * weights[:, :, None].to(wide_type(x.dtype))
        return _across(weighted.transpose(1, 2)).to(x.dtype)

    def _by_expert(self, x: Tensor, local: Tensor, gate_up: Tensor, down: Tensor, act: str) -> Tensor:
        """x [M, H], local [M, P], gate_up [E, 2I, H], down [E, H, I] -> [M, P, H]"""
        num_chosen, places = local.shape[1], {}
        for place, expert in enumerate(local.flatten().tolist()):
            places.setdefault(expert, []).append(place)
        out = x.new_zeros(local.numel(), x.shape[1])
        for expert in sorted(places.keys() & set(range(gate_up.shape[0]))):
            index = torch.tensor(places[expert])
            one = [w if w.data_ptr() % ALIGNED_BYTES == 0 else w.clone() for w in (gate_up[expert], down[expert])]
            out.index_copy_(0, index, self._expert(x[index // num_chosen], act, *(self._by(weight) for weight in one)))
        return out.unflatten(0, local.shape)

    def _by_group(self, x: Tensor, local: Tensor, gate_up: Tensor, down: Tensor, act: str) -> Tensor:
        """x [M, H], local [M, P], gate_up [E, 2I, H], down [E, H, I] -> [M, P, H]"""
        num_experts = gate_up.shape[0]
        # who belongs to another rank goes last, behind every group
        flat = torch.where((local >= 0) & (local < num_experts), local, num_experts).flatten()
        chosen, order = flat.sort(stable=True)
        numbers = torch.arange(num_experts, device=x.device)
        ends = torch.searchsorted(chosen, numbers, right=True).to(torch.int32)
        products = [functools.partial(_grouped, weight=weight, ends=ends) for weight in (gate_up, down)]
        mixed = self._expert(x[order // local.shape[1]], act, *products)
        out = torch.empty_like(mixed).index_copy_(0, order, mixed)
        # rows behind every group were never computed
        return out.masked_fill_((flat == num_experts)[:, None], 0).unflatten(0, local.shape)

    def _densely(self, x: Tensor, local: Tensor, gate_up: Tensor, down: Tensor, act: str) -> Tensor:
        """x [M, H], local [M, P], gate_up [E, 2I, H], down [E, H, I] -> [M, P, H]"""
        out = x.new_zeros(*local.shape, x.shape[1])
        for expert in range(gate_up.shape[0]):
            y = self._expert(x, act, self._by(gate_up[expert]), self._by(down[expert]))
            out = torch.where((local == expert)[:, :, None], y[:, None], out)
        return out

    def _expert(
        self, x: Tensor, act: str, gate_up: Callable[[Tensor], Tensor], down: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """x [M, H] -> [M, H]"""
        return down(self.act_mul(*gate_up(x).chunk(2, -1), act))

    def _by(self, weight: Tensor) -> Callable[[Tensor], Tensor]:
        return functools.partial(self.linear, weight=weight)


def groupable(x: Tensor, gate_up: Tensor, down: Tensor) -> bool:
    """Whether the library's grouped product takes these: bfloat16, rows of whole 16 bytes.

    x        [M, H]
    gate_up  [E, 2I, H]
    down     [E, H, I]
    """
    return x.dtype == torch.bfloat16 and all(weight.shape[2] % 8 == 0 for weight in (gate_up, down))


def _grouped(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """x [M, K] sorted by expert, weight [E, N, K], ends [E] -> [M, N]"""
    return F.grouped_mm(x, weight.transpose(1, 2), offs=ends)


def _first_best(values: Tensor, num_chosen: int) -> Tensor:
    """Places of the largest, best first, lowest place among equals.

    values  [M, E]
    ->      [M, P]
    """
    return values.sort(dim=-1, descending=True, stable=True).indices[:, :num_chosen]


def _across(parts: Tensor) -> Tensor:
    """The sum over the last dimension, first to last: an order that no shape changes.

    parts  [..., P]
    ->     [...]
    """
    return functools.reduce(torch.add, parts.unbind(-1))
