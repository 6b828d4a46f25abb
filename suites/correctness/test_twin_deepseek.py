"""Claim: the twin of DeepSeek is its reference on one rank and on many, and speculates without changing a text.

Born of SGLang #28343 and #25454, where this family lost acceptance to captures that were partial sums or of the wrong
layer, of engines that hold two attentions, one for prompts and one absorbed for decoding, whose bits differ, and of
latents cut over ranks like heads. The twin has one attention, the absorbed one, and the reference has the other. A
choice of experts is no number near another: where rounding may choose either of two, neither is wrong, so drawn texts
are those whose choices are clear.
"""

from typing import NamedTuple

import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from harness.checkpoints import CheckpointError, state_of
from harness.compare import bit_equal, budget, hold
from harness.sharding import split
from optimized.graphs import GuardMode
from reference.outputs import TargetOutput
from reference.targets.deepseek import Router
from suites.catalog import PAIRS, OpenTarget, open_target
from suites.correctness.test_replay import Cycles, begin, paused, run
from suites.correctness.test_sharding import kind_of
from suites.correctness.test_twin import FORMS, truth
from suites.draws import Drawn, folders, random_tokens, variant
from suites.families.deepseek import (
    LATENTS,
    LIMITED,
    LITE,
    PINNED_LIMITED,
    PINNED_LITE,
    PINNED_SIGMOID,
    SIGMOID,
    deepseek_targets,
    tiny_deepseek,
)
from suites.scripted import SIDES, Loop, tiny_draft

pytestmark = [pytest.mark.correctness, pytest.mark.pair("deepseek")]

# few words: a draft of random weights is right often enough for every count to occur
LOOP = Loop(tiny_deepseek(6, vocab=5), tiny_draft(7, vocab=5), (5, 1, 3))
# every interpreted program costs milliseconds
BRIEF = Loop(
    tiny_deepseek(9, vocab=5, num_hidden_layers=2, n_routed_experts=4, num_experts_per_tok=2, n_group=2, topk_group=1),
    tiny_draft(10, vocab=5, eagle_config={"eagle_aux_hidden_state_layer_ids": [1, 0]}),
    (2, 1),
)
ALL_CHOSEN = variant(SIGMOID, 4, num_experts_per_tok=8, n_group=1, topk_group=1)


def hold_all(out: TargetOutput, want: TargetOutput, target: OpenTarget) -> None:
    """Every capture point, the final hidden state and the logits."""
    size = {"dtype": target.side.dtype, "depth": target.num_layers, "width": target.config.hidden}
    for name in ("aux", "hidden", "logits"):
        hold(name, getattr(out, name), getattr(want, name), **size)


def lead(strengths: Tensor, num_chosen: int) -> float:
    """By how much the last that is chosen is ahead of the first that is not.

    strengths  [..., E]
    """
    # nobody is behind the last
    behind = F.pad(strengths.sort(-1, descending=True).values, (0, 1), value=float("-inf"))
    return float((behind[..., num_chosen - 1] - behind[..., num_chosen]).min())


def narrowest(target: OpenTarget, tokens: Tensor) -> float:
    """The least lead of a chosen group or expert over a rejected one, in root mean squares of the scores."""
    c, leads = target.config, [float("inf")]

    def note(gate: nn.Module, args: tuple[Tensor, ...], chosen: tuple[Tensor, Tensor]) -> None:
        scores = F.linear(args[0], gate.weight)
        p = scores.sigmoid() + gate.e_score_correction_bias if c.sigmoid_router else scores.softmax(-1)
        grouped = p.unflatten(-1, (c.groups, -1))
        power = grouped.topk(1 + c.sigmoid_router).values.sum(-1)
        least = power.sort(-1, descending=True).values[..., c.groups_kept - 1, None]
        left = grouped.masked_fill((power < least)[..., None], float("-inf")).flatten(-2)
        rms = float(scores.square().mean().sqrt())
        leads.append(min(lead(power, c.groups_kept), lead(left, c.experts_per_token)) / rms)

    hooks = [module.register_forward_hook(note) for module in target.module.modules() if isinstance(module, Router)]
    target(tokens)
    for hook in hooks:
        hook.remove()
    return min(leads)


def hold_to_reference(drawn: Drawn, dtype: torch.dtype, device: str, tokens: Tensor) -> None:
    """The twin to the reference in float64, with weights as the twin's dtype rounds them."""
    with folders(drawn) as (path, _):
        reference = truth(open_target(path, dtype=dtype))
        twin = open_target(path, side="optimized", dtype=dtype, device=device)
    capture, c = range(twin.num_layers + 1), twin.config
    assume(narrowest(reference, tokens) > 2 * budget(dtype, c.layers, c.hidden, 1.0))

    hold_all(twin(tokens, capture=capture), reference(tokens, capture=capture), twin)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@given(drawn=deepseek_targets(max_layers=3), batch=st.integers(1, 2), width=st.integers(1, 12))
@example(drawn=PINNED_LITE, batch=2, width=12)
@example(drawn=PINNED_LIMITED, batch=2, width=12)
@example(drawn=PINNED_SIGMOID, batch=2, width=12)
def test_the_target_is_the_reference(dtype: torch.dtype, drawn: Drawn, batch: int, width: int) -> None:
    hold_to_reference(drawn, dtype, "cpu", random_tokens(drawn.keys["vocab_size"], batch, width, drawn.seed))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@given(drawn=deepseek_targets(max_layers=3, every_expert=True), width=st.integers(1, 12))
@example(drawn=ALL_CHOSEN, width=12)
def test_in_half_precision_every_expert_is_the_references(device: str, drawn: Drawn, width: int) -> None:
    hold_to_reference(drawn, torch.bfloat16, device, random_tokens(drawn.keys["vocab_size"], 1, width, drawn.seed))


def test_the_bias_that_chooses_keeps_its_precision() -> None:
    name = "layers.2.mlp.gate.e_score_correction_bias"
    with folders(PINNED_SIGMOID) as (path, _):
        want = state_of(open_target(path).module)[name]
        module = open_target(path, side="optimized", dtype=torch.bfloat16).module

    bit_equal(name, module.unpack()[name], want)


class Share(NamedTuple):
    """A target and how many ranks share it."""

    ranks: int
    drawn: Drawn


@st.composite
def shares(draw: st.DrawFn) -> Share:
    """Sizes that two or four ranks divide."""
    ranks = draw(st.sampled_from([2, 4]))
    return Share(ranks, draw(deepseek_targets(max_layers=2, ranks=ranks)))


FEW = {"num_hidden_layers": 2, "first_k_dense_replace": 1}
TWO, FOUR = Share(2, variant(SIGMOID, 2, **FEW)), Share(4, variant(LIMITED, 3, **FEW))
BARE = Share(4, variant(LITE, 5, **FEW))


@given(share=shares(), width=st.integers(1, 12))
@example(share=TWO, width=6)
@example(share=FOUR, width=6)
@example(share=BARE, width=6)
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
@example(share=FOUR)
@example(share=BARE)
def test_a_rank_holds_its_shard_of_every_parameter(share: Share) -> None:
    with folders(share.drawn) as (path, _):
        whole = open_target(path).module
        modules = open_target(path, side="optimized", tp_size=share.ranks).modules
    full, plan = state_of(whole), PAIRS["deepseek"].page.TP_PLAN
    how = {"heads": {"heads": whole.c.heads}}

    held = [module.unpack() for module in modules]

    assert all(shards.keys() == full.keys() for shards in held)
    for name, tensor in full.items():
        kind = kind_of(name, plan)
        for rank, shards in enumerate(held):
            want = split(tensor, kind, rank, share.ranks, **how.get(kind, {}))
            bit_equal(f"{name} of rank {rank}", shards[name], want)


REFUSED = {
    "3 heads": {"num_attention_heads": 3, "num_key_value_heads": 3},
    "7 intermediate features of an expert": {"moe_intermediate_size": 7, "n_shared_experts": 2},
}


@pytest.mark.parametrize("refusal", REFUSED)
def test_what_ranks_do_not_divide_is_refused(refusal: str) -> None:
    drawn = variant(SIGMOID, 1, **FEW, **REFUSED[refusal])

    with folders(drawn) as (path, _), pytest.raises(CheckpointError, match=rf"tp_size=2.*{refusal}"):
        open_target(path, side="optimized", tp_size=2)


def test_a_cache_holds_one_latent_a_slot_and_no_heads() -> None:
    with folders(PINNED_SIGMOID) as (path, _):
        module = open_target(path, side="optimized", tp_size=2).modules[1]

    cache = module.new_cache(3, 50)

    c = module.c
    assert [tuple(t.shape) for t in cache.tensors()] == [(3, 64, 1, c.kv_rank + c.rope_dim)] * c.layers


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


@pytest.mark.parametrize("ranks", [2, 4])
def test_many_ranks_say_what_one_says(ranks: int) -> None:
    one, many = (LATENTS.open(size).generate(LATENTS.prompts, 7, 3) for size in (1, ranks))

    bit_equal("tokens", many.tokens, one.tokens)
    assert many.accepted == one.accepted


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
    aten, triton = (BRIEF.open("optimized", torch.float32, form=form, device=device) for form, device in FORMS)

    want, got = (speculation.generate(BRIEF.prompts, 2, 2) for speculation in (aten, triton))

    assert got.accepted == want.accepted
    bit_equal("tokens", got.tokens, want.tokens)
    size = {"depth": aten.target.num_layers, "width": 2 * aten.target.config.hidden}
    a, b = (speculation.engines[0].session.state for speculation in (aten, triton))
    bit_equal("drafted", b.drafted.cpu(), a.drafted)
    for name in ("hidden", "aux"):
        hold(name, getattr(b, name), getattr(a, name), **size)


def test_a_cycle_asks_the_host_nothing_and_moves_no_buffer() -> None:
    form, device = FORMS[1]
    session = begin(paused(BRIEF, device, torch.float32, form=form), BRIEF.prompts[1:], Cycles(1))

    with GuardMode(session.state.buffers) as guard:
        run(session.run)

    assert guard.num_calls > 0
