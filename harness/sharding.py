"""Who holds which row of a weight under tensor parallel, written out row by row.

One table is the whole truth: `shard_map` lists for every rank the source index of each index of its shard, PADDING
where the shard holds a zero row. `split` gathers by that table, `join` scatters by it, `owner` looks a token up in
it. This is on purpose a second statement of the rule in `optimized/parallel.py`, which computes offsets instead of
lists.

    vocab       layout padded64: P = V rounded up to 64, and to 64 W if W does not divide that; rank r holds rows
                [r P/W, (r+1) P/W) cut at V, then zero rows up to P/W
                layout ceil: s = ceil(V / W); rank r holds [r s, (r+1) s) cut at V, without padding
                layout full: every rank holds every row
    column      output features (dim 0), equal contiguous runs; a merged weight (`parts`) is cut part by part
    row         input features (dim 1), equal contiguous runs
    heads       whole heads of output features (dim 0); with more ranks than heads G, rank r holds head r // (W / G)
    experts     whole experts (dim 0), equal contiguous runs
    replicated  everything, everywhere
"""

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

KINDS = ("vocab", "column", "row", "heads", "experts", "replicated")
LAYOUTS = ("padded64", "ceil", "full")
PADDING = -1

Rows = tuple[int, ...]


class ShardError(ValueError):
    """A weight that cannot be split or joined as asked, or shards handed to a reader of another layout."""


@lru_cache(maxsize=512)
def shard_map(
    kind: str, size: int, ranks: int, *, layout: str = "padded64", heads: int | None = None, parts: int = 1
) -> tuple[Rows, ...]:
    """For each rank, the source index of each index of its shard along the split dim.

    size    length of the split dim: V, output features, input features or experts
    heads   number of heads in it (kind "heads")
    parts   equal parts of a merged weight, each split alone (kind "column": gate and up are 2)
    """
    if kind not in KINDS:
        raise ShardError(f"kind {kind!r} is not one of {', '.join(KINDS)}")
    if ranks < 1:
        raise ShardError(f"ranks must be at least 1, got {ranks}")
    if kind == "replicated":
        return tuple(tuple(range(size)) for _ in range(ranks))
    if kind == "vocab":
        return _vocab(size, ranks, layout)
    if kind == "heads":
        return _heads(size, ranks, heads)
    return _runs(kind, size, ranks, parts)


def _vocab(vocab: int, ranks: int, layout: str) -> tuple[Rows, ...]:
    if layout not in LAYOUTS:
        raise ShardError(f"vocabulary layout {layout!r} is not one of {', '.join(LAYOUTS)}")
    if layout == "full":
        return tuple(tuple(range(vocab)) for _ in range(ranks))
    if layout == "ceil":
        rows = -(-vocab // ranks)
        return tuple(tuple(i for i in range(r * rows, (r + 1) * rows) if i < vocab) for r in range(ranks))
    rows = padded_vocab(vocab, ranks) // ranks
    return tuple(tuple(i if i < vocab else PADDING for i in range(r * rows, (r + 1) * rows)) for r in range(ranks))


def padded_vocab(vocab: int, ranks: int) -> int:
    """P of layout padded64."""
    padded = vocab
    while padded % 64:
        padded += 1
    if padded % ranks:
        while padded % (64 * ranks):
            padded += 64
    return padded


def _heads(size: int, ranks: int, heads: int | None) -> tuple[Rows, ...]:
    if heads is None or heads < 1:
        raise ShardError('kind "heads" needs the number of heads in the weight')
    if size % heads:
        raise ShardError(f"{size} features are not {heads} whole heads")
    dim = size // heads
    if ranks <= heads:
        if heads % ranks:
            raise ShardError(f"{heads} heads do not divide over {ranks} ranks")
        each = heads // ranks
        held = [range(rank * each, (rank + 1) * each) for rank in range(ranks)]
    else:
        if ranks % heads:
            raise ShardError(f"{ranks} ranks are not a multiple of {heads} key/value heads, so no equal replicas exist")
        replicas = ranks // heads
        held = [range(rank // replicas, rank // replicas + 1) for rank in range(ranks)]
    return tuple(tuple(head * dim + d for head in mine for d in range(dim)) for mine in held)


def _runs(kind: str, size: int, ranks: int, parts: int) -> tuple[Rows, ...]:
    if parts < 1 or size % parts:
        raise ShardError(f"{size} {kind} features are not {parts} equal parts")
    part = size // parts
    if part % ranks:
        of = f" in each of {parts} parts" if parts > 1 else ""
        raise ShardError(f"{kind}: {part} rows or columns{of} do not divide over {ranks} ranks")
    each = part // ranks
    return tuple(tuple(p * part + rank * each + i for p in range(parts) for i in range(each)) for rank in range(ranks))


def split_dim(kind: str, tensor: Tensor) -> int:
    """The dim that a kind cuts."""
    if kind != "row":
        return 0
    if tensor.dim() < 2:
        raise ShardError("a row-parallel bias is not split: it is added once, after the sum over ranks")
    return 1


def split(
    tensor: Tensor,
    kind: str,
    rank: int,
    ranks: int,
    *,
    layout: str = "padded64",
    heads: int | None = None,
    parts: int = 1,
) -> Tensor:
    """Rank's own copy of its shard; padding rows are zero."""
    if not 0 <= rank < ranks:
        raise ShardError(f"rank {rank} is not one of {ranks} ranks")
    dim = split_dim(kind, tensor)
    rows = shard_map(kind, tensor.shape[dim], ranks, layout=layout, heads=heads, parts=parts)[rank]
    index = torch.tensor(rows, dtype=torch.int64, device=tensor.device)
    real = (index != PADDING).nonzero().flatten()
    shape = list(tensor.shape)
    shape[dim] = len(rows)
    shard = tensor.new_zeros(shape)
    return shard.index_copy_(dim, real, tensor.index_select(dim, index[real]))


def join(
    shards: Sequence[Tensor],
    kind: str,
    *,
    size: int | None = None,
    layout: str = "padded64",
    heads: int | None = None,
    parts: int = 1,
) -> Tensor:
    """The whole weight from the shards of all ranks, in rank order; copies of one row must be bit-equal.

    size    length of the split dim; may be left out for column, row, experts and replicated
    """
    ranks = len(shards)
    if not ranks:
        raise ShardError("no shards to join")
    dim = split_dim(kind, shards[0])
    if size is None:
        size = _joined_size(shards, kind, dim)
    held = shard_map(kind, size, ranks, layout=layout, heads=heads, parts=parts)
    shape = list(shards[0].shape)
    shape[dim] = size
    whole = shards[0].new_zeros(shape)
    written = torch.zeros(size, dtype=torch.bool, device=whole.device)
    for rank, (shard, rows) in enumerate(zip(shards, held, strict=True)):
        if shard.shape[dim] != len(rows):
            raise ShardError(
                f"rank {rank} of {ranks} holds {shard.shape[dim]} of {kind}, expected {len(rows)} ({layout})"
            )
        index = torch.tensor(rows, dtype=torch.int64, device=whole.device)
        real = (index != PADDING).nonzero().flatten()
        source, target = shard.index_select(dim, real), index[real]
        _check_copies(whole, source, target, written, dim, rank)
        whole.index_copy_(dim, target, source)
        written[target] = True
    return whole


def _joined_size(shards: Sequence[Tensor], kind: str, dim: int) -> int:
    if kind == "replicated":
        return shards[0].shape[dim] if shards[0].dim() else 1
    if kind in ("vocab", "heads"):
        raise ShardError(f"joining {kind} needs size=: shards of padded or repeated rows do not tell it")
    return sum(shard.shape[dim] for shard in shards)


def _check_copies(whole: Tensor, source: Tensor, target: Tensor, written: Tensor, dim: int, rank: int) -> None:
    """Rows that an earlier rank also holds must be the same bits."""
    again = written[target].nonzero().flatten()
    before, now = whole.index_select(dim, target[again]), source.index_select(dim, again)
    if not torch.equal(before.contiguous().view(torch.uint8), now.contiguous().view(torch.uint8)):
        raise ShardError(f"rank {rank} holds other values than an earlier rank for rows that both hold")


def owner(token: int, vocab: int, ranks: int, layout: str = "padded64") -> tuple[int, int]:
    """(rank, row in its shard) of a token's embedding; the lowest rank where every rank holds it."""
    if not 0 <= token < vocab:
        raise ShardError(f"token {token} is not in a vocabulary of {vocab}")
    return _places(vocab, ranks, layout)[token]


@lru_cache(maxsize=64)
def _places(vocab: int, ranks: int, layout: str) -> dict[int, tuple[int, int]]:
    places: dict[int, tuple[int, int]] = {}
    for rank, rows in enumerate(shard_map("vocab", vocab, ranks, layout=layout)):
        for row, token in enumerate(rows):
            if token != PADDING:
                places.setdefault(token, (rank, row))
    return places


def check_hand_over(given: str, taken: str, vocab: int, ranks: int) -> None:
    """Shards of layout `given` may be read as layout `taken` only if every rank finds every token in the same row."""
    gives = shard_map("vocab", vocab, ranks, layout=given)
    takes = shard_map("vocab", vocab, ranks, layout=taken)
    for rank, (here, there) in enumerate(zip(gives, takes, strict=True)):
        if here != there:
            row = next(
                (i for i, (a, b) in enumerate(zip(here, there, strict=False)) if a != b), min(len(here), len(there))
            )
            raise ShardError(
                f"a table of {vocab} rows over {ranks} ranks is given as {given} and read as {taken}: "
                f"rank {rank} row {row} is {_token(here, row)} in one and {_token(there, row)} in the other"
            )


def _token(rows: Rows, row: int) -> str:
    if row >= len(rows):
        return "absent"
    return "padding" if rows[row] == PADDING else f"token {rows[row]}"
