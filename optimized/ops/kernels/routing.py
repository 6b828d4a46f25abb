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
def write_chosen(
    logit,
    row,
    num_scored,
    bias,
    scale,
    ids,
    weights,
    num_chosen,
    num_shared,
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
    """logit [groups, size] of one row, bias, scale [E]; ids, weights [M, P+num_shared]; num_scored = E

    The bias helps to choose and is no part of a weight.
    """
    g = tl.arange(0, BLOCK_G)
    member = tl.arange(0, BLOCK_E)
    real = (g < GROUPS)[:, None] & (member < SIZE)[None, :]
    expert = g[:, None] * SIZE + member[None, :]
    logit = tl.where(real, logit, float("-inf"))
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
    # who is not looked for is shared: the experts behind the last, with weight one
    chosen = num_scored + place - num_chosen
    weight = tl.zeros([BLOCK_P], dtype=tl.float32)
    for p in tl.range(0, num_chosen):
        first = tl.min(tl.where(choice == tl.max(choice), expert, NOWHERE))
        here = expert == first
        chosen = tl.where(place == p, first, chosen)
        weight = tl.where(place == p, tl.sum(tl.where(here, likely, 0.0)), weight)
        choice = tl.where(here, float("-inf"), choice)

    looked_for = place < num_chosen
    if RENORMALISE:
        weight = weight / (tl.sum(weight) + 1e-20)
    if HAS_SCALE:
        weight = weight * tl.load(scale + chosen, mask=looked_for, other=0.0).to(tl.float32)
    weight = tl.where(looked_for, weight * scaling, 1.0)
    num_written = num_chosen + num_shared
    out = row * num_written + place
    tl.store(ids + out, chosen.to(tl.int64), mask=place < num_written)
    tl.store(weights + out, weight.to(weights.dtype.element_ty), mask=place < num_written)


@triton.jit
def route_kernel(
    scores,
    bias,
    scale,
    ids,
    weights,
    num_chosen,
    num_shared,
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
    """scores [M, E], bias, scale [E]; ids, weights [M, P+num_shared]; E = GROUPS * SIZE"""
    row = tl.program_id(0).to(tl.int64)
    g = tl.arange(0, BLOCK_G)[:, None]
    member = tl.arange(0, BLOCK_E)[None, :]
    at = row * (GROUPS * SIZE) + g * SIZE + member
    logit = tl.load(scores + at, mask=(g < GROUPS) & (member < SIZE), other=0.0).to(tl.float32)
    # fmt: off
    write_chosen(
        logit, row, GROUPS * SIZE, bias, scale, ids, weights, num_chosen, num_shared, scaling,
        SIGMOID, HAS_BIAS, HAS_SCALE, RENORMALISE, GROUPS, SIZE, TOP_GROUPS, BLOCK_G, BLOCK_E, BLOCK_P,
    )
    # fmt: on


@triton.jit
def router_kernel(
    x,
    matrix,
    bias,
    scale,
    ids,
    weights,
    num_in,
    num_chosen,
    num_shared,
    scaling,
    ROUNDED: tl.constexpr,
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
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """x [M, H], matrix [E, H], bias, scale [E]; ids, weights [M, P+num_shared]; num_in = H

    One program scores all experts for one row and chooses: the product and the choice of a small router.
    """
    row = tl.program_id(0).to(tl.int64)
    flat = tl.arange(0, BLOCK_G * BLOCK_E)
    real = ((flat // BLOCK_E < GROUPS) & (flat % BLOCK_E < SIZE))[:, None]
    inner = tl.arange(0, BLOCK_K)
    w_row = matrix + (flat // BLOCK_E * SIZE + flat % BLOCK_E)[:, None] * num_in
    acc = tl.zeros([BLOCK_G * BLOCK_E, BLOCK_K], dtype=tl.float32)
    for start in tl.range(0, num_in, BLOCK_K, num_stages=STAGES):
        k = start + inner
        if WHOLE:
            a = tl.load(x + row * num_in + k)
            w = tl.load(w_row + k[None, :], mask=real, other=0.0)
        else:
            a = tl.load(x + row * num_in + k, mask=k < num_in, other=0.0)
            w = tl.load(w_row + k[None, :], mask=real & (k < num_in)[None, :], other=0.0)
        acc += w.to(tl.float32) * a.to(tl.float32)[None, :]
    logit = tl.sum(acc, 1)
    if ROUNDED:
        logit = logit.to(x.dtype.element_ty).to(tl.float32)
    logit = tl.reshape(logit, (BLOCK_G, BLOCK_E))
    # fmt: off
    write_chosen(
        logit, row, GROUPS * SIZE, bias, scale, ids, weights, num_chosen, num_shared, scaling,
        SIGMOID, HAS_BIAS, HAS_SCALE, RENORMALISE, GROUPS, SIZE, TOP_GROUPS, BLOCK_G, BLOCK_E, BLOCK_P,
    )
    # fmt: on
