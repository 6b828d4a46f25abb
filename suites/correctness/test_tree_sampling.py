"""Claim: verification over a tree keeps the target's distribution, whatever the tree offers.

Born of EAGLE #183, #221 and #283 (is acceptance by the target's chances lossless beside children that were not drawn?)
and of engines whose thresholds below one are not. All chances are multiples of 1/D and a grid of midpoints stands for
the numbers, so the law of the text comes out exact, in integers: `test_sampling.py` says how. Trees are the draft's
deterministic best paths, and nothing is assumed of the draft's chances.
"""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import example, given
from torch import Tensor

from harness.strategies import seeds
from optimized import tree_cycle
from optimized.cycle import Speculation
from optimized.ops.aten import Aten
from optimized.parallel import SingleRank
from optimized.state import KVCache
from reference import trees as page
from reference.ops import sampling
from suites.correctness.test_sampling import counted, midpoints, random_law
from suites.growing import Law, Size, grown, sizes
from suites.scripted import SIDES

pytestmark = [pytest.mark.correctness, pytest.mark.pair("llama-eagle3")]

VOCAB = 3


class Told(Aten):
    """Operations whose random numbers are given by depth: [R, S+1]; the root stands at position 1."""

    def __init__(self, numbers: Tensor) -> None:
        super().__init__()
        self.numbers = numbers

    def uniform(self, seed: Tensor, sequence: Tensor, position: Tensor, stream: int) -> Tensor:
        return self.numbers.gather(1, position - 2)


def judge_reference(nodes: page.Nodes, p: Tensor, numbers: Tensor, size: Size) -> tuple[Tensor, Tensor, Tensor]:
    own = sampling.draw(p, numbers.gather(1, nodes.depths))
    path, accepted, following = page.walk(nodes, own, size.num_steps)
    return nodes.tokens.gather(1, path[:, 1:]), accepted, following


def judge_optimized(nodes: page.Nodes, p: Tensor, numbers: Tensor, size: Size) -> tuple[Tensor, Tensor, Tensor]:
    rows, num_nodes, vocab = p.shape
    plan = tree_cycle.TreePlan(rows, 64, 8, size.num_steps, True, False, size.topk, num_nodes)
    state = tree_cycle.TreeState(plan, vocab, 1, 0, torch.float64, "cpu")
    state.target_cache = KVCache(1, rows, 64, 1, 1, torch.float64, "cpu")
    state.tokens.copy_(nodes.tokens)
    state.parents.copy_(nodes.parents)
    state.num_tokens.fill_(8)
    state.done.fill_(False)
    at, hidden = SimpleNamespace(ops=Told(numbers), group=SingleRank()), torch.zeros(rows, num_nodes, 1).double()
    head = SimpleNamespace(logits=lambda x: p.flatten(0, 1).log())
    target: Any = SimpleNamespace(at=at, lm_head=head, states=lambda *_: (hidden, None))
    tree_cycle.verify(Speculation(target, None, ()), state)
    tree_cycle.accept(Speculation(target, None, ()), state)
    accepted = state.log[:, 0]
    return state.drafted, accepted, state.output.gather(1, accepted[:, None])[:, 0]


JUDGES = {"reference": judge_reference, "optimized": judge_optimized}


@pytest.mark.parametrize("side", SIDES)
@given(seed=seeds(), size=sizes(max_topk=3, max_steps=2))
@example(seed=1, size=Size(2, 2, 5))
@example(seed=2, size=Size(3, 2, 9))
@example(seed=3, size=Size(1, 2, 3))
@example(seed=4, size=Size(2, 1, 3))
def test_the_law_of_the_text_is_the_targets(side: str, seed: int, size: Size) -> None:
    law, steps = random_law(seed, VOCAB, size.num_steps), size.num_steps
    nodes = grown("reference", [Law(seed, VOCAB)], size)
    # a number for each depth: the children of a node are asked by the same one
    numbers = torch.cartesian_prod(*[midpoints(law.total)] * (steps + 1)).view(-1, steps + 1)
    lines = [[v for v in range(size.num_draft_tokens) if int(w) >> v & 1][1:] for w in nodes.words[0]]
    paths = [tuple(int(nodes.tokens[0, v]) for v in line) for line in lines]
    p = torch.stack([law.p[len(path)][path] for path in paths]) / law.total  # [T, V]
    rows = page.Nodes(*(x.expand(len(numbers), -1).contiguous() for x in nodes))

    drafted, accepted, following = JUDGES[side](rows, p.expand(len(numbers), -1, -1), numbers, size)

    text = torch.cat([drafted, following[:, None]], 1).scatter(1, accepted[:, None], following[:, None])
    want = torch.tensor(len(numbers))
    for table in law.p:
        want = want[..., None] * table
    assert torch.equal(counted(law, text, accepted), want)
    # a first step is accepted as often as the target says one of the root's children
    children = sum(int(law.p[0][path]) for path in paths if len(path) == 1)
    assert int((accepted > 0).sum()) * law.total == children * len(numbers)
