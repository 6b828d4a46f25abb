"""Bugs of Gemma 4: what its layers do beside attention, whose keys they read, and the twin's fused ends."""

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from harness.planting import Bug

WITNESS = "suites/correctness/test_witness_gemma4.py"
DENSE = f"{WITNESS}::test_dense_equals_transformers_at_every_capture_point"
EXPERTS = f"{WITNESS}::test_experts_equal_transformers_at_every_capture_point"
EDGE = f"{WITNESS}::test_edge_equals_transformers_at_every_capture_point"
ROUNDING = f"{WITNESS}::test_embeddings_and_norms_round_where_transformers_rounds"
IMAGES = f"{WITNESS}::test_an_image_is_seen_both_ways_where_its_kind_of_layer_does"
CLAIMS = "suites/correctness/test_twin_gemma4.py"
TWINS = "suites/correctness/test_twins.py"
TWIN_DENSE, TWIN_EXPERTS, TWIN_EDGE = (
    f"{TWINS}::test_the_target_is_the_reference[gemma4-{size}]" for size in ("dense", "experts", "edge")
)
CACHED = f"{TWINS}::test_behind_its_cache_the_target_is_the_reference[gemma4-edge]"
RANKS = f"{TWINS}::test_ranks_hold_their_shards_and_compute_what_one_computes[gemma4-edge]"
SAID = f"{CLAIMS}::test_a_draft_says_on_the_twin_what_it_says_on_the_reference"
SHARED = f"{CLAIMS}::test_a_draft_shares_the_table_unscaled_and_the_head_without_its_cap"
CACHE = f"{CLAIMS}::test_layers_that_are_shared_take_no_room_in_the_cache"

PAGE, TWIN, ATEN = "reference.targets.gemma4", "optimized.targets.gemma4", "optimized.ops.aten.Aten"


def built(change: Callable[[Any, Any], None]) -> Callable[[Any], Any]:
    """A module that is changed once it is built: (module, config)."""

    def plant(build: Any) -> Any:
        def init(self: Any, c: Any, *rest: Any) -> None:
            build(self, c, *rest)
            change(self, c)

        return init

    return plant


def without(norm: str) -> Callable[[Any], Any]:
    """A layer that passes over one of its norms, whose weight is still there."""

    def plant(forward: Any) -> Any:
        def passing(self: Any, *inputs: Any) -> Tensor:
            own = self._modules[norm]
            self._modules[norm] = nn.Identity()
            try:
                return forward(self, *inputs)
            finally:
                self._modules[norm] = own

        return passing

    return plant


def unscaled(router: Any, ids: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    return ids, weights / router.per_expert_scale[ids]


def values_from_turned_keys(forward: Any) -> Any:
    """Keys that are the values too, taken after norm and rope."""

    def attend(self: Any, u: Tensor, positions: Tensor, visible: Tensor, cache: Any, slots: Tensor) -> Tensor:
        write = cache.write
        if self.kind.k_eq_v:
            cache.write = lambda layer, k, v, slots: write(layer, k, k, slots)
        try:
            return forward(self, u, positions, visible, cache, slots)
        finally:
            cache.write = write

    return attend


def partial_in_place_of_proportional(rotate: Any) -> Any:
    """Features that turn are paired among themselves, and their frequencies are those of a narrower head."""

    def turn(x: Tensor, positions: Tensor, rope: Any) -> Tensor:
        partial = replace(rope, kind="default", dim=2 * rope.pairs, pairs=0)
        return rotate(x, positions, partial if rope.kind == "proportional" else rope)

    return turn


def read(**change: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Facts of a config read wrongly."""

    def plant(right: Any) -> Any:
        def from_hf(cls: Any, config: Any) -> Any:
            c = right(cls, config)
            return replace(c, **{name: wrong(c) for name, wrong in change.items()})

        return from_hf

    return plant


def without_scalar(end: Any) -> Any:
    """The fused end of a layer without its scalar."""

    def close(self: Any, branch: Tensor, stream: Tensor, following: Any) -> Any:
        weight = self.layer_scalar.weight
        self.layer_scalar.weight = torch.ones_like(weight)
        try:
            return end(self, branch, stream, following)
        finally:
            self.layer_scalar.weight = weight

    return close


def capped_for_all(share: Any) -> Any:
    """A draft that shares the target's head gets the target's cap with it."""

    def hand_over(self: Any, target: Any) -> None:
        share(self, target)
        head = target.lm_head
        self.lm_head = SimpleNamespace(logits=lambda x, scale: head.logits(x) * scale, argmax=self.lm_head.argmax)

    return hand_over


def without_v_norm(write: Any) -> Any:
    """Values that are cached as they were projected."""
    return lambda self, *args, v_normed=False, **how: write(self, *args, **how)


def unturned(turn: Any) -> Any:
    """Queries of shared layers that are normed alone, since their layer turns no keys."""

    def norm(self: Any, q: Tensor, positions: Tensor, *how: Any) -> Tensor:
        return turn(self, q, torch.zeros_like(positions), *how)

    return norm


def turned_by_column(turn: Any) -> Any:
    """Queries of shared layers turned by their place in the call, as if every call were a prompt's first."""
    return lambda self, q, positions, *how: turn(self, q, positions - positions.min(), *how)


def one_layer_on(inputs: Any) -> Any:
    def rolled(self: Any, h: Tensor, ids: Tensor) -> Any:
        first, *rest = inputs(self, h, ids)
        return [*rest, first]

    return rolled


def room_for_every_layer(make: Any) -> Any:
    def new_cache(self: Any, batch: int, num_slots: int) -> Any:
        return make(SimpleNamespace(c=replace(self.c, shared_layers=0), at=self.at), batch, num_slots)

    return new_cache


def scaled_as_wide(inputs: Any) -> Any:
    """Per-layer tables scaled like the embedding, by sqrt(H)."""

    def wrong(self: Any, h: Tensor, tokens: Tensor) -> Tensor:
        factor = (self.c.hidden / self.c.per_layer_width) ** 0.5
        table = self.embed_tokens_per_layer
        self._modules["embed_tokens_per_layer"] = lambda ids: table(ids) * factor
        try:
            return inputs(self, h, tokens)
        finally:
            self._modules["embed_tokens_per_layer"] = table

    return wrong


BUGS = (
    Bug(
        "gemma4-scalar-dropped",
        "SGLang gemma4 ports: `layer_scalar` is a buffer, and loaders that walk parameters pass it over",
        f"{PAGE}.Gemma4Layer.forward",
        lambda forward: lambda self, *inputs: forward(self, *inputs) / self.layer_scalar,
        DENSE,
    ),
    Bug(
        "gemma4-per-layer-input-dropped",
        "ports of Gemma 4 that know its dense sizes alone",
        f"{PAGE}.Gemma4Layer.forward",
        lambda forward: lambda self, h, own, *place: forward(self, h, None, *place),
        EDGE,
    ),
    Bug(
        "gemma4-per-layer-table-scaled-by-hidden",
        "the embedding's sqrt(H) used for the table of U features a layer",
        f"{PAGE}.Gemma4Target.per_layer_inputs",
        scaled_as_wide,
        EDGE,
    ),
    Bug(
        "gemma4-experts-third-norm-dropped",
        "experts that read the stream as it is: of the three extra norms one is on the way in",
        f"{PAGE}.Gemma4Layer.forward",
        without("pre_feedforward_layernorm_2"),
        EXPERTS,
    ),
    Bug(
        "gemma4-v-norm-dropped",
        "a norm without weight leaves no tensor in the file, so that nothing is missing without it",
        f"{PAGE}.Gemma4Attention.__init__",
        built(lambda self, c: setattr(self, "v_norm", nn.Identity())),
        DENSE,
    ),
    Bug(
        "gemma4-values-from-turned-keys",
        "attention_k_eq_v read as v = k, where k is already normed and turned",
        f"{PAGE}.Gemma4Attention.forward",
        values_from_turned_keys,
        DENSE,
    ),
    Bug(
        "gemma4-scores-scaled",
        "D^-1/2 where the norm of the queries already holds the scale",
        f"{PAGE}.attend",
        lambda attend: lambda q, k, v, visible, scale: attend(q, k, v, visible, q.shape[-1] ** -0.5),
        DENSE,
    ),
    Bug(
        "gemma4-router-not-renormalised",
        "the weights of the chosen experts left as parts of all",
        f"{PAGE}.route_softmax",
        lambda route: lambda scores, chosen, renormalise: route(scores, chosen, False),
        EXPERTS,
    ),
    Bug(
        "gemma4-per-expert-scale-dropped",
        "a scale of each expert, stored beside the router, that no other mixture has",
        f"{PAGE}.Gemma4Router.forward",
        lambda forward: lambda self, s: unscaled(self, *forward(self, s)),
        EXPERTS,
    ),
    Bug(
        "gemma4-window-one-longer",
        "a window counted without the token itself",
        f"{PAGE}.narrow",
        lambda narrow: lambda v, p, held, w: narrow(v, p, held, w and w + 1),
        DENSE,
    ),
    Bug(
        "gemma4-proportional-rope-as-partial",
        "partial_rotary_factor read as elsewhere: pairs and frequencies of a narrower head",
        f"{PAGE}.rotate",
        partial_in_place_of_proportional,
        DENSE,
    ),
    Bug(
        "gemma4-softcap-missing",
        "logits as the head gives them",
        f"{PAGE}.Gemma4Config.from_hf",
        read(softcap=lambda c: None),
        DENSE,
    ),
    Bug(
        "gemma4-first-donor",
        "shared layers that read the first layer of their kind in place of the last",
        f"{PAGE}.Gemma4Config.last_own",
        lambda last: lambda self, layer_type: self.layer_types.index(layer_type),
        EDGE,
    ),
    Bug(
        "gemma4-embedding-scale-not-rounded",
        "sqrt(H) multiplied in float32, as no checkpoint was trained",
        f"{PAGE}.scaled",
        lambda scaled: lambda rows, width: (rows.float() * width**0.5).to(rows.dtype),
        ROUNDING,
    ),
    Bug(
        "gemma4-text-blocks-causal",
        "image attention left causal on the sliding layers",
        f"{PAGE}.later_of_block",
        lambda ahead: lambda *place: torch.zeros_like(ahead(*place)),
        IMAGES,
    ),
    Bug(
        "gemma4-twin-scalar-not-fused",
        "a fused end of a layer that leaves `layer_scalar` out",
        f"{TWIN}.Gemma4Layer.end",
        without_scalar,
        TWIN_DENSE,
    ),
    Bug(
        "gemma4-twin-router-unscaled",
        "the router's norm asked for g in place of H^-1/2 g",
        f"{TWIN}.RouterScale.matrix",
        lambda matrix: property(lambda self: self.weight),
        TWIN_EXPERTS,
    ),
    Bug(
        "gemma4-twin-values-not-normed",
        "a fused rope and KV write made for models that do not norm values",
        f"{ATEN}.qk_rope_kv_write",
        without_v_norm,
        TWIN_DENSE,
    ),
    Bug(
        "gemma4-twin-shared-queries-unturned",
        "layers that write no keys skip the kernel that would have turned their queries, too",
        f"{ATEN}.q_rope",
        unturned,
        TWIN_EDGE,
    ),
    Bug(
        "gemma4-twin-shared-queries-turned-by-column",
        "positions of a chunk taken for its columns where no key is written",
        f"{ATEN}.q_rope",
        turned_by_column,
        CACHED,
    ),
    Bug(
        "gemma4-twin-per-layer-input-of-the-next",
        "the packed inputs of all layers cut one layer too late",
        f"{TWIN}.Gemma4Target.per_layer_inputs",
        one_layer_on,
        TWIN_EDGE,
    ),
    Bug(
        "gemma4-twin-sampling-without-softcap",
        "a softcap moves no argmax, so greedy text never shows that it is missing",
        f"{TWIN}.CappedHead.logits",
        lambda logits: lambda self, x: self.plain.logits(x),
        SAID,
    ),
    Bug(
        "gemma4-twin-draft-gets-the-cap",
        "a shared head handed over with the softcap of the target",
        "optimized.drafts.eagle3.Eagle3Draft.share_head",
        capped_for_all,
        SHARED,
    ),
    Bug(
        "gemma4-twin-experts-counted-from-zero",
        "every rank takes the ids of all experts for its own",
        f"{TWIN}.WholeExperts.__init__",
        lambda build: lambda self, *sizes: (build(self, *sizes), setattr(self, "first", 0))[0],
        RANKS,
    ),
    Bug(
        "gemma4-twin-experts-not-summed",
        "a rank norms the sum over its own experts",
        f"{TWIN}.sum_in_rank_order",
        lambda add: lambda group, partial: partial,
        RANKS,
    ),
    Bug(
        "gemma4-twin-kv-replica-by-remainder",
        "rank r given key/value head r % G in place of r // (W / G)",
        f"{TWIN}.kv_run",
        lambda run: (
            lambda heads, rank, ranks: (
                slice(rank % heads, rank % heads + 1) if ranks > heads else run(heads, rank, ranks)
            )
        ),
        RANKS,
    ),
    Bug(
        "gemma4-twin-cache-for-every-layer",
        "memory for keys of layers that read their donor's",
        f"{TWIN}.Gemma4Target.new_cache",
        room_for_every_layer,
        CACHE,
    ),
)
