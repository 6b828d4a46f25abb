"""Bugs of D-Flash: its context, its block, its config and its twin."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from harness.conventions import BEFORE, DFLASH_KEYS
from harness.planting import Bug
from reference.ops.cache import EMPTY
from reference.ops.rope import rotate

PAGE, TWIN = "reference.drafts.dflash", "optimized.drafts.dflash"
CLAIM, SERVES = "suites/correctness/test_dflash.py", "suites/correctness/test_twin_dflash.py"
GOLDEN = f"{CLAIM}::test_the_reference_fills_in_what_the_trainer_does"
OUTSIDE = f"{CLAIM}::test_transformers_asks_the_same_blocks_and_fills_them_in_alike"
TRAINED = f"{CLAIM}::test_what_is_trained_is_what_is_served"
REJECTED = f"{CLAIM}::test_columns_that_did_not_stand_change_no_proposal"
CAUSALITY = "suites/correctness/test_dflash_keys.py::test_speculators_speaks_of_sliding_layers_alone_and_must_speak"
FILLS = f"{SERVES}::test_the_twin_fills_in_what_the_reference_does"
CYCLE = f"{SERVES}::test_a_cycle_in_triton_is_the_cycle_in_aten"


def told(change: Callable[[dict[str, Any]], dict[str, Any]]) -> Callable[[Any], Any]:
    """A reader of configs that changes some facts."""
    return lambda read: lambda config: (facts := read(config)) | change(facts)


def before_layer(read: Any) -> Any:
    """Ids of D-Flash as if they named what enters a layer."""
    return lambda given, word, stated_by, *rest: read(
        given, BEFORE if stated_by in DFLASH_KEYS else word, stated_by, *rest
    )


def context(norm_in: bool = False, norm_k: bool = True, turn: bool = True) -> Callable[[Any], Any]:
    """The keys and values of the context with one of their steps wrong."""

    def remember(self: Any, context: Tensor, positions: Tensor, cache: Any, slots: Tensor) -> None:
        x, attn = self.input_layernorm(context) if norm_in else context, self.self_attn
        k, v = (project(x).unflatten(-1, (-1, self.c.head_dim)) for project in (attn.k_proj, attn.v_proj))
        k = attn.k_norm(k) if norm_k else k
        cache.write(self.index, rotate(k, positions, self.c.rope) if turn else k, v, slots)

    return lambda _: remember


def later(block: Any) -> Any:
    """A block stands one position further, as if the root had been read."""

    def at(self: Any, tokens: Tensor, positions: Tensor, cache: Any, slots: Any = None, visible: Any = None) -> Any:
        return block(self, tokens, positions + 1, cache, positions if slots is None else slots, visible)

    return at


def row_before(block: Any) -> Any:
    """Draft k is read at row k - 1: the root's row proposes too."""

    def moved(self: Any, *args: Any) -> Any:
        out = block(self, *args)
        return out._replace(logits=out.logits.roll(1, 1))

    return moved


def sees_all(block: Any) -> Any:
    """A block sees every slot that was ever written."""

    def wide(self: Any, tokens: Tensor, positions: Tensor, cache: Any, slots: Any = None, visible: Any = None) -> Any:
        if visible is None:
            held = cache.place(positions, positions) < EMPTY
            visible = held[:, None].expand(-1, tokens.shape[1], -1)
        return block(self, tokens, positions, cache, slots, visible)

    return wide


def stale(start: Any) -> Any:
    """The context of the last position is left to the next cycle, as recurrent drafts leave it."""

    def late(self: Any, out: Any, tokens: Tensor, following: Tensor, positions: Tensor, last: Tensor) -> Any:
        hidden = torch.arange(tokens.shape[1]) == last[:, None]
        aux = torch.where(hidden[..., None, None], torch.zeros_like(out.aux), out.aux)
        return start(self, out._replace(aux=aux), tokens, following, positions, last)

    return late


def every_layer(read: Any) -> Any:
    """speculators' word about sliding layers taken for a word about all of them."""
    return lambda keys, block, layers, trainer: (
        (not keys.flag("sliding_window_non_causal", True),) * layers if trainer else read(keys, block, layers, trainer)
    )


def blind(attend: Any) -> Any:
    """No query sees ahead of itself."""
    return lambda self, q, k, v, positions, scale, window=None, num_slots=None, ends=None: attend(
        self, q, k, v, positions, scale, window, num_slots
    )


def no_norm(self: Any, aux: Tensor) -> Tensor:
    """The context as `fc` gives it."""
    return self.fc(aux.flatten(2))


def wider(windows: tuple[int | None, ...]) -> tuple[int | None, ...]:
    """Every window one slot wider."""
    return tuple(window and window + 1 for window in windows)


def unpadded(remember: Any) -> Any:
    """Padding of prompts is written at position 0."""
    return lambda self, context, positions, cache, *rest: remember(self, context, positions.clamp(min=0), cache, *rest)


def bug(name: str, origin: str, at: str, make: Callable[[Any], Any], claim: str = GOLDEN) -> Bug:
    """A bug of the draft's page, or of another place."""
    here = at.startswith(("Dflash", "read_facts"))
    return Bug(name, origin, f"{PAGE}.{at}" if here else at, make, claim)


BUGS = (
    bug("D-Flash ids read as before_layer", "vLLM #40727", "harness.conventions._read", before_layer, OUTSIDE),
    bug("context through norm_in", "D-Flash's own layer beside it", "DflashLayer.remember", context(norm_in=True)),
    bug("context keys not normed", "vLLM qwen3_dflash.py", "DflashLayer.remember", context(norm_k=False)),
    bug("context keys not turned", "vLLM qwen3_dflash.py", "DflashLayer.remember", context(turn=False)),
    bug("hidden_norm left out", "loaders that leave it at ones", "DflashDraft.fuse", lambda _: no_norm),
    bug(
        "aux states of D-Flash reversed",
        "vLLM list, 5",
        "DflashDraft.fuse",
        lambda f: lambda self, a: f(self, a.flip(2)),
    ),
    bug(
        "every layer causal in a block", "vLLM 0.33.0", "read_facts", told(lambda f: {"causal": (True,) * f["layers"]})
    ),
    bug("no layer causal in a block", "SGLang", "read_facts", told(lambda f: {"causal": (False,) * f["layers"]})),
    bug(
        "one slot more in a window", "transformers 5.17", "read_facts", told(lambda f: {"windows": wider(f["windows"])})
    ),
    bug("masks are the pad token", "vLLM list", "read_facts", told(lambda f: {"mask_token": 0})),
    bug("a block one position further", "vLLM list, 34", "DflashDraft.block", later),
    bug("draft k read at row k - 1", "D-Spark's rows", "DflashDraft.block", row_before),
    bug("a block sees rejected columns", "vLLM #14649", "DflashDraft.block", sees_all, REJECTED),
    bug("the last context column is left out", "EAGLE-3's lag", "reference.drafting.Block.start", stale, TRAINED),
    bug(
        "speculators' word taken for all layers",
        "vLLM 0.33.0 speculators/algos.py",
        "reference.drafts.dflash_keys._read_causal",
        every_layer,
        CAUSALITY,
    ),
    bug("no query of the twin sees ahead", "vLLM #57964", "optimized.ops.aten.Aten.attend", blind, FILLS),
    bug("padding remembered at position 0", "ragged prompts", f"{TWIN}.DflashDraft.remember", unpadded, FILLS),
    bug(
        "rows of a draft apart",
        "a kernel that takes its rows as contiguous",
        "optimized.drafting.by_draft",
        lambda _: lambda tops: tops,
        CYCLE,
    ),
)
