"""Claim: the twins of the next-token modules are their references on one rank and on many, and change no text.

Born of SGLang #25512 and #26972, next-token modules whose captured batches wrote to slots of another batch, of a module
that was handed the whole table under tensor parallel (SGLang #23976), and of engines whose second next-token layer
attends to keys that nobody wrote: it saw no prompt, and stale drafts.
"""

from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from harness.checkpoints import CheckpointError, state_of
from harness.compare import bit_equal, hold
from harness.sharding import split
from optimized.graphs import GuardMode
from suites.correctness.test_replay import Cycles, PausedEngine, begin, run
from suites.correctness.test_sharding import kind_of
from suites.correctness.test_twin import FORMS, truth
from suites.draws import Drawn, random_tokens, variant
from suites.families.next_token import (
    DEEPSEEK,
    DEEPSEEK_TWO,
    DEEPSEEK_ZERO,
    QWEN3_MOE,
    next_token_pairs,
    open_whole,
    tiny_next_token,
)
from suites.scripted import SIDES, PoisonedEngine

pytestmark = pytest.mark.correctness

PAIR_NAMES = ("qwen3_moe_mtp", "deepseek_nextn")
PINNED = {"qwen3_moe_mtp": (QWEN3_MOE,), "deepseek_nextn": (DEEPSEEK, DEEPSEEK_TWO, DEEPSEEK_ZERO)}
both = pytest.mark.parametrize("pair", PAIR_NAMES)
# everybody is chosen, so that no rounding can choose otherwise
ALL_CHOSEN = {
    "qwen3_moe_mtp": variant(QWEN3_MOE.keys, 21, num_experts_per_tok=8),
    "deepseek_nextn": variant(DEEPSEEK_TWO.keys, 22, num_experts_per_tok=8, n_group=1, topk_group=1),
}


def of(drawn: Drawn) -> pytest.MarkDecorator:
    """Which pair a claim about these speaks of."""
    return pytest.mark.pair(PAIR_NAMES[drawn.keys["model_type"] != "qwen3_moe"])


def held_to_reference(drawn: Drawn, dtype: torch.dtype, device: str, width: int) -> None:
    """Every layer of the twin to the reference in float64, with weights as the twin's dtype rounds them."""
    reference = truth(open_whole(drawn, dtype=dtype).draft).module
    module = open_whole(drawn, "optimized", dtype, device=device).draft.module
    c, tokens = module.c, random_tokens(drawn.keys["vocab_size"], 2, width, drawn.seed)
    hidden = torch.randn(2, width, c.hidden, generator=torch.Generator().manual_seed(drawn.seed)).to(dtype)

    for layer in range(c.layers):
        with torch.no_grad():
            want = reference(tokens, hidden.double(), layer=layer)
            got = module(tokens.to(device), hidden.to(device), layer=layer)
        for name, tensor in zip(got._fields, got, strict=True):
            hold(f"{name} of layer {layer}", tensor, getattr(want, name), dtype=dtype, depth=2, width=2 * c.hidden)


@both
def test_the_pinned_modules_are_the_references(pair: str) -> None:
    for drawn in PINNED[pair]:
        held_to_reference(drawn, torch.float64, "cpu", 9)


@both
@pytest.mark.parametrize(
    ("device", "dtype"), [("cpu", torch.float32), pytest.param("cuda", torch.bfloat16, marks=pytest.mark.gpu)], ids=str
)
def test_in_fewer_digits_the_module_is_the_reference(pair: str, device: str, dtype: torch.dtype) -> None:
    held_to_reference(ALL_CHOSEN[pair], dtype, device, 12)


@pytest.mark.pair("qwen3_moe_mtp")
@given(drawn=next_token_pairs("qwen3_moe_mtp", max_layers=1), width=st.integers(1, 12))
def test_the_module_of_qwen3_moe_is_the_reference(drawn: Drawn, width: int) -> None:
    held_to_reference(drawn, torch.float64, "cpu", width)


@pytest.mark.pair("deepseek_nextn")
@given(drawn=next_token_pairs("deepseek_nextn", max_layers=1), width=st.integers(1, 12))
def test_the_module_of_deepseek_is_the_reference(drawn: Drawn, width: int) -> None:
    held_to_reference(drawn, torch.float64, "cpu", width)


class Share(NamedTuple):
    """A pair and how many ranks share it."""

    ranks: int
    drawn: Drawn


def share(ranks: int, pinned: Drawn, kv_heads: int) -> Share:
    """Sizes that two, three and four ranks divide."""
    sizes = {"num_attention_heads": 12, "num_key_value_heads": kv_heads, "intermediate_size": 48}
    return Share(ranks, variant(pinned.keys, ranks, **sizes, num_hidden_layers=2, moe_intermediate_size=24))


# four ranks share two key/value heads
SHARES = (
    share(2, QWEN3_MOE, 2),
    share(3, QWEN3_MOE, 3),
    share(4, QWEN3_MOE, 2),
    share(2, DEEPSEEK_TWO, 12),
    share(3, DEEPSEEK, 12),
    share(4, DEEPSEEK_ZERO, 12),
)
every_share = pytest.mark.parametrize(
    "drawn",
    [pytest.param(s, marks=of(s.drawn)) for s in SHARES],
    ids=lambda s: f"{s.drawn.keys['model_type']}-{s.ranks}",
)


@every_share
def test_many_ranks_propose_what_one_proposes(drawn: Share) -> None:
    one, many = (open_whole(drawn.drawn, "optimized", tp_size=ranks).draft for ranks in (1, drawn.ranks))
    tokens = random_tokens(331, 2, 6, 1)
    hidden = torch.randn(2, 6, 96, dtype=torch.float64, generator=torch.Generator().manual_seed(2))

    with torch.no_grad():
        first, *others = many.ranks.run(lambda rank: many.modules[rank](tokens, hidden))

    want = one(tokens, hidden)
    for name, got in zip(first._fields, first, strict=True):
        hold(name, got, getattr(want, name), depth=2, width=96)
        for other in others:
            bit_equal(name, getattr(other, name), got)


@every_share
def test_a_rank_holds_its_shard_of_every_parameter(drawn: Share) -> None:
    whole = open_whole(drawn.drawn).draft
    modules = open_whole(drawn.drawn, "optimized", tp_size=drawn.ranks).draft.modules
    full, keys = state_of(whole.module), drawn.drawn.keys
    heads = {"q_proj": keys["num_attention_heads"], "k_proj": keys["num_key_value_heads"]}
    heads |= {"v_proj": heads["k_proj"], "q_b_proj": heads["q_proj"], "kv_b_proj": heads["q_proj"]}
    tables = {"embed_tokens.weight", "lm_head.weight"}

    held = [module.unpack() for module in modules]

    # the target's tables are the target's to hold
    assert all(shards.keys() == full.keys() - tables for shards in held)
    for name in held[0]:
        kind = kind_of(name, whole.pair.page.TP_PLAN)
        how = {"heads": heads[name.split(".")[-2]]} if kind == "heads" else {}
        for rank, shards in enumerate(held):
            want = split(full[name], kind, rank, drawn.ranks, **how)
            bit_equal(f"{name} of rank {rank}", shards[name], want.double())


@both
def test_a_rank_reads_the_targets_own_shards(pair: str) -> None:
    speculation = open_whole(SHARES[PAIR_NAMES.index(pair) * 3].drawn, "optimized", tp_size=2)

    for mine, theirs in zip(speculation.draft.modules, speculation.target.modules, strict=True):
        assert mine.embed_tokens is theirs.embed_tokens
        assert mine.lm_head is theirs.lm_head


@both
def test_what_ranks_do_not_divide_is_refused(pair: str) -> None:
    with pytest.raises(CheckpointError, match="tp_size=5"):
        open_whole(PINNED[pair][0], "optimized", tp_size=5)


class Talk(NamedTuple):
    """A tiny pair and prompts of these lengths."""

    drawn: Drawn
    lengths: tuple[int, ...]

    @property
    def prompts(self) -> list[Tensor]:
        vocab = self.drawn.keys["vocab_size"]
        return [random_tokens(vocab, 1, width, i)[0] for i, width in enumerate(self.lengths)]


# few words: a module of random weights is right often enough for every count to occur
TALKS = {
    "qwen3_moe_mtp": tiny_next_token("qwen3_moe_mtp", 12, 5),
    "deepseek_nextn": tiny_next_token("deepseek_nextn", 9, 5),
    "two layers": tiny_next_token("deepseek_nextn", 15, 5, num_nextn_predict_layers=2),
    "three layers, first embedding zero": tiny_next_token(
        "deepseek_nextn", 9, 5, num_nextn_predict_layers=3, nextn_zero_first_embedding=True
    ),
}


every_talk = pytest.mark.parametrize("talk", [pytest.param(name, marks=of(drawn)) for name, drawn in TALKS.items()])


@pytest.mark.parametrize("lengths", [(4,), (5, 1, 3)], ids=["batch 1", "batch 3"])
@every_talk
def test_a_module_leaves_the_text_alone_and_both_sides_accept_alike(talk: str, lengths: tuple[int, ...]) -> None:
    pair = Talk(TALKS[talk], lengths)
    speculations = {side: open_whole(pair.drawn, side) for side in SIDES}
    plain = speculations["reference"].generate(pair.prompts, 10, 0).tokens

    for num_draft_tokens in (1, 3, 5):
        said = [speculations[side].generate(pair.prompts, 10, num_draft_tokens) for side in SIDES]
        for one in said:
            bit_equal(f"text with {num_draft_tokens} drafts", one.tokens, plain)
        assert said[0].accepted == said[1].accepted
    assert len({count for row in said[0].accepted for count in row}) > 1


@pytest.mark.pair("deepseek_nextn")
@pytest.mark.parametrize("side", SIDES)
def test_several_layers_draft_chains_and_no_trees(side: str) -> None:
    speculation = open_whole(TALKS["two layers"], side, topk=2)

    with pytest.raises(ValueError, match="chains alone, no trees"):
        speculation.generate([random_tokens(5, 1, 3, 1)[0]], 4, 4, num_steps=2)


@every_talk
def test_a_cycle_reads_nothing_that_does_not_stand(talk: str) -> None:
    pair = Talk(TALKS[talk], (5, 1, 3))
    speculation = open_whole(pair.drawn, "optimized")
    models = (speculation.target.module, speculation.draft.module, speculation.draft.capture_points)

    spoilt = PoisonedEngine(*models).generate(pair.prompts, 10, 3)

    clean = speculation.generate(pair.prompts, 10, 3)
    bit_equal("tokens", spoilt.tokens, clean.tokens)
    assert spoilt.accepted == clean.accepted


@every_talk
def test_the_prompt_may_come_in_chunks_of_any_size(talk: str) -> None:
    pair = Talk(TALKS[talk], (9, 2, 6))
    speculation = open_whole(pair.drawn, "optimized")
    whole = speculation.generate(pair.prompts, 10, 3)

    for size in (1, 2, 4):
        chunked = speculation.generate(pair.prompts, 10, 3, chunk_size=size)
        bit_equal("tokens", chunked.tokens, whole.tokens)
        assert chunked.accepted == whole.accepted


@pytest.mark.parametrize(
    "drawn",
    [pytest.param(s, marks=of(s.drawn)) for s in SHARES[1:6:2]],
    ids=lambda s: f"{s.drawn.keys['model_type']}-{s.ranks}",
)
def test_many_ranks_say_what_one_says(drawn: Share) -> None:
    tiny = variant(drawn.drawn.keys, 5, vocab_size=7)
    prompts = [random_tokens(7, 1, width, width)[0] for width in (4, 2)]
    one, many = (open_whole(tiny, "optimized", tp_size=n).generate(prompts, 7, 3) for n in (1, drawn.ranks))

    bit_equal("tokens", many.tokens, one.tokens)
    assert many.accepted == one.accepted


BRIEF = {"num_hidden_layers": 1, "num_experts_per_tok": 2}
# every interpreted program costs milliseconds
BRIEFS = {
    "qwen3_moe_mtp": tiny_next_token("qwen3_moe_mtp", 9, 5, **BRIEF, mlp_only_layers=[], num_experts=4),
    "deepseek_nextn": tiny_next_token(
        "deepseek_nextn", 9, 5, **BRIEF, n_routed_experts=4, n_group=2, topk_group=1, num_nextn_predict_layers=2
    ),
}


@both
def test_a_whole_cycle_in_triton_is_the_cycle_in_aten(pair: str) -> None:
    prompts = [random_tokens(5, 1, 2, 1)[0]]
    aten, triton = (
        open_whole(BRIEFS[pair], "optimized", torch.float32, form=form, device=device) for form, device in FORMS
    )

    want, got = (speculation.generate(prompts, 2, 2) for speculation in (aten, triton))

    assert got.accepted == want.accepted
    bit_equal("tokens", got.tokens.cpu(), want.tokens)
    a, b = (speculation.engines[0].session.state for speculation in (aten, triton))
    bit_equal("drafted", b.drafted.cpu(), a.drafted)
    hold("hidden", b.hidden.cpu(), a.hidden, depth=2, width=96)


@pytest.mark.pair("deepseek_nextn")
def test_a_cycle_of_several_layers_asks_the_host_nothing_and_moves_no_buffer() -> None:
    form, device = FORMS[1]
    speculation = open_whole(BRIEFS["deepseek_nextn"], "optimized", torch.float32, form=form, device=device)
    engine = PausedEngine(speculation.target.module, speculation.draft.module, speculation.draft.capture_points)
    session = begin(engine, [random_tokens(5, 1, 2, 1)[0].to(device)], Cycles(2))

    with GuardMode(session.state.buffers) as guard:
        run(session.run)

    assert guard.num_calls > 0
