"""Prompts as an engine reads them: padded to one width, cut into chunks, with images and sounds among their tokens.

Letters: reference/README.md.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from optimized.drafting import Chunk
from optimized.shell import Media
from optimized.state import PADDING


class EngineError(ValueError):
    """A generation that cannot be started."""


class Prompts(NamedTuple):
    """Rows of unequal length, padded on the right."""

    tokens: Tensor
    """[B, T]  as tables know them, zeros where nothing looks"""
    positions: Tensor
    """[B, T]  -1 is padding"""
    length: Tensor
    """[B]"""
    media: Media | None
    """None where there is nothing but text"""

    @property
    def last(self) -> Tensor:
        """[B]  the last position of each row"""
        return (self.length - 1).clamp(min=0)

    def chunks(self, size: int | None) -> Iterator[tuple[int, int]]:
        """Columns to read at a time: no more than `size`, but an image, which sees ahead, is read in one pass."""
        width, begin = self.tokens.shape[1], 0
        cuts = [*range(1, width + 1)] if self.media is None else [*self.media.cuts(self.positions)]
        while begin < width:
            ahead = [cut for cut in cuts if cut > begin]
            end = max((cut for cut in ahead if cut <= begin + (size or width)), default=ahead[0])
            yield begin, end
            begin = end

    def columns(self, begin: int, end: int) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """What a target's `states` takes of a chunk: [B, T] tokens, [B, T] positions, features among them."""
        named = {} if self.media is None else self.media.columns(begin, end)
        return self.tokens[:, begin:end].contiguous(), self.positions[:, begin:end].contiguous(), named

    def chunk(self, begin: int, end: int, aux: Tensor, hidden: Tensor) -> Chunk:
        """A chunk beside what the target made of it.

        aux     [B, T, A, H]
        hidden  [B, T, H]
        """
        tokens, positions, _ = self.columns(begin, end)
        ahead = slice(begin + 1, end + 1)
        following = self.tokens[:, ahead].contiguous()
        known = positions[:, : following.shape[1]]
        known = torch.where(known < self.last[:, None], known, PADDING)
        seen = () if self.media is None else (self.media.embeds[:, ahead], self.media.holes[:, ahead])
        return Chunk(tokens, positions, following, known, aux, hidden, *seen)


def read_prompts(target: Any, rows: Sequence[Tensor], batch: int, inputs: Mapping[str, Any]) -> Prompts:
    """B rows of unequal length as a batch of `batch`; errors: EngineError, and ValueError for inputs that do not fit.

    inputs  images, audio and video of the rows, named as the target's `forward` names them
    """
    # asked by what it can do: what the loop sees of a target may stand around it
    device, sees = target.at.device, hasattr(target, "sense")
    tokens = torch.zeros(batch, max(len(row) for row in rows), dtype=torch.int64)
    for out, row in zip(tokens, rows, strict=False):
        out[: len(row)] = row.cpu()
    known = target.known(tokens) if sees else tokens
    if known.min() < 0 or known.max() >= target.c.vocab:
        raise EngineError(
            f"prompts hold token ids {int(known.min())}..{int(known.max())}, legal are 0..{target.c.vocab - 1}"
        )
    if inputs and not sees:
        raise EngineError(f"{type(target).__name__} reads text alone, and was given {', '.join(inputs)}")
    length = torch.tensor([*map(len, rows), *[0] * (batch - len(rows))], device=device)
    column = torch.arange(tokens.shape[1], device=device).expand(batch, -1)
    positions = torch.where(column < length[:, None], column, PADDING)
    media = None
    if inputs:
        real = slice(len(rows))
        media = target.sense(tokens[real].to(device), positions[real], **inputs).filled(batch)
    return Prompts(known.to(device), positions, length, media)
