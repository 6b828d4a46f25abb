"""Claim: a call whose tensors are not as the docstring says fails with the name, the line and what came.

Born of docstrings that were right when they were written.
"""

import sys
from types import ModuleType
from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from harness.shapes import ShapeError, ShapeLineError, declared, evaluate, hold, watch

pytestmark = pytest.mark.correctness


class Output(NamedTuple):
    logits: Tensor
    feedback: Tensor


class Draft(nn.Module):
    """A page in small."""

    def __init__(self, feedback: int = 4) -> None:
        super().__init__()
        self.width = feedback

    def fuse(self, aux: Tensor) -> Tensor:
        """Equation (1), where rank r owns rows [r P/W, (r+1) P/W).

        aux  [B, T, A, H]  states in the order of their ids
        ->   [B, T, A*H]
        """
        return aux.flatten(2)

    def forward(self, tokens: Tensor, hidden: Tensor, positions: Tensor | None = None) -> Output:
        """One step.

        tokens, positions  [B, T]
        hidden             [B, T, H]
        ->                 logits [B, T, Vd], feedback [B, T, H]  what the next step reads
        """
        return Output(hidden.new_zeros(*tokens.shape, 9), hidden.new_zeros(*tokens.shape, self.width))

    @staticmethod
    def double(x: Tensor) -> Tensor:
        """x [..., H] -> [..., 2H]"""
        return torch.cat([x, x], -1)


def unroll(tokens: Tensor, num_steps: int, wrong: int = 0) -> Tensor:
    """Repeat.

    tokens  [B, T]
    ->      [num_steps, B, T]
    """
    return tokens.expand(num_steps + wrong, *tokens.shape)


def pick(x: Tensor, index: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """x [M, K] or [B, M, K]

    index  [M] or [B, M]
    ->     [M, K] or [B, M, K], [M] or [B, M] or None
    """
    return x, index


def unspoken(x: Tensor) -> Tensor:
    """Says nothing about float32 [dim/2]."""
    return x


def shape(*sizes: int) -> Tensor:
    return torch.zeros(*sizes)


def test_lines_are_read_as_written():
    lines = declared(Draft.forward)

    assert [(a.name, str(a)) for a in lines.arguments] == [
        ("tokens", "[B, T]"),
        ("positions", "[B, T]"),
        ("hidden", "[B, T, H]"),
    ]
    assert [(r.name, str(r)) for r in lines.results] == [("logits", "[B, T, Vd]"), ("feedback", "[B, T, H]")]
    assert [str(line) for line in declared(pick).results] == ["[M, K] or [B, M, K]", "[M] or [B, M]"]
    assert [line.optional for line in declared(pick).results] == [False, True]
    assert declared(unspoken) is None
    assert hold(unspoken) is unspoken


@given(st.lists(st.integers(1, 5), min_size=4, max_size=4))
def test_right_shapes_pass(sizes):
    b, t, a, h = sizes
    draft = Draft(h)

    assert hold(draft.fuse)(shape(b, t, a, h)).shape == (b, t, a * h)
    assert hold(draft.forward)(shape(b, t), hidden=shape(b, t, h), positions=shape(b, t)).logits.shape == (b, t, 9)
    assert hold(Draft.double)(shape(b, t, h)).shape == (b, t, 2 * h)
    assert hold(Draft.double)(shape(h)).shape == (2 * h,)
    assert hold(unroll)(shape(b, t), num_steps=a).shape == (a, b, t)
    hold(pick)(shape(t, h), None)
    hold(pick)(shape(b, t, h), shape(b, t))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: hold(Draft().fuse)(shape(2, 5, 48)), r"aux: declared \[B, T, A, H\], got \(2, 5, 48\)"),
        (
            lambda: hold(Draft().forward)(shape(2, 5), shape(2, 6, 4)),
            r"hidden: declared \[B, T, H\], got \(2, 6, 4\) with B=2, T=5",
        ),
        (
            lambda: hold(Draft(3).forward)(shape(2, 5), shape(2, 5, 4)),
            r"feedback: declared \[B, T, H\], got \(2, 5, 3\) with B=2, H=4, T=5",
        ),
        (lambda: hold(unroll)(shape(2, 5), 3, wrong=1), r"result: declared \[num_steps, B, T\], got \(4, 2, 5\)"),
        (lambda: hold(pick)(shape(2), None), r"x: declared \[M, K\] or \[B, M, K\], got \(2,\)"),
    ],
)
def test_a_wrong_shape_names_itself(call, message):
    with pytest.raises(ShapeError, match=message):
        call()


def test_letters_do_not_outlive_a_call():
    double = hold(Draft.double)
    assert double(shape(2, 3)).shape == (2, 6)
    assert double(shape(4, 5)).shape == (4, 10)


@given(st.integers(1, 9), st.integers(1, 9))
def test_arithmetic_of_letters(n, g):
    bound = {"N": n, "G": g, "D": 8}
    assert evaluate("(N+2G)*D", bound) == (n + 2 * g) * 8
    assert evaluate("D/2", bound) == 4
    assert evaluate("K+1", bound) is None

    def split(qkv: Tensor, bias: Tensor) -> None:
        """Solves D, then checks.

        qkv   [M, 3D]
        bias  [D+1]
        """

    hold(split)(shape(n, 3 * g), shape(g + 1))
    with pytest.raises(ShapeError, match="bias: declared"):
        hold(split)(shape(n, 3 * g), shape(g))
    with pytest.raises(ShapeError, match="qkv: declared"):
        hold(split)(shape(n, 3 * g + 1), shape(g + 1))


def test_a_line_that_cannot_be_read_is_told():
    def odd(x: Tensor) -> None:
        """x [B, H!!] -> [B]"""

    with pytest.raises(ShapeLineError, match="H!!"):
        hold(odd)(shape(2, 3))


def test_a_missing_result_is_told():
    def forgets(x: Tensor) -> None:
        """x [B] -> [B]"""

    with pytest.raises(ShapeError, match=r"result: declared \[B\], got None"):
        hold(forgets)(shape(2))


def test_watching_holds_a_whole_module_and_leaves_it_as_it_was():
    page, user = ModuleType("page"), ModuleType("user")

    def same(x: Tensor) -> Tensor:
        """x [B, H] -> [H, B]"""
        return x

    same.__module__ = "page"
    page.same = user.borrowed = same
    here = sys.modules[__name__]
    forward = Draft.forward

    with watch(page, user, here) as watched:
        with pytest.raises(ShapeError, match=r"same: result: declared \[H, B\], got \(2, 3\)"):
            user.borrowed(shape(2, 3))
        with pytest.raises(ShapeError, match="aux: declared"):
            Draft().fuse(shape(2, 5, 48))
        Draft()(shape(2, 5), shape(2, 5, 4))
        Draft.double(shape(2))
        Draft().double(shape(2))

    assert page.same is user.borrowed is same
    assert Draft.forward is forward
    names = {name.rsplit(".", 1)[-1]: calls for name, calls in watched.calls.items()}
    assert (names["forward"], names["double"], names["fuse"], names["unroll"]) == (1, 2, 0, 0)
