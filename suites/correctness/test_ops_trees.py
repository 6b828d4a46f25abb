"""Claim: attention that is told a tree sees what stands before it and a node's own line, and a path moves as one.

Born of SGLang #27338 (slots of a level counted without the factor topk: wrong tokens, and nobody noticed) and of its
two strides, D for nodes and S + 1 for paths. The statement below goes by ancestors, one query at a time.
"""

from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from harness.compare import bit_equal
from harness.strategies import seeds
from optimized.ops.aten import Aten
from optimized.ops.sight import MOST_NODES, Sight
from suites.correctness.test_ops import GPU, TRITON_CASES, Case, NoReads, generator, named
from suites.interpreted import products_alike

pytestmark = pytest.mark.correctness

# interpreted programs are slow: half precision is asked of them where there is a compiler
FEW = [case for case in TRITON_CASES if GPU or case.dtype == torch.float32]
ATEN_CASES = [Case(Aten(), dtype, "cpu") for dtype in (torch.float64, torch.bfloat16)]
every_form = pytest.mark.parametrize(
    "case", [*ATEN_CASES, Case(Aten(exact=True), torch.float32, "cpu"), *FEW], ids=named
)
NUM_SLOTS = 84


@pytest.fixture(autouse=True, scope="module")
def _products_alike() -> Iterator[None]:
    with products_alike():
        yield


class Drawn(NamedTuple):
    """A random tree behind a text of another length in each sequence."""

    first: list[int]
    """tokens before the root"""
    parents: list[list[int]]
    """of every node; the root's is -1"""

    @staticmethod
    def of(seed: int, num_nodes: int) -> "Drawn":
        noise = generator(seed)
        first = torch.randint(0, NUM_SLOTS - num_nodes, (2,), generator=noise).tolist()
        # any earlier node is a parent
        parents = [[-1, *(int(torch.randint(0, v, (), generator=noise)) for v in range(1, num_nodes))] for _ in first]
        return Drawn(first, parents)

    def line(self, b: int, node: int) -> list[int]:
        """A node and its ancestors, up to the root."""
        parent = self.parents[b][node]
        return [node] if parent < 0 else [node, *self.line(b, parent)]

    def seen(self, b: int, node: int, window: int | None) -> list[int]:
        """Slots that a node sees: those of positions above its own minus the window."""
        line = self.line(b, node)
        position = self.first[b] + len(line) - 1
        slots = [*range(self.first[b]), *(self.first[b] + v for v in reversed(line))]
        positions = range(position + 1)
        return [s for s, p in zip(slots, positions, strict=True) if window is None or p > position - window]

    def asked(self, device: str) -> tuple[Tensor, Sight]:
        """Positions [B, T] and what `attend` is told."""
        num_nodes, first = len(self.parents[0]), torch.tensor(self.first, device=device)
        up = [torch.tensor([[*range(num_nodes)]] * 2, device=device)]
        above = torch.tensor(self.parents, device=device).clamp(min=0)
        while bool((up[-1] > 0).any()):
            up.append(above.gather(1, up[-1]))
        positions = first[:, None] + torch.stack([node > 0 for node in up]).sum(0)
        return positions, Sight(min(NUM_SLOTS, max(self.first) + num_nodes), first, up, num_nodes)


@every_form
@given(seed=seeds(), num_nodes=st.integers(2, 9), group=st.integers(1, 3), window=st.sampled_from([None, 1, 2, 7, 40]))
@example(seed=1, num_nodes=9, group=2, window=None)
@example(seed=2, num_nodes=7, group=1, window=2)
def test_a_node_reads_its_own_line(case: Case, seed: int, num_nodes: int, group: int, window: int | None) -> None:
    tree, noise = Drawn.of(seed, num_nodes), generator(seed)
    q = case.normal(noise, 2, num_nodes, 2 * group, 16)
    caches = [case.normal(noise, 2, NUM_SLOTS, 2, 16) for _ in range(2)]
    positions, sight = tree.asked(case.device)

    got = case.ops.attend(q, *caches, positions, 0.25, window, sight)

    want = torch.zeros_like(q, dtype=torch.float64)
    for b, v in torch.cartesian_prod(torch.arange(2), torch.arange(num_nodes)).tolist():
        k, x = (cache[b, tree.seen(b, v, window)].double().repeat_interleave(group, 1) for cache in caches)
        weight = (torch.einsum("nd,snd->ns", q[b, v].double(), k) * 0.25).softmax(-1)
        want[b, v] = torch.einsum("ns,snd->nd", weight, x)
    case.hold("attention", got, want.flatten(2), 16)


@every_form
@given(seed=seeds(), num_nodes=st.integers(2, 9), heads=st.integers(1, 4))
@example(seed=1, num_nodes=9, heads=3)
def test_a_node_reads_the_latents_of_its_own_line(case: Case, seed: int, num_nodes: int, heads: int) -> None:
    tree, noise, (rank, rope) = Drawn.of(seed, num_nodes), generator(seed), (20, 8)
    q, turned = (case.normal(noise, 2, num_nodes, heads, width) for width in (rank, rope))
    cache, w_uv = case.normal(noise, 2, NUM_SLOTS, rank + rope), case.normal(noise, heads, rank, 6)
    positions, sight = tree.asked(case.device)

    got = case.ops.attend_latent(q, turned, cache, positions, 0.2, w_uv, sight)

    want = torch.zeros(2, num_nodes, heads, 6, dtype=torch.float64, device=case.device)
    for b, v in torch.cartesian_prod(torch.arange(2), torch.arange(num_nodes)).tolist():
        rows = cache[b, tree.seen(b, v, None)].double()
        weight = (torch.cat([q, turned], -1)[b, v].double() @ rows.T * 0.2).softmax(-1)
        want[b, v] = torch.einsum("nr,nrv->nv", weight @ rows[:, :rank], w_uv.double())
    case.hold("attention", got, want.flatten(2), 2 * rank + rope)


@every_form
def test_the_last_bit_of_a_word_is_a_node_like_others(case: Case) -> None:
    # a star of all nodes that a word can name: each sees the root and itself
    tree = Drawn([3, 20], [[-1, *[0] * (MOST_NODES - 1)]] * 2)
    noise = generator(0)
    q, caches = case.normal(noise, 2, MOST_NODES, 1, 16), [case.normal(noise, 2, NUM_SLOTS, 1, 16) for _ in range(2)]
    positions, sight = tree.asked(case.device)

    got = case.ops.attend(q, *caches, positions, 0.25, None, sight)

    for b, v in ((0, MOST_NODES - 1), (1, MOST_NODES - 1), (1, MOST_NODES - 2)):
        k, x = (cache[b, tree.seen(b, v, None), 0].double() for cache in caches)
        case.hold("attention", got[b, v], (q[b, v, 0].double() @ k.T * 0.25).softmax(-1) @ x, 16)


@every_form
@given(seed=seeds(), batch=st.integers(1, 3), num_moved=st.integers(1, 6), width=st.sampled_from([1, 24, 1500]))
@example(seed=0, batch=3, num_moved=4, width=24)
def test_a_path_moves_to_the_front_and_nothing_else_moves(
    case: Case, seed: int, batch: int, num_moved: int, width: int
) -> None:
    noise = generator(seed)
    x = case.normal(noise, batch, 20, width)
    first = torch.randint(0, 12, (batch,), generator=noise).to(case.device)
    path = torch.stack([torch.randperm(8, generator=noise)[:num_moved] for _ in range(batch)]).to(case.device)

    got = x.clone()
    with NoReads():
        case.ops.compact(got, first, path)

    want = x.clone()
    for b, begin in enumerate(first.tolist()):
        for place, node in enumerate(path[b].tolist()):
            want[b, begin + place] = x[b, begin + node]
    bit_equal("rows", got, want)
