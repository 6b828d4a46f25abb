"""The static memory of a generation: what a captured cycle reads and writes, and nothing else.

Every buffer is made once for a fixed number of rows, slots and draft tokens and keeps its address. Between two cycles
the state of a row is

    lengths     n: the target has read x_0 .. x_{n-1}, and they stand
    root        x_n: emitted, not yet read
    accepted    a: how many drafts the last verify kept
    settled     x_{n-a} .. x_n in columns 0..a: what the draft has not read yet
    aux         the target's states at positions n-1-a .. n-1 in the same columns

so a cycle's first draft step reads column j at position n-1-a+j. A finished row repeats its last cycle and commits
nothing; a row that pads the batch is one that finished before it began.
Letters: reference/README.md.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

PADDING = -1
"""position of a row that writes nowhere and sees nothing"""
SLOT_TILE = 64
LOUD = 64.0
"""finite, far from every activation, and its sums stay finite in float16"""


def whole_tiles(num_slots: int) -> int:
    """The next multiple of SLOT_TILE."""
    return -(-num_slots // SLOT_TILE) * SLOT_TILE


class KVCache:
    """Keys and values of this rank's heads, [B, S, G, D] a layer; the last slot takes the writes of padding rows.

    A token at position p lives in slot p, a query at position p sees slots 0..p. So a rejected token needs no erasing.
    """

    def __init__(
        self,
        layers: int,
        batch: int,
        num_slots: int,
        kv_heads: int | Sequence[int],
        head_dim: int | Sequence[int],
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        """kv_heads, head_dim  one number for all layers, or one for each"""
        # one slot more for the padding rows, and whole tiles
        self.batch, self.num_slots = batch, whole_tiles(num_slots + 1)
        heads, widths = ([x] * layers if isinstance(x, int) else x for x in (kv_heads, head_dim))
        shapes = [(batch, self.num_slots, *shape) for shape in zip(heads, widths, strict=True)]
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for shape in shapes]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for shape in shapes]
        self._first = torch.arange(batch, device=device)[:, None] * self.num_slots
        self._slot = torch.arange(self.num_slots, device=device)

    def slots(self, positions: Tensor) -> Tensor:
        """Where the tokens at these positions are written, counted over the whole batch.

        positions  [B, T]
        ->         [M]
        """
        # remainder: position -1 is the last slot
        return (self._first + positions.remainder(self.num_slots)).flatten()

    def roll_back(self, lengths: Tensor) -> None:
        """Forget every slot at or beyond each sequence's length.

        lengths  [B]
        """
        self._fill(lengths, 0.0)

    def poison(self, lengths: Tensor) -> None:
        """Make every slot that nothing may see loud: finite, because a weight of zero does not silence a NaN.

        lengths  [B]
        """
        self._fill(lengths, LOUD)

    def tensors(self) -> Iterator[Tensor]:
        """Every buffer."""
        yield from self.keys
        yield from self.values

    def _fill(self, lengths: Tensor, value: float) -> None:
        beyond = (self._slot >= lengths[:, None])[..., None, None]
        for tensor in self.tensors():
            tensor.masked_fill_(beyond, value)


@dataclass(frozen=True)
class Plan:
    """What a cycle does; fixed while it is captured."""

    batch: int
    """rows, padding included"""
    num_slots: int
    """positions that a sequence may take"""
    capacity: int
    """tokens that a sequence may emit"""
    num_draft_tokens: int
    sampled: bool = False
    """draw tokens at the state's temperature; otherwise the likeliest"""
    forced: bool = False
    """accept by given rates instead of by what the target says; every computation is still done"""

    @property
    def room(self) -> int:
        """Slots that a cycle may take."""
        return self.num_draft_tokens + 1


class State:
    """The buffers of one plan."""

    def __init__(
        self, plan: Plan, vocab: int, width: int, aux_states: int, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        """width   features of the target's states
        aux_states   A, 0 where the draft reads the final hidden state
        """
        self.plan, self.device = plan, torch.device(device)
        batch, num_drafts = plan.batch, plan.num_draft_tokens
        columns = num_drafts + 1

        def integers(*shape: int, fill: int = 0) -> Tensor:
            return torch.full(shape, fill, dtype=torch.int64, device=device)

        def numbers(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.columns = torch.arange(columns, device=device)
        # what stands
        self.root, self.lengths, self.accepted = integers(batch), integers(batch, fill=1), integers(batch)
        self.settled = integers(batch, columns)
        self.aux = numbers(batch, columns, aux_states, width, dtype=dtype)
        self.hidden = numbers(batch, columns, width, dtype=dtype)
        # from one phase to the next: drafts and what they were drawn from, the target's choices and chances
        self.drafted, self.chosen = integers(batch, num_drafts), integers(batch, columns)
        drawn = vocab if plan.sampled else 0
        # q has a column more than drafts: after all of them the target's own chances are the rest
        self.q, self.p = numbers(batch, columns, drawn), numbers(batch, columns, drawn)
        # what was said; the last columns take what must not be written
        self.output, self.num_output = integers(batch, plan.capacity + columns + 1, fill=-1), integers(batch)
        self.log, self.num_cycles = integers(batch, plan.capacity + 1, fill=-1), integers(batch)
        self.done = torch.ones(batch, dtype=torch.bool, device=device)
        # what the host reads: the length of a row that still speaks, its complement (negative) for one that is done
        self.progress = integers(batch, fill=-2)
        # what was asked
        self.num_tokens, self.eos = integers(1), integers(1, fill=-1)
        self.seed, self.sequence = integers(1), integers(batch)
        self.temperature, self.rates = numbers(1).fill_(1.0), numbers(num_drafts)
        self.target_cache: KVCache | None = None
        self.draft_cache: KVCache | None = None
        self.draft_lag = 0

    def keep(self, cache: KVCache, lag: int) -> KVCache:
        """Hold the draft's cache; `lag` is how far its keys stay behind the target's."""
        self.draft_cache, self.draft_lag = cache, lag
        return cache

    def settled_positions(self) -> Tensor:
        """[B, K+1]  positions of the target's states in `aux` and `hidden` that stand, -1 for the rest"""
        first = self.lengths - 1 - self.accepted
        standing = self.columns <= self.accepted[:, None]
        return torch.where(standing, first[:, None] + self.columns, PADDING)

    def buffers(self) -> dict[str, Tensor]:
        """Every static tensor by name, caches included."""
        named = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        for name in ("target_cache", "draft_cache"):
            cache = getattr(self, name)
            if cache is not None:
                named |= {f"{name}.{i}": tensor for i, tensor in enumerate(cache.tensors())}
        return named

    def ask(
        self,
        num_tokens: int,
        eos_token_id: int | None,
        seed: int,
        sequence_ids: Sequence[int],
        temperature: float,
        rates: Sequence[float],
    ) -> None:
        """Begin a generation: every row is silent until `start`.

        rates   for a forced plan: acceptance rate of each draft position, given that those before it were accepted
        """
        self.num_tokens.fill_(num_tokens)
        self.eos.fill_(-1 if eos_token_id is None else eos_token_id)
        # any Python integer names a seed: its last 64 bits
        self.seed.fill_((seed + 2**63) % 2**64 - 2**63)
        self.temperature.fill_(temperature or 1.0)
        self._put(self.sequence, sequence_ids)
        if self.plan.forced:
            self.rates.copy_(torch.tensor(rates, dtype=torch.float64))
        for buffer in (self.root, self.accepted, self.settled, self.num_output, self.num_cycles):
            buffer.zero_()
        self.lengths.fill_(1)
        self.done.fill_(True)
        for buffer in (self.output, self.log):
            buffer.fill_(-1)
        self.progress.fill_(-2)

    def start(self, lengths: Sequence[int], root: Tensor, aux: Tensor, hidden: Tensor) -> None:
        """The prompts are read; the first rows of the batch begin to speak.

        root    [B]        of these rows, as are the others
        aux     [B, A, H]  at the prompts' last positions
        hidden  [B, H]
        """
        rows = len(lengths)
        self._put(self.lengths, lengths)
        self.root[:rows] = root
        self.settled[:rows, 0] = root
        self.aux[:rows, 0] = aux
        self.hidden[:rows, 0] = hidden
        self.output[:rows, 0] = root
        self.num_output[:rows] = 1
        self.done[:rows] = (root == self.eos) | (self.num_tokens <= 1)
        self.progress.copy_(torch.where(self.done, ~self.lengths, self.lengths))

    def poison(self) -> None:
        """Between two cycles: spoil everything that the next cycle must not read, or must not let through.

        NaN where a value may not be touched at all; loud finite numbers where a masked product touches it; other legal
        ids where an id is read and its result dropped.
        """
        beyond = self.columns > self.accepted[:, None]  # columns of rejected drafts
        self.settled.masked_fill_(beyond, 1)
        self.aux.masked_fill_(beyond[..., None, None], LOUD)
        self.hidden.masked_fill_(beyond[..., None], LOUD)
        self.drafted.fill_(1)
        self.chosen.fill_(1)
        self.p.fill_(float("nan"))
        self.q[:, :-1].fill_(float("nan"))
        for buffer, used in ((self.output, self.num_output), (self.log, self.num_cycles)):
            place = torch.arange(buffer.shape[1], device=self.device)
            buffer.masked_fill_(place >= used[:, None], 1)
        if self.target_cache is not None:
            self.target_cache.poison(self.lengths)
        if self.draft_cache is not None:
            self.draft_cache.poison(self.lengths - self.draft_lag - self.accepted)

    def _put(self, buffer: Tensor, values: Sequence[int]) -> None:
        buffer[: len(values)].copy_(torch.tensor(values))
