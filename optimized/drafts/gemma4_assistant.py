"""The Gemma 4 assistant, fast: the equations of `reference/drafts/gemma4_assistant.py`.

Its layers are the shared layers of `optimized/targets/gemma4.py` whose donor is a layer of the target: eight kernels
each, and none writes a key. A step reads the target's cache through the rank's own key/value heads, so ranks talk to
each other only where the target's layers do. Rows are flattened, M = B*T, between `tokens` and the outputs.
Letters: reference/README.md; X is the target's width, C clusters of V/C tokens of which Z are looked into.
"""

from typing import Any

import torch
from torch import Tensor

from optimized.drafting import FrozenKeys
from optimized.drafts.eagle3 import DraftOutput
from optimized.ops.kinds import GEMMA4
from optimized.ops.table import Ops
from optimized.parallel import (
    Group,
    Norm,
    PackedModel,
    Part,
    Placement,
    ReplicatedLinear,
    VocabEmbedding,
    VocabHead,
)
from optimized.state import KVCache
from optimized.targets.gemma4 import CappedHead, Gemma4Layer
from reference.drafts.gemma4_assistant import Gemma4AssistantConfig


class OrderedHead(Part):
    """Equation (8): the best clusters by their centroids, then their members alone by the rows of a head.

    The rows lie by token id, as they were loaded, and are gathered through the ordering, which is applied here and
    nowhere else. Every rank knows all centroids and the whole ordering, and has the rows of its own shard.
    """

    def __init__(self, plain: VocabHead, c: Gemma4AssistantConfig, at: Placement) -> None:
        super().__init__(at)
        self.c, self.plain = c, plain
        self.weight = self.new(c.clusters, c.hidden)
        self.ordering = torch.full((c.vocab,), -1, dtype=torch.int64, device=at.device)
        self.place("centroids.weight", self.weight, (c.clusters, c.hidden))
        self.place("token_ordering", self.ordering, (c.vocab,))

    def members(self, x: Tensor) -> Tensor:
        """The token ids of the best clusters.

        x   [M, H]
        ->  [M, Z*V/C]
        """
        best = self.ops.linear(x, self.matrix).topk(self.c.clusters_asked, -1).indices
        return self.ordering.view(self.c.clusters, -1)[best].flatten(1)

    def score(self, x: Tensor, members: Tensor) -> Tensor:
        """The logits of some tokens, on every rank.

        x        [M, H]
        members  [M, Z*V/C]
        ->       [M, Z*V/C]
        """
        table, first = (self.plain.tied or self.plain).weight, self.plain.run.start
        # one rank has the row, the others zeros: exact in any order of adding
        return self.group.all_reduce(self.ops.score_rows(x, table, members, None if self.group.size == 1 else first))

    def logits(self, x: Tensor) -> Tensor:
        """x [M, H] -> [M, V] over the whole vocabulary, -inf where a token was not looked at"""
        members = self.members(x)
        logits, cap = self.score(x, members), self.c.softcap
        logits = logits if cap is None else self.ops.softcap(logits, cap)
        return logits.new_full((x.shape[0], self.c.vocab), float("-inf")).scatter_(1, members, logits)

    def argmax(self, x: Tensor) -> Tensor:
        """x [M, H] -> [M] the lowest id among the largest logits"""
        members = self.members(x)
        logits = self.score(x, members)
        best = logits == logits.amax(-1, keepdim=True)
        return members.masked_fill(~best, self.c.vocab).amin(-1)


class Gemma4AssistantDraft(PackedModel):
    """One rank's share of the whole draft; it speaks once it is joined to the target of its rank."""

    way = FrozenKeys

    def __init__(
        self,
        c: Gemma4AssistantConfig,
        ops: Ops,
        group: Group,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__()
        at = self.at = Placement(ops, group, dtype, torch.device(device))
        self.c = c
        self.pre_projection = self.own(ReplicatedLinear("pre_projection", 2 * c.aux_width, c.hidden, False, at))
        self.layers = [Gemma4Layer(c, i, self, at) for i in range(c.layers)]
        self.norm = self.own(Norm("norm.weight", c.hidden, c.eps, at))
        self.post_projection = self.own(ReplicatedLinear("post_projection", c.hidden, c.aux_width, False, at))
        tied = self.own(VocabEmbedding("embed_tokens.weight", c.vocab, c.hidden, at)) if c.tied_head else None
        plain = self.own(VocabHead("lm_head.weight", c.vocab, c.hidden, at, tied))
        self.lm_head: VocabHead | CappedHead | OrderedHead = plain
        if c.clusters:
            self.lm_head = self.own(OrderedHead(plain, c, at))
        elif c.softcap is not None:
            self.lm_head = CappedHead(plain, c.softcap)
        kinds = {c.layer_types[i]: c.kind(i) for i in range(c.layers)}
        self.inv_freq = {layer_type: kind.rope.frequencies().to(device) for layer_type, kind in kinds.items()}
        self.target: Any = None

    def join(self, target: Any) -> list[tuple[str, str, tuple[int, ...]]]:
        """Take the table, its scale and the keys of the target of this rank; errors: ConfigError where they do not fit.

        target   a Gemma 4, or a model with towers around one
        ->       what is shared: (name, whose it is, shape)
        """
        text = getattr(target, "language_model", target)
        self.c.check_target(text.c)
        if isinstance(self.lm_head, OrderedHead):
            self.c.check_ordering(self.lm_head.ordering)
        for i, layer in enumerate(self.layers):
            layer.self_attn.donor = self.c.donor_in(i, text.c)
        self.target = text
        return [("target.embed_tokens.weight", "the target's table embeds the tokens", (text.c.vocab, text.c.hidden))]

    def read(self, out: Any) -> Tensor:
        """What the first draft step reads as `hidden`, from a target's output (or a state's buffers of the same names).

        ->  [B, T, X]
        """
        return out.hidden

    def forward(self, tokens: Tensor, hidden: Tensor, positions: Tensor, cache: KVCache) -> DraftOutput:
        """Propose the token after each of `tokens`.

        tokens     [B, T]     x_{t+1}; in later draft steps the token that was drafted
        hidden     [B, T, X]  g_t
        positions  [B, T]     t, in every draft step of a cycle; -1 marks padding, whose outputs mean nothing
        cache      the target's
        ->         logits [B, T, V], feedback [B, T, X]
        """
        top, feedback = self.states(tokens.contiguous(), hidden.contiguous(), positions.contiguous(), cache)
        return DraftOutput(self.logits(top), feedback)

    def states(
        self, tokens: Tensor, hidden: Tensor, positions: Tensor, cache: KVCache, num_slots: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Everything below the head; reads nothing back from the device, writes nothing into the cache.

        tokens     [B, T]
        hidden     [B, T, X]
        positions  [B, T]
        cache      the target's
        num_slots  a bound on position + 1 that the host knows
        ->         [B, T, H], [B, T, X]  what the head reads, feedback
        """
        if self.target is None:
            raise ValueError("this draft reads its target's table and keys; join it to its target first")
        h = self.pre_projection(torch.cat([self.target.embed(tokens), hidden], -1).flatten(0, 1))  # (1) (2)
        after = [*(layer.input_layernorm for layer in self.layers[1:]), self.norm]
        x, h = self.at.ops.add_rmsnorm(h, None, self.layers[0].input_layernorm.weight, self.c.eps, GEMMA4)
        for layer, following in zip(self.layers, after, strict=True):
            # no layer writes, so no slots are named; no drafted token is of an image, so none sees ahead
            branch, s = layer(x, h, None, positions, positions, self.inv_freq, cache, num_slots, ends=None)  # (3) (4)
            x, h = layer.end(branch, s, following)  # (5), and norm_in of the next layer or (6)
        return x.unflatten(0, tokens.shape), self.post_projection(x).unflatten(0, tokens.shape)  # (9)

    def logits(self, top: Tensor) -> Tensor:
        """Equations (7) and (8).

        top  [B, T, H]
        ->   [B, T, V]
        """
        return self.lm_head.logits(top.flatten(0, 1)).unflatten(0, top.shape[:2])

    def propose(self, top: Tensor) -> Tensor:
        """The likeliest token, without the logits.

        top  [M, H]
        ->   [M]
        """
        return self.lm_head.argmax(top)

    def to_target(self, draft_ids: Tensor) -> Tensor:
        """Draft ids are target ids: draft_ids of any shape -> the same"""
        return draft_ids

    def spread(self, logits: Tensor) -> Tensor:
        """Logits over the target's vocabulary, which they are already.

        logits  [B, T, V]
        ->      [B, T, V]
        """
        return logits
