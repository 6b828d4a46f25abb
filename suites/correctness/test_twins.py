"""Claim: a text target's twin is its reference, on one rank and on many, and speculates without changing a text.

Born of SGLang #28343 (captures taken before the all-reduce are partial sums; behind a norm they cannot even be added up
later), of #28005 and #32383 (captured states that the next layer went on to change, norms fused into the next one), of
windows counted from the chunk's start, of fused experts whose sums depended on who came first, and of batches that
changed a token's experts: a row of verify must choose what decode chose, and give the same bits. What one family alone
can get wrong stands in that family's file.
"""

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from hypothesis import example, given, reject
from hypothesis import strategies as st

from harness.checkpoints import state_of
from harness.compare import bit_equal, budget, hold
from harness.sharding import split
from optimized.graphs import GuardMode
from reference.outputs import TargetOutput
from suites.catalog import PAIRS, OpenTarget, open_target
from suites.correctness.test_replay import Cycles, begin, paused, run
from suites.correctness.test_sharding import kind_of
from suites.correctness.test_twin import FORMS, truth
from suites.draws import Drawn, folders, random_tokens
from suites.families.deepseek import LATENTS
from suites.families.qwen3_moe import MIXTURE
from suites.scripted import SIDES
from suites.twins import BRIEF, FAMILIES, LOOPS, SHARED, WINDOWED, Family, Lead, Share, of, of_every_loop, undivided

pytestmark = pytest.mark.correctness

Pinned = Callable[[Family], Iterable[dict[str, Any]]]
Makes = Callable[[Family], st.SearchStrategy[Any]]


def drawn(names: Iterable[str], pinned: Pinned, **makes: Makes) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """`given` and `example` whose strategies are the family's; they are settled when a claim is run."""

    def decorate(claim: Callable[..., None]) -> Callable[..., None]:
        def each(family: Family) -> None:
            def one(**case: Any) -> None:
                claim(family, **case)

            proof = given(**{name: make(family) for name, make in makes.items()})(one)
            for case in pinned(family):
                proof = example(**case)(proof)
            proof()

        each.__name__, each.__doc__ = claim.__name__, claim.__doc__
        return of(*names)(each)

    return decorate


def hold_all(out: TargetOutput, want: TargetOutput, target: OpenTarget) -> None:
    """Every capture point, the final hidden state and the logits."""
    size = {"dtype": target.side.dtype, "depth": target.num_layers, "width": target.config.hidden}
    for c in range(target.num_layers + 1):
        hold(f"capture point {c}", out.aux[:, :, c], want.aux[:, :, c], **size)
    hold("hidden", out.hidden, want.hidden, **size)
    hold("logits", out.logits, want.logits, **size)


def hold_to_reference(
    drawn: Drawn, dtype: torch.dtype, batch: int, width: int, device: str = "cpu", lead: Lead = undivided
) -> None:
    """The twin to the reference in float64, with weights as the twin's dtype rounds them, where choices are clear."""
    tokens = random_tokens(drawn.keys["vocab_size"], batch, width, drawn.seed)
    with folders(drawn) as (path, _):
        reference = truth(open_target(path, dtype=dtype))
        twin = open_target(path, side="optimized", dtype=dtype, device=device)
    capture, c = range(twin.num_layers + 1), twin.config
    if lead(reference, tokens) <= 2 * budget(dtype, c.layers, c.hidden, 1.0):
        reject()

    hold_all(twin(tokens, capture=capture), reference(tokens, capture=capture), twin)


DTYPES = (torch.float64, torch.float32)


@drawn(
    FAMILIES,
    lambda family: [
        {"drawn": drawn, "dtype": dtype, "batch": batch, "width": width}
        for drawn, batch, width in family.pinned
        for dtype in DTYPES
    ],
    drawn=lambda family: family.targets,
    dtype=lambda _: st.sampled_from(DTYPES),
    batch=lambda _: st.integers(1, 3),
    width=lambda _: st.integers(1, 20),
)
def test_the_target_is_the_reference(family: Family, drawn: Drawn, dtype: torch.dtype, batch: int, width: int) -> None:
    hold_to_reference(drawn, dtype, batch, width, lead=family.lead)


@drawn(
    WINDOWED,
    lambda family: [{"drawn": family.pinned[0][0], "width": 20, "cut": cut} for cut in (9, 18)],
    drawn=lambda family: family.targets,
    width=lambda _: st.integers(2, 16),
    cut=lambda _: st.integers(1, 15),
)
def test_behind_its_cache_the_target_is_the_reference(family: Family, drawn: Drawn, width: int, cut: int) -> None:
    tokens, columns = random_tokens(drawn.keys["vocab_size"], 2, width, drawn.seed), torch.arange(width).expand(2, -1)
    with folders(drawn) as (path, _):
        want = open_target(path, dtype=torch.float64)
        twin = open_target(path, side="optimized", dtype=torch.float64)
    capture, cache = range(twin.num_layers + 1), twin.module.new_cache(2, width)

    ends = ((0, min(cut, width - 1)), (min(cut, width - 1), width))
    parts = [twin.module(tokens[:, a:b], columns[:, a:b], capture, cache) for a, b in ends]

    whole = TargetOutput(*(torch.cat(both, 1) for both in zip(*parts, strict=True)))
    hold_all(whole, want(tokens, capture=capture), twin)


@drawn(
    SHARED,
    lambda family: [{"share": share, "width": 8} for share in family.pinned_shares],
    share=lambda family: family.shares,
    width=lambda _: st.integers(1, 10),
)
def test_ranks_hold_their_shards_and_compute_what_one_computes(family: Family, share: Share, width: int) -> None:
    tokens = random_tokens(share.drawn.keys["vocab_size"], 2, width, share.drawn.seed)
    with folders(share.drawn) as (path, _):
        full = state_of(open_target(path, dtype=torch.float64).module)
        one, many = (
            open_target(path, side="optimized", dtype=torch.float64, tp_size=ranks) for ranks in (1, share.ranks)
        )
    capture, plan = range(one.num_layers + 1), PAIRS[family.pair].page.TP_PLAN

    held = [module.unpack() for module in many.modules]
    with torch.no_grad():
        first, *others = many.ranks.run(lambda rank: many.modules[rank](tokens, None, capture))

    assert all(shards.keys() == full.keys() for shards in held)
    for name, tensor in full.items():
        kind = kind_of(name, plan)
        how = {"heads": family.heads(one.config, name)} if kind == "heads" else {}
        for rank, shards in enumerate(held):
            bit_equal(f"{name} of rank {rank}", shards[name], split(tensor, kind, rank, share.ranks, **how))
    hold_all(first, one(tokens, capture=capture), one)
    for other in others:
        for name, got, want in zip(first._fields, other, first, strict=True):
            bit_equal(name, got, want)


@of(*FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_verify_has_the_bits_of_decode(family: Family, dtype: torch.dtype) -> None:
    with folders(family.small) as (path, _):
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


@of_every_loop
@pytest.mark.parametrize("num_draft_tokens", [1, 3])
def test_a_draft_leaves_the_text_alone(pair: str, num_draft_tokens: int) -> None:
    loop = LOOPS[pair]
    reference, twin = (loop.open(side) for side in SIDES)

    want, said = (speculation.generate(loop.prompts, 12, num_draft_tokens) for speculation in (reference, twin))

    for speculation in (reference, twin):
        bit_equal("tokens", said.tokens, speculation.generate(loop.prompts, 12, 0).tokens)
    bit_equal("text of the reference", said.tokens, want.tokens)
    assert said.accepted == want.accepted
    assert len({count for row in said.accepted for count in row}) > 1


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("pair", ["qwen3_moe", "deepseek"])
def test_many_ranks_say_what_one_says(pair: str, ranks: int) -> None:
    team = {"qwen3_moe": MIXTURE, "deepseek": LATENTS}[pair]

    one, many = (team.open(size).generate(team.prompts, 7, 3) for size in (1, ranks))

    bit_equal("tokens", many.tokens, one.tokens)
    assert many.accepted == one.accepted


@of_every_loop
def test_a_cycle_in_triton_is_the_cycle_in_aten_and_asks_the_host_nothing(pair: str) -> None:
    loop = BRIEF[pair]
    aten, triton = (
        begin(paused(loop, device, torch.float32, form=form), loop.prompts, Cycles(2)) for form, device in FORMS
    )

    run(aten.run)
    with GuardMode(triton.state.buffers) as guard:
        run(triton.run)

    assert guard.num_calls > 0
    a, b, c = aten.state, triton.state, aten.models.target.c
    for name in ("drafted", "chosen", "output"):
        bit_equal(name, getattr(b, name).cpu(), getattr(a, name))
    for name in ("hidden", "aux"):
        hold(name, getattr(b, name), getattr(a, name), depth=c.layers, width=2 * c.hidden)
