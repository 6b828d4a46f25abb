"""What next-token modules share: a layer behind the target's last, asked again with what it said before.

    (1)  e_t = Emb(x_{t+1})
    (2)  u_t = W [norm_e(e_t); norm_h(g_t)]     g_t: the target's final hidden state, after its final norm
    (3)  y_t = Layer(u_1 .. u_t)                a layer of the target's own kind, rope at t
    (4)  z_t = norm(y_t)
    (5)  logits_t = W_head z_t                  over the target's vocabulary
    (6)  g_{t+1} = z_t                          later draft steps, at position t + 1

A module of n layers asks layer k mod n in draft step k + 1. Each layer has keys of its own: at its first use it reads
every column t with the state that the layer before it made there, and x_{t+k+1}; at its m-th use more it stands at
t + m. Embedding and head are the target's where a checkpoint has none. Paper: arXiv 2412.19437.
Letters: reference/README.md.
"""

from typing import Any

import torch
from torch import Tensor, nn

from reference.drafting import Recurrent, Step, row
from reference.ops.cache import Cache
from reference.ops.stream import seat
from reference.outputs import DraftOutput, TargetOutput


class Layered(Recurrent):
    """The way of a module of several layers; a layer after the first reads all columns again in every cycle.

    The state that it reads there stands, but x_{t+k+1} may have been a draft when it was read last.
    """

    branch = None
    """every token of a beam would have columns of its own to read: chains alone"""

    reads_features = False

    def __init__(
        self, draft: Any, target: Any, target_cache: Any, batch: int, num_slots: int, num_draft_tokens: int
    ) -> None:
        super().__init__(draft, target, target_cache, batch, num_slots, num_draft_tokens)
        self.text = torch.zeros(batch, num_slots + 1, dtype=torch.int64)
        self.states: Tensor = torch.empty(0)
        """[B, S, H]  of the last layer asked, by position"""
        self.first: Tensor = torch.empty(0)
        """[B, S, H]  of the first layer"""

    def start(self, out: Any, tokens: Tensor, following: Tensor, positions: Tensor, last: Tensor) -> Step:
        """As `Recurrent.start`.

        tokens     [B, T]
        following  [B, T]
        positions  [B, T]
        last       [B]
        """
        logits, feedback = self.draft(following, self.draft.read(out), positions, self.cache)
        batch, num_slots = self.text.shape
        if not len(self.first):
            self.first = feedback.new_zeros(batch, num_slots, feedback.shape[2])
        rows = torch.arange(batch, device=tokens.device)[:, None]
        self.text = self.text.to(tokens.device).index_put((rows, positions + 1), following)
        self.states = self.first = self.first.index_put((rows, positions), feedback)
        return Step(row(logits, last), row(feedback, last))

    def next(self, token: Tensor, feedback: Tensor, lengths: Tensor, k: int) -> Step:
        """As `Recurrent.next`.

        token     [B, 1]
        feedback  [B, 1, H]
        lengths   [B]
        """
        uses, layer = divmod(k - 1, self.draft.c.layers)
        if uses:
            place = (lengths - 1 + uses)[:, None]
            return Step(*self.draft(token, feedback, place, self.cache, layer=layer))
        self.text = self.text.scatter(1, (lengths + k - 1)[:, None], token)
        width = int(lengths.max())
        positions = torch.arange(width, device=token.device).expand(len(lengths), width)
        ahead = self.text[:, k : k + width]
        logits, states = self.draft(ahead, self.states[:, :width], positions, self.cache, layer=layer)
        self.states = states
        return Step(row(logits, lengths - 1), row(states, lengths - 1))


class NextTokenDraft(nn.Module):
    """Everything but equations (2) to (4), which a page states as `mix`."""

    def __init__(self, c: Any) -> None:
        super().__init__()
        self.c = c
        self.embed_tokens = nn.Embedding(c.vocab, c.hidden)
        self.lm_head = nn.Linear(c.hidden, c.vocab, bias=False)

    @property
    def way(self) -> type[Recurrent]:
        """How it drafts."""
        return Recurrent if self.c.layers == 1 else Layered

    def tie(self) -> None:
        """The head of a draft is never tied: it is the target's, or its own."""

    def join(self, target: nn.Module) -> list[tuple[str, str, tuple[int, ...]]]:
        """Drop copies of the target's tables for the tables themselves; what was dropped: (name, why, shape)."""
        dropped = []
        for name in ("embed_tokens", "lm_head"):
            mine, theirs = getattr(self, name), getattr(target, name)
            if mine is not theirs and torch.equal(mine.weight, theirs.weight):
                setattr(self, name, theirs)
                dropped.append((f"{name}.weight", "its copy is the target's", tuple(theirs.weight.shape)))
        return dropped

    def new_cache(self, batch: int, num_slots: int) -> Cache:
        """Room for `num_slots` tokens of each of `batch` sequences."""
        return Cache(self.c.layers, batch, num_slots)

    def read(self, out: TargetOutput) -> Tensor:
        """What the first draft step reads as `hidden`: the target's state after its final norm."""
        return out.hidden

    def mix(
        self,
        embed: Tensor,
        hidden: Tensor,
        positions: Tensor,
        visible: Tensor,
        cache: Cache | None,
        slots: Tensor,
        layer: int,
    ) -> Tensor:
        """Equations (2) to (4).

        embed      [B, T, H]
        hidden     [B, T, H]
        positions  [B, T]
        visible    [B, T, S]
        slots      [B, T]
        ->         [B, T, H]
        """
        raise NotImplementedError

    def forward(
        self,
        tokens: Tensor,
        hidden: Tensor,
        positions: Tensor | None = None,
        cache: Cache | None = None,
        slots: Tensor | None = None,
        visible: Tensor | None = None,
        layer: int = 0,
        embeds: Tensor | None = None,
    ) -> DraftOutput:
        """Propose the token after each of `tokens`.

        tokens     [B, T]     x_{t+1} in column t
        hidden     [B, T, H]  g_t
        positions  [B, T]     t
        slots      [B, T]     the positions when absent
        visible    [B, T, S]  by position when absent
        embeds     [B, T, H]  (1) in full, where x_{t+1} may be a placeholder of an image
        ->         logits [B, T, V], feedback [B, T, H]
        """
        positions, slots, visible = seat(tokens, positions, cache, slots, visible)
        embed = self.embed_tokens(tokens) if embeds is None else embeds  # (1)
        z = self.mix(embed, hidden, positions, visible, cache, slots, layer)  # (2) to (4)
        return DraftOutput(self.lm_head(z), z)  # (5) (6)

    def unroll(self, tokens: Tensor, hidden: Tensor, num_steps: int) -> Tensor:
        """Teacher-forced draft steps as they are served; NaN where x_{t+k} is not known.

        Column t at step k reads x_{t+k} and its own feedback. It sees the first keys that its layer made in columns
        0..t, and those that the layer made later in its own column.

        tokens  [B, T]
        hidden  [B, T, H]       from `read`
        ->      [K, B, T, V]    K = num_steps
        """
        (batch, width), layers = tokens.shape, self.c.layers
        column = torch.arange(width, device=tokens.device).expand(batch, width)
        cache, steps = self.new_cache(batch, width * num_steps), []
        first, own = column[:, None, :] <= column[:, :, None], column[:, None, :] == column[:, :, None]
        for k in range(num_steps):
            uses, layer = divmod(k, layers)
            shifted = torch.cat([tokens[:, k + 1 :], tokens.new_zeros(batch, min(k + 1, width))], 1)
            blocks = [own if s % layers == layer and s <= k else own & ~own for s in range(num_steps)]
            visible = torch.cat([*blocks[:layer], first, *blocks[layer + 1 :]], -1)  # [B, T, T*K]
            step = self(shifted, hidden, column + uses, cache, column + k * width, visible, layer)
            unknown = (column + k + 1 >= width)[..., None]
            steps.append(step.logits.masked_fill(unknown, float("nan")))
            hidden = step.feedback
        return torch.stack(steps)

    def to_target(self, draft_ids: Tensor) -> Tensor:
        """draft_ids [B, T] -> [B, T]  the target's vocabulary is the draft's"""
        return draft_ids

    def spread(self, logits: Tensor) -> Tensor:
        """logits [B, T, V] -> [B, T, V]"""
        return logits
