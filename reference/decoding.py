"""The speculative loop: propose K, verify K + 1, accept, commit; a tree proposes more than it can accept.

A sequence always has one token that is emitted but that the target has not read yet: the root.
One cycle, for a sequence whose first n tokens the target has read:

    propose   the draft reads the positions that the last verify settled, proposes d_1, then d_2 .. d_K from what it
              proposed itself; what it reads and where is the way of drafting (reference/drafting.py)
    verify    the target reads root, d_1 .. d_K at positions n .. n + K
    accept    the longest run of drafts that the target would have said (greedy) or may have said (sampling)
    commit    the accepted drafts and one token of the target's own, which is the next root

What a target never says (`suppress_tokens` of its generation config) has no chance in any of these choices, the
draft's neither. Logits are not changed by that: it is a fact of decoding.
Rejected tokens are left in their slots: both caches overwrite them before anything can see them.
Rows of a batch keep their own lengths; prompts are padded on the right, where nothing looks.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from reference import trees
from reference.drafting import Step, embed_ahead, row
from reference.ops.sampling import (
    COIN,
    DRAFT,
    TARGET,
    draw,
    probabilities,
    uniform,
    verify_greedy,
    verify_sampled,
)
from reference.outputs import TargetOutput


class Generation(NamedTuple):
    tokens: Tensor
    """[B, num_tokens]  -1 after the end"""
    accepted: list[list[int]]
    """per sequence: accepted drafts of each verify step"""


@dataclass
class Chain:
    """One generation of one batch; `lengths` counts the tokens that the target has read and that stand."""

    target: Callable[..., Any]
    draft: Any
    capture: Sequence[int]
    num_draft_tokens: int
    temperature: float
    seed: int
    sequence: Tensor
    """[B] numbers that name the sequences: their draws follow the number, not the row"""
    suppressed: Sequence[int] = ()
    """target ids that are never said"""
    target_cache: Any = None
    way: Any = None
    """the draft's way of drafting, `draft.way`, in this generation"""
    lengths: Tensor = field(default_factory=lambda: torch.empty(0))

    def open(self, batch: int, num_slots: int) -> None:
        """Make room for `num_slots` tokens of each sequence."""
        self.target_cache = self.target.new_cache(batch, num_slots)
        if self.num_draft_tokens:
            self.way = self.draft.way(
                self.draft, self.target, self.target_cache, batch, num_slots, self.num_draft_tokens
            )

    def prefill(self, tokens: Tensor, lengths: Tensor, inputs: Mapping[str, Any]) -> tuple[Tensor, Step]:
        """Read the prompts; the roots and the draft's first step, of no column when K is 0.

        tokens   [B, T]  padded on the right
        lengths  [B]
        inputs   images, audio and video of the prompts, as the target takes them
        """
        self.lengths = lengths
        out = self.target(tokens, None, self.capture, self.target_cache, **inputs)
        last = lengths - 1
        root = self.choose(row(out.logits, last), lengths[:, None])[:, 0]
        if not self.num_draft_tokens:
            return root, Step(out.logits[:, :0], out.hidden[:, :0])
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        # a placeholder may lie beyond the table: a draft reads the id that the target's table was asked for
        known = self.target.known(tokens) if hasattr(self.target, "known") else tokens
        following = torch.cat([known[:, 1:], known[:, :1]], 1).scatter(1, last[:, None], root[:, None])
        media = {}
        if inputs:
            h, holes, _ = self.target.sense(self.target.language_model.embed(known), tokens, **inputs)
            embeds = embed_ahead(self.draft, following, h, holes)
            media = {} if embeds is None else {"embeds": embeds}
        return root, self.way.start(out, known, following, positions, last, **media)

    def allow(self, logits: Tensor, of_draft: bool = False) -> Tensor:
        """Logits without a chance for what is never said; a draft's stand for target ids.

        logits  [B, T, X]
        ->      [B, T, X]
        """
        if not self.suppressed:
            return logits
        ids = torch.arange(logits.shape[-1], device=logits.device)
        never = torch.tensor(self.suppressed, device=logits.device)
        return logits.masked_fill(torch.isin(self.draft.to_target(ids) if of_draft else ids, never), float("-inf"))

    def choose(self, logits: Tensor, places: Tensor) -> Tensor:
        """The target's own tokens at some places.

        logits  [B, T, V]
        places  [B, T]
        ->      [B, T]
        """
        logits = self.allow(logits)
        if not self.temperature:
            return logits.argmax(-1)
        return draw(probabilities(logits, self.temperature), uniform(self.seed, self.sequence, places, TARGET))

    @property
    def room(self) -> int:
        """Slots that a cycle may take."""
        return self.num_draft_tokens + 1

    def cycle(self, root: Tensor, first: Step) -> tuple[Any, Tensor, Tensor, Tensor]:
        """Propose and verify.

        root   [B]
        first  the draft's first step
        ->     target output, drafted [B, K], accepted [B], next [B]
        """
        drafted, q = self.propose(first) if self.num_draft_tokens else (root[:, None][:, :0], first.logits)
        out, accepted, following = self.verify(root, drafted, q)
        return out, drafted, accepted, following

    def propose(self, first: Step) -> tuple[Tensor, Tensor]:
        """K tokens from the draft and the distributions they were drawn from.

        first  the draft's first step
        ->     drafted [B, K], q [B, K, V] or [B, 0, Vd]  nothing when greedy
        """
        drafted: list[Tensor] = []
        chances: list[Tensor] = []
        (logits, feedback), at_once = first, first.logits.shape[1]
        for k in range(1, self.num_draft_tokens + 1):
            if k <= at_once:
                logits = first.logits[:, k - 1 : k]
            else:
                logits, feedback = self.way.next(drafted[-1], feedback, self.lengths, k)
            logits = self.allow(logits, of_draft=True)
            if self.temperature:
                q = probabilities(self.draft.spread(logits), self.temperature)
                drafted.append(draw(q, uniform(self.seed, self.sequence, (self.lengths + k)[:, None], DRAFT)))
                chances.append(q)
            else:
                drafted.append(self.draft.to_target(logits.argmax(-1)))
        return torch.cat(drafted, 1), torch.cat(chances, 1) if chances else logits[:, :0]

    def verify(self, root: Tensor, drafted: Tensor, q: Tensor) -> tuple[Any, Tensor, Tensor]:
        """One pass of the target over the root and the drafts.

        root     [B]
        drafted  [B, K]
        q        [B, K, V] or [B, 0, Vd]
        ->       target output, accepted [B], next [B]
        """
        tokens = torch.cat([root[:, None], drafted], 1)
        positions = self.lengths[:, None] + torch.arange(tokens.shape[1], device=tokens.device)
        out = self.target(tokens, positions, self.capture, self.target_cache)
        logits = self.allow(out.logits)
        if not self.temperature:
            return out, *verify_greedy(logits, drafted)
        p = probabilities(logits, self.temperature)
        # the token at position n + 1 + j is drafted, judged and drawn with the numbers of that position
        coins = uniform(self.seed, self.sequence, positions[:, 1:], COIN)
        draws = uniform(self.seed, self.sequence, positions + 1, TARGET)
        return out, *verify_sampled(p, q, drafted, coins, draws)

    def settle(self, out: Any, root: Tensor, drafted: Tensor, accepted: Tensor, following: Tensor) -> Step:
        """Let the draft read what the verify settled: its next first step.

        root       [B]
        drafted    [B, K]
        accepted   [B]
        following  [B]     the token after the accepted run
        """
        tokens = torch.cat([root[:, None], drafted], 1)
        after = torch.cat([drafted, following[:, None]], 1).scatter(1, accepted[:, None], following[:, None])
        positions = self.lengths[:, None] + torch.arange(tokens.shape[1], device=tokens.device)
        # columns past the accepted run hold rejected states; the next cycle writes over their slots
        return self.way.start(out, tokens, after, positions, accepted)


@dataclass
class Tree(Chain):
    """A generation whose cycles propose trees: `reference/trees.py`. K is S, the longest path; D counts the nodes."""

    topk: int = 1
    num_nodes: int = 2

    @property
    def room(self) -> int:
        """Slots that a cycle may take: the target's nodes, the draft's root and beams."""
        return max(self.num_nodes, 1 + self.topk * (self.num_draft_tokens - 1))

    def cycle(self, root: Tensor, first: Step) -> tuple[Any, Tensor, Tensor, Tensor]:
        """As `Chain.cycle`, of the path that stands: after it, nothing shows that there was a tree.

        root   [B]
        first  the draft's first step
        ->     target output, drafted [B, K], accepted [B], next [B]
        """
        nodes, places = self.grow(root, first), torch.arange(self.num_nodes, device=root.device)
        positions = self.lengths[:, None] + nodes.depths
        seen = trees.visible(nodes.words, self.lengths, self.target_cache.num_slots)
        slots = self.lengths[:, None] + places
        out = self.target(nodes.tokens, positions, self.capture, self.target_cache, slots, seen)
        own = self.choose(out.logits, positions + 1)
        path, accepted, following = trees.walk(nodes, own, self.num_draft_tokens)
        self.target_cache.compact(self.lengths, path)
        self.target_cache.roll_back(self.lengths + accepted + 1)
        out = TargetOutput(*(trees.pick(x, path) for x in out))
        return out, nodes.tokens.gather(1, path[:, 1:]), accepted, following

    def grow(self, root: Tensor, first: Step) -> trees.Nodes:
        """One draft step a level, each of a whole beam.

        root  [B]
        """
        known, beam = trees.begin(root)
        (logits, feedback), words = first, torch.zeros_like(root)[:, None]
        for k in range(1, self.num_draft_tokens + 1):
            if k > 1:
                # what a member goes on from is the row that it grew from
                feedback = trees.pick(feedback, beam.origin)
                own = 1 << torch.arange(self.topk, device=root.device) + (k - 2) * self.topk
                words = words.gather(1, beam.origin) | own
                tokens = known.tokens.gather(1, beam.numbers)
                logits, feedback = self.way.branch(tokens, feedback, self.lengths, k, words)
            ids, chances = trees.likeliest(self.allow(logits, of_draft=True), self.topk)
            known, beam = trees.grow(known, beam, self.draft.to_target(ids.flatten(1)).view_as(ids), chances)
        self.way.forget(self.lengths)
        return trees.select(known, root, self.num_draft_tokens, self.num_nodes)


@torch.no_grad()
def generate(
    target: Any,
    draft: Any,
    prompts: Tensor | Sequence[Tensor],
    num_tokens: int,
    num_draft_tokens: int = 3,
    capture: Sequence[int] = (),
    temperature: float = 0.0,
    seed: int = 0,
    eos_token_id: int | None = None,
    sequence_ids: Sequence[int] | None = None,
    topk: int = 1,
    num_steps: int | None = None,
    inputs: Mapping[str, Any] | None = None,
    suppressed: Sequence[int] = (),
) -> Generation:
    """Continue every prompt by `num_tokens` tokens; the draft changes how soon they come, not which they are.

    prompts           [B, T], or B one-dimensional tensors
    num_draft_tokens  K; 0 is plain decoding and needs no draft. Of a tree D, its nodes with the root
    capture           capture points that the draft reads
    sequence_ids      name the sequences for sampling; 0..B-1 when absent
    topk              of a tree: what each node of a beam offers; errors: ValueError for a tree that cannot be
    num_steps         S, draft steps of a tree; D - 1 when absent. Neither is given: a chain
    inputs            images, audio and video of the prompts, named as the target's `forward` names them
    suppressed        target ids that are never said
    """
    rows = list(prompts)
    lengths = torch.tensor([len(row) for row in rows], device=rows[0].device)
    tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    names = torch.tensor(list(sequence_ids or range(len(rows))), device=tokens.device)
    how: Any = (temperature, seed, names, suppressed)
    chain = Chain(target, draft, capture, num_draft_tokens, *how)
    if num_draft_tokens and (topk > 1 or num_steps):
        depth = num_steps or num_draft_tokens - 1
        trees.check(topk, depth, num_draft_tokens)
        if getattr(draft.way, "branch", None) is None:
            raise ValueError(f"{draft.way.__name__} has no step for a beam of tokens: chains alone, no trees")
        chain = Tree(target, draft, capture, depth, *how, topk=topk, num_nodes=num_draft_tokens)
    chain.open(len(rows), tokens.shape[1] + num_tokens + chain.room)

    root, first = chain.prefill(tokens, lengths, inputs or {})
    text = [[int(t)] for t in root]
    accepted_log: list[list[int]] = [[] for _ in rows]
    done = [_ended(row, num_tokens, eos_token_id) for row in text]
    while not all(done):
        out, drafted, accepted, following = chain.cycle(root, first)
        for b, run in enumerate(accepted.tolist()):
            if not done[b]:
                text[b] += [*drafted[b, :run].tolist(), int(following[b])]
                accepted_log[b].append(run)
                done[b] = _ended(text[b], num_tokens, eos_token_id)
        if num_draft_tokens:
            first = chain.settle(out, root, drafted, accepted, following)
        # a finished row repeats its last cycle instead of running out of slots
        going = ~torch.tensor(done, device=tokens.device)
        root = torch.where(going, following, root)
        chain.lengths = chain.lengths + (accepted + 1) * going
    return Generation(_pad([_cut(row, num_tokens, eos_token_id) for row in text], num_tokens), accepted_log)


def _ended(row: list[int], num_tokens: int, eos_token_id: int | None) -> bool:
    return len(row) >= num_tokens or eos_token_id in row


def _cut(row: list[int], num_tokens: int, eos_token_id: int | None) -> list[int]:
    """The text up to and with the end token, which may stand inside an accepted run."""
    end = row.index(eos_token_id) + 1 if eos_token_id in row else len(row)
    return row[: min(end, num_tokens)]


def _pad(rows: list[list[int]], num_tokens: int) -> Tensor:
    return torch.tensor([row + [-1] * (num_tokens - len(row)) for row in rows])
