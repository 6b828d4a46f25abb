"""Claim: what Gemma, DeepSeek and Qwen3-MoE targets ask of the operations equals its float64 statement in both forms.

As in `test_ops.py`: the statements are a second witness, written from the equations, and the bits of a row depend on
the row alone wherever a form promises it. Where a norm rounds is held bit for bit, since no budget could see it.

Born of (1 + w) read as w, norms that rounded before the weight instead of after it, an embedding scale that was never
rounded, and rope features paired as halves where the checkpoint pairs neighbours.
"""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from harness.compare import bit_equal
from harness.strategies import seeds
from optimized.ops.aten import Aten
from optimized.ops.kinds import GEMMA3, GEMMA4, LLAMA, NormKind
from suites.correctness.test_ops import GPU, TRITON_CASES, Case, NoReads, generator, named, same_tensors
from suites.interpreted import products_alike

pytestmark = pytest.mark.correctness

HALF = (torch.float16, torch.bfloat16)
ATEN_CASES = [Case(Aten(), dtype, "cpu") for dtype in (torch.float64, torch.bfloat16)]
ATEN_CASES += [Case(Aten(exact=True), torch.float32, "cpu")]
# interpreted programs are slow: half precision is asked of them only where it shows more than float32 does
FEW = [case for case in TRITON_CASES if GPU or case.dtype == torch.float32]
EXACT = [*(Case(Aten(exact=True), dtype, "cpu") for dtype in (torch.float32, torch.bfloat16)), *FEW]
every_form = pytest.mark.parametrize("case", ATEN_CASES + FEW, ids=named)
every_half = pytest.mark.parametrize("case", [c for c in ATEN_CASES + TRITON_CASES if c.dtype in HALF], ids=named)
every_exact_form = pytest.mark.parametrize("case", EXACT, ids=named)
every_kind = pytest.mark.parametrize("kind", [LLAMA, GEMMA3, GEMMA4], ids=["llama", "gemma3", "gemma4"])
kinds = st.sampled_from([LLAMA, GEMMA3, GEMMA4])
acts = st.sampled_from(["silu", "gelu_tanh"])
rows = st.integers(1, 3)


@pytest.fixture(autouse=True, scope="module")
def _products_alike() -> Iterator[None]:
    with products_alike():
        yield


def normed(x: Tensor, weight: Tensor | None, kind: NormKind, eps: float = 1e-6) -> Tensor:
    """x [..., H], weight [H] -> [..., H]"""
    x = x.double()
    factor = 1 if weight is None else weight.double() + kind.plus_one
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * factor


def activated(x: Tensor, act: str) -> Tensor:
    """x [M, I] -> [M, I]"""
    cubic = (2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)
    return x / (1 + (-x).exp()) if act == "silu" else x * (1 + cubic.tanh()) / 2


def turned(x: Tensor, positions: Tensor, inv_freq: Tensor, interleaved: bool, scale: float = 1.0) -> Tensor:
    """x [M, N, D], positions [M], inv_freq [R/2] -> [M, N, D]"""
    half = inv_freq.shape[0]
    angle = (positions[:, None].float() * inv_freq)[:, None]
    rotor = torch.complex((angle.cos() * scale).double(), (angle.sin() * scale).double())
    moving, rest = x.double().split([2 * half, x.shape[-1] - 2 * half], -1)
    a, b = (moving[..., ::2], moving[..., 1::2]) if interleaved else moving.chunk(2, -1)
    y = torch.complex(a, b) * rotor
    both = torch.stack([y.real, y.imag], -1).flatten(-2) if interleaved else torch.cat([y.real, y.imag], -1)
    return torch.cat([both, rest], -1)


@every_form
@given(seed=seeds(), num_rows=rows, width=st.integers(8, 96), kind=kinds, weighted=st.booleans(), scaled=st.booleans())
@example(seed=0, num_rows=3, width=72, kind=GEMMA3, weighted=True, scaled=True)
@example(seed=0, num_rows=3, width=72, kind=GEMMA4, weighted=False, scaled=False)
def test_the_branch_is_normed_added_and_normed_again(
    case: Case, seed: int, num_rows: int, width: int, kind: NormKind, weighted: bool, scaled: bool
) -> None:
    noise = generator(seed)
    branch, residual = (case.normal(noise, num_rows, width) for _ in range(2))
    post, pre = (case.normal(noise, width) if weighted else None for _ in range(2))
    scale = case.normal(noise, 1) if scaled else None
    factor = scale.double() if scaled else 1

    y, total = case.ops.sandwich_norm(branch, residual, post, pre, 1e-6, kind, scale)
    plain, sum_ = case.ops.add_rmsnorm(branch, residual, pre, 1e-6, kind, scale)

    case.hold("residual", total, (normed(branch, post, kind) + residual.double()) * factor, width)
    case.hold("normed", y, normed(total, pre, kind), width)
    case.hold("plain residual", sum_, (branch.double() + residual.double()) * factor, 2)
    case.hold("plain normed", plain, normed(sum_, pre, kind), width)


@every_half
@every_kind
def test_a_norm_rounds_where_its_kind_says(case: Case, kind: NormKind) -> None:
    # the root mean square is that of 7, so that no product is half-way between two numbers of a dtype
    x = torch.tensor([1, -5, 1, 1], dtype=torch.float64).repeat(2, 24).to(case.device, case.dtype)
    weight = (torch.arange(96) / 96 + 0.3).to(case.device, case.dtype)

    got = case.ops.add_rmsnorm(x, None, weight, 0.0, kind)[0]
    first = case.ops.sandwich_norm(x, torch.zeros_like(x), weight, weight, 0.0, kind)[1]

    u, factor = x.double() / 7**0.5, weight.double() + kind.plus_one
    early, late = (u.to(case.dtype).double() * factor).to(case.dtype), (u * factor).to(case.dtype)
    assert not torch.equal(early, late)
    bit_equal("normed", got, early if kind.cast_first else late)
    bit_equal("post-normed", first, early if kind.cast_first else late)


@every_form
@given(seed=seeds(), num_rows=rows, width=st.integers(8, 40), num_in=st.integers(1, 96), act=acts)
@example(seed=0, num_rows=3, width=33, num_in=64, act="gelu_tanh")
def test_the_gate_opens_by_its_activation(
    case: Case, seed: int, num_rows: int, width: int, num_in: int, act: str
) -> None:
    noise = generator(seed)
    x, weight = case.normal(noise, num_rows, num_in), case.normal(noise, 2 * width, num_in) / num_in**0.5
    both = case.normal(noise, num_rows, 2 * width)

    got = case.ops.gate_up_act(x, case.ops.pack(weight), act=act)
    alone = case.ops.act_mul(*both.chunk(2, -1), act)

    gate, up = (x.double() @ weight.double().T).chunk(2, -1)
    case.hold("product", got, activated(gate, act) * up, num_in)
    gate, up = both.double().chunk(2, -1)
    case.hold("alone", alone, activated(gate, act) * up, 1)


@every_form
def test_an_unknown_activation_is_refused(case: Case) -> None:
    x = case.normal(generator(0), 2, 4)

    with pytest.raises(ValueError, match="relu"):
        case.ops.gate_up_act(x, x, act="relu")


@every_form
@given(seed=seeds(), width=st.integers(2, 99))
@example(seed=0, width=62)
def test_the_scale_of_an_embedding_is_rounded_first(case: Case, seed: int, width: int) -> None:
    table, ids = case.normal(generator(seed), 9, width), torch.tensor([8, 0, 3], device=case.device)

    got = case.ops.embed(ids, table, scale=width**0.5)
    shard = case.ops.embed(ids, table, 3, width**0.5)

    want = table * torch.tensor(width**0.5, dtype=case.dtype, device=case.device)
    bit_equal("whole", got, want[ids])
    bit_equal("shard", shard[1:], torch.stack([torch.zeros_like(want[0]), want[0]]))


@every_form
@given(seed=seeds(), num_rows=rows, cap=st.sampled_from([5.0, 30.0]))
@example(seed=0, num_rows=2, cap=30.0)
def test_a_capped_logit_stays_below_the_cap(case: Case, seed: int, num_rows: int, cap: float) -> None:
    logits = 40 * case.normal(generator(seed), num_rows, 70)

    got = case.ops.softcap(logits, cap)

    case.hold("capped", got, cap * (logits.double() / cap).tanh(), 3)


turns = {
    "seed": seeds(),
    "num_rows": rows,
    "kind": kinds,
    "v_normed": st.booleans(),
    "k_eq_v": st.booleans(),
    "interleaved": st.booleans(),
}


@every_form
@given(**turns)
@example(seed=0, num_rows=3, kind=GEMMA4, v_normed=True, k_eq_v=True, interleaved=False)
@example(seed=0, num_rows=2, kind=GEMMA3, v_normed=False, k_eq_v=False, interleaved=True)
def test_every_family_turns_and_writes_its_heads(
    case: Case, seed: int, num_rows: int, kind: NormKind, v_normed: bool, k_eq_v: bool, interleaved: bool
) -> None:
    noise, (heads, kv_heads, width) = generator(seed), (3, 1, 12)
    qkv = case.normal(noise, num_rows, (heads + (2 - k_eq_v) * kv_heads) * width)
    position = torch.randint(0, 9, (num_rows,), generator=noise).to(case.device)
    slot = torch.randperm(9, generator=noise)[:num_rows].to(case.device)
    q_norm, k_norm = (case.normal(noise, width) for _ in range(2))
    k_cache, v_cache = (case.normal(noise, 1, 9, kv_heads, width) for _ in range(2))
    # proportional partial rope: the last pairs have a frequency, and it is zero
    inv_freq = torch.tensor([1.0, 0.3, 0.1, 0.03, 0.0, 0.0], device=case.device)
    wide = qkv.view(num_rows, -1, width)

    args = (position, slot, inv_freq, 1.25, k_cache, v_cache, q_norm, k_norm, 1e-6)
    q = case.ops.qk_rope_kv_write(qkv, *args, kind, v_normed, k_eq_v, interleaved)
    alone = case.ops.q_rope(wide[:, :heads], position, inv_freq, 1.25, 9, q_norm, 1e-6, kind, interleaved)
    plain = case.ops.q_rope(wide[:, :heads, 2:], position, inv_freq[:2], 1.0, 9, None, 0.0, interleaved=interleaved)

    want = turned(normed(wide[:, :heads], q_norm, kind), position, inv_freq, interleaved, 1.25)
    case.hold("q", q, want, width)
    case.hold("q alone", alone, want, width)
    case.hold("q plain", plain, turned(wide[:, :heads, 2:], position, inv_freq[:2], interleaved), width)
    k, v = wide[:, heads : heads + kv_heads], wide[:, -kv_heads:]
    want = turned(normed(k, k_norm, kind), position, inv_freq, interleaved, 1.25)
    case.hold("k", k_cache[0, slot], want, width)
    case.hold("v", v_cache[0, slot], normed(v, None, kind) if v_normed else v.double(), width)


@every_form
@pytest.mark.parametrize("width", [16, 80, 256, 512])
def test_heads_of_every_width_attend(case: Case, width: int) -> None:
    noise = generator(width)
    q, position = case.normal(noise, 1, 2, 2, width) / width**0.5, torch.tensor([[4, 7]], device=case.device)
    k_cache, v_cache = (case.normal(noise, 1, 9, 1, width) for _ in range(2))

    got = case.ops.attend(q, k_cache, v_cache, position, 1.0, 3)

    want = []
    for t, last in enumerate([4, 7]):
        k, v = (cache[0, last - 2 : last + 1, 0].double() for cache in (k_cache, v_cache))
        want.append((q[0, t].double() @ k.T).softmax(-1) @ v)
    case.hold("attention", got[0], torch.stack(want).flatten(1), width)


LATENT = {"seed": seeds(), "num_queries": st.integers(1, 3), "heads": st.integers(1, 5), "interleaved": st.booleans()}
RANK, ROPE, NOPE, VALUE = 20, 8, 12, 10


@every_form
@given(**LATENT)
@example(seed=0, num_queries=3, heads=5, interleaved=True)
def test_absorbed_attention_is_attention(
    case: Case, seed: int, num_queries: int, heads: int, interleaved: bool
) -> None:
    noise, num_slots = generator(seed), 20
    cache, kv_a = case.normal(noise, 2, num_slots, RANK + ROPE), case.normal(noise, 3, RANK + ROPE)
    weight, inv_freq = case.normal(noise, RANK), 0.3 ** torch.arange(ROPE // 2, device=case.device)
    position, slot = torch.tensor([3, 7, 11], device=case.device), torch.tensor([21, 7, 31], device=case.device)
    q = case.normal(noise, 2 * num_queries, heads, NOPE + ROPE)
    w_uk, w_uv = case.normal(noise, heads, NOPE, RANK) / NOPE**0.5, case.normal(noise, heads, RANK, VALUE) / RANK**0.5
    asked = torch.tensor([[-1], [num_slots - num_queries]]) + torch.tensor([[0], [1]]) * torch.arange(num_queries)

    both, before = case.normal(noise, 3, 15), cache.clone()
    wrote = (kv_a, weight, 1e-6, position, slot, inv_freq, 1.25, cache, interleaved)
    assert case.ops.latent_write(*wrote).shape == (3, 0)
    q_a = case.ops.latent_write(*wrote, both[:, 1:], both[0, 1:])
    asked = asked.to(case.device)
    q_latent, q_rope = case.ops.absorb(q, w_uk, asked.flatten(), inv_freq, 1.25, num_slots, interleaved)
    latent, turning = (part.unflatten(0, (2, num_queries)) for part in (q_latent, q_rope))
    got = case.ops.attend_latent(latent, turning, cache, asked, 0.3, w_uv, 20)
    got = got.unflatten(2, (heads, VALUE)).flatten(0, 1)

    flat, untouched = cache.flatten(0, 1), torch.ones(2 * num_slots, dtype=torch.bool, device=case.device)
    untouched[slot] = False
    bit_equal("other slots", flat[untouched], before.flatten(0, 1)[untouched])
    case.hold("latent", flat[slot, :RANK], normed(kv_a[:, :RANK], weight, LLAMA), RANK)
    case.hold("rope", flat[slot, RANK:], turned(kv_a[:, None, RANK:], position, inv_freq, interleaved, 1.25)[:, 0], 2)
    case.hold("query's latent", q_a, normed(both[:, 1:], both[0, 1:], LLAMA), 14)
    where = asked.flatten().clamp(min=0)
    case.hold("turned", q_rope, turned(q[..., NOPE:], where, inv_freq, interleaved, 1.25), ROPE)
    wide = cache[1].double()
    k = torch.einsum("sr,ndr->snd", wide[:, :RANK], w_uk.double())
    v = torch.einsum("sr,nrv->snv", wide[:, :RANK], w_uv.double())
    k = torch.cat([k, wide[:, None, RANK:].expand(-1, heads, -1)], -1)
    whole = torch.cat([q[..., :NOPE].double(), q_rope.double()], -1)[num_queries:]
    score = 0.3 * torch.einsum("tnd,snd->nts", whole, k)
    unseen = torch.arange(num_slots, device=case.device) > asked[1][:, None]
    weights = score.masked_fill(unseen, float("-inf")).softmax(-1)
    want = torch.einsum("nts,snv->tnv", weights, v)
    # three products one after another, and keys that were never rounded
    case.hold("attention", got[num_queries:], want, 3 * RANK)
    bit_equal("nothing seen", got[:num_queries], torch.zeros_like(got[:num_queries]))


@every_exact_form
@given(seed=seeds(), num_rows=st.integers(2, 5), kind=kinds, act=acts)
@example(seed=0, num_rows=5, kind=GEMMA3, act="gelu_tanh")
def test_a_row_has_the_same_bits_alone(case: Case, seed: int, num_rows: int, kind: NormKind, act: str) -> None:
    noise, ops, last = generator(seed), case.ops, slice(-1, None)
    x, residual = (case.normal(noise, num_rows, 36) for _ in range(2))
    norm, weight, heads = (case.normal(noise, *shape) for shape in ((36,), (34, 36), (3, 8, 20)))
    place, inv_freq = torch.arange(num_rows, device=case.device), torch.tensor([1.0, 0.3], device=case.device)

    def computed(rows: slice) -> tuple[Tensor, ...]:
        a, b = x[rows], residual[rows]
        return (
            *ops.sandwich_norm(a, b, norm, norm, 1e-6, kind, norm[:1]),
            *(ops.gate_up_act(a, weight, act=act), ops.act_mul(a, b, act)),
            *(ops.softcap(a, 3.0), *ops.absorb(a.view(-1, 3, 12), heads, place[rows], inv_freq, 1.0, 9)),
        )

    same_tensors("row", computed(last), tuple(part[last] for part in computed(slice(None))))


@every_exact_form
@given(seed=seeds(), num_queries=st.integers(2, 4), heads=st.integers(1, 5))
@example(seed=1, num_queries=4, heads=5)
def test_verify_of_latents_is_decode(case: Case, seed: int, num_queries: int, heads: int) -> None:
    noise = generator(seed)
    q_latent, q_rope = (case.normal(noise, 2, num_queries, heads, width) for width in (RANK, ROPE))
    cache, weight = case.normal(noise, 2, 36, RANK + ROPE), case.normal(noise, RANK)
    w_uv = case.normal(noise, heads, RANK, VALUE)
    kv_a, inv_freq = case.normal(noise, num_queries, RANK + ROPE), 0.3 ** torch.arange(ROPE // 2, device=case.device)
    position = torch.randint(0, 36 - num_queries, (2, 1), generator=noise) + torch.arange(num_queries)
    position = position.to(case.device)
    last, alone, slots = slice(-1, None), cache.clone(), position[1] + 36

    case.ops.latent_write(kv_a, weight, 1e-6, position[1], slots, inv_freq, 1.0, cache)
    case.ops.latent_write(kv_a[last], weight, 1e-6, position[1, last], slots[last], inv_freq, 1.0, alone)
    verified = case.ops.attend_latent(q_latent, q_rope, cache, position, 0.3, w_uv)
    one = (q_latent[1:, last].clone(), q_rope[1:, last].clone(), cache[1:].clone(), position[1:, last].clone())
    decoded = case.ops.attend_latent(*one, 0.3, w_uv, int(position.max()) + 1)

    bit_equal("written", alone.flatten(0, 1)[slots[last]], cache.flatten(0, 1)[slots[last]])
    bit_equal("last query of the last sequence", decoded, verified[1:, last])


@pytest.mark.parametrize("exact", [False, True])
def test_no_operation_waits_for_its_device(exact: bool) -> None:
    case, noise, position = Case(Aten(exact), torch.float32, "cpu"), generator(0), torch.tensor([[1, 2, 3]])
    x, down, ids = case.normal(noise, 3, 24), case.normal(noise, 3, 8, 8), torch.tensor([0, 2])
    cache, inv_freq = case.normal(noise, 1, 9, 12), torch.ones(2)

    with NoReads():
        case.ops.sandwich_norm(x, x, x[0], None, 1e-6, GEMMA4, x[0, :1])
        case.ops.gate_up_act(x, x[:2], act="gelu_tanh")
        case.ops.embed(ids, x, 1, 7.3)
        case.ops.softcap(x, 30.0)
        case.ops.q_rope(x.view(3, 6, 4), position[0], inv_freq, 1.0, 9, None, 1e-6)
        case.ops.latent_write(x[:, :12], x[0, :8], 1e-6, position[0], position[0], inv_freq, 1.0, cache)
        case.ops.attend_latent(x.view(1, 3, 3, 8), x.view(1, 3, 6, 4)[:, :, :3], cache, position, 1.0, down)
        case.ops.absorb(x.view(3, 2, 12), down[:2], position[0], inv_freq, 1.0, 9)
