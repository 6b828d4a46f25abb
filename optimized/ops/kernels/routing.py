"""Which experts a row chooses: lowest number among equals, best first."""

import triton
import triton.language as tl

NOWHERE = tl.constexpr(2147483647)


@triton.jit
def of_best_groups(choice, g, member, SIGMOID: tl.constexpr, SIZE: tl.constexpr, TOP_GROUPS: tl.constexpr):
    """choice [groups, size], g [groups], member [size]; a group is worth its best expert, or its best two"""
    best = tl.max(choice, 1)
    if SIGMOID and SIZE > 1:
        at = tl.min(tl.where(choice == best[:, None], member[None, :], NOWHERE), 1)
        best = best + tl.max(tl.where(member[None, :] == at[:, None], float("-inf"), choice), 1)
    equal = (best[None, :] == best[:, None]) & (g[None, :] < g[:, None])
    ahead = tl.sum(((best[None, :] > best[:, None]) | equal).to(tl.int32), 1)
    return tl.where((ahead < TOP_GROUPS)[:, None], choice, float("-inf"))


@triton.jit
def route_kernel(
    scores,
    bias,
    scale,
    ids,
    weights,
    num_chosen,
    scaling,
    SIGMOID: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    RENORMALISE: tl.constexpr,
    GROUPS: tl.constexpr,
    SIZE: tl.constexpr,
    TOP_GROUPS: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """scores [M, E], bias, scale [E]; ids, weights [M, P]; E = GROUPS * SIZE

    The bias helps to choose and is no part of a weight.
    """
    row = tl.program_id(0).to(tl.int64)
    g = tl.arange(0, BLOCK_G)
    member = tl.arange(0, BLOCK_E)
    expert = g[:, None] * SIZE + member[None, :]
    real = (g < GROUPS)[:, None] & (member < SIZE)[None, :]
    logit = tl.load(scores + row * (GROUPS * SIZE) + expert, mask=real, other=float("-inf")).to(tl.float32)
    if SIGMOID:
        likely = 1.0 / (1.0 + tl.exp(-tl.maximum(logit, -80.0)))
    else:
        likely = tl.exp(logit - tl.max(logit))
        likely = likely / tl.sum(likely)
    choice = likely
    if HAS_BIAS:
        choice = choice + tl.load(bias + expert, mask=real, other=0.0).to(tl.float32)
    choice = tl.where(real, choice, float("-inf"))
    # places that are no expert would share the number of the next group's first
    expert = tl.where(real, expert, NOWHERE)
    if TOP_GROUPS < GROUPS:
        choice = of_best_groups(choice, g, member, SIGMOID, SIZE, TOP_GROUPS)

    place = tl.arange(0, BLOCK_P)
    chosen = tl.zeros([BLOCK_P], dtype=tl.int32)
    weight = tl.zeros([BLOCK_P], dtype=tl.float32)
    for p in tl.range(0, num_chosen):
        first = tl.min(tl.where(choice == tl.max(choice), expert, NOWHERE))
        here = expert == first
        chosen = tl.where(place == p, first, chosen)
        weight = tl.where(place == p, tl.sum(tl.where(here, likely, 0.0)), weight)
        choice = tl.where(here, float("-inf"), choice)

    inside = place < num_chosen
    if RENORMALISE:
        weight = weight / (tl.sum(weight) + 1e-20)
    if HAS_SCALE:
        weight = weight * tl.load(scale + chosen, mask=inside, other=0.0).to(tl.float32)
    out = row * num_chosen + place
    tl.store(ids + out, chosen.to(tl.int64), mask=inside)
    tl.store(weights + out, (weight * scaling).to(weights.dtype.element_ty), mask=inside)
