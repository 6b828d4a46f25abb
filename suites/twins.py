"""Text targets that have twins: what the claims over all of them draw, pin and ask of each.

A choice of experts is no number near another: where rounding may choose either of two, neither is wrong, so drawn texts
are those whose choices are clear.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import pytest
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from reference.targets.deepseek import Router
from suites.draws import Drawn, variant
from suites.families import deepseek, gemma3, gemma4, qwen3_moe
from suites.opened import OpenTarget
from suites.scripted import Loop, tiny_draft


class Share(NamedTuple):
    """A target and how many ranks share it."""

    ranks: int
    drawn: Drawn


Lead = Callable[[OpenTarget, Tensor], float]


def undivided(target: OpenTarget, tokens: Tensor) -> float:
    """Nobody has to choose."""
    return float("inf")


class Family(NamedTuple):
    """One family of targets, or one size of a family whose sizes differ in kind."""

    pair: str
    targets: st.SearchStrategy[Drawn]
    pinned: tuple[tuple[Drawn, int, int], ...]
    """with the batch and the width of a text"""
    shares: st.SearchStrategy[Share]
    pinned_shares: tuple[Share, ...]
    small: Drawn
    lead: Lead = undivided
    """by how much a chosen expert is ahead of a rejected one at least, in root mean squares of the scores"""
    heads: Callable[[Any, str], int] = lambda config, name: config.heads if ".q_proj." in name else config.kv_heads
    """how many a parameter of heads has"""


def shared(ranks: tuple[int, ...], make: Callable[[int], st.SearchStrategy[Drawn]]) -> st.SearchStrategy[Share]:
    """Sizes that a number of ranks divide."""
    return st.sampled_from(ranks).flatmap(lambda size: make(size).map(lambda drawn: Share(size, drawn)))


def least(target: OpenTarget, tokens: Tensor, is_router: Callable[[str, nn.Module], bool], note: Any) -> float:
    """The least of what `note(target, router, inputs, outputs)` says of every router while a text is read."""
    leads = [float("inf")]
    hooks = [
        module.register_forward_hook(lambda router, args, out: leads.append(note(target, router, args, out)))
        for name, module in target.module.named_modules()
        if is_router(name, module)
    ]
    target(tokens)
    for hook in hooks:
        hook.remove()
    return min(leads)


def ahead(strengths: Tensor, num_chosen: int) -> float:
    """By how much the last that is chosen is ahead of the first that is not.

    strengths  [..., E]
    """
    # nobody is behind the last
    behind = F.pad(strengths.sort(-1, descending=True).values, (0, 1), value=float("-inf"))
    return float((behind[..., num_chosen - 1] - behind[..., num_chosen]).min())


def of_scores(target: OpenTarget, router: nn.Module, args: tuple[Tensor, ...], scores: Tensor) -> float:
    """A router whose output is its scores."""
    return ahead(scores, target.config.experts_per_token) / float(scores.square().mean().sqrt())


def of_groups(target: OpenTarget, router: Any, args: tuple[Tensor, ...], chosen: tuple[Tensor, Tensor]) -> float:
    """A router that chooses groups before it chooses experts."""
    c, scores = target.config, F.linear(args[0], router.weight)
    p = scores.sigmoid() + router.e_score_correction_bias if c.sigmoid_router else scores.softmax(-1)
    grouped = p.unflatten(-1, (c.groups, -1))
    power = grouped.topk(1 + c.sigmoid_router).values.sum(-1)
    weakest = power.sort(-1, descending=True).values[..., c.groups_kept - 1, None]
    left = grouped.masked_fill((power < weakest)[..., None], float("-inf")).flatten(-2)
    return min(ahead(power, c.groups_kept), ahead(left, c.experts_per_token)) / float(scores.square().mean().sqrt())


def _gemma3() -> Family:
    text, few = gemma3.TEXT, {"num_hidden_layers": 2, "intermediate_size": 48}
    stretched = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 100.0}
    ropes = dict.fromkeys((gemma3.FULL, gemma3.SLIDING), stretched)
    untied = {"tie_word_embeddings": False, "attention_bias": False, "num_hidden_layers": 2, "layer_types": None}
    few["layer_types"] = text["layer_types"][1:3]
    return Family(
        "gemma3",
        gemma3.gemma3_texts(),
        (
            (gemma3.PINNED_TEXT, 2, 20),
            (variant(text, 5, **untied), 1, 9),
            (variant(text, 6, max_position_embeddings=8, rope_parameters=ropes), 1, 20),
        ),
        shared((2, 3, 4), lambda ranks: gemma3.gemma3_texts(max_layers=3, ranks=ranks)),
        (
            Share(2, variant(text, 2, **few)),
            Share(3, variant(text, 3, **few, num_attention_heads=6, num_key_value_heads=3)),
            # two ranks for each key/value head, and a last rank without a row of the vocabulary
            Share(4, variant(text, 5, **few, vocab_size=130)),
        ),
        LOOPS["gemma3"].target,
    )


def _gemma4(size: str, pinned: tuple[tuple[Drawn, int, int], ...], *shares: Share, **routes: Any) -> Family:
    def heads(config: Any, name: str) -> int:
        # "layers." and the number of the layer
        return config.heads if ".q_proj." in name else config.kind(int(name.split(".")[1])).kv_heads

    sizes = st.sampled_from(gemma4.SIZES)
    drawn_shares = shared((2, 3, 4), lambda ranks: sizes.flatmap(lambda any_: gemma4.gemma4_targets(any_, ranks)))
    targets, small = gemma4.gemma4_targets(size), gemma4.PINNED[size]
    return Family("gemma4", targets, pinned, drawn_shares, shares, small, heads=heads, **routes)


FEW_LAYERS = {"num_hidden_layers": 3, "layer_types": [gemma4.SLIDING, gemma4.FULL, gemma4.FULL]}


def _share(ranks: int, config: Mapping[str, Any], **changes: Any) -> Share:
    """Three layers of a size of Gemma 4, the last one shared where the size shares."""
    few = {**FEW_LAYERS, "num_kv_shared_layers": min(1, config.get("num_kv_shared_layers", 0))}
    return Share(ranks, gemma4.drawn_of({**config, **few}, ranks, intermediate_size=48, **changes))


def _qwen3_moe() -> Family:
    raw = qwen3_moe.RAW
    few = {"num_hidden_layers": 2, "mlp_only_layers": [1], "decoder_sparse_step": 1, "intermediate_size": 48}
    return Family(
        "qwen3_moe",
        qwen3_moe.qwen3_moe_targets(),
        ((qwen3_moe.PINNED_NORMED, 2, 20), (qwen3_moe.PINNED_RAW, 2, 20)),
        shared((2, 3, 4), lambda ranks: qwen3_moe.qwen3_moe_targets(max_layers=3, ranks=ranks)),
        (
            Share(2, variant(raw, 2, **few)),
            Share(3, variant(raw, 3, **few, num_key_value_heads=3)),
            # two ranks for each key/value head
            Share(4, variant(raw, 5, **few, num_attention_heads=8)),
        ),
        LOOPS["qwen3_moe"].target,
        lambda target, tokens: least(target, tokens, lambda name, _: name.endswith("mlp.gate"), of_scores),
    )


def _deepseek() -> Family:
    few = {"num_hidden_layers": 2, "first_k_dense_replace": 1}
    pinned = (deepseek.PINNED_LITE, deepseek.PINNED_LIMITED, deepseek.PINNED_SIGMOID)
    return Family(
        "deepseek",
        deepseek.deepseek_targets(max_layers=3),
        tuple((drawn, 2, 12) for drawn in pinned),
        shared((2, 4), lambda ranks: deepseek.deepseek_targets(max_layers=2, ranks=ranks)),
        (
            Share(2, variant(deepseek.SIGMOID, 2, **few)),
            Share(4, variant(deepseek.LIMITED, 3, **few)),
            Share(4, variant(deepseek.LITE, 5, **few)),
        ),
        LOOPS["deepseek"].target,
        lambda target, tokens: least(target, tokens, lambda _, module: isinstance(module, Router), of_groups),
        lambda config, name: config.heads,
    )


# few words: a draft of random weights is right often enough for every count to occur
LOOPS = {
    "gemma3": Loop(gemma3.tiny_gemma3(5, vocab=5, tie_word_embeddings=False), tiny_draft(6, vocab=5), (5, 1, 3)),
    "gemma4": Loop(gemma4.tiny_gemma4(6, vocab=5, final_logit_softcapping=1.0), tiny_draft(7, vocab=5), (5, 1, 3)),
    "qwen3_moe": Loop(qwen3_moe.tiny_qwen3_moe(6, vocab=5), tiny_draft(7, vocab=5), (5, 1, 3)),
    "deepseek": Loop(deepseek.tiny_deepseek(6, vocab=5), tiny_draft(7, vocab=5), (5, 1, 3)),
}
_short = tiny_draft(10, vocab=5, eagle_config={"eagle_aux_hidden_state_layer_ids": [1, 0]})
_routed = {"num_hidden_layers": 2, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1}
# every interpreted program costs milliseconds
BRIEF = {
    "gemma3": LOOPS["gemma3"]._replace(lengths=(2, 1)),
    "gemma4": LOOPS["gemma4"]._replace(
        target=gemma4.tiny_gemma4(6, 5, **FEW_LAYERS, num_kv_shared_layers=1), lengths=(3,)
    ),
    "qwen3_moe": Loop(qwen3_moe.tiny_qwen3_moe(9, vocab=5, num_hidden_layers=2, mlp_only_layers=[0]), _short, (2, 1)),
    "deepseek": Loop(deepseek.tiny_deepseek(9, vocab=5, **_routed), _short, (2, 1)),
}

_dense = gemma4.drawn_of(gemma4.DENSE, attention_k_eq_v=False, attention_bias=True, tie_word_embeddings=False)
FAMILIES = {
    "gemma3": _gemma3(),
    "gemma4-dense": _gemma4("dense", ((gemma4.PINNED["dense"], 2, 14), (_dense, 1, 9))),
    "gemma4-experts": _gemma4(
        "experts",
        ((gemma4.PINNED["experts"], 2, 14),),
        lead=lambda target, tokens: least(target, tokens, lambda name, _: name.endswith("router.proj"), of_scores),
    ),
    "gemma4-edge": _gemma4(
        "edge",
        ((gemma4.PINNED["edge"], 2, 14), (gemma4.tiny_gemma4(4), 1, 9)),
        # ranks share a model of any size. One full key/value head for two ranks
        _share(2, gemma4.DENSE),
        # three heads for three ranks
        _share(3, gemma4.EXPERTS, num_attention_heads=6, num_key_value_heads=3),
        # two sliding heads for four ranks, whose last has no words
        _share(4, gemma4.EXPERTS, num_experts=8, vocab_size=130, vocab_size_per_layer_input=130),
        _share(4, gemma4.EDGE),
    ),
    "qwen3_moe": _qwen3_moe(),
    "deepseek": _deepseek(),
}
SHARED = ("gemma3", "gemma4-edge", "qwen3_moe", "deepseek")
"""those whose `shares` are drawn: one of each pair"""
WINDOWED = ("gemma3", "gemma4-dense", "gemma4-edge")
"""those whose layers look back from where they are"""


def of(*names: str) -> pytest.MarkDecorator:
    """A claim about each of these families, in the name of its pair."""
    marked = ((name, pytest.mark.pair(FAMILIES[name].pair)) for name in names)
    return pytest.mark.parametrize(
        "family", [pytest.param(FAMILIES[name], id=name, marks=mark) for name, mark in marked]
    )


of_every_loop = pytest.mark.parametrize("pair", LOOPS)
