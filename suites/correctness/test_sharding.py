"""Claim: W ranks hold every row of every weight once, in the place where its reader looks.

Born of SGLang #23976: under tensor parallel a draft was handed the whole table. Its repair splits by ceil(V / W) what
VocabParallelEmbedding splits with padding: for V = 1000 and W = 4 rank 1 begins with token 250 in one and 256 in the
other. The rule is stated twice, as offsets in optimized.parallel and as one list a rank in harness.sharding, and
engines' own numbers stand beside both. What ranks say together: test_ranks.
"""

from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from harness.checkpoints import CheckpointError, state_of
from harness.compare import bit_equal
from harness.sharding import LAYOUTS, ShardError, check_hand_over, join, owner, split
from harness.strategies import head_specs, ranks, vocabs
from optimized.parallel import vocab_run
from suites.catalog import PAIRS, open_draft, open_target
from suites.draws import LLAMA, eagle3_weights, folders, variant
from suites.stand import stand_as
from suites.teams import FOUR, THREE, TWO, Team, teams

pytestmark = pytest.mark.correctness

BY_RUNS = ("column", "row", "experts")


class Cut(NamedTuple):
    """One weight and how it is split."""

    kind: str
    size: int
    ranks: int
    how: dict[str, Any]
    repeats: bool = False
    """several ranks hold the same row"""

    @property
    def weight(self) -> Tensor:
        """Every element shows its own index along the split dim."""
        index = torch.arange(1, self.size + 1)
        return index.expand(2, -1).clone() if self.kind == "row" else index[:, None].repeat(1, 2)

    @property
    def shards(self) -> list[Tensor]:
        return [split(self.weight, self.kind, rank, self.ranks, **self.how) for rank in range(self.ranks)]


@st.composite
def cuts(draw: st.DrawFn) -> Cut:
    """Every kind, rank count, vocabulary and layout."""
    kind, size = draw(st.sampled_from(["vocab", "heads", "replicated", *BY_RUNS])), draw(ranks())
    if kind == "vocab":
        layout = draw(st.sampled_from(LAYOUTS))
        return Cut(kind, draw(vocabs()), size, {"layout": layout}, layout == "full" and size > 1)
    if kind == "heads":
        spec = draw(head_specs())
        size, heads = spec.ranks, spec.kv_heads
        return Cut(kind, heads * spec.head_dim, size, {"heads": heads}, size > heads)
    if kind == "replicated":
        return Cut(kind, draw(st.integers(1, 40)), size, {}, size > 1)
    parts = draw(st.integers(1, 3)) if kind == "column" else 1
    return Cut(kind, size * parts * draw(st.integers(1, 9)), size, {"parts": parts})


@given(cut=cuts())
@example(cut=Cut("vocab", 331, 4, {"layout": "padded64"}))
@example(cut=Cut("vocab", 130, 4, {"layout": "padded64"}))
@example(cut=Cut("vocab", 1000, 3, {"layout": "ceil"}))
@example(cut=Cut("vocab", 100, 8, {"layout": "full"}, True))
@example(cut=Cut("heads", 2 * 16, 8, {"heads": 2}, True))
@example(cut=Cut("column", 2 * 24, 4, {"parts": 2}))
@example(cut=Cut("row", 24, 3, {}))
def test_joining_undoes_splitting(cut: Cut) -> None:
    shards = cut.shards

    bit_equal("joined", join(shards, cut.kind, size=cut.size, **cut.how), cut.weight)
    assert len({shard.shape for shard in shards}) == 1 or cut.how.get("layout") == "ceil"


@given(cut=cuts().filter(lambda cut: not cut.repeats))
@example(cut=Cut("vocab", 331, 4, {"layout": "padded64"}))
@example(cut=Cut("vocab", 1000, 3, {"layout": "ceil"}))
@example(cut=Cut("row", 24, 3, {}))
@example(cut=Cut("heads", 6 * 16, 3, {"heads": 6}))
def test_no_row_is_lost_moved_or_held_twice(cut: Cut) -> None:
    dim = 1 if cut.kind == "row" else 0
    beside = torch.cat(cut.shards, dim)

    real = beside.select(1 - dim, 0)
    # padding is zero and stands behind all rows; merged parts are cut one by one, so they mix
    bit_equal("rows", real[real != 0].sort().values, torch.arange(1, cut.size + 1))
    bit_equal("both copies", beside.select(1 - dim, 1), real)


@pytest.mark.parametrize("layout", LAYOUTS)
@given(vocab=vocabs(), ranks=ranks())
@example(vocab=100, ranks=2)
@example(vocab=331, ranks=3)
@example(vocab=1000, ranks=4)
def test_every_token_is_found_at_its_owner(layout: str, vocab: int, ranks: int) -> None:
    table = torch.arange(vocab)[:, None]
    shards = [split(table, "vocab", rank, ranks, layout=layout) for rank in range(ranks)]

    places = [owner(token, vocab, ranks, layout) for token in range(vocab)]

    assert [int(shards[rank][row]) for rank, row in places] == list(range(vocab))


# (V, W, first token of each rank and the end of the last): as VocabParallelEmbedding of vLLM and SGLang cuts them
ENGINES = (
    (250, 2, (0, 128, 250)),
    (250, 4, (0, 64, 128, 192, 250)),
    (130, 4, (0, 48, 96, 130, 130)),
    (1000, 4, (0, 256, 512, 768, 1000)),
    (1000, 3, (0, 384, 768, 1000)),
    (331, 8, (0, 48, 96, 144, 192, 240, 288, 331, 331)),
)


@pytest.mark.parametrize(("vocab", "ranks", "ends"), ENGINES, ids=str)
def test_both_statements_cut_where_engines_cut(vocab: int, ranks: int, ends: tuple[int, ...]) -> None:
    table = torch.arange(1, vocab + 1)[:, None]
    for rank in range(ranks):
        run = vocab_run(vocab, rank, ranks)
        shard = split(table, "vocab", rank, ranks)[:, 0]

        assert (run.start, run.stop) == (ends[rank], ends[rank + 1])
        assert shard[shard != 0].tolist() == list(range(ends[rank] + 1, ends[rank + 1] + 1))


def refused(given: str, taken: str, vocab: int, ranks: int) -> bool:
    """Whether shards of one layout may not be read as another."""
    try:
        check_hand_over(given, taken, vocab, ranks)
    except ShardError:
        return True
    return False


@given(given=st.sampled_from(LAYOUTS), taken=st.sampled_from(LAYOUTS), vocab=vocabs(), ranks=ranks())
@example(given="ceil", taken="padded64", vocab=1000, ranks=4)
@example(given="ceil", taken="padded64", vocab=512, ranks=4)
@example(given="full", taken="padded64", vocab=128, ranks=2)
def test_a_hand_over_is_refused_where_a_row_would_be_anothers(given: str, taken: str, vocab: int, ranks: int) -> None:
    table = torch.arange(1, vocab + 1)[:, None]
    here, there = ([split(table, "vocab", rank, ranks, layout=x) for rank in range(ranks)] for x in (given, taken))

    assert refused(given, taken, vocab, ranks) == (not all(map(torch.equal, here, there)))


def kind_of(name: str, plan: dict[str, str]) -> str:
    """What the plan of a page says about a parameter."""
    return next((kind for pattern, kind in plan.items() if fnmatchcase(name, pattern)), "replicated")


def cut_as_planned(name: str, full: Tensor, kind: str, config: Any, ranks: int) -> list[Tensor]:
    """The shards of a parameter by harness.sharding."""
    heads = {"q_proj": config.heads, "k_proj": config.kv_heads, "v_proj": config.kv_heads}
    how = {"heads": heads[name.split(".")[-2]]} if kind == "heads" else {}
    return [split(full, kind, rank, ranks, **how) for rank in range(ranks)]


@pytest.mark.parametrize("pair", ["llama", "eagle3"])
@given(team=teams())
@example(team=TWO)
@example(team=THREE)
@example(team=FOUR)
def test_a_rank_holds_its_shard_of_every_parameter(pair: str, team: Team) -> None:
    place = ["llama", "eagle3"].index(pair)
    with folders(team.target, team.draft) as paths:
        whole = [open_target(paths[0])]
        whole += [open_draft(paths[1], whole[0])]
        share = [open_target(paths[0], side="optimized", tp_size=team.ranks)]
        share += [open_draft(paths[1], share[0], side="optimized", tp_size=team.ranks)]
    full, modules, config = state_of(whole[place].module), share[place].modules, whole[place].module.c

    held = [module.unpack() for module in modules]

    plan = PAIRS[pair].page.TP_PLAN
    assert all(shards.keys() == full.keys() for shards in held)
    for name, tensor in full.items():
        for rank, want in enumerate(cut_as_planned(name, tensor, kind_of(name, plan), config, team.ranks)):
            bit_equal(f"{name} of rank {rank}", held[rank][name], want)


@pytest.mark.pair("eagle3")
@given(team=teams())
@example(team=TWO)
@example(team=FOUR)
def test_a_handed_over_table_has_the_layout_of_its_reader(team: Team) -> None:
    config = {**team.draft.keys, "draft_vocab_size": team.vocab}
    tensors = eagle3_weights(variant(config, 1), own_embedding=False)
    del tensors["lm_head.weight"]
    with folders(team.target) as (path, _):
        target = open_target(path, side="optimized", dtype=torch.float64, tp_size=team.ranks)
        whole = state_of(open_target(path, dtype=torch.float64).module)

    draft = stand_as(config, tensors, target, tp_size=team.ranks)

    # every id of every rank; asking with one feature at a time gives the head's columns
    ids, features = torch.arange(team.vocab), torch.eye(target.config.hidden, dtype=torch.float64)
    with torch.no_grad():
        rows = draft.ranks.run(lambda rank: draft.modules[rank].embed_tokens(ids))
        columns = draft.ranks.run(lambda rank: draft.modules[rank].lm_head.logits(features))
    for found, asked in zip(rows, columns, strict=True):
        bit_equal("embedding", found, whole["embed_tokens.weight"])
        bit_equal("head", asked.T.contiguous(), whole["lm_head.weight"])


INDIVISIBLE = (
    ({"num_attention_heads": 4, "num_key_value_heads": 2}, 3, "heads"),
    ({"num_attention_heads": 6, "num_key_value_heads": 2}, 3, "key/value heads"),
    ({"num_attention_heads": 12, "num_key_value_heads": 6}, 4, "key/value heads"),
    ({"intermediate_size": 50}, 4, "intermediate features"),
)


@pytest.mark.pair("llama")
@pytest.mark.parametrize(("sizes", "ranks", "what"), INDIVISIBLE, ids=str)
def test_what_ranks_do_not_divide_is_refused(sizes: dict[str, int], ranks: int, what: str) -> None:
    base = {"num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 4, "intermediate_size": 48}
    refusal = pytest.raises(CheckpointError, match=rf"cannot be split over tp_size={ranks}.*{what}")
    with folders(variant(LLAMA, 1, **{**base, **sizes})) as (path, _), refusal:
        open_target(path, side="optimized", tp_size=ranks)
