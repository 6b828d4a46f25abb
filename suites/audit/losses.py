"""How well drafts foresee their target along texts: teacher-forced, by draft step and by sequence.

    loss_k = mean over t of  - sum over v of p_{t+k}(v) log((1 - e) q_{k,t}(v) + e / V)

p is the target's distribution after x_0 .. x_{t+k}, q that of the draft in its k-th step, V the target's vocabulary.
The floor e makes one scale of all readings: a token that a reading cannot propose costs log(V / e) and no infinity,
so that readings of the vocabulary map can be compared, and no sequence outweighs the others.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from reference.drafting import FrozenKeys
from suites.audit.candidates import Edit
from suites.opened import OpenDraft, OpenTarget

NUM_STEPS = 3
WIDTH = 48
"""tokens that are read of a text"""
LEAST = NUM_STEPS + 3
"""tokens of a text that says anything about every draft step"""
BATCH = 32
"""texts forced at once"""
FLOOR = 1e-3

Hypothesis = tuple[Edit, ...]
"""edits of different facts, in the order of the table"""


@dataclass(frozen=True)
class Texts:
    """Token ids of texts of any lengths."""

    tokens: Tensor
    """[B, T], padded behind their ends"""
    lengths: Tensor
    """[B]"""

    @classmethod
    def of(cls, rows: Sequence[Tensor], width: int = WIDTH) -> "Texts":
        """The beginnings of some texts; those too short to say anything are left out."""
        kept = [row[:width] for row in rows if len(row) >= LEAST]
        if not kept:
            return cls(torch.zeros(0, 0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64))
        padded = torch.nn.utils.rnn.pad_sequence(kept, batch_first=True)
        return cls(padded, torch.tensor([len(row) for row in kept]))

    def __len__(self) -> int:
        return len(self.tokens)

    def first(self, count: int) -> "Texts":
        return self.part(slice(0, count))

    def part(self, place: slice) -> "Texts":
        return Texts(self.tokens[place], self.lengths[place])

    @property
    def num_tokens(self) -> int:
        return int(self.lengths.sum())


@torch.no_grad()
def losses(target: OpenTarget, drafts: Sequence[OpenDraft], texts: Texts, num_steps: int = NUM_STEPS) -> Tensor:
    """Losses of several drafts beside one target, in nats; the target reads each text once for all of them.

    ->  [X, K, B]  X drafts
    """
    points = sorted({point for draft in drafts for point in draft.capture_points})
    found = []
    for start in range(0, len(texts), BATCH):
        part = texts.part(slice(start, start + BATCH))
        out = target(part.tokens, capture=points)
        meant, keys, rows = out.logits.softmax(-1), _keys(drafts, part.tokens), []
        for draft in drafts:
            aux = out.aux[:, :, [points.index(point) for point in draft.capture_points]]
            hidden = draft.module.read(out._replace(aux=aux))
            steps = draft.module.unroll(part.tokens, hidden, num_steps, *keys)
            rows.append(
                torch.stack([_loss(draft, logits, meant, part.lengths, k) for k, logits in enumerate(steps, 1)])
            )
        found.append(torch.stack(rows))
    return torch.cat(found, -1)


@torch.no_grad()
def blind_loss(target: OpenTarget, texts: Texts) -> float:
    """What it costs, in nats, to say at every place how often the target says each token: the entropy of its mean."""
    total, count = torch.zeros(target.config.vocab), 0
    for start in range(0, len(texts), BATCH):
        part = texts.part(slice(start, start + BATCH))
        stands = torch.arange(part.tokens.shape[1]) < part.lengths[:, None]
        said = target(part.tokens).logits.softmax(-1)[stands]
        total, count = total + said.sum(0), count + len(said)
    return float(torch.special.entr(total / count).sum())


def _keys(drafts: Sequence[OpenDraft], tokens: Tensor) -> tuple[Any, ...]:
    """The target's keys and values of these texts, where the drafts ask for them.

    tokens  [B, T]
    """
    module = drafts[0].module
    if module.way is not FrozenKeys:
        return ()
    cache = module.target.new_cache(*tokens.shape)
    module.target(tokens, cache=cache)
    return (cache,)


def _loss(draft: OpenDraft, logits: Tensor, meant: Tensor, lengths: Tensor, k: int) -> Tensor:
    """Mean loss of one draft step over the columns of each text whose next token is known.

    logits   [B, T, Vd]
    meant    [B, T, V]
    lengths  [B]
    ->       [B]
    """
    width = meant.shape[1]
    said = draft.module.spread(logits[:, : width - k - 1]).softmax(-1)
    floored = said.mul_(1 - FLOOR).add_(FLOOR / said.shape[-1]).log_()
    by_column = -torch.einsum("btv,btv->bt", meant[:, k : width - 1], floored)
    known = torch.arange(width - k - 1) < (lengths - k - 1)[:, None]
    return (by_column * known).sum(1) / known.sum(1)


@dataclass
class Stand:
    """The losses of every reading that was asked for, each computed once."""

    target: OpenTarget
    draft: OpenDraft
    """the reading that all others are edits of"""
    texts: Texts
    known: dict[tuple[Any, ...], Tensor] = field(default_factory=dict)
    """hypothesis -> [K, n] of the first n texts"""
    advance: Callable[[int], object] = lambda count: None
    """told how many texts were read by how many drafts, times each other"""

    @property
    def count(self) -> int:
        return len(self.texts)

    def realise(self, hypothesis: Hypothesis) -> OpenDraft:
        """The draft as a hypothesis has it."""
        draft = self.draft
        for edit in hypothesis:
            draft = edit.apply(draft, self.target)
        return draft

    def losses(self, hypotheses: Sequence[Hypothesis], count: int) -> list[Tensor]:
        """Losses of the first `count` texts: one [K, count] a hypothesis; only what is new is computed."""
        keys = [key(hypothesis) for hypothesis in hypotheses]
        for have in sorted({self._have(one) for one in keys} - {self.count}):
            todo = {k: h for k, h in zip(keys, hypotheses, strict=True) if self._have(k) == have < count}
            if not todo:
                continue
            more = self.texts.part(slice(have, count))
            for k, row in zip(todo, losses(self.target, [*map(self.realise, todo.values())], more), strict=True):
                self.known[k] = torch.cat([self.known[k], row], 1) if k in self.known else row
                self.advance(row.shape[1])
        return [self.known[k][:, :count] for k in keys]

    def _have(self, one: tuple[Any, ...]) -> int:
        return self.known[one].shape[1] if one in self.known else 0


@dataclass
class Resampled:
    """Some of the texts of a stand, drawn anew: the same losses, other sequences."""

    stand: Stand
    indices: Tensor
    """[n]"""

    @property
    def target(self) -> OpenTarget:
        return self.stand.target

    @property
    def draft(self) -> OpenDraft:
        return self.stand.draft

    @property
    def texts(self) -> Texts:
        return Texts(self.stand.texts.tokens[self.indices], self.stand.texts.lengths[self.indices])

    @property
    def count(self) -> int:
        return len(self.indices)

    def realise(self, hypothesis: Hypothesis) -> OpenDraft:
        """As `Stand.realise`."""
        return self.stand.realise(hypothesis)

    def losses(self, hypotheses: Sequence[Hypothesis], count: int) -> list[Tensor]:
        """As `Stand.losses`, of the first `count` of these texts."""
        return [row[:, self.indices[:count]] for row in self.stand.losses(hypotheses, self.stand.count)]


def key(hypothesis: Hypothesis) -> tuple[Any, ...]:
    """What a hypothesis is, whichever tables its edits came from."""
    return tuple((edit.fact, edit.value) for edit in hypothesis)
