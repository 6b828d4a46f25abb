"""Claim: both forms of every operation equal its float64 statement within the budget, and their rows are independent.

The statements below are a second witness: written from the equations, in float64, one query or one row at a time
where that is the plainer way. Ties, moves and counts are exact. The chain rule (the bits of a row depend on the row
alone) is what makes greedy speculation equal greedy decoding; it is held for both forms that promise it.

Born of a slot mapping expanded over the batch and read with stride 1, and of argmax kernels whose ties were decided by
the order of their blocks.
"""

from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from harness.compare import bit_equal, hold
from harness.strategies import seeds
from optimized.ops.aten import Aten
from optimized.ops.launch import Triton
from optimized.ops.slots import SlotError
from optimized.ops.table import Ops, choose
from optimized.ops.tiles import KeyTile, Tile
from suites.interpreted import products_alike

pytestmark = pytest.mark.correctness

GPU = torch.cuda.is_available()


class Case(NamedTuple):
    """One form in one dtype, and how to draw its tensors."""

    ops: Ops
    dtype: torch.dtype
    device: str

    def normal(self, noise: torch.Generator, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=noise).to(self.device, self.dtype)

    def whole(self, noise: torch.Generator, *shape: int, largest: int = 2) -> Tensor:
        """Whole numbers: exact in every dtype, and full of ties."""
        return torch.randint(-largest, largest + 1, shape, generator=noise).to(self.device, self.dtype)

    def hold(self, name: str, got: Tensor, want: Tensor, width: int) -> None:
        hold(name, got, want, dtype=self.dtype, depth=1, width=width)


# small blocks, so that small tensors have several of them
SMALL = {"tile": Tile(16, 16, 32, 4, 2), "key_tile": KeyTile(16, 16, 32, 4, 2)}
TRITON = Triton(16, **SMALL)
# the interpreter's bfloat16 is wrong; the compiler's is judged where there is a GPU
TRITON_DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if GPU else [])]
ATEN_DTYPES = [torch.float64, torch.float32, torch.bfloat16]
TRITON_CASES = [Case(TRITON, dtype, "cuda" if GPU else "cpu") for dtype in TRITON_DTYPES]
EXACT_CASES = [Case(Aten(exact=True), dtype, "cpu") for dtype in ATEN_DTYPES] + TRITON_CASES
CASES = [Case(Aten(), dtype, "cpu") for dtype in ATEN_DTYPES] + EXACT_CASES


def named(case: Case) -> str:
    exact = "exact " if getattr(case.ops, "exact", False) else ""
    return f"{exact}{type(case.ops).__name__.lower()} {str(case.dtype).removeprefix('torch.')}"


every_form = pytest.mark.parametrize("case", CASES, ids=named)
every_exact_form = pytest.mark.parametrize("case", EXACT_CASES, ids=named)
rows = st.integers(1, 20)
widths = st.integers(1, 96)


@pytest.fixture(autouse=True, scope="module")
def _products_alike() -> Iterator[None]:
    with products_alike():
        yield


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rmsnorm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., H] -> [..., H]"""
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double()


def same_tensors(name: str, got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> None:
    for index, (a, b) in enumerate(zip(got, want, strict=True)):
        bit_equal(f"{name} {index}", a, b)


@every_form
@given(seed=seeds(), num_rows=rows, width=widths, branch=st.booleans())
@example(seed=0, num_rows=3, width=72, branch=True)
def test_the_norm_is_of_the_sum(case: Case, seed: int, num_rows: int, width: int, branch: bool) -> None:
    noise = generator(seed)
    x, weight = case.normal(noise, num_rows, width), case.normal(noise, width)
    residual = case.normal(noise, num_rows, width) if branch else None

    normed, total = case.ops.add_rmsnorm(x, residual, weight, 1e-5)

    want = x.double() if residual is None else x.double() + residual.double()
    case.hold("residual", total, want, 1)
    case.hold("normed", normed, rmsnorm(total.double(), weight, 1e-5), width)


@every_form
@given(seed=seeds(), num_rows=rows, num_out=st.integers(1, 40), num_in=widths, biased=st.booleans())
@example(seed=0, num_rows=17, num_out=33, num_in=64, biased=True)
def test_a_product_is_a_product(case: Case, seed: int, num_rows: int, num_out: int, num_in: int, biased: bool) -> None:
    noise = generator(seed)
    x, weight = case.normal(noise, num_rows, num_in), case.normal(noise, num_out, num_in)
    bias = case.normal(noise, num_out) if biased else None

    got = case.ops.linear(x, case.ops.pack(weight), bias)

    want = torch.einsum("mk,nk->mn", x.double(), weight.double())
    case.hold("product", got, want if bias is None else want + bias.double(), num_in)


@pytest.mark.parametrize("dtype", ATEN_DTYPES, ids=str)
@given(seed=seeds(), num_rows=st.integers(1, 8))
@example(seed=0, num_rows=4)
def test_a_packed_weight_is_the_same_weight(dtype: torch.dtype, seed: int, num_rows: int) -> None:
    case, noise = Case(Aten(), dtype, "cpu"), generator(seed)
    x, weight, bias = (case.normal(noise, *shape) for shape in ((num_rows, 256), (1024, 256), (1024,)))

    got = case.ops.linear(x, case.ops.pack(weight), bias)

    case.hold("product", got, x.double() @ weight.double().T + bias.double(), 256)


@every_form
@given(seed=seeds(), num_rows=rows, width=st.integers(1, 40), num_in=widths, biased=st.booleans())
@example(seed=0, num_rows=17, width=33, num_in=64, biased=True)
def test_the_gate_lets_the_branch_through(
    case: Case, seed: int, num_rows: int, width: int, num_in: int, biased: bool
) -> None:
    noise = generator(seed)
    x, weight = case.normal(noise, num_rows, num_in), case.normal(noise, 2 * width, num_in) / num_in**0.5
    bias = case.normal(noise, 2 * width) if biased else None

    got = case.ops.gate_up_act(x, case.ops.pack(weight), bias)

    product = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    gate, up = product[:, :width], product[:, width:]
    case.hold("activation", got, gate / (1 + (-gate).exp()) * up, num_in)


class Rotation(NamedTuple):
    """The arguments of `qk_rope_kv_write`, every row at a slot of its own."""

    qkv: Tensor
    positions: Tensor
    slots: Tensor
    inv_freq: Tensor
    scale: float
    k_cache: Tensor
    v_cache: Tensor
    q_norm: Tensor | None
    k_norm: Tensor | None
    eps: float = 1e-6

    def rows(self, index: slice) -> "Rotation":
        moved = self._replace(qkv=self.qkv[index], positions=self.positions[index], slots=self.slots[index])
        return moved._replace(k_cache=self.k_cache.clone(), v_cache=self.v_cache.clone())


def rotation(case: Case, seed: int, num_rows: int, group: int, turning: int, normed: bool) -> Rotation:
    noise = generator(seed)
    batch, num_slots, kv_heads, width = 2, 24, 2, 16
    position = torch.randint(0, num_slots, (num_rows,), generator=noise).to(case.device)
    slot = torch.randperm(batch * num_slots, generator=noise)[:num_rows].to(case.device)
    caches = [case.normal(noise, batch, num_slots, kv_heads, width) for _ in range(2)]
    norms = [case.normal(noise, width) if normed else None for _ in range(2)]
    inv_freq = 1.0 / 10_000.0 ** (torch.arange(0, turning, 2, device=case.device).float() / turning)
    qkv = case.normal(noise, num_rows, (group + 2) * kv_heads * width)
    return Rotation(qkv, position, slot, inv_freq, 1.25, *caches, *norms)


rotations = {
    "seed": seeds(),
    "num_rows": st.integers(1, 5),
    "group": st.integers(1, 3),
    "turning": st.sampled_from([8, 16]),
    "normed": st.booleans(),
}


@every_form
@given(**rotations)
@example(seed=0, num_rows=4, group=2, turning=8, normed=True)
def test_heads_turn_and_land_in_their_slots(
    case: Case, seed: int, num_rows: int, group: int, turning: int, normed: bool
) -> None:
    given_ = rotation(case, seed, num_rows, group, turning, normed)
    before = given_.rows(slice(None))

    q = case.ops.qk_rope_kv_write(*given_)

    kv_heads, width = given_.k_cache.shape[2:]
    heads = given_.qkv.double().view(num_rows, -1, width)
    want_q, want_k, v = heads.split([group * kv_heads, kv_heads, kv_heads], 1)
    if normed:
        want_q, want_k = rmsnorm(want_q, given_.q_norm, 1e-6), rmsnorm(want_k, given_.k_norm, 1e-6)
    # angles, cosines and sines are float32 by definition, in a float64 model too
    angle = (given_.positions[:, None].float() * given_.inv_freq)[:, None]
    rotor = torch.complex((angle.cos() * 1.25).double(), (angle.sin() * 1.25).double())

    def turn(x: Tensor) -> Tensor:
        a, b, rest = x.split([turning // 2, turning // 2, width - turning], -1)
        y = torch.complex(a, b) * rotor
        return torch.cat([y.real, y.imag, rest], -1)

    case.hold("q", q, turn(want_q), width)
    case.hold("k", given_.k_cache.flatten(0, 1)[given_.slots], turn(want_k), width)
    bit_equal("v", given_.v_cache.flatten(0, 1)[given_.slots], v.to(case.dtype))
    untouched = torch.ones(given_.k_cache.shape[:2].numel(), dtype=torch.bool, device=case.device)
    untouched[given_.slots] = False
    bit_equal("other keys", given_.k_cache.flatten(0, 1)[untouched], before.k_cache.flatten(0, 1)[untouched])
    bit_equal("other values", given_.v_cache.flatten(0, 1)[untouched], before.v_cache.flatten(0, 1)[untouched])


@every_form
@pytest.mark.parametrize(
    "slots",
    [torch.arange(8)[::2], torch.tensor([3]).expand(4), torch.arange(4, dtype=torch.int32), torch.arange(3)],
    ids=["strided", "expanded", "int32", "too few"],
)
def test_slots_that_a_kernel_would_misread_are_refused(case: Case, slots: Tensor) -> None:
    given_ = rotation(case, 0, 4, 1, 16, False)

    with pytest.raises(SlotError, match="slots"):
        case.ops.qk_rope_kv_write(*given_._replace(slots=slots.to(case.device) if slots.stride() == (1,) else slots))


class Question(NamedTuple):
    """The arguments of `attend`."""

    q: Tensor
    k_cache: Tensor
    v_cache: Tensor
    positions: Tensor
    scale: float
    window: int | None

    def rows(self, batch: slice, query: slice) -> "Question":
        caches = {"k_cache": self.k_cache[batch].clone(), "v_cache": self.v_cache[batch].clone()}
        return self._replace(q=self.q[batch, query].clone(), positions=self.positions[batch, query].clone(), **caches)


def question(case: Case, seed: int, num_queries: int, group: int, window: int | None, num_slots: int = 52) -> Question:
    noise = generator(seed)
    batch, kv_heads, width = 2, 2, 16
    q = case.normal(noise, batch, num_queries, group * kv_heads, width)
    caches = [case.normal(noise, batch, num_slots, kv_heads, width) for _ in range(2)]
    first = torch.randint(-1, num_slots - num_queries, (batch, 1), generator=noise)
    position = torch.where(first < 0, -1, first + torch.arange(num_queries)).to(case.device)
    return Question(q, *caches, position, width**-0.5, window)


questions = {
    "seed": seeds(),
    "num_queries": st.integers(1, 5),
    "group": st.integers(1, 4),
    "window": st.sampled_from([None, None, 1, 7, 40]),
}


@every_form
@given(**questions, ahead=st.none() | st.integers(0, 9))
@example(seed=6, num_queries=5, group=4, window=40, ahead=None)
@example(seed=6, num_queries=5, group=2, window=7, ahead=9)
@example(seed=9, num_queries=3, group=1, window=None, ahead=4)
def test_a_query_reads_the_slots_it_may_see(
    case: Case, seed: int, num_queries: int, group: int, window: int | None, ahead: int | None
) -> None:
    asked = question(case, seed, num_queries, group, window)
    # an image's tokens all see up to its last, each of them from its own position on
    ends = asked.positions if ahead is None else (asked.positions.amax(1, keepdim=True) + ahead).clamp(max=51)
    ends = ends.expand_as(asked.positions).masked_fill(asked.positions < 0, -1).contiguous()

    got = case.ops.attend(*asked, max(int(ends.max()) + 1, 1), None if ahead is None else ends)

    want = torch.zeros_like(asked.q, dtype=torch.float64)
    for b, t in torch.cartesian_prod(torch.arange(2), torch.arange(num_queries)).tolist():
        own, last = int(asked.positions[b, t]), int(ends[b, t])
        seen = slice(0 if window is None else max(0, own - window + 1), last + 1)
        k, v = (cache[b, seen].double().repeat_interleave(group, 1) for cache in (asked.k_cache, asked.v_cache))
        weight = (torch.einsum("nd,snd->ns", asked.q[b, t].double(), k) * asked.scale).softmax(-1)
        want[b, t] = torch.einsum("ns,snd->nd", weight, v)
    case.hold("attention", got, want.flatten(2), asked.q.shape[-1])


@every_form
@given(
    seed=seeds(),
    num_rows=rows,
    num_out=st.integers(1, 40),
    padding=st.integers(0, 9),
    num_in=widths,
    scale=st.sampled_from([1.0, -1.0, 0.3]),
)
@example(seed=0, num_rows=2, num_out=40, padding=5, num_in=1, scale=1.0)
@example(seed=0, num_rows=17, num_out=40, padding=0, num_in=96, scale=0.3)
def test_the_head_takes_the_first_of_its_best(
    case: Case, seed: int, num_rows: int, num_out: int, padding: int, num_in: int, scale: float
) -> None:
    noise = generator(seed)
    # the largest sums are beyond the whole numbers of half precision and below its infinity
    x, weight = case.whole(noise, num_rows, num_in, largest=60), case.whole(noise, num_out + padding, num_in, largest=9)

    value, index = case.ops.head_argmax(x, case.ops.pack(weight), num_out, scale)

    # sums of whole numbers are exact, so the logits' rounding is the only one
    logits = ((x.double() @ weight[:num_out].double().T).to(case.dtype) * scale).double()
    # values, not bits: a sum of zeros may be -0
    assert torch.equal(value.double(), logits.max(-1).values)
    bit_equal("index", index, (logits == logits.max(-1, keepdim=True).values).long().argmax(-1))


@every_form
@given(seed=seeds(), num_rows=st.integers(1, 3), vocab=st.integers(1, 9000))
@example(seed=0, num_rows=2, vocab=9000)
def test_argmax_takes_the_first_of_its_best(case: Case, seed: int, num_rows: int, vocab: int) -> None:
    logits = case.whole(generator(seed), num_rows, vocab)

    got = case.ops.argmax(logits)

    assert got.tolist() == [row.index(max(row)) for row in logits.tolist()]


@every_form
@given(seed=seeds(), num_rows=st.integers(1, 5), table_rows=st.integers(1, 40), first=st.integers(0, 50))
@example(seed=0, num_rows=5, table_rows=40, first=20)
def test_a_shard_of_a_table_gives_its_own_rows_and_zeros(
    case: Case, seed: int, num_rows: int, table_rows: int, first: int
) -> None:
    noise = generator(seed)
    table = case.normal(noise, table_rows, 24)
    ids = torch.randint(-1, 91, (num_rows,), generator=noise).to(case.device)
    zero = table.new_zeros(24)

    got = case.ops.embed(ids, table, first)
    inside = case.ops.embed(ids.clamp(0, table_rows - 1), table)

    own = [table[i - first] if first <= i < first + table_rows else zero for i in ids.tolist()]
    bit_equal("shard", got, torch.stack(own))
    bit_equal("whole", inside, table[ids.clamp(0, table_rows - 1)])


@every_form
@given(seed=seeds(), batch=st.integers(1, 4), num_drafted=st.integers(0, 6))
@example(seed=0, batch=4, num_drafted=3)
def test_drafts_are_accepted_up_to_the_first_miss(case: Case, seed: int, batch: int, num_drafted: int) -> None:
    noise = generator(seed)
    drafted = torch.randint(0, 2, (batch, num_drafted), generator=noise).to(case.device)
    chosen = torch.randint(0, 2, (batch, num_drafted + 1), generator=noise).to(case.device)

    got = case.ops.accept_greedy(drafted, chosen)

    pairs = [
        [a == b for a, b in zip(x, y, strict=False)] for x, y in zip(drafted.tolist(), chosen.tolist(), strict=True)
    ]
    assert got.tolist() == [(*row, False).index(False) for row in pairs]


@every_form
@given(seed=seeds(), batch=st.integers(1, 4), num_rows=st.integers(1, 5))
@example(seed=0, batch=3, num_rows=4)
def test_each_sequence_gives_the_row_it_is_asked_for(case: Case, seed: int, batch: int, num_rows: int) -> None:
    noise = generator(seed)
    x = case.normal(noise, batch, num_rows, 12)
    index = torch.randint(0, num_rows, (batch,), generator=noise).to(case.device)

    got = case.ops.gather_rows(x, index)

    bit_equal("rows", got, torch.stack([x[b, i] for b, i in enumerate(index.tolist())]))


def splitmix(seed: int, sequence: int, position: int, stream: int) -> float:
    """The hash in Python's unbounded integers."""
    mask = (1 << 64) - 1
    words = (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB, 0xD6E8FEB86659FD93)
    z = sum(word * value for word, value in zip(words, (seed, sequence, position, stream), strict=True)) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    z ^= z >> 31
    return (z >> 11) / 2**53


@every_form
@given(seed=st.integers(-(2**63), 2**63 - 1), sequence=st.integers(0, 99), stream=st.integers(0, 2))
@example(seed=-1, sequence=7, stream=2)
def test_chance_depends_on_who_asks_alone(case: Case, seed: int, sequence: int, stream: int) -> None:
    sequences = torch.tensor([sequence, sequence + 1], device=case.device)
    positions = torch.tensor([[0, 1, 2], [5, 6, 7]], device=case.device)
    seeded = torch.tensor([seed], device=case.device)

    got = case.ops.uniform(seeded, sequences, positions, stream)
    column = case.ops.uniform(seeded, sequences, positions[:, 1], stream)

    want = [[splitmix(seed, sequence + b, p, stream) for p in row] for b, row in enumerate(positions.tolist())]
    assert got.tolist() == want
    bit_equal("column", column, got[:, 1])


@every_exact_form
@given(seed=seeds(), num_rows=st.integers(2, 20), width=st.integers(1, 40), num_in=widths, row=st.integers(0, 19))
@example(seed=0, num_rows=20, width=33, num_in=72, row=18)
@example(seed=0, num_rows=2, width=1, num_in=17, row=1)
def test_a_row_has_the_same_bits_alone(case: Case, seed: int, num_rows: int, width: int, num_in: int, row: int) -> None:
    noise, ops = generator(seed), case.ops
    x, residual, norm = (case.normal(noise, *shape) for shape in ((num_rows, num_in), (num_rows, num_in), (num_in,)))
    weight = case.normal(noise, 2 * width, num_in) / num_in**0.5
    one = slice(row % num_rows, row % num_rows + 1)

    normed, total = ops.add_rmsnorm(x, residual, norm, 1e-5)
    together = (normed, total, ops.linear(x, weight), ops.gate_up_act(x, weight), *ops.head_argmax(x, weight, width))
    normed, total = ops.add_rmsnorm(x[one], residual[one], norm, 1e-5)
    alone = (normed, total, ops.linear(x[one], weight), ops.gate_up_act(x[one], weight))

    same_tensors("row", (*alone, *ops.head_argmax(x[one], weight, width)), tuple(part[one] for part in together))


@every_exact_form
@given(**rotations)
@example(seed=0, num_rows=5, group=3, turning=16, normed=True)
def test_a_turned_head_has_the_same_bits_alone(
    case: Case, seed: int, num_rows: int, group: int, turning: int, normed: bool
) -> None:
    given_ = rotation(case, seed, num_rows, group, turning, normed)
    last = given_.rows(slice(-1, None))

    together = case.ops.qk_rope_kv_write(*given_)
    alone = case.ops.qk_rope_kv_write(*last)

    slot = given_.slots[-1:]
    bit_equal("q", alone, together[-1:])
    bit_equal("k", last.k_cache.flatten(0, 1)[slot], given_.k_cache.flatten(0, 1)[slot])


@every_exact_form
@given(**questions)
@example(seed=1, num_queries=5, group=4, window=None)
@example(seed=4, num_queries=5, group=2, window=40)
def test_verify_is_decode(case: Case, seed: int, num_queries: int, group: int, window: int | None) -> None:
    asked = question(case, seed, num_queries, group, window)

    verified = case.ops.attend(*asked)
    decoded = case.ops.attend(
        *asked.rows(slice(1, 2), slice(-1, None)), num_slots=max(1, int(asked.positions.max()) + 1)
    )

    bit_equal("last query of the last sequence", decoded, verified[1:, -1:])


class NoReads(TorchDispatchMode):
    """Refuses what makes a host wait for its device."""

    def __torch_dispatch__(self, func: object, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
        name = str(func)
        assert not any(word in name for word in ("_local_scalar_dense", "nonzero", "masked_select", "unique")), name
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("case", [case for case in CASES if isinstance(case.ops, Aten)], ids=named)
def test_no_operation_reads_a_number_back(case: Case) -> None:
    noise, ops = generator(0), case.ops
    x, weight = case.normal(noise, 5, 24), case.normal(noise, 8, 24)
    turned, asked = rotation(case, 0, 4, 2, 8, True), question(case, 0, 3, 2, 7)
    ids, drafted, chosen = (
        torch.tensor([1, 3]),
        torch.zeros(2, 3, dtype=torch.int64),
        torch.zeros(2, 4, dtype=torch.int64),
    )

    with NoReads():
        ops.add_rmsnorm(x, x, x[0], 1e-5)
        ops.gate_up_act(x, weight)
        ops.head_argmax(x, weight, 7)
        ops.qk_rope_kv_write(*turned)
        ops.attend(*asked)
        ops.embed(ids, weight, 2)
        ops.accept_greedy(drafted, chosen)
        ops.gather_rows(asked.q.flatten(2), ids.clamp(max=2))
        ops.uniform(ids[:1], ids, drafted, 1)


def test_a_device_is_served_by_its_form() -> None:
    assert isinstance(choose("cpu"), Aten)
    assert isinstance(choose("cuda"), Triton)
    assert isinstance(choose("cpu", form="triton"), Triton)
    with pytest.raises(ValueError, match="cudnn"):
        choose("cpu", form="cudnn")
