"""Drawing tokens so that a draw depends on nothing but its own place.

One number in [0, 1) belongs to each (seed, sequence, position, stream): a counter-based generator, so neither the
batch, nor the number of draft tokens, nor what was rejected before moves it.

Rejection sampling (arXiv 2211.17192) keeps the target's distribution p whatever the draft's q proposes:

    accept x ~ q  if  coin * q(x) < p(x);  at the first rejection draw from  max(p - q, 0) / sum(max(p - q, 0))
"""

import torch
from torch import Tensor

TARGET, DRAFT, COIN = 0, 1, 2
"""streams: the target's own draws (first, recovered, bonus), the draft's proposals, the accept coins"""


def uniform(seed: int, sequence: Tensor, position: Tensor, stream: int) -> Tensor:
    """The number of each place, splitmix64 of the four counters.

    sequence  [B]
    position  [B, T]
    ->        [B, T]  float64 in [0, 1)
    """
    word = _wrap(seed * 0x9E3779B97F4A7C15 + stream * 0xD6E8FEB86659FD93)
    x = word + sequence[:, None] * _wrap(0xBF58476D1CE4E5B9) + position * _wrap(0x94D049BB133111EB)
    x = (x ^ _shift(x, 30)) * _wrap(0xBF58476D1CE4E5B9)
    x = (x ^ _shift(x, 27)) * _wrap(0x94D049BB133111EB)
    x = x ^ _shift(x, 31)
    return _shift(x, 11).double() * 2.0**-53


def _wrap(value: int) -> int:
    """The signed 64-bit integer with the same bits."""
    return (value + 2**63) % 2**64 - 2**63


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift: torch shifts int64 arithmetically."""
    return (x >> bits) & (2 ** (64 - bits) - 1)


def probabilities(logits: Tensor, temperature: float) -> Tensor:
    """logits [B, T, V] -> [B, T, V]  float64"""
    return (logits.double() / temperature).softmax(-1)


def draw(weights: Tensor, u: Tensor) -> Tensor:
    """The token at which the running sum of the weights passes u of their total.

    weights  [B, T, V]  not negative, not all zero
    u        [B, T]
    ->       [B, T]
    """
    total = weights.cumsum(-1)
    # the last number below one: its product with the total must stay below the total
    level = u.clamp(max=1 - 2.0**-52)[..., None] * total[..., -1:]
    return (total <= level).sum(-1)


def verify_sampled(p: Tensor, q: Tensor, drafted: Tensor, coins: Tensor, draws: Tensor) -> tuple[Tensor, Tensor]:
    """Keep the longest accepted run of drafts and draw the token after it.

    p        [B, K+1, V]  the target's probabilities after the root and after each draft
    q        [B, K, V]    the draft's, each draft was drawn from
    drafted  [B, K]
    coins    [B, K]
    draws    [B, K+1]
    ->       accepted [B], next [B]
    """
    at = drafted[..., None]
    keep = coins * q.gather(-1, at)[..., 0] < p[:, :-1].gather(-1, at)[..., 0]
    accepted = keep.long().cumprod(-1).sum(-1)
    rest = torch.cat([(p[:, :-1] - q).clamp(min=0), p[:, -1:]], 1)
    return accepted, draw(rest, draws).gather(1, accepted[:, None])[:, 0]


def verify_greedy(logits: Tensor, drafted: Tensor) -> tuple[Tensor, Tensor]:
    """Keep the drafts that the target would have chosen itself.

    logits   [B, K+1, V]
    drafted  [B, K]
    ->       accepted [B], next [B]
    """
    chosen = logits.argmax(-1)
    accepted = (drafted == chosen[:, :-1]).long().cumprod(-1).sum(-1)
    return accepted, chosen.gather(1, accepted[:, None])[:, 0]
