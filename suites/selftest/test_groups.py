"""Claim: ranks as threads give what ranks as processes give, and a lost rank never hangs the others.

Born of tensor-parallel tests that hung for the length of a CI job because one rank had raised.
"""

import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from harness import strategies
from harness.contracts import Group
from harness.groups import RankError, ThreadGroup, run_processes, run_threads

pytestmark = pytest.mark.correctness


def three_calls(group: Group) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What each rank has, summed, side by side, and as rank 1 has it."""
    mine = torch.arange(6.0).reshape(2, 3) + 10 * group.rank
    return group.all_reduce(mine), group.all_gather(mine, 1), group.broadcast(mine, group.size - 1)


def fail_on_rank_one(group: Group) -> torch.Tensor:
    if group.rank == 1:
        raise LookupError("a table was lost")
    return group.all_reduce(torch.ones(2))


@given(ranks=strategies.ranks())
def test_three_calls_over_threads(ranks):
    shares = [torch.arange(6.0).reshape(2, 3) + 10 * rank for rank in range(ranks)]

    for total, beside, last in run_threads(ranks, three_calls):
        assert torch.equal(total, torch.stack(shares).sum(0))
        assert torch.equal(beside, torch.cat(shares, 1))
        assert torch.equal(last, shares[-1])


@given(ranks=strategies.ranks(), seed=strategies.seeds())
def test_threads_sum_in_rank_order_whoever_comes_first(ranks, seed):
    parts = [torch.randn(33, generator=torch.Generator().manual_seed(seed + rank)) for rank in range(ranks)]
    in_order = parts[0].clone()
    for part in parts[1:]:
        in_order += part

    def late(group):
        # the ranks come in the opposite order
        threading.Event().wait(0.001 * (group.size - group.rank))
        return group.all_reduce(parts[group.rank])

    assert all(torch.equal(total, in_order) for total in run_threads(ranks, late))


@given(ranks=st.sampled_from([2, 3, 4]), rounds=st.integers(1, 20))
def test_a_rank_may_write_into_what_it_gave_and_got(ranks, rounds):
    def count(group):
        mine = torch.ones(4)
        for _ in range(rounds):
            total = group.all_reduce(mine)
            mine.fill_(-7)
            mine.copy_(total / group.size)
            total.zero_()
        return mine

    assert all(torch.equal(mine, torch.ones(4)) for mine in run_threads(ranks, count))


def test_threads_and_processes_agree():
    threads, processes = run_threads(2, three_calls), run_processes(2, three_calls)
    for one, other in zip(threads, processes, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("run", [run_threads, run_processes])
def test_an_error_comes_back_with_its_rank(run):
    with pytest.raises(LookupError, match="a table was lost") as caught:
        run(2, fail_on_rank_one)
    assert "raised by rank 1 of 2" in "".join(caught.value.__notes__)


def test_a_rank_that_returns_early_is_noticed():
    with pytest.raises(RankError, match="wait for 1 that already returned"):
        run_threads(3, lambda group: None if group.rank == 2 else group.all_reduce(torch.ones(1)))


def test_different_calls_are_noticed():
    def confused(group):
        return group.all_reduce(torch.ones(1)) if group.rank else group.all_gather(torch.ones(1), 0)

    with pytest.raises(RankError, match="different calls: 0: all_gather dim 0, 1: all_reduce"):
        run_threads(2, confused)
    with pytest.raises(RankError, match="unequal shapes"):
        run_threads(2, lambda group: group.all_reduce(torch.ones(group.rank + 1)))


def test_a_rank_that_never_comes_ends_the_wait():
    gate = threading.Event()

    def stuck(group):
        if group.rank:
            gate.wait(0.5)
        return group.all_reduce(torch.ones(1))

    with pytest.raises(RankError, match=r"waited 0\.05 s"):
        run_threads(2, stuck, timeout=0.05)


def test_groups_keep_the_protocol():
    assert all(run_threads(2, lambda group: isinstance(group, Group) and isinstance(group, ThreadGroup)))
