"""Bugs of Qwen3-MoE: routers, experts, head norms, and the twin's stacked weights."""

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from harness.planting import Bug

WITNESS = "suites/correctness/test_witness_qwen3_moe.py"
TEXT = f"{WITNESS}::test_the_reference_equals_transformers_at_every_capture_point"
SIZES = f"{WITNESS}::test_published_sizes_have_the_parameters_of_transformers"
CLAIMS = "suites/correctness/test_twins.py"
TWIN = f"{CLAIMS}::test_the_target_is_the_reference[qwen3_moe]"
RANKS = f"{CLAIMS}::test_ranks_hold_their_shards_and_compute_what_one_computes[qwen3_moe]"
VERIFY = f"{CLAIMS}::test_verify_has_the_bits_of_decode[torch.float32-qwen3_moe]"

PAGE = "reference.targets.qwen3_moe"


def attention(place: Callable[[Any, Tensor, Callable[[Tensor], Tensor]], Tensor]) -> Callable[[Any], Any]:
    """Attention whose heads are normed and turned as `place` does: (norm, heads, rope) -> heads."""

    def plant(forward: Any) -> Any:
        from reference.ops.attention import attend
        from reference.ops.rope import rotate

        def heads(self: Any, x: Tensor, positions: Tensor, visible: Tensor, layer: int, cache: Any, slots: Any) -> Any:
            q, k, v = (p(x).unflatten(-1, (-1, self.head_dim)) for p in (self.q_proj, self.k_proj, self.v_proj))
            q, k = (
                place(norm, y, lambda y: rotate(y, positions, self.rope))
                for norm, y in ((self.q_norm, q), (self.k_norm, k))
            )
            k, v = (k, v) if cache is None else cache.write(layer, k, v, slots)
            return self.o_proj(attend(q, k, v, visible, self.scale).flatten(2))

        return heads

    return plant


def over_all_heads(norm: Any, y: Tensor, turn: Callable[[Tensor], Tensor]) -> Tensor:
    """One norm over all heads of a token together."""
    wide = y.flatten(-2)
    scale = torch.rsqrt(wide.square().mean(-1) + norm.eps)[..., None, None]
    return turn(y * scale * norm.weight)


def sorted_apart(mix: Any) -> Any:
    """Experts put in the order of their numbers, weights left in the order of their size."""
    return lambda x, ids, weights, experts: mix(x, ids.sort(-1).values, weights, experts)


def next_expert(mix: Any) -> Any:
    return lambda x, ids, weights, experts: mix(x, (ids + 1) % len(experts), weights, experts)


def weights_on_the_way_in(_: Any) -> Any:
    """Tokens multiplied by their weights before the experts, as Llama 4 does and Qwen does not."""

    def mix(x: Tensor, ids: Tensor, weights: Tensor, experts: Any) -> Tensor:
        out = torch.zeros_like(x)
        for number, expert in enumerate(experts):
            weight = (weights * (ids == number)).sum(-1, keepdim=True)
            out += expert(x * weight) * (weight > 0)
        return out

    return mix


def by_sigmoid(_: Any) -> Any:
    def route(scores: Tensor, num_chosen: int, renormalise: bool) -> tuple[Tensor, Tensor]:
        weights, ids = scores.sigmoid().topk(num_chosen, -1)
        return ids, weights / weights.sum(-1, keepdim=True) if renormalise else weights

    return route


def worst_first(route: Any) -> Any:
    return lambda *asked: tuple(x.flip(-1) for x in route(*asked))


def without_residual(captured: Any) -> Any:
    """What each layer adds, in place of what has run up to it."""
    return lambda stream, points: captured([stream[0], *(b - a for a, b in pairwise(stream))], points)


def ups_first(load: Any) -> Any:
    """The stacked weight read as up | gate."""
    halves = {"gate_proj": "up_proj", "up_proj": "gate_proj"}

    def swapped(self: Any, name: str, full: Tensor) -> None:
        prefix, kind, weight = name.rsplit(".", 2)
        load(self, f"{prefix}.{halves.get(kind, kind)}.{weight}", full)

    return swapped


def sorted_as_words(load: Any) -> Any:
    """Experts stacked in the order of a directory: 0, 1, 10, 11, 2."""

    def stacked(self: Any, name: str, full: Tensor) -> None:
        prefix, number, rest = name.split(".experts.")[0], *name.split(".experts.")[1].split(".", 1)
        place = sorted(map(str, range(len(self.down)))).index(number)
        load(self, f"{prefix}.experts.{place}.{rest}", full)

    return stacked


def first_rows_experts(call: Any) -> Any:
    """The experts of the first row serve the batch."""
    return lambda self, x, ids, weights: call(self, x, ids[:1].expand_as(ids), weights)


def with_capacity(call: Any) -> Any:
    """An expert takes two rows of a step and drops the others."""

    def few(self: Any, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        chosen = F.one_hot(ids, len(self.down)).sum(1)  # [M, E]
        late = chosen.cumsum(0).gather(1, ids) > 2
        return call(self, x, ids, weights.masked_fill(late, 0))

    return few


BUGS = (
    Bug(
        "qwen3moe-renormalisation-dropped",
        "norm_topk_prob left at its default, false, where published checkpoints say true",
        f"{PAGE}.route_softmax",
        lambda route: lambda scores, num_chosen, renormalise: route(scores, num_chosen, False),
        TEXT,
    ),
    Bug(
        "qwen3moe-softmax-over-the-chosen",
        "top-P before softmax, as Mixtral's router is often written: weights sum to one whatever the config says",
        f"{PAGE}.route_softmax",
        lambda route: lambda scores, num_chosen, renormalise: route(scores, num_chosen, True),
        TEXT,
    ),
    Bug(
        "qwen3moe-one-expert-more",
        "num_experts_per_tok counted from zero",
        f"{PAGE}.route_softmax",
        lambda route: lambda scores, num_chosen, renormalise: route(scores, num_chosen + 1, renormalise),
        TEXT,
    ),
    Bug(
        "qwen3moe-sigmoid-router",
        "the router of DeepSeek V3 in place of softmax",
        f"{PAGE}.route_softmax",
        by_sigmoid,
        TEXT,
    ),
    Bug(
        "qwen3moe-gate-and-up-swapped",
        "w1 and w3 of other checkpoints read in the order of their numbers",
        "reference.ops.mlp.MLP.forward",
        lambda forward: lambda self, x: self.down_proj(self.gate_proj(x) * self.act(self.up_proj(x))),
        TEXT,
    ),
    Bug(
        "qwen3moe-expert-shifted",
        "expert numbers counted from one",
        f"{PAGE}.mix",
        next_expert,
        TEXT,
    ),
    Bug(
        "qwen3moe-weights-sorted-apart",
        "expert numbers sorted for grouping, weights left as they were",
        f"{PAGE}.mix",
        sorted_apart,
        TEXT,
    ),
    Bug(
        "qwen3moe-weights-on-the-way-in",
        "apply_router_weight_on_input of fused experts, which is for Llama 4",
        f"{PAGE}.mix",
        weights_on_the_way_in,
        TEXT,
    ),
    Bug(
        "qwen3moe-sparse-step-from-zero",
        "the layer itself in place of layer + 1 divided by decoder_sparse_step",
        f"{PAGE}.Qwen3MoeConfig.is_sparse",
        lambda rule: lambda self, layer: layer not in self.dense_layers and layer % self.sparse_step == 0,
        TEXT,
    ),
    Bug(
        "qwen3moe-dense-list-ignored",
        "mlp_only_layers is empty in every published size",
        f"{PAGE}.Qwen3MoeConfig.is_sparse",
        lambda rule: lambda self, layer: (layer + 1) % self.sparse_step == 0,
        TEXT,
    ),
    Bug(
        "qwen3moe-experts-as-wide-as-dense",
        "intermediate_size read for moe_intermediate_size",
        f"{PAGE}.Qwen3MoeConfig.from_hf",
        lambda read: lambda cls, keys: replace(read(cls, keys), expert_intermediate=keys["intermediate_size"]),
        SIZES,
    ),
    Bug(
        "qwen3moe-heads-normed-after-rope",
        "norm and rope of q and k in the other order",
        "reference.ops.attention.Attention.forward",
        attention(lambda norm, heads, turn: norm(turn(heads))),
        TEXT,
    ),
    Bug(
        "qwen3moe-heads-not-normed",
        "attention of Qwen2-MoE under the layers of Qwen3-MoE",
        "reference.ops.attention.Attention.forward",
        attention(lambda norm, heads, turn: turn(heads)),
        TEXT,
    ),
    Bug(
        "qwen3moe-heads-normed-together",
        "the q norm of OLMoE: one over all heads",
        "reference.ops.attention.Attention.forward",
        attention(over_all_heads),
        TEXT,
    ),
    Bug(
        "qwen3moe-capture-without-residual",
        "SGLang #39286",
        f"{PAGE}.captured",
        without_residual,
        TEXT,
    ),
    Bug(
        "qwen3moe-chosen-worst-first",
        "an order of the chosen experts that no sum minds",
        f"{PAGE}.route_softmax",
        worst_first,
        TEXT,
        harmless=True,
    ),
    Bug(
        "qwen3moe-twin-renormalisation-dropped",
        "a fused router called without its flag",
        "optimized.ops.aten.Aten.route_softmax",
        lambda route: lambda self, x, weight, num_chosen, renormalise: route(self, x, weight, num_chosen, False),
        TWIN,
    ),
    Bug(
        "qwen3moe-twin-heads-not-normed",
        "head norms left out of the fused rope",
        "optimized.ops.aten.Aten._headnorm",
        lambda norm: lambda self, x, weight, eps, kind: x,
        TWIN,
    ),
    Bug(
        "qwen3moe-twin-ups-first",
        "stacked gate and up halves in the other order",
        "optimized.experts.Experts.load",
        ups_first,
        TWIN,
    ),
    Bug(
        "qwen3moe-twin-experts-sorted-as-words",
        "experts stacked in the order in which their names sort",
        "optimized.experts.Experts.load",
        sorted_as_words,
        TWIN,
    ),
    Bug(
        "qwen3moe-twin-experts-of-the-first-row",
        "one choice of experts for all rows of a small batch",
        "optimized.experts.Experts.__call__",
        first_rows_experts,
        TWIN,
    ),
    Bug(
        "qwen3moe-twin-expert-capacity",
        "experts with a capacity drop tokens of a full step, so verify is not decode",
        "optimized.experts.Experts.__call__",
        with_capacity,
        VERIFY,
    ),
    Bug(
        "qwen3moe-twin-partial-sums",
        "SGLang #28343: what experts add is not summed over ranks",
        "optimized.experts.sum_in_rank_order",
        lambda add: lambda group, partial: partial,
        RANKS,
    ),
    Bug(
        "qwen3moe-twin-first-run-on-every-rank",
        "every rank holds the first features of every expert",
        "optimized.experts.equal_run",
        lambda run: lambda size, rank, ranks, what: run(size, 0, ranks, what),
        RANKS,
    ),
)
