"""Claim: the twin of the Gemma 4 assistant is its reference on one rank and on many, and changes no text.

Born of SGLang's loader of ordered vocabularies, which permutes the head in place and may run twice, of its CUDA graphs,
where metadata made for other drafts let the assistant see one slot that nobody wrote, and of vLLM #49262: a draft that
reads its target's keys as another layer would have written them.
"""

import json
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st
from torch import Tensor

from harness.checkpoints import CheckpointError, state_of
from harness.compare import bit_equal, hold
from optimized.graphs import GuardMode
from suites.catalog import PAIRS, open_draft, open_speculation, open_target
from suites.correctness.test_replay import PausedEngine, begin, run
from suites.correctness.test_sharding import cut_as_planned, kind_of
from suites.correctness.test_twin import FORMS, truth
from suites.draws import Drawn, random_tokens
from suites.families.gemma4 import DENSE, EDGE, drawn_of, tiny_gemma4
from suites.families.gemma4_assistant import (
    ORDERED,
    PINNED,
    UNIFIED_ASSISTANT,
    WITH_BOTH,
    Couple,
    beside,
    couples,
    folders,
    shared_by,
)
from suites.families.gemma4_unified import TEXT, UNIFIED, shell
from suites.opened import OpenDraft, OpenSpeculation, OpenTarget
from suites.scripted import SIDES, PoisonedEngine, WatchedDraft, seat

pytestmark = [pytest.mark.correctness, pytest.mark.pair("gemma4_assistant")]

STEPS = 3


class Both(NamedTuple):
    """One draft on both sides behind one text, of which each sequence has read another part."""

    targets: tuple[OpenTarget, OpenTarget]
    drafts: tuple[OpenDraft, OpenDraft]
    tokens: Tensor
    """[1, T+K]"""

    def known(self) -> tuple[Tensor, Tensor, Any, Any]:
        """Sequence b has read b + 1 tokens: hidden [T, 1, X] there, positions [T, 1], the caches of both targets.

        The twin's cache is the reference's, rounded: the draft alone is judged.
        """
        (reference, twin), width = self.targets, self.tokens.shape[1] - STEPS
        columns, text = torch.arange(width).expand(width, -1), self.tokens[:, :width].expand(width, -1)
        theirs = reference.module.new_cache(width, width)
        hidden = reference.module(text, columns, cache=theirs).hidden.diagonal(0, 0, 1).T[:, None]
        dtype, device = twin.side.dtype, twin.side.device
        mine = twin.module.new_cache(width, width)
        for i in range(len(mine.keys)):
            for buffers, held in ((mine.keys, theirs.keys), (mine.values, theirs.values)):
                held[i] = held[i].to(dtype).double()
                buffers[i][:, :width] = held[i].to(device, dtype)
        return hidden.to(dtype).double(), columns[:1].T.contiguous(), theirs, mine

    def hold(self) -> None:
        """Logits and feedback of every step, and the token that each would propose."""
        (page, twin), c = self.drafts, self.drafts[1].facts.config
        hidden, positions, theirs, mine = self.known()
        side, fed, width = twin.side, hidden, len(hidden)
        fed = hidden.to(side.device, side.dtype)
        for k in range(1, STEPS + 1):
            token = self.tokens[0, k : width + k, None]
            want = page.module(token, hidden, positions, theirs)
            top, feedback = twin.module.states(token.to(side.device), fed, positions.to(side.device), mine)
            logits, size = twin.module.logits(top), {"depth": 1 + k * c.layers, "width": 2 * c.aux_width}
            hold(f"logits of step {k}", logits, want.logits, dtype=side.dtype, **size)
            hold(f"feedback of step {k}", feedback, want.feedback, dtype=side.dtype, **size)
            bit_equal("proposed", twin.module.propose(top[:, 0]), logits[:, 0].argmax(-1))
            hidden, fed = want.feedback, feedback


def both(couple: Couple, dtype: torch.dtype, device: str, width: int, **how: Any) -> Both:
    """Opened from one folder."""
    tokens = random_tokens(couple.target.keys["vocab_size"], 1, width + STEPS, couple.draft.seed)
    with folders(couple) as (path, draft_path):
        page = open_target(path, dtype=dtype)
        twin = open_target(path, side="optimized", dtype=dtype, device=device, **how)
        drafts = (
            open_draft(draft_path, page, dtype=dtype),
            open_draft(draft_path, twin, side="optimized", dtype=dtype, device=device, **how),
        )
    return Both((truth(page), twin), (truth(drafts[0]), drafts[1]), tokens)


@given(couple=couples(), dtype=st.sampled_from([torch.float64, torch.float32]), width=st.integers(1, 10))
@example(couple=PINNED["dense"], dtype=torch.float64, width=9)
@example(couple=PINNED["ordered"], dtype=torch.float64, width=9)
@example(couple=PINNED["experts"], dtype=torch.float32, width=4)
@torch.no_grad()
def test_three_draft_steps_are_those_of_the_reference(couple: Couple, dtype: torch.dtype, width: int) -> None:
    # rounding may choose either of two clusters; in float64 nothing is in doubt
    assume(dtype == torch.float64 or not couple.draft.keys.get("use_ordered_embeddings"))
    both(couple, dtype, "cpu", width).hold()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("name", ["dense", "unified", "experts"])
@torch.no_grad()
def test_in_half_precision_three_draft_steps_are_those_of_the_reference(name: str, device: str) -> None:
    both(PINNED[name], torch.bfloat16, device, 5).hold()


@torch.no_grad()
def test_a_whole_text_in_one_pass_is_every_position_alone() -> None:
    couple, batch, width = PINNED["ordered"], 2, 6
    with folders(couple) as (path, draft_path):
        target = open_target(path, side="optimized", dtype=torch.float64)
        draft = open_draft(draft_path, target, side="optimized", dtype=torch.float64)
    tokens = random_tokens(target.config.vocab, batch, width + 1, couple.draft.seed)
    cache, columns = target.module.new_cache(batch, width), torch.arange(width).repeat(batch, 1)
    hidden = target.module(tokens[:, :width], columns, cache=cache).hidden

    whole = draft.module(tokens[:, 1:], hidden, columns, cache)

    size = {"depth": 1 + draft.facts.config.layers, "width": 2 * draft.facts.config.aux_width}
    for t in range(width):
        one = draft.module(*(x[:, t : t + 1] for x in (tokens[:, 1:], hidden, columns)), cache)
        hold("logits", whole.logits[:, t : t + 1], one.logits, **size)
        hold("feedback", whole.feedback[:, t : t + 1], one.feedback, **size)


class Share(NamedTuple):
    """A couple and how many ranks share it."""

    ranks: int
    couple: Couple


def shares() -> st.SearchStrategy[Share]:
    return st.sampled_from([2, 3, 4]).flatmap(lambda ranks: couples(ranks).map(lambda c: Share(ranks, c)))


# one full key/value head for two ranks; a vocabulary whose last rank has no words, in clusters, for four
TWO, FOUR = Share(2, shared_by(2, DENSE)), Share(4, shared_by(4, EDGE, **ORDERED))


@given(share=shares(), width=st.integers(1, 8))
@example(share=TWO, width=6)
@example(share=FOUR, width=6)
def test_many_ranks_propose_what_one_proposes(share: Share, width: int) -> None:
    tokens, columns = random_tokens(share.couple.target.keys["vocab_size"], 2, width + 1, 4), torch.arange(width)
    with folders(share.couple) as (path, draft_path):
        sides = [{"side": "optimized", "dtype": torch.float64, "tp_size": n} for n in (1, share.ranks)]
        targets = [open_target(path, **side) for side in sides]
        drafts = [open_draft(draft_path, t, **side) for t, side in zip(targets, sides, strict=True)]

    def step(target: OpenTarget, draft: OpenDraft, rank: int) -> tuple[Tensor, ...]:
        module, place = target.modules[rank], columns.repeat(2, 1)
        cache = module.new_cache(2, width)
        hidden = module(tokens[:, :width], place, (), cache).hidden
        top, feedback = draft.modules[rank].states(tokens[:, 1:].contiguous(), hidden, place, cache)
        return draft.modules[rank].logits(top), feedback, draft.modules[rank].propose(top[:, -1].contiguous())

    with torch.no_grad():
        want = step(targets[0], drafts[0], 0)
        first, *others = targets[1].ranks.run(lambda rank: step(targets[1], drafts[1], rank))

    size = {"depth": targets[0].num_layers + 4, "width": 2 * targets[0].config.hidden}
    hold("logits", first[0], want[0], **size)
    hold("feedback", first[1], want[1], **size)
    bit_equal("proposed", first[2], want[2])
    for other in others:
        for name, got, mine in zip(("logits", "feedback", "proposed"), other, first, strict=True):
            bit_equal(name, got, mine)


@pytest.mark.parametrize("share", [TWO, FOUR], ids=["two", "four"])
def test_a_rank_holds_its_shard_of_every_parameter(share: Share) -> None:
    with folders(share.couple) as (path, draft_path):
        whole = open_draft(draft_path, open_target(path)).module
        side = {"side": "optimized", "tp_size": share.ranks}
        modules = open_draft(draft_path, open_target(path, **side), **side).modules
    full, plan = state_of(whole), PAIRS["gemma4_assistant"].page.TP_PLAN
    heads = SimpleNamespace(heads=whole.c.heads, kv_heads=0)

    held = [module.unpack() for module in modules]

    assert all(shards.keys() == full.keys() for shards in held)
    for name, tensor in full.items():
        for rank, want in enumerate(cut_as_planned(name, tensor, kind_of(name, plan), heads, share.ranks)):
            bit_equal(f"{name} of rank {rank}", held[rank][name], want)


def test_what_ranks_do_not_divide_is_refused() -> None:
    with folders(beside(drawn_of(DENSE, num_attention_heads=6, num_key_value_heads=3, intermediate_size=48))) as paths:
        side = {"side": "optimized", "tp_size": 3}
        target = open_target(paths[0], **side)
        open_draft(paths[1], target, **side)
    with folders(shared_by(2, DENSE, text_config={"intermediate_size": 33})) as paths:
        side = {"side": "optimized", "tp_size": 2}
        target = open_target(paths[0], **side)
        with pytest.raises(CheckpointError, match=r"cannot be split over tp_size=2.*33"):
            open_draft(paths[1], target, **side)


def speak(couple: Couple, side: str, dtype: torch.dtype = torch.float64, **how: Any) -> OpenSpeculation:
    """Opened from a folder that is gone afterwards."""
    with folders(couple) as paths:
        return open_speculation(*paths, side=side, dtype=dtype, **how)


# few words: a draft of random weights is right often enough for every count to occur
FEW = {"vocab_size": 5, "vocab_size_per_layer_input": 5}
FEW_CLUSTERS = {**ORDERED, "num_centroids": 3, "centroid_intermediate_top_k": 2}
IN_TOWERS = shell({**TEXT, "vocab_size": 14}, UNIFIED["vision_config"], UNIFIED["audio_config"], far=True)
TALK = {
    "dense": beside(drawn_of(DENSE, **WITH_BOTH, **FEW), 1),
    "edge": beside(tiny_gemma4(6, vocab=6), 9, **FEW_CLUSTERS),
    "unified": beside(Drawn(json.dumps(IN_TOWERS), 5), 10, UNIFIED_ASSISTANT),
}
PROMPTS = [torch.tensor(row) for row in ([1, 4, 2, 0, 3], [2], [3, 1, 4])]


@pytest.mark.parametrize("name", TALK)
def test_greedy_text_is_that_of_plain_decoding_on_both_sides(name: str) -> None:
    page, twin = (speak(TALK[name], side) for side in SIDES)

    for prompts, counts in ((PROMPTS, (1, 3, 5)), (PROMPTS[:1], (3, 5))):
        want = page.generate(prompts, 10, 0)
        for num_draft_tokens in counts:
            said, spoken = (s.generate(prompts, 10, num_draft_tokens) for s in (page, twin))
            bit_equal("reference", said.tokens, want.tokens)
            bit_equal("twin", spoken.tokens, want.tokens)
            assert said.accepted == spoken.accepted


@pytest.mark.parametrize("name", TALK)
@pytest.mark.parametrize("side", SIDES)
@torch.no_grad()
def test_every_proposal_is_that_of_a_fresh_target_which_read_the_accepted_prefix(side: str, name: str) -> None:
    prompt, num_draft_tokens = PROMPTS[2], 3
    watched, draft = seat(speak(TALK[name], side), WatchedDraft)
    said = watched.generate([prompt], 12, num_draft_tokens)
    text, page, length = torch.cat([prompt, said.tokens[0]])[None], speak(TALK[name], "reference"), len(prompt)

    for cycle, accepted in enumerate(said.accepted[0]):
        cache = page.target.module.new_cache(1, length)
        hidden = page.target.module(text[:, :length], cache=cache).hidden[:, -1:]
        readings = draft.readings[cycle * num_draft_tokens :][:num_draft_tokens]
        bit_equal("root", readings[0].tokens, text[:, length : length + 1])
        for reading in readings:
            want = page.draft.module(reading.tokens, hidden, torch.tensor([[length - 1]]), cache)
            hold("logits", reading.logits, want.logits, depth=8, width=96)
            hold("feedback", reading.feedback, want.feedback, depth=8, width=96)
            hidden = want.feedback
        length += accepted + 1


@pytest.mark.parametrize("name", TALK)
def test_sampled_text_is_that_of_the_reference(name: str) -> None:
    draws = {"temperature": 0.8, "seed": 3}

    said, spoken = (speak(TALK[name], side).generate(PROMPTS, 12, 2, **draws) for side in SIDES)

    bit_equal("tokens", spoken.tokens, said.tokens)
    assert said.accepted == spoken.accepted
    assert len({count for row in said.accepted for count in row}) > 1


@pytest.mark.parametrize("name", TALK)
def test_nothing_of_a_rejected_token_is_read(name: str) -> None:
    speculation = speak(TALK[name], "optimized")
    never = speculation.target.voice.suppressed
    poisoned = PoisonedEngine(speculation.target.module, speculation.draft.module, suppressed=never)

    want, got = (engine.generate(PROMPTS, 12, 3) for engine in (speculation.engines[0], poisoned))

    bit_equal("tokens", got.tokens, want.tokens)
    assert got.accepted == want.accepted


def test_a_cycle_in_triton_is_the_cycle_in_aten_and_asks_the_host_nothing() -> None:
    few = {"num_hidden_layers": 3, "layer_types": ["sliding_attention", "full_attention", "full_attention"]}
    couple = beside(tiny_gemma4(6, 6, **few, num_kv_shared_layers=1), **FEW_CLUSTERS)
    sides = [speak(couple, "optimized", torch.float32, form=form, device=device) for form, device in FORMS]
    aten, triton = (
        begin(PausedEngine(s.target.module, s.draft.module), [PROMPTS[2].to(s.target.side.device)], (2, 0.0))
        for s in sides
    )

    run(aten.run)
    with GuardMode(triton.state.buffers) as guard:
        run(triton.run)

    assert guard.num_calls > 0
    for name in ("drafted", "chosen", "output"):
        bit_equal(name, getattr(triton.state, name).cpu(), getattr(aten.state, name))
    hold("hidden", triton.state.hidden, aten.state.hidden, depth=3, width=2 * aten.models.target.c.hidden)
