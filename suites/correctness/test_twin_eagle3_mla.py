"""Claim: the twin of EAGLE-3 with latent attention is its reference on one rank and on many, and changes no text.

Born of SGLang #24826: a column-parallel `fc` with a gather that no other draft has, latents that every rank must hold
in whole beside heads that it must not, and a draft whose cache is laid out as its target's and yet is not the same. The
twin has one attention, the absorbed one; the reference has the other.
"""

from pathlib import Path

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from harness.checkpoints import CheckpointError, state_of
from harness.compare import bit_equal, hold
from harness.sharding import split
from optimized.graphs import GuardMode
from suites.catalog import PAIRS, open_draft, open_target
from suites.correctness.test_sharding import kind_of
from suites.correctness.test_twin import FORMS, Couple, both_drafts, served, unrolled
from suites.draws import PINNED_TARGET, Drawn, eagle3_weights, folders, random_tokens, variant
from suites.families.eagle3_mla import (
    EVERY_MLA_FLAG,
    FOUR,
    LATENT_LOOP,
    PINNED_MLA,
    THREE,
    TWO,
    TWO_LAYERS,
    eagle3_mla_drafts,
    mla_team,
    mla_teams,
)
from suites.scripted import SIDES, PoisonedEngine
from suites.stand import stand_as
from suites.teams import Team

pytestmark = [pytest.mark.correctness, pytest.mark.pair("eagle3_mla")]

every_team = pytest.mark.parametrize("team", [TWO, THREE, FOUR], ids=["2", "3", "4"])
COUPLES = st.builds(Couple, st.just(PINNED_TARGET), eagle3_mla_drafts(PINNED_TARGET), st.booleans())


def hold_served(couple: Couple, dtype: torch.dtype, device: str, width: int) -> None:
    """What the draft reads, and what it says and feeds back at every draft step."""
    drafts = both_drafts(couple, dtype, device, width)
    c = drafts.twin.facts.config

    read, steps = served(drafts, width)

    want = drafts.reference.module.read(drafts.known)[:, :width]
    hold("fuse", read[-1:], want, dtype=dtype, depth=1, width=c.aux_states * c.aux_width)
    want_logits, want_feedback = unrolled(drafts)
    for k, (logits, feedback) in enumerate(steps):
        size = {"dtype": dtype, "depth": 1 + (k + 1) * c.layers, "width": 2 * c.hidden}
        hold(f"logits of step {k + 1}", logits, want_logits[k, 0, :width], **size)
        hold(f"feedback of step {k + 1}", feedback, want_feedback[k][0, :width], **size)


@given(couple=COUPLES, width=st.integers(1, 8), dtype=st.sampled_from([torch.float64, torch.float32]))
@example(couple=Couple(PINNED_TARGET, PINNED_MLA, False), width=9, dtype=torch.float64)
@example(couple=Couple(PINNED_TARGET, PINNED_MLA, True), width=5, dtype=torch.float32)
@example(couple=Couple(PINNED_TARGET, EVERY_MLA_FLAG, True), width=6, dtype=torch.float64)
@example(couple=Couple(PINNED_TARGET, TWO_LAYERS, False), width=3, dtype=torch.float32)
def test_the_draft_serves_what_the_reference_unrolls(couple: Couple, width: int, dtype: torch.dtype) -> None:
    hold_served(couple, dtype, "cpu", width)


@pytest.mark.gpu
@pytest.mark.parametrize("drawn", [PINNED_MLA, EVERY_MLA_FLAG], ids=["pinned", "every flag"])
def test_on_a_gpu_in_half_precision_too(drawn: Drawn) -> None:
    hold_served(Couple(PINNED_TARGET, drawn, True), torch.bfloat16, "cuda", 7)


def noise(*shape: int) -> Tensor:
    """Hidden states of nobody."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@given(team=mla_teams())
@example(team=TWO)
@example(team=THREE)
@example(team=FOUR)
def test_many_ranks_compute_what_one_computes(team: Team) -> None:
    following = team.text(4)
    aux = noise(*following.shape, 3, team.target.keys["hidden_size"]).double()
    with folders(team.target, team.draft, team.own_embedding) as paths:
        how = [{"side": "optimized", "dtype": torch.float64, "tp_size": size} for size in (1, team.ranks)]
        one, many = (open_draft(paths[1], open_target(paths[0], **side), **side) for side in how)

    fused, want = one.fuse(aux), one(following, one.fuse(aux))
    with torch.no_grad():
        first, *others = many.ranks.run(lambda rank: many.modules[rank](following, fused))

    hold("fuse", many.fuse(aux), fused, depth=1, width=aux[0, 0].numel())
    for name, got, wanted in zip(want._fields, first, want, strict=True):
        hold(name, got, wanted, depth=2, width=2 * one.facts.config.hidden)
    for other in others:
        for name, a, b in zip(want._fields, other, first, strict=True):
            bit_equal(name, a, b)


@every_team
def test_a_rank_holds_its_shard_of_every_parameter(team: Team) -> None:
    with folders(team.target, team.draft) as paths:
        whole = open_draft(paths[1], open_target(paths[0])).module
        target = open_target(paths[0], side="optimized", tp_size=team.ranks)
        modules = open_draft(paths[1], target, side="optimized", tp_size=team.ranks).modules
    full, plan = state_of(whole), PAIRS["eagle3_mla"].page.TP_PLAN

    held = [module.unpack() for module in modules]

    assert all(shards.keys() == full.keys() for shards in held)
    for name, tensor in full.items():
        kind = kind_of(name, plan)
        how = {"heads": whole.c.heads} if kind == "heads" else {}
        for rank, shards in enumerate(held):
            bit_equal(f"{name} of rank {rank}", shards[name], split(tensor, kind, rank, team.ranks, **how))


@every_team
def test_many_ranks_say_what_one_says(team: Team) -> None:
    one, many = (team.open(size).generate(team.prompts, 7, 3) for size in (1, team.ranks))

    bit_equal("tokens", many.tokens, one.tokens)
    assert many.accepted == one.accepted


def test_heads_that_ranks_do_not_divide_are_refused() -> None:
    odd = mla_team(3, 97, 1)
    two = mla_team(2, 97, 1)

    with folders(two.target, odd.draft) as paths, pytest.raises(CheckpointError, match=r"tp_size=2.*3 heads"):
        open_draft(paths[1], open_target(paths[0], side="optimized", tp_size=2), side="optimized", tp_size=2)


def test_a_cache_holds_one_latent_a_slot_and_no_heads() -> None:
    draft = TWO.open(2).draft

    caches = [module.new_cache(3, 50) for module in draft.modules]

    c = draft.facts.config
    for cache in caches:
        assert [tuple(t.shape) for t in cache.tensors()] == [(3, 64, 1, c.kv_rank + c.rope_dim)] * c.layers


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("num_draft_tokens", [1, 3, 5])
@pytest.mark.parametrize("side", SIDES)
def test_a_draft_leaves_the_text_alone(side: str, num_draft_tokens: int, rows: int) -> None:
    speculation, prompts = LATENT_LOOP.open(side), LATENT_LOOP.prompts[:rows]

    said = speculation.generate(prompts, 12, num_draft_tokens)

    bit_equal("tokens", said.tokens, speculation.generate(prompts, 12, 0).tokens)
    assert len({count for row in said.accepted for count in row}) > 1
    truth = LATENT_LOOP.open("reference").generate(prompts, 12, num_draft_tokens)
    bit_equal("text of the reference", said.tokens, truth.tokens)
    assert said.accepted == truth.accepted


def test_what_a_cycle_may_not_read_changes_nothing() -> None:
    speculation = LATENT_LOOP.open("optimized")
    draft = speculation.draft
    engine = PoisonedEngine(speculation.target.module, draft.module, draft.capture_points)

    said, want = (speak.generate(LATENT_LOOP.prompts, 12, 3) for speak in (engine, speculation))

    bit_equal("tokens", said.tokens, want.tokens)
    assert said.accepted == want.accepted


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_row_has_the_same_bits_alone_and_among_others(dtype: torch.dtype) -> None:
    module = LATENT_LOOP.open("optimized", dtype, exact=True).draft.module
    tokens, hidden = random_tokens(5, 2, 9, 1), noise(2, 9, module.c.hidden).to(dtype)
    places = torch.arange(9).expand(2, -1)
    step_by_step, at_once = (module.new_cache(2, 64) for _ in range(2))
    with torch.no_grad():
        for cache in (step_by_step, at_once):
            module(tokens[:, :5], hidden[:, :5], places[:, :5], cache)

        alone = [module(tokens[:, p : p + 1], hidden[:, p : p + 1], places[:, p : p + 1], step_by_step) for p in (5, 6)]
        together = module(tokens[:, 5:7], hidden[:, 5:7], places[:, 5:7], at_once)

    for name in together._fields:
        bit_equal(name, getattr(together, name), torch.cat([getattr(step, name) for step in alone], 1))


@pytest.mark.parametrize("side", SIDES)
def test_a_shared_table_and_head_are_the_targets(side: str, target_folder: Path) -> None:
    whole = variant(PINNED_MLA.keys, draft_vocab_size=PINNED_MLA.keys["vocab_size"])
    target = open_target(target_folder, side=side)

    tensors = {n: t for n, t in eagle3_weights(whole, False).items() if n != "lm_head.weight"}
    draft = stand_as(whole.keys, tensors, target)

    assert draft.module.embed_tokens is target.module.embed_tokens
    assert draft.module.lm_head is target.module.lm_head
    shared = sorted(entry.parameter for entry in draft.ledger.entries if entry.status == "shared")
    assert shared == ["embed_tokens.weight", "lm_head.weight"]


def test_the_states_of_a_draft_in_triton_are_those_in_aten_and_ask_the_host_nothing() -> None:
    width, tokens, hidden = 4, random_tokens(5, 2, 4, 3), noise(2, 4, 48)
    said = []

    for form, device in FORMS:
        module = LATENT_LOOP.open("optimized", torch.float32, form=form, device=device).draft.module
        cache, places = module.new_cache(2, 30), torch.arange(width, device=device).repeat(2, 1)
        given = (tokens.to(device), hidden.to(device), places, cache)
        with torch.no_grad():
            # what is made once is made at first use
            module.states(*given)
            with GuardMode(lambda held=cache: dict(enumerate(held.tensors()))) as guard:
                top, feedback = module.states(*given)
        assert guard.num_calls > 0
        said.append((top, feedback, *cache.tensors()))

    for name, got, want in zip(("top", "feedback", "latents"), *reversed(said), strict=True):
        hold(name, got[:, :width].cpu(), want[:, :width], depth=2, width=96)
