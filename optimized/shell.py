"""What the twins of targets with images and sounds have in common: a text twin, and features among its tokens.

A prompt is seen and heard once, text is read again and again. So towers are not made fast: they are the reference's own
modules, handed in by whoever opens the twin and held whole by every rank. What they make of a prompt enters the text
twin as the rows that layer 0 reads, and tokens of one image see each other by `ends`. Cycles read text alone.
Letters: reference/README.md.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from optimized.ops.table import Ops
from optimized.parallel import Group, PackedModel, Part, Placement
from optimized.state import PADDING, KVCache
from optimized.targets.llama import TargetOutput

TEXT = "language_model."


class Media(NamedTuple):
    """A prompt with features among its tokens."""

    embeds: Tensor
    """[B, T, H] what layer 0 reads"""
    holes: Tensor
    """[B, T] true where a feature stands"""
    ends: Tensor | None
    """[B, T] the last position that a token sees; None where each sees up to its own"""

    def columns(self, begin: int, end: int) -> dict[str, Tensor]:
        """What the text twin's `states` takes of some columns beside their tokens."""
        named = {"embeds": self.embeds} | ({} if self.ends is None else {"ends": self.ends})
        return {name: tensor[:, begin:end].contiguous() for name, tensor in named.items()}

    def filled(self, batch: int) -> "Media":
        """The same with rows of padding up to a batch of so many."""
        more = (0, batch - len(self.embeds))
        ends = None if self.ends is None else F.pad(self.ends, (0, 0, *more), value=PADDING)
        return Media(F.pad(self.embeds, (0, 0, 0, 0, *more)), F.pad(self.holes, (0, 0, *more)), ends)

    def cuts(self, positions: Tensor) -> Iterator[int]:
        """Columns before which a prompt may be cut: an image is read in one pass, since it sees ahead.

        positions  [B, T]
        """
        through = [False] * positions.shape[1] if self.ends is None else (self.ends > positions).any(0).tolist()
        return (column + 1 for column, inside in enumerate(through) if not inside)


class Towers(Part):
    """Modules that every rank holds whole, tensor by tensor."""

    def __init__(self, module: nn.Module, at: Placement) -> None:
        super().__init__(at)
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            self.place(name, tensor, tuple(tensor.shape))

    def load(self, name: str, full: Tensor) -> None:
        """Copy the whole tensor, which may be a single number."""
        self.pieces[name].into.copy_(self.shard(name, full))
        self.written.add(name)


class Shell(PackedModel):
    """One rank's share of a target with towers."""

    text: type
    """the text twin"""

    def __init__(self, c: Any, ops: Ops, group: Group, dtype: torch.dtype, device: torch.device | str = "cpu") -> None:
        super().__init__()
        self.c = c
        self.language_model = self.text(c.text, ops, group, dtype, device)
        self.at = self.language_model.at
        for part in self.language_model.parts:
            part.prefix = TEXT
            self.own(part)
        self.towers: Any = None

    def take(self, towers: nn.Module) -> None:
        """The reference's shell without its text model: its `sense` makes features and puts them among embeddings."""
        self.towers = towers
        self.own(Towers(towers, self.at))

    @property
    def embed_tokens(self) -> Any:
        """The text twin's table, which a draft may share."""
        return self.language_model.embed_tokens

    @property
    def lm_head(self) -> Any:
        """The text twin's head, which a draft may share."""
        return self.language_model.lm_head

    def new_cache(self, batch: int, num_slots: int) -> KVCache:
        """Room for `num_slots` tokens of each of `batch` sequences."""
        return self.language_model.new_cache(batch, num_slots)

    def known(self, tokens: Tensor) -> Tensor:
        """The ids that tables are asked for: tokens [B, T] -> [B, T]"""
        raise NotImplementedError

    def sense(self, tokens: Tensor, positions: Tensor, **inputs: Any) -> Media:
        """Read the inputs of a prompt; errors: ValueError where they do not fit its placeholders.

        tokens     [B, T]
        positions  [B, T]  -1 marks padding
        inputs     named as the reference's `forward` names them
        """
        h, holes, blocks = self._sense(tokens, inputs)
        return Media(h, holes, None if blocks is None else ends_of(blocks, positions))

    def embed_inputs(self, tokens: Tensor, **inputs: Any) -> Tensor:
        """What layer 0 reads: tokens [B, T] -> [B, T, H]"""
        return self._sense(tokens, inputs)[0]

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        capture: Sequence[int] = (),
        cache: KVCache | None = None,
        **inputs: Any,
    ) -> TargetOutput:
        """Predict the token after each of `tokens`; without a cache the tokens see each other alone.

        tokens     [B, T]
        positions  [B, T]  0..T-1 when absent; -1 marks padding, whose outputs mean nothing
        inputs     images, audio and video among these tokens, named as the reference's `forward` names them
        ->         logits [B, T, V], hidden [B, T, H], aux [B, T, A, H]
        """
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        media = self.sense(tokens, positions, **inputs).columns(0, tokens.shape[1])
        return self.language_model(self.known(tokens), positions, capture, cache, **media)

    def states(
        self,
        tokens: Tensor,
        positions: Tensor,
        cache: KVCache,
        capture: Sequence[int] = (),
        num_slots: int | None = None,
        aux_out: Tensor | None = None,
        **media: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Everything below the head; reads nothing back from the device.

        tokens     [B, T]
        positions  [B, T]
        num_slots  a bound on position + 1, and on end + 1, that the host knows
        aux_out    [B, T, A, H]  where to put the aux states; new when absent
        media      `Media.columns` of these tokens; text alone when absent
        ->         [B, T, H], [B, T, A, H]  after the final norm, at the capture points
        """
        return self.language_model.states(self.known(tokens), positions, cache, capture, num_slots, aux_out, **media)

    def _sense(self, tokens: Tensor, inputs: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor | None]:
        """tokens [B, T] -> h [B, T, H], holes [B, T], blocks [B, T] or None"""
        return self.towers.sense(self.language_model.embed(self.known(tokens)), tokens, **inputs)


def ends_of(blocks: Tensor, positions: Tensor) -> Tensor:
    """The last position of a token's image; its own outside of any.

    blocks     [B, T]  number of a token's image, -1 for none
    positions  [B, T]
    ->         [B, T]
    """
    inside, number = blocks >= 0, blocks.clamp(min=0)
    last = torch.full_like(positions, PADDING).scatter_reduce(1, number, positions.where(inside, PADDING), "amax")
    return last.gather(1, number).where(inside, positions)
