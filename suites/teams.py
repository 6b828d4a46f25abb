"""Couples of a target and a draft that a number of ranks can share."""

from math import lcm
from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor

from harness.sharding import padded_vocab
from suites.catalog import open_speculation
from suites.draws import EVERY_FLAG, LLAMA, Drawn, folders, random_tokens, variant
from suites.opened import OpenSpeculation
from suites.scripted import POINTS


class Team(NamedTuple):
    """A couple and how many ranks share it."""

    ranks: int
    target: Drawn
    draft: Drawn
    own_embedding: bool = True

    def open(self, ranks: int, dtype: torch.dtype = torch.float64) -> OpenSpeculation:
        """Opened on some ranks, from a folder that is gone afterwards."""
        with folders(self.target, self.draft, self.own_embedding) as paths:
            return open_speculation(*paths, side="optimized", dtype=dtype, tp_size=ranks)

    @property
    def vocab(self) -> int:
        return self.target.keys["vocab_size"]

    @property
    def borders(self) -> Tensor:
        """[M]  the tokens on both sides of every border between ranks, the last one and the first"""
        first = range(0, self.vocab, padded_vocab(self.vocab, self.ranks) // self.ranks)
        return torch.tensor(sorted({t for b in (*first, self.vocab) for t in (b - 1, b) if 0 <= t < self.vocab}))

    def text(self, width: int) -> Tensor:
        """[2, T]  both orders of the borders, and random tokens"""
        noise = random_tokens(self.vocab, 2, width, self.target.seed)
        return torch.cat([torch.stack([self.borders, self.borders.flip(0)]), noise], 1)

    @property
    def prompts(self) -> list[Tensor]:
        """Of unequal lengths."""
        first, second = self.text(3)
        return [first, second[:3]]


def team(
    size: int, kv_heads: int, draft_kv_heads: int, vocab: int, seed: int, own_embedding: bool = True, **flags: Any
) -> Team:
    """Few layers, and sizes that `size` ranks divide; query heads are two for each key/value head, or more."""
    sizes = {"hidden_size": 48, "intermediate_size": 24 * size, "head_dim": 8, "vocab_size": vocab}
    target = variant(
        LLAMA,
        seed,
        **sizes,
        num_hidden_layers=3,
        num_key_value_heads=kv_heads,
        num_attention_heads=lcm(2 * kv_heads, size),
    )
    heads = {"num_key_value_heads": draft_kv_heads, "num_attention_heads": lcm(draft_kv_heads, size)}
    changes = {**sizes, **heads, "draft_vocab_size": min(vocab, 97), "eagle_config": POINTS, **flags}
    return Team(size, target, variant(EVERY_FLAG.keys, seed + 1, **changes), own_embedding)


@st.composite
def teams(draw: st.DrawFn) -> Team:
    """Key/value heads divide over the ranks, or are repeated on them."""
    size, flag = draw(st.sampled_from([2, 3, 4])), st.booleans()
    heads = st.sampled_from([*(g for g in range(1, size) if size % g == 0), size, 2 * size])
    flags = {"norm_before_residual": draw(flag), "mlp_bias": draw(flag), "bias": draw(flag), "fc_norm": draw(flag)}
    vocab = draw(st.sampled_from([97, 130, 192, 331]))
    return team(size, draw(heads), draw(heads), vocab, draw(st.integers(0, 2**20)), draw(flag), **flags)


# every bias, padding inside and beyond a shard; 4 ranks share 2 heads, and a vocabulary whose last rank has no row
TWO, THREE = team(2, 2, 1, 331, 1), team(3, 3, 3, 331, 3, own_embedding=False, num_hidden_layers=1, layer_types=None)
FOUR = team(4, 2, 2, 130, 5)
