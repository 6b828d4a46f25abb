"""Claim: the twin of Gemma 4 text is its reference on one rank and on many, and speculates without changing a text.

Born of SGLang #28005 (captures of Gemma 4 that the next layer went on to change), of `layer_scalar` left out of a fused
norm, of a cache that gives layers without keys of their own the wrong donor, and of key/value heads repeated by rank
modulo heads. Layers of one model differ here in all that layers can differ in: heads, widths, windows, ropes, donors.
"""

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st
from torch import Tensor, nn

from harness.checkpoints import CheckpointError, state_of
from harness.compare import bit_equal, budget, hold
from optimized.graphs import GuardMode
from reference.outputs import TargetOutput
from suites.catalog import PAIRS, OpenTarget, open_target
from suites.correctness.test_replay import begin, paused, run
from suites.correctness.test_sharding import cut_as_planned, kind_of
from suites.correctness.test_twin import FORMS, truth
from suites.draws import Drawn, eagle3_weights, folders, random_tokens
from suites.families.gemma4 import (
    DENSE,
    EDGE,
    EXPERTS,
    FULL,
    PINNED,
    SIZES,
    SLIDING,
    drawn_of,
    gemma4_targets,
    tiny_gemma4,
)
from suites.scripted import SIDES, Loop, tiny_draft
from suites.stand import stand_as

pytestmark = [pytest.mark.correctness, pytest.mark.pair("gemma4")]

any_size = st.sampled_from(SIZES).flatmap(gemma4_targets)
# few words: a draft of random weights is right often enough for every count to occur
LOOP = Loop(tiny_gemma4(6, vocab=5, final_logit_softcapping=1.0), tiny_draft(7, vocab=5), (5, 1, 3))
FEW_LAYERS = {"num_hidden_layers": 3, "layer_types": [SLIDING, FULL, FULL]}
UNTIED = drawn_of(DENSE, attention_k_eq_v=False, attention_bias=True, tie_word_embeddings=False)


def hold_all(out: TargetOutput, want: TargetOutput, target: OpenTarget) -> None:
    """Every capture point, the final hidden state and the logits."""
    size = {"dtype": target.side.dtype, "depth": target.num_layers, "width": target.config.hidden}
    for c in range(target.num_layers + 1):
        hold(f"capture point {c}", out.aux[:, :, c], want.aux[:, :, c], **size)
    hold("hidden", out.hidden, want.hidden, **size)
    hold("logits", out.logits, want.logits, **size)


def narrowest(target: OpenTarget, tokens: Tensor) -> float:
    """By how much a chosen expert is ahead of a rejected one at least, in root mean squares of the scores."""
    chosen, margins = target.config.experts_per_token, [float("inf")]

    def note(router: nn.Module, args: tuple[Tensor, ...], scores: Tensor) -> None:
        best = scores.sort(-1, descending=True).values
        ahead = best[..., chosen - 1 : -1] - best[..., chosen:]
        margins.extend((ahead[..., :1] / scores.square().mean().sqrt()).flatten().tolist())

    routers = [module for name, module in target.module.named_modules() if name.endswith("router.proj")]
    hooks = [router.register_forward_hook(note) for router in routers]
    target(tokens)
    for hook in hooks:
        hook.remove()
    return min(margins)


class Both(NamedTuple):
    """One checkpoint on both sides, and a text."""

    reference: OpenTarget
    """in float64, with weights as the twin's dtype rounds them"""
    twin: OpenTarget
    tokens: Tensor

    def hold(self) -> None:
        capture = range(self.twin.num_layers + 1)
        hold_all(self.twin(self.tokens, capture=capture), self.reference(self.tokens, capture=capture), self.twin)

    def hold_if_clear(self) -> None:
        """A choice is no number near another: where rounding may choose either of two experts, neither is wrong."""
        unit = budget(self.twin.side.dtype, self.twin.num_layers, self.twin.config.hidden, 1.0)
        assume(narrowest(self.reference, self.tokens) > 2 * unit)
        self.hold()


def both(drawn: Drawn, dtype: torch.dtype, batch: int, width: int, device: str = "cpu") -> Both:
    """Opened from one folder."""
    tokens = random_tokens(drawn.keys["vocab_size"], batch, width, drawn.seed)
    with folders(drawn) as (path, _):
        reference = truth(open_target(path, dtype=dtype))
        return Both(reference, open_target(path, side="optimized", dtype=dtype, device=device), tokens)


dtypes = st.sampled_from([torch.float64, torch.float32])


@given(drawn=gemma4_targets("dense"), dtype=dtypes, batch=st.integers(1, 2), width=st.integers(1, 16))
@example(drawn=PINNED["dense"], dtype=torch.float64, batch=2, width=14)
@example(drawn=UNTIED, dtype=torch.float32, batch=1, width=9)
def test_dense_is_the_reference(drawn: Drawn, dtype: torch.dtype, batch: int, width: int) -> None:
    both(drawn, dtype, batch, width).hold()


@given(drawn=gemma4_targets("experts"), dtype=dtypes, batch=st.integers(1, 2), width=st.integers(1, 16))
@example(drawn=PINNED["experts"], dtype=torch.float64, batch=2, width=14)
@example(drawn=PINNED["experts"], dtype=torch.float32, batch=2, width=14)
def test_experts_are_the_reference(drawn: Drawn, dtype: torch.dtype, batch: int, width: int) -> None:
    both(drawn, dtype, batch, width).hold_if_clear()


@given(drawn=gemma4_targets("edge"), dtype=dtypes, batch=st.integers(1, 2), width=st.integers(1, 16))
@example(drawn=PINNED["edge"], dtype=torch.float64, batch=2, width=14)
@example(drawn=tiny_gemma4(4), dtype=torch.float32, batch=1, width=9)
def test_edge_is_the_reference(drawn: Drawn, dtype: torch.dtype, batch: int, width: int) -> None:
    both(drawn, dtype, batch, width).hold()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("drawn", [PINNED["dense"], drawn_of(EXPERTS, top_k_experts=6), PINNED["edge"]], ids=SIZES)
def test_in_half_precision_the_target_is_the_reference(drawn: Drawn, device: str) -> None:
    both(drawn, torch.bfloat16, 1, 9, device).hold()


@given(drawn=any_size, width=st.integers(2, 16), cut=st.integers(1, 15))
@example(drawn=PINNED["edge"], width=14, cut=9)
@example(drawn=PINNED["dense"], width=14, cut=9)
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
    ranks, size = draw(st.sampled_from([2, 3, 4])), draw(st.sampled_from(SIZES))
    return Share(ranks, draw(gemma4_targets(size, ranks)))


def share(ranks: int, config: Mapping[str, Any], **changes: Any) -> Share:
    """Three layers of a size, the last one shared where the size shares."""
    few = {**FEW_LAYERS, "num_kv_shared_layers": min(1, config.get("num_kv_shared_layers", 0))}
    return Share(ranks, drawn_of({**config, **few}, ranks, intermediate_size=48, **changes))


# one full key/value head for two ranks; three heads for three; two sliding heads for four, whose last has no words
TWO, THREE = share(2, DENSE), share(3, EXPERTS, num_attention_heads=6, num_key_value_heads=3)
FOUR = share(4, EXPERTS, num_experts=8, vocab_size=130, vocab_size_per_layer_input=130)
EDGES = share(4, EDGE)


@given(share=shares(), width=st.integers(1, 10))
@example(share=TWO, width=8)
@example(share=THREE, width=8)
@example(share=FOUR, width=8)
@example(share=EDGES, width=8)
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


@pytest.mark.parametrize("share", [TWO, THREE, FOUR, EDGES], ids=["two", "three", "four", "edges"])
def test_a_rank_holds_its_shard_of_every_parameter(share: Share) -> None:
    with folders(share.drawn) as (path, _):
        whole = open_target(path).module
        modules = open_target(path, side="optimized", tp_size=share.ranks).modules
    full, plan, c = state_of(whole), PAIRS["gemma4"].page.TP_PLAN, whole.c
    # names of layers begin with "layers.", their number follows
    kv_heads = {f"layers.{i}.": c.kind(i).kv_heads for i in range(c.layers)}

    held = [module.unpack() for module in modules]

    assert all(shards.keys() == full.keys() for shards in held)
    for name, tensor in full.items():
        heads = SimpleNamespace(heads=c.heads, kv_heads=next((g for p, g in kv_heads.items() if name.startswith(p)), 0))
        for rank, want in enumerate(cut_as_planned(name, tensor, kind_of(name, plan), heads, share.ranks)):
            bit_equal(f"{name} of rank {rank}", held[rank][name], want)


@pytest.mark.parametrize(
    ("drawn", "ranks", "what"),
    [(PINNED["experts"], 4, "6 experts"), (PINNED["dense"], 3, "4 heads")],
    ids=["experts", "heads"],
)
def test_what_ranks_do_not_divide_is_refused(drawn: Drawn, ranks: int, what: str) -> None:
    refusal = pytest.raises(CheckpointError, match=rf"cannot be split over tp_size={ranks}.*{what}")
    with folders(drawn) as (path, _), refusal:
        open_target(path, side="optimized", tp_size=ranks)


def test_layers_that_are_shared_take_no_room_in_the_cache() -> None:
    with folders(PINNED["edge"]) as (path, _):
        twin = open_target(path, side="optimized").module

    shapes = [tuple(keys.shape) for keys in twin.new_cache(2, 10).keys]

    # sliding layers have two heads of 8, full ones two of 16
    assert shapes == [(2, 64, 2, width) for width in (8, 8, 16, 8, 8)]


@pytest.mark.parametrize(("num_draft_tokens", "temperature"), [(1, 0.0), (3, 0.0), (2, 0.8)])
def test_a_draft_says_on_the_twin_what_it_says_on_the_reference(num_draft_tokens: int, temperature: float) -> None:
    draws = {"temperature": temperature, "seed": 3}

    want, got = (LOOP.open(side).generate(LOOP.prompts, 10, num_draft_tokens, **draws) for side in SIDES)

    bit_equal("tokens", got.tokens, want.tokens)
    assert got.accepted == want.accepted
    assert len({count for row in got.accepted for count in row}) > 1


@pytest.mark.parametrize("num_draft_tokens", [1, 3])
@pytest.mark.parametrize("size", SIZES)
def test_greedy_text_is_that_of_plain_decoding(size: str, num_draft_tokens: int) -> None:
    loop = LOOP._replace(target=PINNED[size], draft=tiny_draft(7, vocab=331))
    speculation = loop.open("optimized")

    said, plain = (speculation.generate(loop.prompts, 8, k) for k in (num_draft_tokens, 0))

    bit_equal("tokens", said.tokens, plain.tokens)


def test_a_draft_shares_the_table_unscaled_and_the_head_without_its_cap() -> None:
    target, config = drawn_of(DENSE, final_logit_softcapping=2.0), tiny_draft(4, 331).keys
    tensors = eagle3_weights(tiny_draft(4, 331), own_embedding=False)
    del tensors["lm_head.weight"]
    with folders(target) as (path, _):
        sides = [open_target(path, side=side, dtype=torch.float64) for side in SIDES]
    drafts = [stand_as(config, tensors, opened) for opened in sides]
    tokens = random_tokens(331, 2, 6, 1)
    hidden = drafts[0].fuse(sides[0](tokens, capture=drafts[0].capture_points).aux)

    want, got = (draft(tokens.roll(-1, 1), hidden) for draft in drafts)

    for name, a, b in zip(got._fields, got, want, strict=True):
        hold(name, a, b, depth=1, width=2 * sides[0].config.hidden)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_verify_has_the_bits_of_decode(size: str, dtype: torch.dtype) -> None:
    with folders(PINNED[size]) as (path, _):
        target = open_target(path, side="optimized", dtype=dtype, exact=True)
    tokens, capture = random_tokens(target.config.vocab, 2, 9, 1), tuple(range(target.num_layers + 1))
    places = torch.arange(9).repeat(2, 1)
    step_by_step, at_once = (target.module.new_cache(2, 63) for _ in range(2))
    for cache in (step_by_step, at_once):
        target.module(tokens[:, :5], places[:, :5], capture, cache)

    decoded = [target.module(tokens[:, p : p + 1], places[:, p : p + 1], capture, step_by_step) for p in range(5, 9)]
    verified = target.module(tokens[:, 5:], places[:, 5:], capture, at_once)

    for name in verified._fields:
        bit_equal(name, getattr(verified, name), torch.cat([getattr(out, name) for out in decoded], 1))


def test_a_cycle_in_triton_is_the_cycle_in_aten_and_asks_the_host_nothing() -> None:
    loop = LOOP._replace(target=tiny_gemma4(6, 5, **FEW_LAYERS, num_kv_shared_layers=1), lengths=(3,))
    aten, triton = (
        begin(paused(loop, device, torch.float32, form=form), loop.prompts, (1, 0.0)) for form, device in FORMS
    )

    run(aten.run)
    with GuardMode(triton.state.buffers) as guard:
        run(triton.run)

    assert guard.num_calls > 0
    a, b = aten.state, triton.state
    for name in ("drafted", "chosen", "output"):
        bit_equal(name, getattr(b, name).cpu(), getattr(a, name))
    for name in ("hidden", "aux"):
        hold(name, getattr(b, name), getattr(a, name), depth=3, width=2 * aten.models.target.c.hidden)
