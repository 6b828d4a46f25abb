"""Kernels under the Triton interpreter, with products whose bits do not depend on a row's place.

A tensor core computes every element of a tile alike. The interpreter multiplies by NumPy, so by a BLAS whose last rows
of a tile may be summed in another order; the chain rule of a kernel cannot be judged through it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import triton
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def create_dot(
    builder: Any, a: Any, b: Any, d: Any, input_precision: object, max_num_imprecise_acc: object
) -> TensorHandle:
    """d + a b, one column of a after another: elementwise operations only, the same for every element."""
    total = d.data.copy()
    for k in range(a.data.shape[-1]):
        total += a.data[..., :, k : k + 1].astype(total.dtype) * b.data[..., k : k + 1, :].astype(total.dtype)
    return TensorHandle(total, d.dtype.scalar)


@contextmanager
def products_alike() -> Iterator[None]:
    """For the time of a `with`: interpreted products as a tensor core's; compiled kernels are left as they are."""
    if not triton.knobs.runtime.interpret:
        yield
        return
    with patch.object(InterpreterBuilder, "create_dot", create_dot):
        yield
