"""One cycle over static buffers: propose K drafts, verify K + 1 tokens, accept, commit.

The equations are those of `reference/decoding.py` with the same numbers for every draw; the order differs by where a
cycle begins: the draft's first step, which reads what the last verify settled, stands here at the front. No number
is read back from the device and no branch depends on one, so M cycles in a row can be captured as they are.
Letters: reference/README.md.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from optimized.state import State

TARGET, DRAFT, COIN = 0, 1, 2
"""streams of random numbers: the target's own draws, the draft's proposals, the accept coins"""
# the last number below one: its product with a total must stay below the total
BELOW_ONE = 1 - 2.0**-52


class Speculation(NamedTuple):
    """What speaks: a target, a draft (None for plain decoding) and how they join."""

    target: Any
    draft: Any
    capture: tuple[int, ...]
    way: Any = None
    """the draft's way of drafting, `draft.way`, over the state of a generation"""


def cycle(models: Speculation, state: State, num_slots: int | None = None) -> None:
    """The three phases; `num_slots` is a bound on position + 1 that the host knows."""
    propose(models, state, num_slots)
    verify(models, state, num_slots)
    accept(models, state)


def propose(models: Speculation, state: State, num_slots: int | None = None) -> None:
    """Fill `drafted` (and `q`): one draft step over the settled columns, then K - 1 over the draft's own feedback."""
    draft, way = models.draft, models.way
    if not state.plan.num_draft_tokens:
        return
    tops, feedback = way.start(num_slots)
    token = state.root
    for k in range(1, state.plan.num_draft_tokens + 1):
        if k <= tops.shape[1]:
            top = tops[:, k - 1]
        else:
            top, feedback = way.next(token, feedback, k, num_slots)
        token = draft.at.group.broadcast(_draft_token(draft, state, top, k))
        state.drafted[:, k - 1] = token


def verify(models: Speculation, state: State, num_slots: int | None = None) -> None:
    """Fill `chosen` (or `p`) and the states that the draft reads next: the target reads the root and the drafts."""
    target = models.target
    tokens = torch.cat([state.root[:, None], state.drafted], 1)
    positions = state.lengths[:, None] + state.columns
    hidden, _ = target.states(tokens, positions, state.target_cache, models.capture, num_slots, state.aux)
    state.hidden.copy_(hidden)
    if state.plan.sampled:
        logits = target.lm_head.logits(hidden.flatten(0, 1)).unflatten(0, tokens.shape)
        state.p.copy_(probabilities(logits, state.temperature))
    else:
        state.chosen.copy_(target.lm_head.argmax(hidden.flatten(0, 1)).view(tokens.shape))


def accept(models: Speculation, state: State) -> None:
    """Judge the drafts, draw the token after them, and commit both."""
    ops, group = models.target.at.ops, models.target.at.group
    if state.plan.num_draft_tokens:
        accepted = _accept_forced(ops, state) if state.plan.forced else _accept(ops, state)
    else:
        accepted = torch.zeros_like(state.accepted)
    following = draw_following(ops, state, accepted) if state.plan.sampled else _at(state.chosen, accepted)
    if group.size > 1:
        # ranks compute the same numbers; should one of them not, it must still not say other tokens
        accepted, following = group.broadcast(torch.stack([accepted, following])).unbind(0)
    commit(state, accepted, following)


def commit(state: State, accepted: Tensor, following: Tensor) -> None:
    """Append the accepted drafts and the token after them to every row that still speaks.

    accepted   [B]
    following  [B]
    """
    going = ~state.done
    num_drafts, live = state.plan.num_draft_tokens, going[:, None]
    state.settled[:, :num_drafts] = state.drafted
    state.settled.scatter_(1, accepted[:, None], following[:, None])
    said = (state.columns <= accepted[:, None]) & live  # [B, K+1]
    # what must not be written goes to the last column, which nobody reads
    place = torch.where(said, state.num_output[:, None] + state.columns, state.output.shape[1] - 1)
    state.output.scatter_(1, place, state.settled)
    place = torch.where(going, state.num_cycles, state.log.shape[1] - 1)
    state.log.scatter_(1, place[:, None], accepted[:, None])
    state.num_cycles += going
    state.num_output += said.sum(1)
    ended = ((state.settled == state.eos) & said).any(1) | (state.num_output >= state.num_tokens)
    state.done |= ended
    # a row that ends here repeats this cycle for ever: its length and its root stand still
    going = ~state.done
    state.accepted.copy_(accepted * going)
    state.lengths += (accepted + 1) * going
    state.root.copy_(torch.where(going, following, state.root))
    state.progress.copy_(torch.where(going, state.lengths, ~state.lengths))


def probabilities(logits: Tensor, temperature: Tensor) -> Tensor:
    """logits [..., V], temperature [1] -> [..., V]  float64"""
    return (logits.double() / temperature).softmax(-1)


def draw(weights: Tensor, u: Tensor) -> Tensor:
    """The token at which the running sum of the weights passes u of their total.

    weights  [B, V]  not negative, not all zero
    u        [B]
    ->       [B]
    """
    total = weights.cumsum(-1)
    level = u.clamp(max=BELOW_ONE)[:, None] * total[:, -1:]
    return (total <= level).sum(-1)


def draw_following(ops: Any, state: State, accepted: Tensor) -> Tensor:
    """The recovered or bonus token, from max(p - q, 0); after the last draft q is zero.

    accepted  [B]
    ->        [B]
    """
    rest = (ops.gather_rows(state.p, accepted) - ops.gather_rows(state.q, accepted)).clamp(min=0)
    return draw(rest, ops.uniform(state.seed, state.sequence, state.lengths + 1 + accepted, TARGET))


def conditional(rates: Sequence[float]) -> list[float]:
    """Acceptance rates of draft positions, given that all before them were accepted, from the unconditional ones."""
    return [now / then if then else 0.0 for now, then in zip(rates, [1.0, *rates], strict=False)]


def _draft_token(draft: Any, state: State, top: Tensor, k: int) -> Tensor:
    """top [B, H] -> the k-th draft [B]"""
    if not state.plan.sampled:
        return draft.propose(top)
    q = probabilities(draft.spread(draft.logits(top[:, None])), state.temperature)[:, 0]
    state.q[:, k - 1] = q
    return draw(q, draft.at.ops.uniform(state.seed, state.sequence, state.lengths + k, DRAFT))


def _accept(ops: Any, state: State) -> Tensor:
    """-> [B] the leading drafts that the target would have said, or may have said"""
    if not state.plan.sampled:
        return ops.accept_greedy(state.drafted, state.chosen)
    at = state.drafted[..., None]
    q, p = state.q[:, :-1].gather(-1, at)[..., 0], state.p[:, :-1].gather(-1, at)[..., 0]
    return _leading(_coins(ops, state) * q < p)


def _accept_forced(ops: Any, state: State) -> Tensor:
    """-> [B] leading positions whose coin lies below the given rate"""
    return _leading(_coins(ops, state) < state.rates)


def _coins(ops: Any, state: State) -> Tensor:
    """-> [B, K] one number for each drafted position"""
    positions = state.lengths[:, None] + state.columns[1:]
    return ops.uniform(state.seed, state.sequence, positions, COIN)


def _leading(kept: Tensor) -> Tensor:
    """kept [B, K] -> [B]"""
    return kept.long().cumprod(-1).sum(-1)


def _at(x: Tensor, index: Tensor) -> Tensor:
    """x [B, T], index [B] -> [B]"""
    return x.gather(1, index[:, None])[:, 0]
