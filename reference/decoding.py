"""The speculative loop for chains: propose K, verify K + 1, accept, commit.

A sequence always has one token that is emitted but that the target has not read yet: the root.
One cycle, for a sequence whose first n tokens the target has read:

    propose   the draft reads (x_{p+1}, target state of p) for the positions p that the last verify settled,
              proposes d_1, then d_2 .. d_K from its own feedback, at positions n .. n + K - 2
    verify    the target reads root, d_1 .. d_K at positions n .. n + K
    accept    the longest run of drafts that the target would have said (greedy) or may have said (sampling)
    commit    the accepted drafts and one token of the target's own, which is the next root

Rejected tokens are left in their slots: both caches overwrite them before anything can see them.
Rows of a batch keep their own lengths; prompts are padded on the right, where nothing looks.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

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
    target_cache: Any = None
    draft_cache: Any = None
    lengths: Tensor = field(default_factory=lambda: torch.empty(0))

    def prefill(self, tokens: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Read the prompts; the root and what the draft will propose from.

        tokens   [B, T]  padded on the right
        lengths  [B]
        ->       root [B], logits [B, 1, Vd] or [B, 0, V], feedback [B, 1, H] or [B, 0, H]  nothing when K is 0
        """
        self.lengths = lengths
        out = self.target(tokens, None, self.capture, self.target_cache)
        last = lengths - 1
        root = self.choose(_row(out.logits, last))
        if not self.num_draft_tokens:
            return root, out.logits[:, :0], out.hidden[:, :0]
        following = torch.cat([tokens[:, 1:], tokens[:, :1]], 1).scatter(1, last[:, None], root[:, None])
        step = self.draft(following, self.draft.read(out), None, self.draft_cache)
        return root, _row(step.logits, last), _row(step.feedback, last)

    def choose(self, logits: Tensor) -> Tensor:
        """The target's own token after the last one read.

        logits  [B, 1, V]
        ->      [B]
        """
        if not self.temperature:
            return logits[:, 0].argmax(-1)
        u = uniform(self.seed, self.sequence, self.lengths[:, None], TARGET)
        return draw(probabilities(logits, self.temperature), u)[:, 0]

    def propose(self, logits: Tensor, feedback: Tensor) -> tuple[Tensor, Tensor]:
        """K tokens from the draft and the distributions they were drawn from.

        logits    [B, 1, Vd]
        feedback  [B, 1, H]
        ->        drafted [B, K], q [B, K, V] or [B, 0, Vd]  nothing when greedy
        """
        drafted: list[Tensor] = []
        chances: list[Tensor] = []
        for k in range(1, self.num_draft_tokens + 1):
            if k > 1:
                # the token of step k - 1 follows position n + k - 2, whose slot the new step takes
                positions = (self.lengths + k - 2)[:, None]
                logits, feedback = self.draft(drafted[-1], feedback, positions, self.draft_cache)
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
        if not self.temperature:
            return out, *verify_greedy(out.logits, drafted)
        p = probabilities(out.logits, self.temperature)
        # the token at position n + 1 + j is drafted, judged and drawn with the numbers of that position
        coins = uniform(self.seed, self.sequence, positions[:, 1:], COIN)
        draws = uniform(self.seed, self.sequence, positions + 1, TARGET)
        return out, *verify_sampled(p, q, drafted, coins, draws)

    def settle(self, out: Any, drafted: Tensor, accepted: Tensor, following: Tensor) -> tuple[Tensor, Tensor]:
        """Let the draft read what the verify settled: logits and feedback of its next first step.

        drafted    [B, K]
        accepted   [B]
        following  [B]     the token after the accepted run
        ->         [B, 1, Vd], [B, 1, H]
        """
        tokens = torch.cat([drafted, following[:, None]], 1).scatter(1, accepted[:, None], following[:, None])
        positions = self.lengths[:, None] + torch.arange(tokens.shape[1], device=tokens.device)
        # columns past the accepted run hold rejected states; the next cycle writes over their slots
        step = self.draft(tokens, self.draft.read(out), positions, self.draft_cache)
        return _row(step.logits, accepted), _row(step.feedback, accepted)


def _row(x: Tensor, index: Tensor) -> Tensor:
    """x [B, T, X], index [B] -> [B, 1, X]"""
    return x.gather(1, index[:, None, None].expand(-1, 1, x.shape[-1]))


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
) -> Generation:
    """Continue every prompt by `num_tokens` tokens; the draft changes how soon they come, not which they are.

    prompts           [B, T], or B one-dimensional tensors
    num_draft_tokens  K; 0 is plain decoding and needs no draft
    capture           capture points that the draft reads
    sequence_ids      name the sequences for sampling; 0..B-1 when absent
    """
    rows = list(prompts)
    lengths = torch.tensor([len(row) for row in rows], device=rows[0].device)
    tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    names = torch.tensor(list(sequence_ids or range(len(rows))), device=tokens.device)
    chain = Chain(target, draft, capture, num_draft_tokens, temperature, seed, names)
    num_slots = tokens.shape[1] + num_tokens + num_draft_tokens + 1
    chain.target_cache = target.new_cache(len(rows), num_slots)
    chain.draft_cache = draft.new_cache(len(rows), num_slots) if num_draft_tokens else None

    root, logits, feedback = chain.prefill(tokens, lengths)
    text = [[int(t)] for t in root]
    accepted_log: list[list[int]] = [[] for _ in rows]
    done = [_ended(row, num_tokens, eos_token_id) for row in text]
    while not all(done):
        drafted, q = chain.propose(logits, feedback) if num_draft_tokens else (tokens[:, :0], logits)
        out, accepted, following = chain.verify(root, drafted, q)
        for b, run in enumerate(accepted.tolist()):
            if not done[b]:
                text[b] += [*drafted[b, :run].tolist(), int(following[b])]
                accepted_log[b].append(run)
                done[b] = _ended(text[b], num_tokens, eos_token_id)
        if num_draft_tokens:
            logits, feedback = chain.settle(out, drafted, accepted, following)
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
