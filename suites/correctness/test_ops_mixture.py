"""Claim: routers choose and weigh experts, and experts mix, as their float64 statements say, in every form.

Born of biases of a router that found their way into its weights, of renormalisations dropped, of gate and up halves
swapped, and of partial sums that were added by whoever came first.
"""

from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from harness.compare import bit_equal
from harness.strategies import seeds
from optimized.ops.aten import Aten
from optimized.ops.launch import Triton
from optimized.ops.tiles import KeyTile, Tile
from suites.correctness.test_ops import GPU, Case, NoReads, generator, named, same_tensors
from suites.correctness.test_ops_targets import activated
from suites.interpreted import products_alike

pytestmark = pytest.mark.correctness

# two tiles at most: every interpreted program costs milliseconds
TRITON = Triton(16, Tile(16, 32, 32, 4, 2), KeyTile(16, 16, 32, 4, 2))
FEW = [Case(TRITON, dtype, "cuda") for dtype in (torch.float32, torch.bfloat16)] if GPU else []
FEW = FEW or [Case(TRITON, torch.float32, "cpu")]
EXACT = [*(Case(Aten(exact=True), dtype, "cpu") for dtype in (torch.float32, torch.bfloat16)), *FEW]
PLAIN = [Case(Aten(), dtype, "cpu") for dtype in (torch.float64, torch.bfloat16)]
every_form = pytest.mark.parametrize("case", [*PLAIN, EXACT[0], *FEW], ids=named)
# a large router is a product and a choice, each a kernel of its own
APART = [case._replace(ops=Triton(16, Tile(16, 32, 32, 4, 2), router_bytes=0)) for case in FEW]
every_router = pytest.mark.parametrize(
    ("case", "parts"), [*((case, 1) for case in (*PLAIN, EXACT[0], *FEW)), *((case, 2) for case in APART)]
)
every_exact_form = pytest.mark.parametrize("case", EXACT, ids=named)
acts = st.sampled_from(["silu", "gelu_tanh"])
rows = st.integers(1, 2)


@pytest.fixture(autouse=True, scope="module")
def _products_alike() -> Iterator[None]:
    with products_alike():
        yield


def hold_route(case: Case, got: tuple[Tensor, Tensor], want: list[tuple[int, float]], row: int) -> None:
    """One row of a router's answer."""
    assert got[0][row].tolist() == [expert for expert, _ in want]
    case.hold("weights", got[1][row].double(), torch.tensor([w for _, w in want], dtype=torch.float64), 8)


@every_form
@given(seed=seeds(), num_rows=rows, num_chosen=st.integers(1, 4), renormalise=st.booleans(), scaled=st.booleans())
@example(seed=0, num_rows=3, num_chosen=3, renormalise=True, scaled=True)
@example(seed=0, num_rows=2, num_chosen=2, renormalise=False, scaled=False)
def test_the_likeliest_experts_are_chosen(
    case: Case, seed: int, num_rows: int, num_chosen: int, renormalise: bool, scaled: bool
) -> None:
    noise = generator(seed)
    scores = case.whole(noise, num_rows, 11)  # full of ties
    scale = case.normal(noise, 11) if scaled else None

    # a product with ones and zeros is exact: the scores are what was drawn
    same = case.ops.pack(torch.eye(11, dtype=case.dtype, device=case.device))
    got = case.ops.route_softmax(scores, same, num_chosen, renormalise, scale)
    wide = case.ops.route_softmax(scores, same, num_chosen, renormalise, scale, wide=True)

    for row, likely in enumerate(scores.double().softmax(-1).tolist()):
        order = scores[row].tolist()
        best = sorted(range(11), key=lambda e: (-order[e], e))[:num_chosen]
        total = sum(likely[e] for e in best) if renormalise else 1
        factors = scale.double().tolist() if scaled else [1] * 11
        hold_route(case, got, [(e, likely[e] / total * factors[e]) for e in best], row)
    bit_equal("ids", wide[0], got[0])
    bit_equal("rounded", wide[1].to(case.dtype), got[1])
    assert wide[1].dtype == torch.promote_types(case.dtype, torch.float32)


def grouped(choice: list[float], groups: int, top_groups: int, best_of: int) -> list[int]:
    """The experts of the best groups."""
    size = len(choice) // groups
    worth = [sum(sorted(choice[g * size : (g + 1) * size])[-best_of:]) for g in range(groups)]
    kept = sorted(range(groups), key=lambda g: (-worth[g], g))[:top_groups]
    return [e for e in range(len(choice)) if e // size in kept]


@every_form
@given(seed=seeds(), num_rows=rows, shape=st.sampled_from([(1, 1), (4, 2), (3, 1)]), sigmoid=st.booleans())
@example(seed=0, num_rows=4, shape=(4, 2), sigmoid=True)
@example(seed=0, num_rows=4, shape=(4, 2), sigmoid=False)
@example(seed=0, num_rows=4, shape=(1, 1), sigmoid=False)
def test_experts_are_chosen_from_the_best_groups(
    case: Case, seed: int, num_rows: int, shape: tuple[int, int], sigmoid: bool
) -> None:
    noise = generator(seed)
    # whole numbers are full of ties; a bias would make them near ones, which rounding decides
    scores = case.normal(noise, num_rows, 12) if sigmoid else case.whole(noise, num_rows, 12)
    bias = case.normal(noise, 12) if sigmoid else None
    kind = "sigmoid" if sigmoid else "softmax"

    same = case.ops.pack(torch.eye(12, dtype=case.dtype, device=case.device), wide=True)
    ids, weights = case.ops.route_grouped(scores, same, bias, *shape, 3, sigmoid, 2.5, kind, 2)
    got = (ids[:, :3], weights[:, :3])

    wide = scores.double()
    likely = wide.sigmoid() if sigmoid else wide.softmax(-1)
    choice = likely + bias.double() if sigmoid else wide
    for row in range(num_rows):
        inside = grouped(choice[row].tolist(), *shape, 1 + sigmoid)
        best = sorted(inside, key=lambda e: (-choice[row, e].item(), e))[:3]
        total = sum(likely[row, e].item() for e in best) if sigmoid else 1
        hold_route(case, got, [(e, likely[row, e].item() / total * 2.5) for e in best], row)
    # who is shared is chosen by every row, with weight one
    assert ids[:, 3:].tolist() == [[12, 13]] * num_rows
    bit_equal("weights of shared experts", weights[:, 3:], torch.ones_like(weights[:, 3:]))


@every_router
@given(seed=seeds(), num_rows=rows, width=st.integers(1, 96))
@example(seed=0, num_rows=2, width=70)
@example(seed=0, num_rows=2, width=64)
def test_a_router_scores_what_it_reads(case: Case, parts: int, seed: int, num_rows: int, width: int) -> None:
    noise = generator(seed)
    x, weight = case.normal(noise, num_rows, width), case.normal(noise, 6, width) / width**0.5

    ids, weights = case.ops.route_grouped(x, case.ops.pack(weight, wide=True), None, 1, 1, 6, False, 1.0, "sigmoid")
    _, rounded = case.ops.route_softmax(x, case.ops.pack(weight), 6, False, wide=True)

    scores = x.double() @ weight.double().T
    case.hold("sigmoid", weights.gather(1, ids.argsort(1)), scores.sigmoid(), width)
    order = scores.softmax(-1).sort(-1, descending=True).values
    case.hold("softmax", rounded, order, width)


@every_form
def test_more_experts_than_the_groups_hold_cannot_be_chosen(case: Case) -> None:
    same = case.ops.pack(torch.eye(8, dtype=case.dtype, device=case.device), wide=True)

    with pytest.raises(ValueError, match="3 of 8 experts"):
        case.ops.route_grouped(case.normal(generator(0), 1, 8), same, None, 4, 1, 3, False, 1.0, "softmax")


def mixed(x: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, act: str) -> Tensor:
    """x [M, H], ids [M, P], weights [M, P], gate_up [E, 2I, H], down [E, H, I] -> [M, H]"""
    x, weights, gate_up, down = x.double(), weights.double(), gate_up.double(), down.double()
    out = torch.zeros_like(x)
    for row, chosen in enumerate(ids.tolist()):
        for place, expert in enumerate(chosen):
            gate, up = (gate_up[expert] @ x[row]).chunk(2)
            out[row] += weights[row, place] * (down[expert] @ (activated(gate, act) * up))
    return out


def mixture(case: Case, seed: int, num_rows: int, hidden: int, width: int) -> tuple[Tensor, ...]:
    """x, ids, weights, gate_up, down of five experts, two a row."""
    noise = generator(seed)
    ids = torch.stack([torch.randperm(5, generator=noise)[:2] for _ in range(num_rows)]).to(case.device)
    x, weights = case.normal(noise, num_rows, hidden), case.normal(noise, num_rows, 2)
    gate_up = case.normal(noise, 5, 2 * width, hidden) / hidden**0.5
    return x, ids, weights, gate_up, case.normal(noise, 5, hidden, width) / width**0.5


@every_form
@given(seed=seeds(), num_rows=rows, hidden=st.integers(8, 32), width=st.integers(8, 32), act=acts)
@example(seed=0, num_rows=2, hidden=33, width=34, act="gelu_tanh")
def test_a_row_is_the_weighted_sum_of_its_experts(
    case: Case, seed: int, num_rows: int, hidden: int, width: int, act: str
) -> None:
    x, ids, weights, gate_up, down = mixture(case, seed, num_rows, hidden, width)

    got = case.ops.experts(x, ids, weights, gate_up, down, act)
    # a second rank, which holds the last two experts
    part = case.ops.experts(x, ids, weights, gate_up[3:].clone(), down[3:].clone(), act, 3)

    case.hold("mixture", got, mixed(x, ids, weights, gate_up, down, act), hidden + width)
    case.hold("share", part, mixed(x, ids, weights * (ids >= 3), gate_up, down, act), hidden + width)


@pytest.mark.parametrize("way", [Aten._by_expert, Aten._by_group, Aten._densely], ids=lambda way: way.__name__)
@given(seed=seeds(), num_rows=st.integers(1, 20))
@example(seed=0, num_rows=20)
def test_every_way_through_the_experts_is_the_same(way: Callable[..., Tensor], seed: int, num_rows: int) -> None:
    case = Case(Aten(), torch.bfloat16, "cpu")
    x, ids, weights, gate_up, down = mixture(case, seed, num_rows, 32, 16)

    # experts 0 and 4 belong to other ranks
    pairs = way(case.ops, x, ids - 1, gate_up[1:4], down[1:4], "silu")

    held = weights * ((ids >= 1) & (ids < 4))
    got = (pairs.double() * held.double()[:, :, None]).sum(1)
    case.hold("mixture", got, mixed(x, ids, held, gate_up, down, "silu"), 48)
    assert not pairs.isnan().any()


@every_exact_form
@given(seed=seeds(), num_rows=st.integers(2, 3), act=acts)
@example(seed=0, num_rows=3, act="gelu_tanh")
def test_a_row_is_routed_and_mixed_alike_alone(case: Case, seed: int, num_rows: int, act: str) -> None:
    x, ids, weights, gate_up, down = mixture(case, seed, num_rows, 28, 20)
    last, bias = slice(-1, None), case.normal(generator(seed), 12)
    rows_of = case.normal(generator(seed), 12, 28)
    wide, scorer = case.ops.pack(rows_of, wide=True), case.ops.pack(rows_of)

    def computed(rows: slice) -> tuple[Tensor, ...]:
        routes = case.ops.route_grouped(x[rows], wide, bias, 4, 2, 3, True, 2.5, "sigmoid", 1)
        mix = case.ops.experts(x[rows], ids[rows], weights[rows], gate_up, down, act)
        return *routes, *case.ops.route_softmax(x[rows], scorer, 3, True), mix

    same_tensors("row", computed(last), tuple(part[last] for part in computed(slice(None))))


@pytest.mark.parametrize("exact", [False, True])
def test_no_router_waits_for_its_device(exact: bool) -> None:
    case = Case(Aten(exact), torch.float32, "cpu")
    x, ids, weights, gate_up, down = mixture(case, 0, 3, 24, 8)

    with NoReads():
        case.ops.route_softmax(x, gate_up[0], 2, True, x[0, :16])
        case.ops.route_grouped(x, gate_up[0], x[0, :16], 4, 2, 3, True, 2.5, "sigmoid", 1)
        case.ops.experts(x, ids, weights, gate_up, down)
