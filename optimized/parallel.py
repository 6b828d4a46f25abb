"""Tensor parallel: who holds what, and the layers that load their own shard of a full weight.

    vocab       P = V rounded up to 64, and to 64 W if W does not divide that; rank r holds rows
                [r P/W, (r+1) P/W) cut at V, then zero rows
    column      output features, equal contiguous runs
    row         input features, equal contiguous runs; partial products are summed over ranks, then the bias is added
    heads       whole heads of output features; with more ranks than key/value heads G, rank r holds head r // (W/G)
    replicated  everything, everywhere

A layer packs what one kernel multiplies by (q | k | v, gate | up) and remembers where each canonical tensor lies, so
that `unpack` gives back the shards that `load` was given. Parameters are NaN until they are written.
"""

from typing import Any, NamedTuple, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from optimized.ops.table import Ops


class ShardError(ValueError):
    """A weight that cannot be split as asked: heads or features that do not divide, or another shape than expected."""


class LoadError(ValueError):
    """A tensor that nobody asked for, or that was given twice."""


class Group(Protocol):
    """The ranks that share one model; every call returns a new tensor."""

    rank: int
    size: int

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """The sum over ranks."""

    def all_gather(self, tensor: Tensor, dim: int = 0) -> Tensor:
        """Every rank's tensor along `dim`, in rank order."""

    def broadcast(self, tensor: Tensor, src: int = 0) -> Tensor:
        """The tensor of rank `src`."""


class SingleRank:
    """A world of one: every call is the identity."""

    rank, size = 0, 1

    def all_reduce(self, tensor: Tensor) -> Tensor:
        return tensor

    def all_gather(self, tensor: Tensor, dim: int = 0) -> Tensor:
        return tensor

    def broadcast(self, tensor: Tensor, src: int = 0) -> Tensor:
        return tensor


class DistributedGroup:
    """A group of torch.distributed: gloo on CPUs, NCCL (which CUDA graphs capture) on GPUs."""

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group, self.rank, self.size = group, dist.get_rank(group), dist.get_world_size(group)

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """The sum over ranks, in the backend's own order."""
        total = tensor.clone()
        dist.all_reduce(total, group=self.group)
        return total

    def all_gather(self, tensor: Tensor, dim: int = 0) -> Tensor:
        """Every rank's tensor along `dim`, in rank order."""
        shards = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(self.size)]
        dist.all_gather(shards, tensor.contiguous(), group=self.group)
        return torch.cat(shards, dim)

    def broadcast(self, tensor: Tensor, src: int = 0) -> Tensor:
        """The tensor of rank `src` of this group."""
        copy = tensor.clone()
        dist.broadcast(copy, src if self.group is None else dist.get_global_rank(self.group, src), group=self.group)
        return copy


def padded_vocab(vocab: int, ranks: int) -> int:
    """P: the rows that all ranks together hold."""
    padded = -(-vocab // 64) * 64
    return padded if padded % ranks == 0 else -(-vocab // (64 * ranks)) * 64 * ranks


def vocab_run(vocab: int, rank: int, ranks: int) -> slice:
    """The real rows of a rank's shard; empty where it holds padding alone."""
    rows = padded_vocab(vocab, ranks) // ranks
    return slice(min(rank * rows, vocab), min((rank + 1) * rows, vocab))


def equal_run(size: int, rank: int, ranks: int, what: str) -> slice:
    """A rank's run of `size` features or heads; ShardError where ranks do not divide it."""
    if size % ranks:
        raise ShardError(f"{size} {what} do not divide over {ranks} ranks")
    return slice(rank * (size // ranks), (rank + 1) * (size // ranks))


def kv_run(kv_heads: int, rank: int, ranks: int) -> slice:
    """The key/value heads that a rank's query heads read."""
    if ranks <= kv_heads:
        return equal_run(kv_heads, rank, ranks, "key/value heads")
    if ranks % kv_heads:
        raise ShardError(f"{ranks} ranks are no multiple of {kv_heads} key/value heads, so no equal replicas exist")
    head = rank // (ranks // kv_heads)
    return slice(head, head + 1)


def sum_in_rank_order(group: Group, partial: Tensor) -> Tensor:
    """The sum of partial products; its bits depend on the values alone, never on an element's place.

    partial  [M, H]
    ->       [M, H]
    """
    if group.size <= 2:
        return group.all_reduce(partial)
    # an all_reduce over three ranks or more adds in an order that depends on the element's place in the tensor
    shards = group.all_gather(partial[None])
    total = shards[0].to(torch.promote_types(partial.dtype, torch.float32))
    for shard in shards[1:]:
        total = total + shard
    return total.to(partial.dtype)


class Placement(NamedTuple):
    """What every layer of one rank's model shares."""

    ops: Ops
    group: Group
    dtype: torch.dtype
    device: torch.device | str


class Piece(NamedTuple):
    """Where one canonical tensor lies."""

    into: Tensor
    """a view of the packed parameter; rows beyond the shard are padding"""
    shape: tuple[int, ...]
    """of the canonical tensor, whole"""
    held: tuple[slice, ...]
    """this rank's part of it"""


P = TypeVar("P", bound="Part")


class Part:
    """One or more canonical tensors in the layout that a kernel reads."""

    def __init__(self, at: Placement) -> None:
        self.ops, self.group, self.dtype, self.device = at
        self.pieces: dict[str, Piece] = {}
        self.written: set[str] = set()
        self.weight = torch.empty(0)
        self.bias: Tensor | None = None
        self._packed: Tensor | None = None
        # before the names of its tensors, for a part of a model inside another
        self.prefix = ""

    def new(self, *shape: int) -> Tensor:
        """A parameter that nobody has written: NaN."""
        return torch.full(shape, float("nan"), dtype=self.dtype, device=self.device)

    def place(self, name: str, into: Tensor, shape: tuple[int, ...], *held: slice) -> None:
        """Declare a canonical tensor, how much of it this rank holds, and where."""
        self.pieces[name] = Piece(into, shape, held)

    def shard(self, name: str, full: Tensor) -> Tensor:
        """This rank's part of a full canonical tensor that was not loaded yet."""
        if name in self.written:
            raise LoadError(f"{name!r} was loaded twice")
        _, shape, held = self.pieces[name]
        if tuple(full.shape) != shape:
            raise ShardError(f"{name!r} has shape {tuple(full.shape)}, expected {shape}")
        return full[held] if held else full

    def load(self, name: str, full: Tensor) -> None:
        """Copy this rank's shard out of the full canonical tensor."""
        shard, into = self.shard(name, full), self.pieces[name].into
        into[: shard.shape[0]].copy_(shard)
        into[shard.shape[0] :].zero_()
        self.written.add(name)
        self._packed = None

    def missing(self) -> list[str]:
        """Canonical names that were not loaded."""
        return [name for name in self.pieces if name not in self.written]

    def unpack(self) -> dict[str, Tensor]:
        """This rank's shard of every canonical tensor, copied out of the packed layout."""
        return {name: piece.into.clone() for name, piece in self.pieces.items()}

    @property
    def matrix(self) -> Tensor:
        """The weight as the operations like it best; made at first use after loading."""
        if self._packed is None:
            self._packed = self.ops.pack(self.weight)
        return self._packed


class Norm(Part):
    """The weight of a norm, replicated."""

    def __init__(self, name: str, width: int, eps: float, at: Placement) -> None:
        super().__init__(at)
        self.eps, self.weight = eps, self.new(width)
        self.place(name, self.weight, (width,))

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x [M, H], residual [M, H] or None -> [M, H], [M, H]  the norm of x + residual, the sum"""
        return self.ops.add_rmsnorm(x, residual, self.weight, self.eps)


class VocabEmbedding(Part):
    """A table cut by vocabulary rows; a rank gives zeros for ids of other ranks."""

    def __init__(self, name: str, vocab: int, hidden: int, at: Placement) -> None:
        super().__init__(at)
        self.vocab, self.hidden = vocab, hidden
        self.run = vocab_run(vocab, at.group.rank, at.group.size)
        self.weight = self.new(padded_vocab(vocab, at.group.size) // at.group.size, hidden)
        self.first = None if at.group.size == 1 else at.group.rank * self.weight.shape[0]
        self.place(name, self.weight, (vocab, hidden), self.run)

    def __call__(self, ids: Tensor, scale: float | None = None) -> Tensor:
        """ids [M] -> [M, H]"""
        # one rank gives the row, the others zeros: exact in any order of adding
        return self.group.all_reduce(self.ops.embed(ids, self.weight, self.first, scale))


class VocabHead(Part):
    """A head cut by vocabulary rows; `tied` reads the table of an embedding with the same vocabulary."""

    def __init__(self, name: str, vocab: int, hidden: int, at: Placement, tied: VocabEmbedding | None = None) -> None:
        super().__init__(at)
        self.vocab, self.hidden, self.tied = vocab, hidden, tied
        self.run = vocab_run(vocab, at.group.rank, at.group.size)
        self.rows = self.run.stop - self.run.start
        if tied is None:
            self.weight = self.new(padded_vocab(vocab, at.group.size) // at.group.size, hidden)
            self.place(name, self.weight, (vocab, hidden), self.run)

    @property
    def matrix(self) -> Tensor:
        """The weight as the operations like it best; the embedding's own when tied."""
        return super().matrix if self.tied is None else self.tied.matrix

    def logits(self, x: Tensor, scale: float = 1.0) -> Tensor:
        """x [M, H] -> [M, V] over the whole vocabulary, on every rank"""
        logits = self.group.all_gather(self.ops.linear(x, self.matrix), -1)[:, : self.vocab]
        return logits if scale == 1.0 else logits * scale

    def argmax(self, x: Tensor, scale: float = 1.0) -> Tensor:
        """x [M, H] -> [M] the lowest global id among the largest logits, without gathering them"""
        if self.group.size == 1:
            return self.ops.head_argmax(x, self.matrix, self.rows, scale)[1]
        if self.rows:
            value, index = self.ops.head_argmax(x, self.matrix, self.rows, scale)
        else:
            value = x.new_full(x.shape[:1], float("-inf"), dtype=torch.promote_types(x.dtype, torch.float32))
            index = torch.zeros_like(value, dtype=torch.int64)
        # float64 holds both exactly, so that one gather does
        pair = torch.stack([value.double(), (index + self.run.start).double()])
        values, ids = self.group.all_gather(pair[None]).unbind(1)  # [W, M] each
        # the first of equal values is that of the lowest rank, which holds the lowest ids
        return ids.gather(0, values.max(0).indices[None])[0].long()


class ColumnLinear(Part):
    """Output features cut in equal runs."""

    def __init__(self, name: str, into: int, out: int, bias: bool, at: Placement) -> None:
        super().__init__(at)
        run = equal_run(out, at.group.rank, at.group.size, f"output features of {name}")
        stack(self, [(name, out, run)], into, bias)

    def __call__(self, x: Tensor) -> Tensor:
        """x [M, H] -> [M, O/W]"""
        return self.ops.linear(x, self.matrix, self.bias)


class QKVLinear(Part):
    """The query, key and value projections of this rank's heads as one weight, q | k | v."""

    def __init__(
        self, prefix: str, into: int, heads: int, kv_heads: int, head_dim: int, bias: bool, at: Placement
    ) -> None:
        super().__init__(at)
        q, kv = equal_run(heads, at.group.rank, at.group.size, "heads"), kv_run(kv_heads, at.group.rank, at.group.size)
        self.heads, self.kv_heads = q.stop - q.start, kv.stop - kv.start
        runs = [("q_proj", heads, q), ("k_proj", kv_heads, kv), ("v_proj", kv_heads, kv)]
        wide = [(prefix + n, size * head_dim, slice(r.start * head_dim, r.stop * head_dim)) for n, size, r in runs]
        stack(self, wide, into, bias)

    def __call__(self, x: Tensor) -> Tensor:
        """x [M, H] -> [M, (N+2G)*D] of this rank"""
        return self.ops.linear(x, self.matrix, self.bias)


class GateUpLinear(Part):
    """The gate and up projections of this rank as one weight, gate | up, and their activation."""

    def __init__(self, prefix: str, into: int, out: int, bias: bool, at: Placement, act: str = "silu") -> None:
        super().__init__(at)
        run, self.act = equal_run(out, at.group.rank, at.group.size, "intermediate features"), act
        stack(self, [(prefix + "gate_proj", out, run), (prefix + "up_proj", out, run)], into, bias)

    def __call__(self, x: Tensor) -> Tensor:
        """x [M, H] -> [M, I/W]"""
        return self.ops.gate_up_act(x, self.matrix, self.bias, self.act)


class RowLinear(Part):
    """Input features cut in equal runs; the replicated bias is added once, after the sum over ranks."""

    def __init__(self, name: str, into: int, out: int, bias: bool, at: Placement) -> None:
        super().__init__(at)
        run = equal_run(into, at.group.rank, at.group.size, f"input features of {name}")
        self.weight = self.new(out, run.stop - run.start)
        self.place(f"{name}.weight", self.weight, (out, into), slice(None), run)
        if bias:
            self.bias = self.new(out)
            self.place(f"{name}.bias", self.bias, (out,))

    def __call__(self, x: Tensor) -> Tensor:
        """x [M, I/W] -> [M, H]"""
        if self.group.size == 1:
            return self.ops.linear(x, self.matrix, self.bias)
        total = sum_in_rank_order(self.group, self.ops.linear(x, self.matrix))
        return total if self.bias is None else total + self.bias


class ReplicatedLinear(ColumnLinear):
    """The whole weight on every rank."""

    def __init__(self, name: str, into: int, out: int, bias: bool, at: Placement) -> None:
        Part.__init__(self, at)
        stack(self, [(name, out, slice(0, out))], into, bias)


def stack(part: Part, runs: list[tuple[str, int, slice]], into: int, bias: bool) -> None:
    """One weight of all runs (name, whole size, held rows), one below the other."""
    sizes = [run.stop - run.start for _, _, run in runs]
    part.weight = part.new(sum(sizes), into)
    part.bias = part.new(sum(sizes)) if bias else None
    first = 0
    for (name, out, run), size in zip(runs, sizes, strict=True):
        rows = slice(first, first + size)
        part.place(f"{name}.weight", part.weight[rows], (out, into), run)
        if part.bias is not None:
            part.place(f"{name}.bias", part.bias[rows], (out,), run)
        first += size


class PackedModel:
    """A model made of parts; every canonical name belongs to one of them."""

    def __init__(self) -> None:
        self.parts: list[Part] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.forward(*args, **kwargs)

    def own(self, part: P) -> P:
        """Register a part whose tensors this model's checkpoint holds."""
        self.parts.append(part)
        return part

    def disown(self, part: Part) -> None:
        """Forget a part that another model's takes the place of."""
        self.parts = [other for other in self.parts if other is not part]

    def names(self) -> list[str]:
        """The canonical name of every tensor that `load` wants, once each."""
        return [part.prefix + name for part in self.parts for name in part.pieces]

    def load(self, name: str, tensor: Tensor) -> None:
        """Take this rank's shard of a full canonical tensor; errors: LoadError, ShardError."""
        for part in self.parts:
            if name.startswith(part.prefix) and (inner := name.removeprefix(part.prefix)) in part.pieces:
                return part.load(inner, tensor)
        raise LoadError(f"{name!r} is no tensor of this model, which reads {', '.join(self.names())}")

    def parameters_missing(self) -> list[str]:
        """Canonical names that were not loaded yet; their parameters are NaN."""
        return [part.prefix + name for part in self.parts for name in part.missing()]

    def unpack(self) -> dict[str, Tensor]:
        """This rank's shard of every canonical tensor, bit for bit; vocabulary shards keep their zero rows."""
        return {part.prefix + name: shard for part in self.parts for name, shard in part.unpack().items()}
