"""Bugs of the twin of Gemma 3: what a fused norm, two kinds of layers and a scaled table invite."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor

from harness.planting import Bug
from optimized.ops.kinds import NormKind

CLAIMS = "suites/correctness/test_twin_gemma3.py"
TWINS = "suites/correctness/test_twins.py"
REFERENCE = f"{TWINS}::test_the_target_is_the_reference[gemma3]"
BEHIND_CACHE = f"{TWINS}::test_behind_its_cache_the_target_is_the_reference[gemma3]"
SHARED = f"{CLAIMS}::test_a_draft_reads_the_shared_table_unscaled_on_any_number_of_ranks"
CHAIN = f"{TWINS}::test_verify_has_the_bits_of_decode[torch.float32-gemma3]"
MANY = f"{TWINS}::test_ranks_hold_their_shards_and_compute_what_one_computes[gemma3]"

TWIN, ATEN, PARTS = "optimized.targets.gemma3", "optimized.ops.aten.Aten", "optimized.parallel"


def built(change: Callable[[Any], None]) -> Callable[[Any], Any]:
    """A layer that is changed once it is built."""

    def plant(build: Any) -> Any:
        def init(self: Any, *args: Any) -> None:
            build(self, *args)
            change(self)

        return init

    return plant


def widen(layer: Any) -> None:
    layer.window = layer.window and layer.window + 1


def scale_by_width(layer: Any) -> None:
    layer.c = replace(layer.c, query_scale=layer.c.head_dim**-0.5)


def norm_after_add(right: Any) -> Any:
    """The sum normed by both norms, one after the other: as if the first were one of BERT's."""

    def sandwich(self: Any, branch: Tensor, residual: Tensor, post: Tensor, pre: Tensor, *how: Any) -> Any:
        total, _ = self.add_rmsnorm(branch, residual, post, *how)
        return self.add_rmsnorm(total, None, pre, *how)

    return sandwich


def times_w(right: Any) -> Any:
    """1 + w read as w, in the fused norm alone."""
    return lambda self, *tensors: right(self, *tensors[:5], NormKind(cast_first=False))


def capture_normed(right: Any) -> Any:
    """What a layer's projections read in place of what runs past them."""

    def call(self: Any, branch: Tensor, h: Tensor | None, below: Any, *place: Any) -> Any:
        normed, _ = self.input_layernorm(branch, h, below)
        return *right(self, branch, h, below, *place)[:2], normed

    return call


def window_for_one_query(right: Any) -> Any:
    """A window that decode keeps and verify, with several queries, forgets."""

    def attend(self: Any, q: Tensor, k: Tensor, v: Tensor, positions: Tensor, scale: float, *sight: Any) -> Tensor:
        window, *rest = sight
        return right(self, q, k, v, positions, scale, window if q.shape[1] == 1 else None, *rest)

    return attend


def window_by_column(right: Any) -> Any:
    """Keys behind the chunk's first column forgotten beyond a window that begins there."""

    def attend(self: Any, q: Tensor, k: Tensor, v: Tensor, positions: Tensor, scale: float, *sight: Any) -> Tensor:
        window, *rest = sight
        return right(self, q, k, v, positions, scale, window and min(window, q.shape[1]), *rest)

    return attend


BUGS = (
    Bug(
        "gemma3 twin: window one longer",
        "a window counted without the token itself",
        f"{TWIN}.Gemma3Layer.__init__",
        built(widen),
        REFERENCE,
    ),
    Bug(
        "gemma3 twin: verify without a window",
        "kernels for several queries that take no window",
        f"{ATEN}.attend",
        window_for_one_query,
        CHAIN,
    ),
    Bug(
        "gemma3 twin: window cut at the chunk",
        "a window that counts columns of the call",
        f"{ATEN}.attend",
        window_by_column,
        BEHIND_CACHE,
    ),
    Bug(
        "gemma3 twin: local rope on full layers",
        "ports with one rope for both kinds of layers",
        f"{TWIN}.Gemma3Target.frequencies",
        lambda right: lambda self, *seen: right(self, *seen)[1:] * 2,
        REFERENCE,
    ),
    Bug(
        "gemma3 twin: scale from the head's width",
        "head_dim^-1/2 in place of query_pre_attn_scalar^-1/2",
        f"{TWIN}.Gemma3Layer.__init__",
        built(scale_by_width),
        REFERENCE,
    ),
    Bug(
        "gemma3 twin: fused norm times w",
        "a fused norm of Llama reused for Gemma",
        f"{ATEN}.sandwich_norm",
        times_w,
        REFERENCE,
    ),
    Bug(
        "gemma3 twin: head norms times w",
        "a rope kernel of Qwen3 reused for Gemma",
        f"{ATEN}.qk_rope_kv_write",
        lambda right: lambda self, *args: right(self, *args[:10]),
        REFERENCE,
    ),
    Bug(
        "gemma3 twin: branch normed after the add",
        "SGLang #32383: norms fused in the wrong order",
        f"{ATEN}.sandwich_norm",
        norm_after_add,
        REFERENCE,
    ),
    Bug(
        "gemma3 twin: branch not normed",
        "an add and a norm fused as in Llama",
        f"{TWIN}.GemmaNorm.__call__",
        lambda right: lambda self, x, residual=None, post=None: right(self, x, residual),
        REFERENCE,
    ),
    Bug(
        "gemma3 twin: embedding unscaled",
        "a draft's reading of the shared table used for the target",
        f"{PARTS}.VocabEmbedding.__call__",
        lambda right: lambda self, ids, scale=None: right(self, ids),
        REFERENCE,
    ),
    Bug(
        "gemma3 twin: shared table read scaled",
        "the target's reading of the shared table used for the draft",
        f"{PARTS}.VocabEmbedding.__call__",
        lambda right: lambda self, ids, scale=None: right(self, ids, self.hidden**0.5),
        SHARED,
    ),
    Bug(
        "gemma3 twin: silu",
        "an activation that every other target has",
        f"{PARTS}.GateUpLinear.__init__",
        lambda right: lambda self, *args: right(self, *args[:5]),
        REFERENCE,
    ),
    Bug(
        "gemma3 twin: capture after the norm",
        "SGLang #32383",
        f"{TWIN}.Gemma3Layer.__call__",
        capture_normed,
        REFERENCE,
    ),
    Bug(
        "gemma3 twin: partial sums normed",
        "SGLang #28343: a norm fused before the reduction over ranks",
        f"{PARTS}.sum_in_rank_order",
        lambda right: lambda group, partial: partial * group.size,
        MANY,
    ),
)
