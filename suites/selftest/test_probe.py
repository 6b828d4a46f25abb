"""Claim: the probe tells machines whose products depend on a row's slot from those whose do not, and exactness follows.

On some machines the last slots of a 16-row tile take another path through the product and end in other bits. There
every row must be multiplied alone.
"""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from harness.compare import bit_equal
from optimized.ops import aten

pytestmark = pytest.mark.correctness

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def _fresh_probe() -> Iterator[None]:
    aten.probe.cache_clear()
    yield
    aten.probe.cache_clear()


def slot_dependent(x: Tensor, weight: Tensor, bias: Tensor | None = None, product: object = F.linear) -> Tensor:
    """A product whose slots 6 and 7 add up from the other end.

    x       [M, K]
    weight  [N, K]
    ->      [M, N]
    """
    out = product(x, weight, bias)
    odd = product(x.flip(1), weight.flip(1), bias) * (1 + torch.finfo(x.dtype).eps)
    late = (torch.arange(x.shape[0]) % 8 >= 6)[:, None]
    return torch.where(late, odd, out)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_machine_with_odd_slots_is_found_out(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aten.F, "linear", lambda x, w, b=None, product=F.linear: slot_dependent(x, w, b, product))

    assert not aten.probe(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_are_exact_even_where_slots_are_odd(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aten.F, "linear", lambda x, w, b=None, product=F.linear: slot_dependent(x, w, b, product))
    noise = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(20, 72, generator=noise).to(dtype) for _ in range(2))

    together = aten.Aten(exact=True).linear(x, weight)
    alone = torch.cat([aten.Aten(exact=True).linear(row[None], weight) for row in x])

    bit_equal("rows", together, alone)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_probe_gives_one_answer_and_the_threads_back(dtype: torch.dtype) -> None:
    threads = torch.get_num_threads()

    answers = {aten.probe.__wrapped__(dtype) for _ in range(2)}

    assert len(answers) == 1
    assert torch.get_num_threads() == threads
