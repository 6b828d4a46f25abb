"""What the twins of next-token modules share: `reference/drafts/next_token.py` over the kernels of `optimized/ops`.

    embed | norm | norm | project | a layer of the target's twin | norm + add | head

Rows are flattened, M = B*T, between `tokens` and the outputs. Letters: reference/README.md.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from optimized.drafting import Chunk, Recurrent
from optimized.ops.table import Ops
from optimized.parallel import Group, PackedModel, Placement, ShardError, VocabEmbedding, VocabHead
from optimized.state import PADDING, KVCache, State


class DraftOutput(NamedTuple):
    logits: Tensor
    """[B, T, V]"""
    feedback: Tensor
    """[B, T, H] what the next draft step reads as `hidden`, equation (6)"""


class Layered(Recurrent):
    """The way of a module of L layers: in every cycle each reads the L - 1 columns before the settled ones again.

    The state that a layer reads in a column stands, but the token may have been a draft when it was read last.
    """

    branch = None
    """every token of a beam would have a window of its own: chains alone"""

    def __init__(self, draft: Any, target: Any, state: State) -> None:
        self.lag = draft.c.layers
        super().__init__(draft, target, state)
        batch, num_slots = state.plan.batch, state.plan.num_slots
        # what stands, by position; text 0 and the last state take what padding writes
        self.text = torch.zeros(batch, num_slots + self.lag, dtype=torch.int64, device=state.device)
        self.hidden = state.hidden.new_zeros(batch, num_slots + 1, state.hidden.shape[2])
        self.before = torch.arange(1 - self.lag, 0, device=state.device)
        self.window, self.trail = state.root[:, None], self.hidden

    def read(self, following: Tensor, hidden: Tensor, positions: Tensor) -> None:
        """Note what became known, and open the window: the columns before these, and these.

        following  [B, T]
        hidden     [B, T, H]
        positions  [B, T]  -1 is padding
        """
        rows = torch.arange(len(positions), device=positions.device)[:, None]
        self.text[rows, positions + 1] = following
        self.hidden[rows, positions.remainder(self.hidden.shape[1])] = hidden
        first = positions[:, :1]
        before = torch.where(first == PADDING, PADDING, (first + self.before).clamp(min=PADDING))
        self.window = torch.cat([before, positions], 1)
        self.trail = self.hidden[rows, self.window.remainder(self.hidden.shape[1])]

    def ask(self, layer: int, num_slots: int | None) -> Tensor:
        """A layer's first use over the window.

        ->  [B, T, H]
        """
        tokens = self.text.gather(1, self.window + layer + 1)
        place = (self.window, self.cache, num_slots)
        top, self.trail = self.draft.states(tokens, self.trail, *place, layer=layer)
        return top

    def prefill(self, chunk: Chunk, num_slots: int | None) -> None:
        """As `Recurrent.prefill`; what a layer reads before its token is known, it reads again."""
        width = chunk.following.shape[1]
        if width:
            self.read(chunk.following, self.draft.read(chunk)[:, :width], chunk.known)
            for layer in range(self.draft.c.layers):
                self.ask(layer, num_slots)

    def start(self, num_slots: int | None) -> tuple[Tensor, Tensor]:
        """As `Recurrent.start`."""
        self.read(self.state.settled, self.draft.read(self.state), self.state.settled_positions())
        last, gather = self.state.accepted + len(self.before), self.draft.at.ops.gather_rows
        return gather(self.ask(0, num_slots), last)[:, None], gather(self.trail, last)

    def next(self, token: Tensor, feedback: Tensor, k: int, num_slots: int | None) -> tuple[Tensor, Tensor]:
        """As `Recurrent.next`."""
        uses, layer = divmod(k - 1, self.draft.c.layers)
        if uses:
            place = (self.state.lengths - 1 + uses)[:, None]
            top, feedback = self.draft.states(
                token[:, None], feedback[:, None], place, self.cache, num_slots, layer=layer
            )
            return top[:, 0], feedback[:, 0]
        self.text.scatter_(1, (self.state.lengths + layer)[:, None], token[:, None])
        last, gather = self.state.accepted + len(self.before), self.draft.at.ops.gather_rows
        return gather(self.ask(layer, num_slots), last), gather(self.trail, last)


class NextTokenDraft(PackedModel):
    """One rank's share of everything but equations (2) to (4), which a page states as `mix`."""

    def __init__(self, c: Any, ops: Ops, group: Group, dtype: torch.dtype, device: torch.device | str = "cpu") -> None:
        super().__init__()
        at = self.at = Placement(ops, group, dtype, torch.device(device))
        self.c = c
        self.embed_tokens = self.own(VocabEmbedding("embed_tokens.weight", c.vocab, c.hidden, at))
        self.lm_head = self.own(VocabHead("lm_head.weight", c.vocab, c.hidden, at))
        self.inv_freq = c.rope.frequencies().to(device)

    @property
    def way(self) -> type[Recurrent]:
        """How it drafts."""
        return Recurrent if self.c.layers == 1 else Layered

    def share_embedding(self, target: Any) -> None:
        """Read the target's table, shard by shard as it lies, instead of an own one."""
        self._check_width("embedding", target.embed_tokens)
        self.disown(self.embed_tokens)
        self.embed_tokens = target.embed_tokens

    def share_head(self, target: Any) -> None:
        """Ask the target's head, shard by shard as it lies, instead of an own one."""
        self._check_width("head", target.lm_head)
        self.disown(self.lm_head)
        self.lm_head = target.lm_head

    def _check_width(self, what: str, theirs: VocabEmbedding | VocabHead) -> None:
        here, there = (self.c.vocab, self.c.hidden), (theirs.vocab, theirs.hidden)
        if here != there:
            raise ShardError(f"the target's {what} is {there[0]} x {there[1]}, the draft reads {here[0]} x {here[1]}")

    def join(self, target: Any) -> list[tuple[str, str, tuple[int, ...]]]:
        """Drop copies of the target's tables for the tables themselves; what was dropped: (name, why, shape)."""
        # a tied head lies in the embedding
        head = target.embed_tokens if target.lm_head.tied is not None else target.lm_head
        dropped, shape = [], (self.c.vocab, self.c.hidden)
        for name, theirs, share in (
            ("embed_tokens", target.embed_tokens, self.share_embedding),
            ("lm_head", head, self.share_head),
        ):
            mine = getattr(self, name)
            if mine is not getattr(target, name) and torch.equal(mine.weight, theirs.weight):
                share(target)
                dropped.append((f"{name}.weight", "its copy is the target's", shape))
        return dropped

    def new_cache(self, batch: int, num_slots: int) -> KVCache:
        """Room for `num_slots` tokens of each of `batch` sequences."""
        raise NotImplementedError

    def read(self, out: Any) -> Tensor:
        """What the first draft step reads as `hidden`, from a target's output or buffers of the same names.

        ->  [B, T, H]
        """
        return out.hidden

    def mix(
        self,
        embed: Tensor,
        hidden: Tensor,
        positions: Tensor,
        slots: Tensor,
        inv_freq: Tensor,
        cache: KVCache,
        num_slots: int | None,
        layer: int,
    ) -> Tensor:
        """Equations (2) to (4).

        embed      [M, H]
        hidden     [M, H]
        positions  [B, T]
        slots      [M]
        ->         [M, H]
        """
        raise NotImplementedError

    def forward(
        self,
        tokens: Tensor,
        hidden: Tensor,
        positions: Tensor | None = None,
        cache: KVCache | None = None,
        layer: int = 0,
    ) -> DraftOutput:
        """Propose the token after each of `tokens`.

        tokens     [B, T]     x_{t+1} in column t
        hidden     [B, T, H]  g_t
        positions  [B, T]     t; -1 marks padding, whose outputs mean nothing
        ->         logits [B, T, V], feedback [B, T, H]
        """
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        tokens, hidden, positions = tokens.contiguous(), hidden.contiguous(), positions.contiguous()
        if cache is None:
            cache = self.new_cache(tokens.shape[0], int(positions.max()) + 1)
        inv_freq = self.inv_freq
        if self.c.rope.kind == "dynamic":
            inv_freq = self.c.rope.frequencies(int(positions.max()) + 1).to(tokens.device)
        top, feedback = self.states(tokens, hidden, positions, cache, inv_freq=inv_freq, layer=layer)
        return DraftOutput(self.logits(top), feedback)

    def states(
        self,
        tokens: Tensor,
        hidden: Tensor,
        positions: Tensor,
        cache: KVCache,
        num_slots: int | None = None,
        inv_freq: Tensor | None = None,
        layer: int = 0,
        embeds: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Everything below the head; reads nothing back from the device.

        tokens     [B, T]
        hidden     [B, T, H]
        positions  [B, T]
        num_slots  a bound on position + 1 that the host knows
        embeds     [B, T, H]  (1) in full, where x_{t+1} may be a placeholder of an image
        ->         [B, T, H], [B, T, H]  what the head reads, feedback
        """
        slots, inv_freq = cache.slots(positions), self.inv_freq if inv_freq is None else inv_freq
        embed = self.embed_tokens(tokens.flatten()) if embeds is None else embeds.flatten(0, 1)  # (1)
        place = (positions, slots, inv_freq, cache, num_slots, layer)
        z = self.mix(embed, hidden.flatten(0, 1), *place).unflatten(0, tokens.shape)  # (2) to (4)
        return z, z  # (5) (6)

    def logits(self, top: Tensor) -> Tensor:
        """Equation (5).

        top  [B, T, H]
        ->   [B, T, V]
        """
        return self.lm_head.logits(top.flatten(0, 1)).unflatten(0, top.shape[:2])

    def propose(self, top: Tensor) -> Tensor:
        """The likeliest token, (5) without the logits.

        top  [B, H]
        ->   [B]
        """
        return self.lm_head.argmax(top)

    def to_target(self, draft_ids: Tensor) -> Tensor:
        """draft_ids of any shape -> the same shape"""
        return draft_ids

    def spread(self, logits: Tensor) -> Tensor:
        """logits [B, T, V] -> [B, T, V]"""
        return logits
