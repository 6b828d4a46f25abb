"""Bugs of the twin of DeepSeek: what absorbed attention, uncut latents and a wide router invite."""

from typing import Any

import torch
from torch import Tensor

from harness.planting import Bug

CLAIMS = "suites/correctness/test_twin_deepseek.py"
TWINS = "suites/correctness/test_twins.py"
REFERENCE = f"{TWINS}::test_the_target_is_the_reference[deepseek]"
FINE = f"{CLAIMS}::test_the_bias_that_chooses_keeps_its_precision"
RANKS = f"{TWINS}::test_ranks_hold_their_shards_and_compute_what_one_computes[deepseek]"
TEXT = f"{TWINS}::test_a_draft_leaves_the_text_alone[3-deepseek]"
CHAIN = f"{TWINS}::test_verify_has_the_bits_of_decode[torch.float32-deepseek]"

TWIN, ATEN = "optimized.targets.deepseek", "optimized.ops.aten.Aten"


def unstretched(build: Any) -> Any:
    """A softmax factor without yarn's m."""

    def init(self: Any, *facts: Any) -> None:
        build(self, *facts)
        self.scale = sum(self.q_dims) ** -0.5

    return init


def values_first(load: Any) -> Any:
    """Rows of kv_b_proj taken for values, then keys."""

    def swapped(self: Any, name: str, full: Tensor) -> None:
        by_head = full.unflatten(0, (-1, sum(self.dims)))
        load(self, name, by_head.roll(self.dims[0], 1).flatten(0, 1))

    return swapped


def heads_together(load: Any) -> Any:
    """Keys of all heads first, then all values, as other checkpoints fold them."""

    def folded(self: Any, name: str, full: Tensor) -> None:
        heads = full.shape[0] // sum(self.dims)
        keys, values = full.split([heads * dim for dim in self.dims])
        load(self, name, torch.cat([x.unflatten(0, (heads, -1)) for x in (keys, values)], 1).flatten(0, 1))

    return folded


def capture_normed(layer: Any) -> Any:
    """What a layer's projections read in place of what runs past them."""

    def call(self: Any, *place: Any) -> Any:
        branch, s, captured = layer(self, *place)
        return branch, s, self.input_layernorm(captured)[0]

    return call


def rounded_bias(build: Any) -> Any:
    def init(self: Any, name: str, experts: int, at: Any) -> None:
        build(self, name, experts, at)
        self.weight = self.weight.to(at.dtype)
        self.place(name, self.weight, (experts,))

    return init


def latents_by_column(write: Any) -> Any:
    """Shared keys turned by their column in the call."""

    def early(self: Any, kv_a: Tensor, weight: Tensor, eps: float, positions: Tensor, *rest: Any) -> Tensor:
        return write(self, kv_a, weight, eps, (positions - positions[0]).clamp(min=0), *rest)

    return early


def unshared(route: Any) -> Any:
    """Only those that were looked for are mixed."""

    def chosen(self: Any, *how: Any) -> tuple[Tensor, Tensor]:
        ids, weights = route(self, *how)
        return ids, weights.index_fill(1, torch.arange(ids.shape[1] - how[-1], ids.shape[1]), 0.0)

    return chosen


def together(attend: Any) -> Any:
    """Every token of a call sees what the last one does."""

    def late(self: Any, q: Tensor, q_rope: Tensor, cache: Tensor, positions: Tensor, *rest: Any) -> Tensor:
        return attend(self, q, q_rope, cache, positions.amax(1, keepdim=True).expand_as(positions), *rest)

    return late


BUGS = (
    Bug(
        "deepseek-twin-mscale-none",
        "yarn's factor left to a kernel that knows nothing of it",
        f"{TWIN}.Attention.__init__",
        unstretched,
        REFERENCE,
    ),
    Bug(
        "deepseek-twin-query-turned-by-halves",
        "neighbours in the cache, halves in the query",
        f"{ATEN}.absorb",
        lambda turn: lambda self, *facts: turn(self, *facts[:-1], not facts[-1]),
        REFERENCE,
    ),
    Bug(
        "deepseek-twin-keys-turned-by-column",
        "positions counted from the first column of a call",
        f"{ATEN}.latent_write",
        latents_by_column,
        TEXT,
    ),
    Bug(
        "deepseek-twin-values-before-keys",
        "kv_b_proj parted in the wrong order",
        f"{TWIN}.Unfolding.load",
        values_first,
        REFERENCE,
    ),
    Bug(
        "deepseek-twin-heads-folded-together",
        "kv_b_proj parted across heads",
        f"{TWIN}.Unfolding.load",
        heads_together,
        RANKS,
    ),
    Bug(
        "deepseek-twin-first-heads-on-every-rank",
        "one rank's rows of kv_b_proj on all ranks, like the latents",
        f"{TWIN}.equal_run",
        lambda run: lambda size, rank, ranks, what: run(size, 0, ranks, what),
        RANKS,
    ),
    Bug(
        "deepseek-twin-partial-sums",
        "SGLang #28343: what ranks add is not summed",
        "optimized.parallel.sum_in_rank_order",
        lambda add: lambda group, partial: partial,
        RANKS,
    ),
    Bug(
        "deepseek-twin-bias-dropped",
        "a fused router called without its bias",
        f"{ATEN}.route_grouped",
        lambda route: lambda self, x, weight, bias, *how: route(self, x, weight, None, *how),
        REFERENCE,
    ),
    Bug(
        "deepseek-twin-bias-rounded",
        "the bias cast with the weights",
        f"{TWIN}.ChoiceBias.__init__",
        rounded_bias,
        FINE,
    ),
    Bug(
        "deepseek-twin-shared-experts-dropped",
        "the block that every token reads left out",
        f"{ATEN}.route_grouped",
        unshared,
        REFERENCE,
    ),
    Bug(
        "deepseek-twin-capture-normed",
        "SGLang #25454",
        f"{TWIN}.DeepseekLayer.__call__",
        capture_normed,
        REFERENCE,
    ),
    Bug(
        "deepseek-twin-tokens-of-a-call-see-each-other",
        "an attention made for one new token a sequence: rows of verify see the drafts behind them",
        f"{ATEN}.attend_latent",
        together,
        CHAIN,
    ),
)
