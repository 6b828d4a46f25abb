"""Claim: W ranks hold every row once, in the place where its reader looks, and together say what one rank says.

Born of SGLang #23976 (a draft was handed the whole table under tensor parallel; its repair splits by ceil(V / W) what
VocabParallelEmbedding splits with padding), #28343 (captures taken before the all-reduce are partial sums), gpt-fast
(`output[0]` in the reduce: only the first row is summed) and torchtitan #4245 (a replicated bias added on every rank
counts W times). The rule is stated twice: offsets in optimized.parallel, one list a rank in harness.sharding.
"""

from collections.abc import Callable
from fnmatch import fnmatchcase
from math import lcm
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from harness.checkpoints import CheckpointError, state_of
from harness.compare import bit_equal, hold
from harness.contracts import Group
from harness.groups import run_processes, run_threads
from harness.sharding import LAYOUTS, ShardError, check_hand_over, join, owner, padded_vocab, split
from harness.strategies import head_specs, ranks, seeds, vocabs
from optimized.ops.aten import Aten
from optimized.parallel import Placement, RowLinear, VocabEmbedding, VocabHead, vocab_run
from reference.decoding import Generation
from suites.catalog import PAIRS, open_draft, open_speculation, open_target
from suites.draws import EVERY_FLAG, LLAMA, Drawn, eagle3_weights, folders, random_tokens, variant
from suites.opened import OpenSpeculation
from suites.ranked import speak_as_a_rank
from suites.scripted import POINTS
from suites.stand import stand_as

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


class Team(NamedTuple):
    """A couple that a number of ranks can share."""

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


@pytest.mark.pair("llama-eagle3")
@given(team=teams())
@example(team=TWO)
@example(team=THREE)
@example(team=FOUR)
def test_many_ranks_compute_what_one_computes(team: Team) -> None:
    one, many = team.open(1), team.open(team.ranks)
    tokens, points = team.text(4), tuple(range(one.target.num_layers + 1))
    size = {"depth": one.target.num_layers, "width": one.target.config.hidden}

    want, got = (speculation.target(tokens, capture=points) for speculation in (one, many))
    for name, a, b in zip(got._fields, got, want, strict=True):
        hold(name, a, b, **size)

    aux, following = want.aux[:, :, list(one.draft.capture_points)], tokens.roll(-1, 1)
    fused = one.draft.fuse(aux)
    hold("fuse", many.draft.fuse(aux), fused, depth=1, width=aux[0, 0].numel())
    step, joined = one.draft(following, fused), many.draft(following, fused)
    for name, a, b in zip(step._fields, joined, step, strict=True):
        hold(f"draft {name}", a, b, **size)


@pytest.mark.pair("llama")
@given(team=teams())
@example(team=TWO)
@example(team=FOUR)
def test_every_rank_captures_the_sum(team: Team) -> None:
    target = team.open(team.ranks).target
    tokens, points = team.text(2), tuple(range(target.num_layers + 1))

    with torch.no_grad():
        seen = target.ranks.run(lambda rank: target.modules[rank](tokens, None, points))

    for other in seen[1:]:
        for name, a, b in zip(other._fields, other, seen[0], strict=True):
            bit_equal(name, a, b)


@pytest.mark.pair("llama-eagle3")
@given(team=teams(), num_draft_tokens=st.integers(0, 3), temperature=st.sampled_from([0.0, 0.8]))
@example(team=TWO, num_draft_tokens=3, temperature=0.0)
@example(team=THREE, num_draft_tokens=2, temperature=0.8)
def test_many_ranks_say_what_one_says(team: Team, num_draft_tokens: int, temperature: float) -> None:
    how = (team.prompts, 7, num_draft_tokens, temperature)

    one, many = (team.open(size).generate(*how, seed=3) for size in (1, team.ranks))

    bit_equal("tokens", many.tokens, one.tokens)
    assert many.accepted == one.accepted


@pytest.mark.pair("llama-eagle3")
@given(team=teams(), num_draft_tokens=st.integers(0, 3))
@example(team=TWO, num_draft_tokens=3)
def test_rank_zero_speaks_for_all(team: Team, num_draft_tokens: int) -> None:
    speculation = team.open(team.ranks)

    def say(rank: int) -> Generation:
        # other coins on every rank: whatever a rank would draw, rank 0 decides
        return speculation.engines[rank].generate(team.prompts, 7, num_draft_tokens, 0.8, seed=3 + rank)

    first, *others = speculation.target.ranks.run(say)

    for said in others:
        bit_equal("tokens", said.tokens, first.tokens)
        assert said.accepted == first.accepted


def on_ranks(ranks: int, make: Callable[[Placement], Any], full: dict[str, Tensor], x: list[Tensor]) -> list[Any]:
    """What one layer gives on every rank, called with each rank's input."""

    def call(group: Group) -> Any:
        part = make(Placement(Aten(), group, torch.float64, "cpu"))
        for name, tensor in full.items():
            part.load(name, tensor.double())
        return part(x[group.rank])

    return run_threads(ranks, call)


@given(vocab=vocabs(512), ranks=ranks())
@example(vocab=331, ranks=4)
@example(vocab=130, ranks=3)
def test_ids_of_all_ranks_are_looked_up(vocab: int, ranks: int) -> None:
    table, ids = torch.arange(1, 2 * vocab + 1).view(vocab, 2), torch.arange(vocab)

    rows = on_ranks(ranks, lambda at: VocabEmbedding("table", vocab, 2, at), {"table": table}, [ids] * ranks)

    for found in rows:
        bit_equal("rows", found, table.double())


class Asked(VocabHead):
    """A head whose call is the argmax, with the gathered logits beside it."""

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [M, H] -> [M], [M, V]"""
        return self.argmax(x), self.logits(x)


@given(vocab=vocabs(512), ranks=ranks(), seed=seeds())
@example(vocab=331, ranks=4, seed=0)
@example(vocab=331, ranks=1, seed=0)
@example(vocab=130, ranks=4, seed=0)
def test_padding_never_wins_and_the_lowest_of_equals_does(vocab: int, ranks: int, seed: int) -> None:
    border = torch.arange(0, vocab, padded_vocab(vocab, ranks) // ranks)
    drawn = random_tokens(vocab, 1, 4, seed)[0]
    winners = torch.cat([border, (border - 1).clamp(min=0), drawn, torch.tensor([vocab - 1])])
    # feature m is the logit of question m: every token loses with -2 but the winner, and a padding row would say 0
    head = torch.full((vocab, len(winners)), -2)
    head[winners, torch.arange(len(winners))] = -1
    # a second winner, which is as good and comes first where it is lower
    rivals = winners.flip(0)
    head[rivals, torch.arange(len(winners))] = -1
    x = torch.eye(len(winners), dtype=torch.float64)

    said = on_ranks(ranks, lambda at: Asked("head", vocab, len(winners), at), {"head": head}, [x] * ranks)

    for chosen, logits in said:
        bit_equal("argmax", chosen, torch.minimum(winners, rivals))
        bit_equal("logits", logits, head.double().T.contiguous())


@given(ranks=ranks(), seed=seeds())
@example(ranks=2, seed=0)
@example(ranks=3, seed=0)
def test_a_replicated_bias_is_added_once(ranks: int, seed: int) -> None:
    noise = torch.Generator().manual_seed(seed)
    # whole numbers: sums are exact in any order
    x, weight, bias = (torch.randint(-9, 10, size, generator=noise) for size in ((3, 4 * ranks), (5, 4 * ranks), (5,)))

    full = {"proj.weight": weight, "proj.bias": bias}
    shards = [split(x, "row", rank, ranks).double() for rank in range(ranks)]
    sums = on_ranks(ranks, lambda at: RowLinear("proj", 4 * ranks, 5, True, at), full, shards)

    for total in sums:
        bit_equal("sum", total, (x @ weight.T + bias).double())


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


PROCESSES = {"pinned": (TWO,), "quick": (TWO,), "ci": (TWO,), "nightly": (TWO, THREE)}


@pytest.mark.pair("llama-eagle3")
def test_processes_say_what_threads_say(profile: str) -> None:
    for case in PROCESSES[profile]:
        threads = case.open(case.ranks)
        want, points = threads.generate(case.prompts, 6, 3), threads.draft.capture_points
        aux = threads.target(case.prompts[0][None], capture=points).aux

        with folders(case.target, case.draft, case.own_embedding) as paths:
            answers = run_processes(case.ranks, speak_as_a_rank, paths, case.prompts, 6, 3)

        for said, captured in answers:
            bit_equal("tokens", said.tokens, want.tokens)
            assert said.accepted == want.accepted
            hold("aux", captured, aux, depth=threads.target.num_layers, width=threads.target.config.hidden)


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
