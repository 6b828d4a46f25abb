"""Claim: the twin of D-Flash is its reference on one rank and on many, in every form, and changes no text.

The twin writes keys of the context without queries, and lets queries see ahead of themselves: two paths that no other
draft takes. Born of vLLM #57964 (a block whose causality the attention backend did not know) and of SGLang #23976.
"""

from pathlib import Path

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from harness.checkpoints import state_of
from harness.compare import bit_equal, hold
from harness.sharding import split
from reference.outputs import TargetOutput
from suites.catalog import PAIRS, open_draft, open_target
from suites.correctness.test_sharding import kind_of
from suites.correctness.test_twin import FORMS, truth
from suites.draws import PINNED_TARGET, Drawn, folders, random_tokens
from suites.families.dflash import (
    BOTH_WAYS,
    CAUSAL,
    DFLASH_LOOP,
    EVERY_DFLASH_FLAG,
    FOUR,
    PINNED_DFLASH,
    THREE,
    TWO,
    dflash_drafts,
    dflash_team,
)
from suites.stand import stand
from suites.teams import Team

pytestmark = [pytest.mark.correctness, pytest.mark.pair("dflash")]

every_team = pytest.mark.parametrize("team", [TWO, THREE, FOUR], ids=["2", "3", "4"])
TEAMS = st.builds(dflash_team, st.sampled_from([2, 3, 4]), st.sampled_from([97, 192, 331]), st.integers(0, 2**20))
VOCAB, WIDTH = PINNED_TARGET.keys["vocab_size"], 9


def hold_blocks(path: Path, drawn: Drawn, dtype: torch.dtype, device: str, num_drafts: int) -> None:
    """Every block of a text: its context in two parts behind padding, as chunks of prompts come, then the block."""
    tokens, side = random_tokens(VOCAB, 1, WIDTH, drawn.seed), {"side": "optimized", "dtype": dtype, "device": device}
    target = open_target(path, dtype=dtype)
    reference, twin = truth(stand(drawn, target)), stand(drawn, open_target(path, **side), device=device).module
    known = truth(target)(tokens, capture=reference.capture_points)
    known = TargetOutput(*(x.to(dtype).double() for x in known))
    c, want = reference.facts.config, reference.unroll(tokens, known, num_drafts)
    read, rows = reference.module.read(known), WIDTH - 1
    # every position of the text is a sequence of its own, which has read up to there
    column = torch.arange(WIDTH, device=device)
    aux = known.aux.to(device, dtype).expand(rows, *known.aux.shape[1:])
    with torch.no_grad():
        context = twin.read(TargetOutput(aux, aux, aux))
        places = torch.where(column <= column[:rows, None], column, -1)
        cache = twin.new_cache(rows, WIDTH + num_drafts + 1)
        for part in (slice(0, 3), slice(3, WIDTH)):
            twin.remember(context[:, part].contiguous(), places[:, part].contiguous(), cache)
        asked = twin.ask(tokens[0, 1:].to(device), num_drafts)
        at = column[:rows, None] + 1 + torch.arange(num_drafts + 1, device=device)
        top = twin.states(asked, at, cache)
        logits = twin.logits(top)[:, 1:]

    size = {"dtype": dtype, "width": max(c.hidden, c.aux_states * c.aux_width)}
    hold("context", context[:1], read, depth=1, **size)
    for k in range(num_drafts):
        seen = rows - k
        hold(f"draft {k + 1}", logits[:seen, k], want[k, 0, :seen], depth=2 + 2 * c.layers, **size)
    likeliest = twin.propose(top.flatten(0, 1)).view(rows, -1)[:, 1:]
    bit_equal("proposed", likeliest, twin.to_target(logits.argmax(-1)))


@given(
    drawn=dflash_drafts(PINNED_TARGET),
    num_drafts=st.integers(1, 5),
    dtype=st.sampled_from([torch.float64, torch.float32]),
)
@example(drawn=PINNED_DFLASH, num_drafts=3, dtype=torch.float64)
@example(drawn=EVERY_DFLASH_FLAG, num_drafts=5, dtype=torch.float32)
@example(drawn=BOTH_WAYS, num_drafts=6, dtype=torch.float64)
@example(drawn=CAUSAL, num_drafts=2, dtype=torch.float32)
def test_the_twin_fills_in_what_the_reference_does(
    target_folder: Path, drawn: Drawn, num_drafts: int, dtype: torch.dtype
) -> None:
    hold_blocks(target_folder, drawn, dtype, "cpu", num_drafts)


@pytest.mark.gpu
@pytest.mark.parametrize("drawn", [PINNED_DFLASH, EVERY_DFLASH_FLAG, BOTH_WAYS], ids=["pinned", "every flag", "both"])
def test_on_a_gpu_in_half_precision_too(target_folder: Path, drawn: Drawn) -> None:
    hold_blocks(target_folder, drawn, torch.bfloat16, "cuda", 7)


def known_to(team: Team) -> tuple[Tensor, Tensor]:
    """A text with the tokens of every border, and the target's states of it: [2, T], [2, T, A, H]."""
    tokens = team.text(4)
    with folders(team.target) as (path, _):
        target = open_target(path, dtype=torch.float64)
    return tokens, target(tokens, capture=(3, 1, 2)).aux


@given(team=TEAMS)
@example(team=TWO)
@example(team=THREE)
@example(team=FOUR)
def test_many_ranks_compute_what_one_computes(team: Team) -> None:
    tokens, aux = known_to(team)
    one, many = (team.open(size).draft for size in (1, team.ranks))
    asked = one.module.ask(tokens[:, -1], 4)

    context = one.fuse(aux)
    want = one(asked, context)
    with torch.no_grad():
        first, *others = many.ranks.run(lambda rank: many.modules[rank](asked, context))

    c = one.facts.config
    hold("context", many.fuse(aux), context, depth=1, width=aux[0, 0].numel())
    for name, got, wanted in zip(want._fields, first, want, strict=True):
        hold(name, got, wanted, depth=2 * c.layers, width=2 * c.hidden)
    for other in others:
        for name, a, b in zip(want._fields, other, first, strict=True):
            bit_equal(name, a, b)


@every_team
def test_a_rank_holds_its_shard_of_every_parameter(team: Team) -> None:
    with folders(team.target, team.draft) as paths:
        whole = open_draft(paths[1], open_target(paths[0])).module
        target = open_target(paths[0], side="optimized", tp_size=team.ranks)
        modules = open_draft(paths[1], target, side="optimized", tp_size=team.ranks).modules
    full, plan = state_of(whole), PAIRS["dflash"].page.TP_PLAN

    held = [module.unpack() for module in modules]

    assert all(shards.keys() == full.keys() for shards in held)
    for name, tensor in full.items():
        kind = kind_of(name, plan)
        heads = whole.c.kv_heads if "k_proj" in name or "v_proj" in name else whole.c.heads
        how = {"heads": heads} if kind == "heads" else {}
        for rank, shards in enumerate(held):
            bit_equal(f"{name} of rank {rank}", shards[name], split(tensor, kind, rank, team.ranks, **how))


@every_team
def test_many_ranks_say_what_one_says(team: Team) -> None:
    one, many = (team.open(size).generate(team.prompts, 7, 3) for size in (1, team.ranks))

    bit_equal("tokens", many.tokens, one.tokens)
    assert many.accepted == one.accepted


@pytest.mark.parametrize("chunk_size", [1, 2, 4])
def test_prompts_are_remembered_in_chunks_of_any_size(chunk_size: int) -> None:
    prompts, said = DFLASH_LOOP.prompts, []

    for size in (None, chunk_size):
        # buffers of its own: what another generation left must not stand in for what is not read
        speculation = DFLASH_LOOP.open("optimized")
        tokens = speculation.generate(prompts, 12, 3, chunk_size=size).tokens
        said.append((tokens, [t.clone() for t in speculation.engines[0].session.state.draft_cache.tensors()]))

    (whole, kept), (parts, held) = said
    bit_equal("tokens", parts, whole)
    for one, other in zip(kept, held, strict=True):
        for row, prompt in enumerate(prompts):
            hold("keys of a prompt", other[row, : len(prompt)], one[row, : len(prompt)], depth=4, width=144)


def test_a_cycle_in_triton_is_the_cycle_in_aten() -> None:
    aten, triton = (DFLASH_LOOP.open("optimized", torch.float32, form=form, device=device) for form, device in FORMS)

    want, got = (speculation.generate(DFLASH_LOOP.prompts[1:], 2, 3) for speculation in (aten, triton))

    bit_equal("tokens", got.tokens, want.tokens)
    assert got.accepted == want.accepted
    mine, theirs = (speculation.engines[0].session.state for speculation in (aten, triton))
    bit_equal("drafted", theirs.drafted.cpu(), mine.drafted)
    for one, other in zip(theirs.draft_cache.tensors(), mine.draft_cache.tensors(), strict=True):
        for row, length in enumerate(mine.lengths.tolist()):
            hold("keys", one[row, : length + 1], other[row, : length + 1], depth=5, width=144)
