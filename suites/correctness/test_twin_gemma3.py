"""Claim: the twin of Gemma 3 text is its reference on one rank and on many, and speculates without changing a text.

Born of SGLang #32383 (norms fused into the next one, and captured states that moved with them), of SGLang #28343
(captures taken before the all-reduce are partial sums; behind a norm they cannot even be added up later), of a shared
embedding that was scaled for the target and read scaled by the draft, and of windows counted from the chunk's start.
The windows here are shorter than the texts, so that verify and decode look back from different columns.
"""

from typing import NamedTuple

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from harness.checkpoints import state_of
from harness.compare import bit_equal, hold
from optimized.graphs import GuardMode
from reference.outputs import TargetOutput
from suites.catalog import PAIRS, OpenTarget, open_speculation, open_target
from suites.correctness.test_replay import begin, paused, run
from suites.correctness.test_sharding import cut_as_planned, kind_of
from suites.correctness.test_twin import FORMS, every_form, truth
from suites.draws import Drawn, folders, random_tokens, variant
from suites.families.gemma3 import FULL, PINNED_TEXT, SLIDING, TEXT, gemma3_texts, tiny_gemma3
from suites.scripted import SIDES, Loop, tiny_draft
from suites.teams import Team

pytestmark = [pytest.mark.correctness, pytest.mark.pair("gemma3")]

# few words: a draft of random weights is right often enough for every count to occur
LOOP = Loop(tiny_gemma3(5, vocab=5, tie_word_embeddings=False), tiny_draft(6, vocab=5), (5, 1, 3))
STRETCHED = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 100.0}
DYNAMIC = variant(TEXT, 6, max_position_embeddings=8, rope_parameters=dict.fromkeys((FULL, SLIDING), STRETCHED))
UNTIED = variant(TEXT, 5, tie_word_embeddings=False, attention_bias=False, num_hidden_layers=2, layer_types=None)


def hold_all(out: TargetOutput, want: TargetOutput, target: OpenTarget) -> None:
    """Every capture point, the final hidden state and the logits."""
    size = {"dtype": target.side.dtype, "depth": target.num_layers, "width": target.config.hidden}
    for c in range(target.num_layers + 1):
        hold(f"capture point {c}", out.aux[:, :, c], want.aux[:, :, c], **size)
    hold("hidden", out.hidden, want.hidden, **size)
    hold("logits", out.logits, want.logits, **size)


@every_form
@given(drawn=gemma3_texts(), batch=st.integers(1, 3), width=st.integers(1, 24))
@example(drawn=PINNED_TEXT, batch=2, width=20)
@example(drawn=UNTIED, batch=1, width=9)
@example(drawn=DYNAMIC, batch=1, width=20)
def test_the_target_is_the_reference(device: str, dtype: torch.dtype, drawn: Drawn, batch: int, width: int) -> None:
    tokens = random_tokens(drawn.keys["vocab_size"], batch, width, drawn.seed)
    with folders(drawn) as (path, _):
        reference = truth(open_target(path, dtype=dtype))
        twin = open_target(path, side="optimized", dtype=dtype, device=device)
    capture = range(twin.num_layers + 1)

    hold_all(twin(tokens, capture=capture), reference(tokens, capture=capture), twin)


@given(drawn=gemma3_texts(max_layers=3), width=st.integers(2, 24), cut=st.integers(1, 23))
@example(drawn=PINNED_TEXT, width=20, cut=9)
@example(drawn=PINNED_TEXT, width=20, cut=18)
def test_behind_its_cache_the_target_is_the_reference(drawn: Drawn, width: int, cut: int) -> None:
    tokens, columns = random_tokens(drawn.keys["vocab_size"], 2, width, drawn.seed), torch.arange(width).expand(2, -1)
    with folders(drawn) as (path, _):
        want = open_target(path, dtype=torch.float64)
        twin = open_target(path, side="optimized", dtype=torch.float64)
    capture, cache = range(twin.num_layers + 1), twin.module.new_cache(2, width)

    ends = ((0, min(cut, width - 1)), (min(cut, width - 1), width))
    parts = [twin.module(tokens[:, a:b], columns[:, a:b], capture, cache) for a, b in ends]

    whole = TargetOutput(*(torch.cat(both, 1) for both in zip(*parts, strict=True)))
    hold_all(whole, want(tokens, capture=capture), twin)


class Share(NamedTuple):
    """A target and how many ranks share it."""

    ranks: int
    drawn: Drawn


@st.composite
def shares(draw: st.DrawFn) -> Share:
    """Sizes that two, three or four ranks divide."""
    ranks = draw(st.sampled_from([2, 3, 4]))
    return Share(ranks, draw(gemma3_texts(max_layers=3, ranks=ranks)))


SIZES = {"num_hidden_layers": 2, "layer_types": TEXT["layer_types"][1:3], "intermediate_size": 48}
TWO = Share(2, variant(TEXT, 2, **SIZES))
THREE = Share(3, variant(TEXT, 3, **SIZES, num_attention_heads=6, num_key_value_heads=3))
# two ranks for each key/value head, and a last rank without a row of the vocabulary
FOUR = Share(4, variant(TEXT, 5, **SIZES, vocab_size=130))


@given(share=shares(), width=st.integers(1, 12))
@example(share=TWO, width=8)
@example(share=THREE, width=8)
@example(share=FOUR, width=8)
def test_many_ranks_compute_what_one_computes(share: Share, width: int) -> None:
    tokens = random_tokens(share.drawn.keys["vocab_size"], 2, width, share.drawn.seed)
    with folders(share.drawn) as (path, _):
        one, many = (
            open_target(path, side="optimized", dtype=torch.float64, tp_size=ranks) for ranks in (1, share.ranks)
        )
    capture = range(one.num_layers + 1)

    with torch.no_grad():
        first, *others = many.ranks.run(lambda rank: many.modules[rank](tokens, None, capture))

    hold_all(first, one(tokens, capture=capture), one)
    for other in others:
        for name, got, want in zip(first._fields, other, first, strict=True):
            bit_equal(name, got, want)


@given(share=shares())
@example(share=TWO)
@example(share=THREE)
@example(share=FOUR)
def test_a_rank_holds_its_shard_of_every_parameter(share: Share) -> None:
    with folders(share.drawn) as (path, _):
        whole = open_target(path).module
        modules = open_target(path, side="optimized", tp_size=share.ranks).modules
    full, plan = state_of(whole), PAIRS["gemma3"].page.TP_PLAN

    held = [module.unpack() for module in modules]

    assert all(shards.keys() == full.keys() for shards in held)
    for name, tensor in full.items():
        for rank, want in enumerate(cut_as_planned(name, tensor, kind_of(name, plan), whole.c, share.ranks)):
            bit_equal(f"{name} of rank {rank}", held[rank][name], want)


@pytest.mark.parametrize("num_draft_tokens", [1, 3])
@pytest.mark.parametrize("side", SIDES)
def test_a_draft_leaves_the_text_alone(side: str, num_draft_tokens: int) -> None:
    speculation = LOOP.open(side)

    said = speculation.generate(LOOP.prompts, 12, num_draft_tokens)

    plain = speculation.generate(LOOP.prompts, 12, 0)
    bit_equal("tokens", said.tokens, plain.tokens)
    assert len({count for row in said.accepted for count in row}) > 1
    truth_said = LOOP.open("reference").generate(LOOP.prompts, 12, num_draft_tokens)
    bit_equal("text of the reference", said.tokens, truth_said.tokens)
    assert said.accepted == truth_said.accepted


# the draft has no embedding of its own; a tied head would say one word for ever
SHARED = Team(4, tiny_gemma3(3, 331, tie_word_embeddings=False), tiny_draft(4, 331), own_embedding=False)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_a_draft_reads_the_shared_table_unscaled_on_any_number_of_ranks(ranks: int) -> None:
    with folders(SHARED.target, SHARED.draft, SHARED.own_embedding) as paths:
        reference = open_speculation(*paths, dtype=torch.float64)
    twin, tokens = SHARED.open(ranks), SHARED.text(4)
    known = reference.target(tokens, capture=reference.draft.capture_points)
    hidden, following = reference.draft.fuse(known.aux), tokens.roll(-1, 1)

    want, got = (speculation.draft(following, hidden) for speculation in (reference, twin))
    for name, a, b in zip(got._fields, got, want, strict=True):
        hold(name, a, b, depth=1, width=2 * twin.target.config.hidden)

    said, truth_said = (speculation.generate(SHARED.prompts, 7, 3) for speculation in (twin, reference))
    bit_equal("tokens", said.tokens, truth_said.tokens)
    assert said.accepted == truth_said.accepted


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_verify_has_the_bits_of_decode(dtype: torch.dtype) -> None:
    target = LOOP.open("optimized", dtype, exact=True).target
    tokens, capture = random_tokens(target.config.vocab, 2, 9, 1), tuple(range(target.num_layers + 1))
    places = torch.arange(9).repeat(2, 1)
    step_by_step, at_once = (target.module.new_cache(2, 64) for _ in range(2))
    for cache in (step_by_step, at_once):
        target.module(tokens[:, :5], places[:, :5], capture, cache)

    decoded = [target.module(tokens[:, p : p + 1], places[:, p : p + 1], capture, step_by_step) for p in range(5, 9)]
    verified = target.module(tokens[:, 5:], places[:, 5:], capture, at_once)

    for name in verified._fields:
        bit_equal(name, getattr(verified, name), torch.cat([getattr(out, name) for out in decoded], 1))


def test_a_whole_cycle_in_triton_is_the_cycle_in_aten() -> None:
    loop = LOOP._replace(lengths=(4, 1))
    aten, triton = (loop.open("optimized", torch.float32, form=form, device=device) for form, device in FORMS)

    want, got = (speculation.generate(loop.prompts, 3, 2) for speculation in (aten, triton))

    assert got.accepted == want.accepted
    bit_equal("tokens", got.tokens, want.tokens)
    size = {"depth": aten.target.num_layers, "width": 2 * aten.target.config.hidden}
    a, b = (speculation.engines[0].session.state for speculation in (aten, triton))
    bit_equal("drafted", b.drafted.cpu(), a.drafted)
    for name in ("hidden", "aux"):
        hold(name, getattr(b, name), getattr(a, name), **size)


def test_a_cycle_asks_the_host_nothing_and_moves_no_buffer() -> None:
    form, device = FORMS[1]
    session = begin(paused(LOOP._replace(lengths=(2,)), device, torch.float32, form=form), LOOP.prompts[:1], (1, 0.0))

    with GuardMode(session.state.buffers) as guard:
        run(session.run)

    assert guard.num_calls > 0
