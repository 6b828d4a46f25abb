"""Bugs of DeepSeek V2 and V3: latents, yarn, routers, captures."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from harness.planting import Bug
from reference.ops.moe import strongest

CLAIMS = "suites/correctness/test_witness_deepseek.py"
TEXT = f"{CLAIMS}::test_the_reference_equals_transformers_at_every_capture_point"
TWO_PASSES = f"{CLAIMS}::test_two_passes_over_a_cache_of_latents_equal_one"
ABSORBED = f"{CLAIMS}::test_attention_absorbed_is_attention_as_written"
EPSILON = f"{CLAIMS}::test_the_epsilon_of_the_latents_is_a_fact_of_its_own"
BEYOND = f"{CLAIMS}::test_the_next_token_layer_is_accounted_for_and_left_alone"
DENIED = f"{CLAIMS}::test_a_next_token_layer_that_the_config_denies_is_refused"
FINE = f"{CLAIMS}::test_the_bias_that_chooses_keeps_its_precision[dtype0]"

PAGE, MLA = "reference.targets.deepseek", "reference.ops.mla"


def yarn_power(power: int) -> Callable[[Any], Any]:
    """The softmax factor with another power of yarn's m."""

    def plant(scale: property) -> property:
        def wrong(self: Any) -> float:
            plain = (self.nope_dim + self.rope_dim) ** -0.5
            return plain * (scale.fget(self) / plain) ** (power / 2)  # type: ignore[misc]

        return property(wrong)

    return plant


def turned(place: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Any], Any]:
    """Rope at other positions: (features, positions) -> positions."""
    return lambda rotate: lambda x, positions, *facts: rotate(x, place(x, positions), *facts)


def built(change: Callable[[Any], None]) -> Callable[[Any], Any]:
    """A module that is changed once it is built."""

    def plant(build: Any) -> Any:
        def init(self: Any, *facts: Any) -> None:
            build(self, *facts)
            change(self)

        return init

    return plant


def key_first(attention: Any) -> None:
    """The shared key taken from the head of the projection, the latent from its tail."""
    attention.kv_a_proj_with_mqa.register_forward_hook(lambda _, x, y: y.roll(-attention.c.rope_dim, -1))


def turning_first(query: Any) -> Any:
    """Every head's features that turn taken from its head."""

    def read(self: Any, x: Tensor) -> Tensor:
        return query(self, x).unflatten(-1, (self.c.heads, -1)).roll(-self.c.rope_dim, -1).flatten(-2)

    return read


def unnormed(query: Any) -> Any:
    def read(self: Any, x: Tensor) -> Tensor:
        return query(self, x) if self.c.q_rank is None else self.q_b_proj(self.q_a_proj(x))

    return read


def values_first(written: Any) -> Any:
    """The rows of kv_b_proj read as values, then keys."""
    return lambda q, qr, latent, key, up, *rest: written(
        q, qr, latent, key, up.roll(-(up.shape[1] - q.shape[-1]), 1), *rest
    )


def values_behind(attend: Any) -> Any:
    """Absorbed values cut from the wrong end of a slot."""
    return lambda q, k, v, *rest: attend(q, k, k[..., -v.shape[-1] :] if k.shape[2] == 1 else v, *rest)


def router(
    by_bias: bool = False, unbiased: bool = False, raw: bool = False, scaled: bool = True, other: bool = False
) -> Callable[[Any], Any]:
    """The router with one mistake."""

    def forward(self: Any, u: Tensor) -> tuple[Tensor, Tensor]:
        c, scores = self.c, F.linear(u, self.weight)
        p = scores.sigmoid() if c.sigmoid_router != other else scores.softmax(-1)
        bias = self.e_score_correction_bias if c.sigmoid_router else torch.zeros_like(p[0, 0])
        strength = p if unbiased else p + bias
        ids = strongest(strength, c.experts_per_token, c.groups, c.groups_kept, 1 + c.sigmoid_router)
        weights = (strength if by_bias else p).gather(-1, ids)
        if c.norm_topk_prob and not raw:
            weights = weights / weights.sum(-1, keepdim=True)
        return ids, weights * c.routed_scaling if scaled else weights

    return lambda right: forward


def without_residual(captured: Any) -> Any:
    """What each layer adds, in place of what has run up to it."""
    return lambda stream, points: captured([stream[0], *(b - a for a, b in pairwise(stream))], points)


def after_the_norm(decode: Any) -> Any:
    def normed(self: Any, *rest: Any) -> Any:
        out = decode(self, *rest)
        return out._replace(aux=self.norm(out.aux))

    return normed


BUGS = (
    Bug(
        "deepseek-mscale-once",
        "yarn's factor on the queries alone",
        f"{MLA}.Latent.scale",
        yarn_power(1),
        TEXT,
    ),
    Bug(
        "deepseek-mscale-none",
        "vLLM deepseek_v2.py: a shared rope config rewritten, and read again without its factor",
        f"{MLA}.Latent.scale",
        yarn_power(0),
        TEXT,
    ),
    Bug(
        "deepseek-rope-halves",
        "halves turned where the model turns neighbours",
        f"{MLA}.rotate",
        lambda rotate: lambda x, positions, rope, interleaved: rotate(x, positions, rope, not interleaved),
        TEXT,
    ),
    Bug(
        "deepseek-shared-key-unturned",
        "the one key of all heads cached before its turn",
        f"{MLA}.rotate",
        turned(lambda x, positions: positions * 0 if x.shape[2] == 1 else positions),
        TEXT,
    ),
    Bug(
        "deepseek-rope-by-column",
        "positions counted from the first column of a call",
        f"{MLA}.rotate",
        turned(lambda x, positions: positions - positions[:, :1]),
        TWO_PASSES,
    ),
    Bug(
        "deepseek-values-before-keys",
        "rows of kv_b_proj in the wrong order",
        f"{MLA}.written",
        values_first,
        TEXT,
    ),
    Bug(
        "deepseek-absorbed-values-from-the-key",
        "a slot of latent and key cut at the wrong end",
        f"{MLA}.attend",
        values_behind,
        ABSORBED,
    ),
    Bug(
        "deepseek-key-before-latent",
        "columns of kv_a_proj_with_mqa in the wrong order",
        f"{MLA}.LatentAttention.__init__",
        built(key_first),
        TEXT,
    ),
    Bug(
        "deepseek-query-turns-its-first-features",
        "features of a query in the wrong order",
        f"{MLA}.LatentAttention.query",
        turning_first,
        TEXT,
    ),
    Bug(
        "deepseek-query-latent-unnormed",
        "a fused q_a and kv_a product that norms one of its halves",
        f"{MLA}.LatentAttention.query",
        unnormed,
        TEXT,
    ),
    Bug(
        "deepseek-latent-eps-of-the-stream",
        "SGLang and vLLM deepseek_v2.py: rms_norm_eps in the norms of the latents",
        f"{PAGE}.read_latent",
        lambda read: lambda keys: {**read(keys), "latent_norm_eps": keys.number("rms_norm_eps", 1e-6)},
        EPSILON,
    ),
    Bug(
        "deepseek-bias-weighs",
        "the bias that balances experts left in their weights",
        f"{PAGE}.Router.forward",
        router(by_bias=True),
        TEXT,
    ),
    Bug(
        "deepseek-bias-dropped",
        "a buffer that is no parameter, left out of the choice",
        f"{PAGE}.Router.forward",
        router(unbiased=True),
        TEXT,
    ),
    Bug(
        "deepseek-bias-in-half-precision",
        "a model moved to bfloat16 together with its bias",
        f"{PAGE}.Router._apply",
        lambda right: nn.Module._apply,
        FINE,
    ),
    Bug(
        "deepseek-weights-not-renormalised",
        "norm_topk_prob ignored",
        f"{PAGE}.Router.forward",
        router(raw=True),
        TEXT,
    ),
    Bug(
        "deepseek-weights-unscaled",
        "routed_scaling_factor ignored",
        f"{PAGE}.Router.forward",
        router(scaled=False),
        TEXT,
    ),
    Bug(
        "deepseek-router-of-the-other-version",
        "softmax and sigmoid mistaken for each other",
        f"{PAGE}.Router.forward",
        router(other=True),
        TEXT,
    ),
    Bug(
        "deepseek-groups-ignored",
        "experts chosen from all groups",
        f"{PAGE}.strongest",
        lambda right: lambda strengths, chosen, *groups: right(strengths, chosen),
        TEXT,
    ),
    Bug(
        "deepseek-groups-by-their-best",
        "V2's strength of a group used for V3",
        f"{PAGE}.strongest",
        lambda right: lambda strengths, chosen, groups, kept, best=1: right(strengths, chosen, groups, kept),
        TEXT,
    ),
    Bug(
        "deepseek-shared-experts-dropped",
        "the block that every token reads left out",
        f"{PAGE}.Experts.forward",
        lambda forward: lambda self, u: forward(self, u) - self.shared_experts(u),
        TEXT,
    ),
    Bug(
        "deepseek-shared-experts-scaled",
        "the block that every token reads multiplied like a routed one",
        f"{PAGE}.Experts.forward",
        lambda forward: lambda self, u: forward(self, u) + (self.gate.c.routed_scaling - 1) * self.shared_experts(u),
        TEXT,
    ),
    Bug(
        "deepseek-next-token-layer-unknown",
        "a strict reader without a list of what may be there",
        f"{PAGE}.DeepseekConfig.ignored",
        lambda right: property(lambda self: ()),
        BEYOND,
    ),
    Bug(
        "deepseek-next-token-layer-always-ignored",
        "layers behind the last left alone whatever the config says",
        f"{PAGE}.DeepseekConfig.ignored",
        lambda right: property(lambda self: ((f"layers.{self.layers}.*", "left alone"),)),
        DENIED,
    ),
    Bug(
        "deepseek-capture-one-late",
        "SGLang #25454",
        f"{PAGE}.captured",
        lambda captured: lambda stream, points: captured([*stream[1:], stream[-1]], points),
        TEXT,
    ),
    Bug(
        "deepseek-capture-without-residual",
        "SGLang #39286",
        f"{PAGE}.captured",
        without_residual,
        TEXT,
    ),
    Bug(
        "deepseek-capture-after-the-norm",
        "states taken as the next block reads them",
        f"{PAGE}.DeepseekTarget.decode",
        after_the_norm,
        TEXT,
    ),
)
