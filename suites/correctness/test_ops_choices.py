"""Claim: whoever multiplies by a weight, and from whatever bits it was kept in, a product is the product.

cuBLAS with padded rows, float8 weights with the scales of their blocks, and rows of a head picked by their ids: each
equals its float64 statement in both forms, and the bits of a row depend on the row alone. The table of choices is keyed
by the weight and the engine's bucket, so a step launches the same kernels however many rows it has.

Born of scales read transposed or one block off, of padding that reached a result, and of tables keyed by the number of
rows, which give decode and verify other bits.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from harness.compare import bit_equal
from harness.scales import BlockScales
from harness.strategies import seeds
from optimized.ops.aten import Aten
from optimized.ops.launch import Triton
from optimized.ops.tiles import BUCKETS, Choice, ChoiceError, Tile, frozen, read_choices, tile, write_choices
from suites.correctness.test_ops import EXACT_CASES, GPU, Case, generator, named
from suites.interpreted import products_alike
from suites.launches import Watch

pytestmark = pytest.mark.correctness

PLAIN = [Case(Aten(), dtype, "cpu") for dtype in (torch.float64, torch.bfloat16)]
FEW = [case for case in EXACT_CASES if case.dtype == torch.float32 or (GPU and case.device == "cuda")]
every_form = pytest.mark.parametrize("case", [*PLAIN, *FEW], ids=named)
every_exact_form = pytest.mark.parametrize("case", FEW, ids=named)
DEVICE = "cuda" if GPU else "cpu"
rows = st.integers(1, 3)


@pytest.fixture(autouse=True, scope="module")
def _products_alike() -> Iterator[None]:
    with products_alike():
        yield


# (N, K, rows and columns of a block): whole blocks, cut ones, one scale for all
BLOCKS = ((40, 192, (16, 64)), (33, 130, (16, 64)), (24, 96, (24, 96)))


@every_form
@given(seed=seeds(), num_rows=rows, shape=st.sampled_from(BLOCKS), biased=st.booleans())
@example(seed=0, num_rows=2, shape=BLOCKS[0], biased=True)
@example(seed=0, num_rows=3, shape=BLOCKS[1], biased=False)
@example(seed=0, num_rows=1, shape=BLOCKS[2], biased=False)
def test_a_float8_weight_is_its_numbers_times_its_scales(
    case: Case, seed: int, num_rows: int, shape: tuple[int, int, tuple[int, int]], biased: bool
) -> None:
    noise, (num_out, num_in, block), scaled = generator(seed), shape, BlockScales(*shape[2])
    x, bias = case.normal(noise, num_rows, num_in), case.normal(noise, num_out) if biased else None
    q = torch.randn(num_out, num_in, generator=noise).to(torch.float8_e4m3fn)
    # far apart, so that a neighbour's scale shows
    scales = 2.0 ** torch.randint(-4, 5, scaled.grid((num_out, num_in)), generator=noise).float()

    got = case.ops.linear_scaled(x, q.to(case.device), scales.to(case.device), block, bias)

    # the reader of checkpoints is the second witness of what scales mean
    whole = scaled.expand(q, scales).double().to(case.device)
    want = x.double() @ whole.T + (0 if bias is None else bias.double())
    case.hold("product", got / whole.abs().max(), want / whole.abs().max(), num_in)


def test_steps_that_would_cross_a_block_are_refused() -> None:
    x, q = torch.zeros(1, 96), torch.zeros(16, 96).to(torch.float8_e4m3fn)

    with pytest.raises(ValueError, match="blocks of 48 columns"):
        Triton(16).linear_scaled(x, q, torch.ones(1, 2), (16, 48))


@every_exact_form
@given(seed=seeds(), num_rows=st.integers(2, 3))
@example(seed=0, num_rows=3)
def test_a_row_has_the_same_bits_alone(case: Case, seed: int, num_rows: int) -> None:
    noise, q = generator(seed), torch.randn(20, 96, generator=generator(seed)).to(torch.float8_e4m3fn).to(case.device)
    x, table = case.normal(noise, num_rows, 96), case.normal(noise, 30, 96)
    ids, scales = torch.randint(0, 30, (num_rows, 5), generator=noise).to(case.device), torch.ones(1, 1).to(case.device)

    def computed(rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
        scaled = case.ops.linear_scaled(x[rows].clone(), q, scales, (20, 96))
        return scaled, case.ops.score_rows(x[rows].clone(), table, ids[rows].clone())

    for name, alone, among in zip(("scaled", "scores"), computed(slice(-1, None)), computed(slice(None)), strict=True):
        bit_equal(name, alone, among[-1:])


@every_form
@given(seed=seeds(), num_rows=rows, width=st.integers(1, 96), num_ids=st.integers(8, 20))
@example(seed=0, num_rows=2, width=70, num_ids=19)
@example(seed=1, num_rows=3, width=64, num_ids=16)
def test_rows_of_a_head_are_scored_by_their_ids(case: Case, seed: int, num_rows: int, width: int, num_ids: int) -> None:
    noise = generator(seed)
    x, table = case.normal(noise, num_rows, width), case.normal(noise, 23, width)
    ids = torch.randint(0, 23, (num_rows, num_ids), generator=noise).to(case.device)

    got = case.ops.score_rows(x, table, ids)
    # a second rank, which has the rows from 9 to 17
    part = case.ops.score_rows(x, table[9:17].clone(), ids, 9)

    want = torch.einsum("mh,mzh->mz", x.double(), table.double()[ids])
    case.hold("scores", got, want, width)
    bit_equal("shard", part, got.masked_fill((ids < 9) | (ids >= 17), 0))


@given(seed=seeds(), num_rows=st.integers(1, 20), biased=st.booleans())
@example(seed=0, num_rows=3, biased=True)
@example(seed=0, num_rows=17, biased=False)
def test_the_library_reads_as_many_rows_as_the_bucket_has(seed: int, num_rows: int, biased: bool) -> None:
    how = {(4, 24, 40, 16): Choice(tile(24, 40, 16, 4), library=True)}
    case, noise = Case(Triton(16, choices=how), torch.float32, DEVICE), generator(seed)
    x, weight = case.normal(noise, num_rows, 40), case.normal(noise, 24, 40)
    bias = case.normal(noise, 24) if biased else None

    with Rows() as asked:
        got = case.ops.linear(x, weight, bias)

    assert set(asked.rows) == {16}
    case.hold("product", got, x.double() @ weight.double().T + (0 if bias is None else bias.double()), 40)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(4096, 4096), (6144, 4096), (4096, 14_336), (2560, 10_240)], ids=str)
@pytest.mark.parametrize("bucket", BUCKETS)
def test_on_a_gpu_the_library_gives_a_row_its_own_bits(shape: tuple[int, int], bucket: int) -> None:
    ops = Triton(bucket, choices={(2, *shape, bucket): Choice(tile(*shape, bucket, 2), library=True)})
    case, noise = Case(ops, torch.bfloat16, "cuda"), generator(0)
    x, weight = case.normal(noise, bucket, shape[1]), case.normal(noise, *shape)

    together = ops.linear(x, weight)

    for row in range(bucket):
        bit_equal("row", ops.linear(x[row : row + 1].clone(), weight)[0], together[row])


class Rows(TorchDispatchMode):
    """How many rows products of the library were given."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        place = {"mm": 0, "addmm": 1}.get(func.overloadpacket.__name__)
        self.rows += [] if place is None else [args[place].shape[0]]
        return func(*args, **(kwargs or {}))


def of_a_step(ops: Triton, num_rows: int) -> list[tuple[str, tuple[Any, ...], int]]:
    """Kernels of products and attention, their constants and warps, for a step of so many rows."""
    x = nowhere(num_rows, 4096)
    with Watch() as watch:
        for shape in ((6144, 4096), (4096, 4096)):
            ops.linear(x, nowhere(*shape))
        ops.linear(nowhere(num_rows, 14_336), nowhere(4096, 14_336))
        ops.gate_up_act(x, nowhere(28_672, 4096))
        ops.head_argmax(x, nowhere(128_256, 4096), 128_256)
        ops.linear_scaled(x, nowhere(4096, 4096, dtype=torch.float8_e4m3fn), nowhere(32, 32), (128, 128))
        cache, places = nowhere(1, 2048, 8, 128), nowhere(1, num_rows, dtype=torch.int64)
        ops.attend(nowhere(1, num_rows, 32, 128), cache, cache, places, 0.1)
        latent = ops.absorb(nowhere(num_rows, 16, 192), nowhere(16, 128, 512), places[0], nowhere(32), 1.0, 2048)
        asked = (part.unflatten(0, (1, num_rows)) for part in latent)
        ops.attend_latent(*asked, nowhere(1, 2048, 576), places, 0.1, nowhere(16, 512, 128))
    # who is one is a constant to the launcher, whatever the kernel says
    return [
        (launch.kernel, tuple((n, v) for n, v in launch.constants if n.isupper()), launch.num_warps)
        for launch in watch.launches
        if launch.module
    ]


def nowhere(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Numbers without memory."""
    return torch.empty(shape, dtype=dtype, device="meta")


@given(num_rows=st.integers(2, 64))
@example(num_rows=4)
@example(num_rows=16)
def test_a_step_of_any_number_of_rows_launches_the_same_kernels(num_rows: int) -> None:
    ops = Triton(num_rows)

    assert of_a_step(ops, num_rows) == of_a_step(ops, 1)


def test_a_table_says_what_was_measured_and_by_whom(tmp_path: Path) -> None:
    measured = {"device": "NVIDIA H200", "us": 12.5, "torch": "2.11", "triton": "3.6.0", "beside": 40}
    table = {**frozen(), (1, 512, 256, 64): Choice(Tile(64, 32, 64), early=True, measured=measured)}

    write_choices(tmp_path / "choices.json", table)

    assert read_choices(tmp_path / "choices.json") == table
    for choice in frozen().values():
        assert choice.measured is None or measured.keys() <= choice.measured.keys()


FAULTS = {
    "schema is 'x/2'": lambda table: table | {"schema": "x/2"},
    "row 0 is no choice": lambda table: table | {"choices": [{"out": 1}]},
    "row 3 is there twice": lambda table: table | {"choices": [*table["choices"], table["choices"][0]]},
    "its tile is not one of 64 rows": lambda table: table | {"choices": [table["choices"][0] | {"rows": 64}]},
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_table_that_is_none_is_refused(fault: str, tmp_path: Path) -> None:
    three = dict(list(frozen().items())[:3])
    write_choices(tmp_path / "choices.json", three)
    table = json.loads((tmp_path / "choices.json").read_text())
    (tmp_path / "choices.json").write_text(json.dumps(FAULTS[fault](table)))

    with pytest.raises(ChoiceError, match=rf"choices.json.*{fault}"):
        read_choices(tmp_path / "choices.json")
