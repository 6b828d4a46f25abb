"""The floor of a cycle: bytes that must be read and operations that must be done, over what the machine reaches.

One pass of a model over M = B*q rows reads

    every matrix and norm once                     a table only by the M rows that are looked up
    the head once                                  a tied head is the table, and is counted once
    of E experts, P a token, E (1 - (1 - P/E)^M)   expected distinct ones where routing is uniform; shared ones always
    keys and values of every sequence once         a sliding layer those within its window

and does two operations a parameter and row. A cycle is a verify over K + 1 rows a sequence and K draft steps, the first
of which also reads what fuses the target's states. Activations are left out. No version runs faster than the larger of
bytes over bandwidth and operations over the rate of a matrix product. Letters: reference/README.md.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

from optimized.drafts.gemma4_assistant import OrderedHead
from optimized.experts import Experts
from optimized.parallel import Part, Piece, VocabEmbedding, VocabHead
from optimized.targets.gemma4 import WholeExperts
from suites.benchmarks.shapes import Built


class Ceilings(NamedTuple):
    """What one machine reached in one run."""

    copy: float
    """bytes/s, read and written, of a copy between two large buffers"""
    read: float
    """bytes/s of a reduction"""
    matmul: float
    """FLOP/s of a large matrix product of random numbers"""


class Traffic(NamedTuple):
    """What one pass must read and do."""

    weights: float
    """bytes"""
    keys: float
    """bytes"""
    flops: float

    def floor(self, ceilings: Ceilings) -> float:
        """Seconds."""
        return max((self.weights + self.keys) / ceilings.copy, self.flops / ceilings.matmul)


class Pass(NamedTuple):
    """One pass of a model."""

    batch: int
    queries: int
    """rows a sequence"""
    length: int
    """slots that stand before"""

    @property
    def rows(self) -> int:
        return self.batch * self.queries


def distinct(experts: int, chosen: int, rows: float) -> float:
    """Expected number of experts that so many rows touch together, each row choosing `chosen` of them at random."""
    return experts * (1.0 - (1.0 - chosen / experts) ** rows)


def decode(built: Built, batch: int) -> tuple[Traffic, ...]:
    """The passes of a step that decodes plainly."""
    return (target_pass(built, Pass(batch, 1, built.shape.length)),)


def cycle(built: Built, batch: int, num_drafts: int) -> tuple[Traffic, ...]:
    """The passes of a cycle: the verify, then each draft step."""
    length, steps = built.shape.length, range(num_drafts)
    verify = target_pass(built, Pass(batch, num_drafts + 1, length))
    # the first step reads every column that the last verify settled; queries on frozen keys read the last one alone
    first = 1 if built.draft.way.__name__ == "FrozenKeys" else num_drafts + 1
    return verify, *(draft_pass(built, Pass(batch, first if k == 0 else 1, length), is_first=k == 0) for k in steps)


def floor(passes: tuple[Traffic, ...], ceilings: Ceilings) -> float:
    """Seconds of passes that follow one another."""
    return sum(one.floor(ceilings) for one in passes)


def target_pass(built: Built, run: Pass) -> Traffic:
    """The target, its head over every row."""
    weights, flops = _weights(built.text, run.rows, run.rows)
    return Traffic(weights, _keys(built.text, built.text, run), flops)


def draft_pass(built: Built, run: Pass, is_first: bool) -> Traffic:
    """A draft step, its head over one row a sequence."""
    draft: Any = built.draft
    fusing = [draft.fc, draft.input_norm, *draft.fc_norm] if hasattr(draft, "fuse") else []
    weights, flops = _weights(draft, run.rows, run.batch, [] if is_first else fusing)
    return Traffic(weights, _keys(draft, built.text, run), flops)


def resident(built: Built, batch: int, num_slots: int) -> float:
    """Bytes of both models and of the caches of one generation."""
    held = {id(part): part for model in (built.target, built.draft) for part in model.parts}
    weights = sum(_numbers(part) * part.dtype.itemsize for part in held.values())
    keeping = [model for model in (built.text, built.draft) if hasattr(model, "new_cache")]
    return weights + batch * num_slots * sum(sum(_slots(model)) for model in keeping)


def _weights(model: Any, rows: float, head_rows: float, without: list[Any] | tuple[()] = ()) -> tuple[float, float]:
    """Bytes and operations of one pass below, in and behind the head."""
    head = getattr(model.lm_head, "plain", model.lm_head)
    table, ordered = head.tied or head, isinstance(model.lm_head, OrderedHead)
    size, flops = 0.0, 0.0
    parts = {id(part): part for part in (*model.parts, getattr(model, "embed_tokens", head), table)}
    for part in (part for part in parts.values() if not any(part is other for other in without)):
        read, done = _part(part, model.c, rows, head_rows, part is table and not ordered)
        if ordered and isinstance(part, OrderedHead):
            # the members of the best clusters, row by row
            members = head_rows * part.c.clusters_asked * (part.c.vocab // part.c.clusters)
            read, done = read + members * part.c.hidden * part.dtype.itemsize, done + 2 * members * part.c.hidden
        size, flops = size + read, flops + done
    return size, flops


def _part(part: Part, c: Any, rows: float, head_rows: float, is_head: bool) -> tuple[float, float]:
    """Bytes and operations of one part of a model."""
    numbers, width = _numbers(part), part.dtype.itemsize
    if is_head:
        return numbers * width, 2 * numbers * head_rows
    if isinstance(part, VocabEmbedding):
        return min(rows * part.hidden, numbers) * width, 0.0
    if isinstance(part, Experts | WholeExperts):
        held = len(part.gate_up)
        # behind the others stand those that every row chooses
        shared, one = max(0, held - c.experts), numbers / held
        routed = (held - shared) / c.experts
        touched = distinct(c.experts, c.experts_per_token, rows) * routed + shared
        return touched * one * width, 2 * (c.experts_per_token * routed + shared) * one * rows
    if isinstance(part, VocabHead):
        return 0.0, 0.0
    return numbers * width, 2 * numbers * rows


def _numbers(part: Part) -> int:
    """Numbers of this rank's shards; maps of a vocabulary are looked up, not read."""
    return sum(_held(piece) for piece in part.pieces.values() if piece.into.is_floating_point())


def _held(piece: Piece) -> int:
    cuts = (*piece.held, *(slice(None) for _ in piece.shape[len(piece.held) :]))
    return math.prod(len(range(*cut.indices(size))) for cut, size in zip(cuts, piece.shape, strict=True))


def _keys(model: Any, text: Any, run: Pass) -> float:
    """Bytes of keys and values that one pass reads."""
    return run.batch * sum(size * min(run.length, window or run.length) for size, window in _layers(model, text))


def _layers(model: Any, text: Any) -> Iterator[tuple[int, int | None]]:
    """(bytes of a slot, window) of every layer's keys."""
    own = hasattr(model, "new_cache")
    slots, c = _slots(model if own else text), model.c
    for i, layer in enumerate(model.layers):
        if hasattr(c, "kind"):
            yield slots[layer.self_attn.donor], c.kind(i).window
        elif hasattr(c, "window"):
            yield slots[i], c.window(i)
        else:
            yield slots[i], c.windows[i] if hasattr(c, "windows") else None


def _slots(model: Any) -> list[int]:
    """Bytes of one slot of every layer that keeps keys."""
    cache = model.new_cache(1, 1)
    if hasattr(cache, "latents"):
        return [latent[0, 0].nbytes for latent in cache.latents]
    return [keys[0, 0].nbytes + values[0, 0].nbytes for keys, values in zip(cache.keys, cache.values, strict=True)]
