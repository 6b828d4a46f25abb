"""Every single fact that a draft could be read with otherwise: one table, a row a fact.

A row says what the fact is now, what else it could be, and how the draft runs with it. Weights are shared and nothing
that was given is changed. Rows of the config stand first, so that edits of several facts can be made one after the
other in the order of the table; none of them undoes another.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import permutations
from typing import Any

import torch
from torch import Tensor, nn

from reference.ops.rope import Rope
from suites.audit import variants
from suites.audit.variants import body, with_config, with_layers, with_parts, with_points
from suites.opened import OpenDraft, OpenTarget

EAGLE3 = ("eagle3", "eagle3_mla", "peagle")
MODULES = ("qwen3_moe_mtp", "deepseek_nextn")
AUX = (*EAGLE3, "dflash")
ROPED = (*AUX, *MODULES, "standalone")
THETAS = (10_000.0, 500_000.0, 1_000_000.0)
"""rope bases of published models"""
FACTOR = 2.0
"""of the stretching that is tried where there is none"""
SOFTCAP = 30.0
"""that of published targets"""
EXPERTS = (1, 2, 3, 4, 6, 8)
"""experts a token in published models"""
MOST_STATES = 3
"""aux states of which every order is tried; of more, neighbours change places"""
NORM_HIDES = "the norm hides it"
NOT_FED_BACK = "nothing is fed back"

Value = Any
"""of a fact: plain, hashable, and the same in every session"""
Given = OpenTarget | None
Put = Callable[[OpenDraft, Given, Value], OpenDraft]


@dataclass(frozen=True)
class Fact:
    """One thing that engines and trainers read in more than one way."""

    name: str
    drafts: tuple[str, ...]
    """pairs that have it"""
    now: Callable[[OpenDraft], Value]
    """what it is; None where this draft has no such fact"""
    others: Callable[[OpenDraft, Given], Sequence[Value]]
    """what else it could be; what it is now may be among them"""
    put: Put
    moves_points: bool = False
    """whether it acts on what the target captures"""
    idle: Callable[[OpenDraft], str] = lambda draft: ""
    """why it has no effect on this draft; "" where it may have one"""
    read: Callable[[Any], Value] | None = None
    """what a config says about it; None where no key of any config does"""


@dataclass(frozen=True)
class Edit:
    """One fact of a draft changed."""

    fact: str
    value: Value
    put: Put
    moves_points: bool = False
    """whether it acts on capture ids: `capture_points` of the result are others"""
    idle: str = ""
    """why it cannot be seen, where that is known beforehand"""

    @property
    def name(self) -> str:
        return f"{self.fact}: {shown(self.value)}"

    def apply(self, draft: OpenDraft, target: Given = None) -> OpenDraft:
        """The draft with this one edit: reference side, weights shared, config replaced."""
        return self.put(draft, target, self.value)


def candidates(draft: OpenDraft, target: Given = None) -> tuple[Edit, ...]:
    """Every single edit of an opened draft (reference side), in the order of the table; the target gives limits."""
    found = []
    for fact in FACTS:
        if draft.pair.name in fact.drafts and fact.now(draft) is not None:
            idle, others = fact.idle(draft), dict.fromkeys(fact.others(draft, target))
            found += [edit_of(fact, value, idle) for value in others if value != fact.now(draft)]
    return tuple(found)


def edit_of(fact: Fact, value: Value, idle: str = "") -> Edit:
    """The edit that gives a fact a value, whether the table tries it or not."""
    return Edit(fact.name, value, fact.put, fact.moves_points, idle)


def standing(draft: OpenDraft) -> dict[str, Value]:
    """Every fact of the table as this draft has it now."""
    rows = [fact for fact in FACTS if draft.pair.name in fact.drafts]
    return {fact.name: fact.now(draft) for fact in rows if fact.now(draft) is not None}


def shown(value: Value) -> str:
    """A value as people read it."""
    if isinstance(value, Rope):
        stretched = f" by {value.factor:g}" if value.kind != "default" else ""
        return value.kind + stretched + (f", base {value.theta:g}" if value.theta else "")
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"{value:g}" if isinstance(value, float) else str(value)


def mapped_ids(draft: OpenDraft, value: str) -> Tensor:
    """The target ids that a draft's ids would mean under a reading of its stored map; beyond the vocabulary: its last.

    ->  [Vd]
    """
    stored = draft.module.token_map if draft.pair.name == "standalone" else draft.module.d2t
    own = torch.arange(len(stored), device=stored.device)
    stored = stored + own if isinstance(draft.checkpoint, variants.Restated) else stored
    ids = {"offset": own + stored, "absolute": stored, "none": own}[value]
    return ids.clamp(0, draft.facts.config.vocab - 1)


def _stated(
    name: str,
    drafts: tuple[str, ...],
    read: Callable[[Any], Value],
    others: Callable[[Any, Given], Sequence[Value]],
    facts: Callable[[Any, Value], dict[str, Any]],
    idle: Callable[[OpenDraft], str] = lambda draft: "",
) -> Fact:
    """A fact of the config; `others` and `facts` (the fields that say a value) are asked with the config."""

    def put(draft: OpenDraft, target: Given, value: Value) -> OpenDraft:
        return with_config(draft, **facts(body(draft).c, value))

    def asked(draft: OpenDraft, target: Given) -> Sequence[Value]:
        return others(body(draft).c, target)

    return Fact(name, drafts, lambda draft: read(body(draft).c), asked, put, idle=idle, read=read)


def _flag(
    name: str, drafts: tuple[str, ...], when: str = "", idle: Callable[[OpenDraft], str] = lambda draft: ""
) -> Fact:
    """A field of the config that is on or off; `when`: the field without which it means nothing."""
    return _stated(
        name,
        drafts,
        lambda c: getattr(c, name, None) if getattr(c, when, True) else None,
        lambda c, target: (True, False),
        lambda c, value: {name: value},
        idle,
    )


def _depth(c: Any) -> int | None:
    """Layers; None of a model whose last layers read others' keys, which cannot lose any."""
    shared = getattr(c, "shared_layers", c.layers)
    return c.layers if shared == c.layers else None


def _first_layers(c: Any, layers: int) -> dict[str, Any]:
    """The first layers alone; lists with one entry a layer are cut too."""
    listed = {name: getattr(c, name)[:layers] for name in ("windows", "causal", "layer_types") if getattr(c, name, ())}
    return {**listed, **({"shared_layers": layers} if hasattr(c, "shared_layers") else {"layers": layers})}


def _experts(c: Any) -> int | None:
    """Experts a token, where any number of them can be chosen."""
    return getattr(c, "experts_per_token", None) if hasattr(c, "sparse_step") else None


def _rope(c: Any) -> Rope | None:
    return getattr(c, "rope", None)


def _plain(rope: Rope) -> Rope:
    """Without what its kind does not use, so that equal ropes are equal."""
    return replace(rope, original_length=0) if rope.kind in ("default", "linear", "proportional") else rope


def _thetas(c: Any, target: Given) -> Sequence[float]:
    theirs = _rope(target.config) if target else None
    return (*THETAS, *([theirs.theta] if theirs else []))


def _stretching(c: Any) -> Rope | None:
    """A rope but for its base."""
    return replace(_plain(c.rope), theta=0.0) if _rope(c) else None


def _stretchings(c: Any, target: Given) -> Sequence[Rope]:
    plain = Rope(dim=c.rope.dim, theta=0.0)
    return (plain, replace(plain, kind="linear", factor=FACTOR))


def _pairing(c: Any) -> str | None:
    return None if not hasattr(c, "rope_interleaved") else "interleaved" if c.rope_interleaved else "halves"


def _rope_of(kind: str) -> Fact:
    """The rope of an assistant's queries on one kind of layer."""

    def others(c: Any, target: Given) -> Sequence[Rope]:
        rope = _plain(getattr(c, kind).rope)
        kinds = (rope, Rope(dim=rope.dim), replace(rope, kind="proportional", pairs=rope.dim // 8))
        return [replace(one, theta=theta) for one in kinds for theta in THETAS]

    return _stated(
        f"rope of {kind} layers",
        ("gemma4_assistant",),
        lambda c: _plain(getattr(c, kind).rope),
        others,
        lambda c, value: {kind: replace(getattr(c, kind), rope=value)},
    )


def _pairs(draft: OpenDraft) -> str | None:
    attentions = [layer.self_attn for layer in body(draft).layers]
    return "halves" if all(hasattr(a, "rope") and hasattr(a, "head_dim") for a in attentions) else None


def _shifts(draft: OpenDraft, target: Given) -> Sequence[int]:
    points, last = draft.capture_points, target.num_layers if target else None
    return [s for s in (-1, 1) if min(points) + s >= 0 and (last is None or max(points) + s <= last)]


def _orders(draft: OpenDraft, target: Given) -> Sequence[tuple[int, ...]]:
    """Which of the states of now stands at each place."""
    states = tuple(range(len(draft.capture_points)))
    if len(states) <= MOST_STATES:
        return list(permutations(states))
    return [(*states[:i], i + 1, i, *states[i + 2 :]) for i in states[:-1]]


def _state(draft: OpenDraft) -> str | None:
    reads = getattr(draft.facts.config, "reads", "")
    return "after the final norm" if reads in ("hidden", "keys") else None


def _put_state(draft: OpenDraft, target: Given, value: str) -> OpenDraft:
    if target is None:
        raise ValueError("the state before the final norm is captured behind the target's last layer: pass the target")
    return variants.before_final_norm(draft, target.num_layers)


def _embedding(draft: OpenDraft) -> str | None:
    if draft.pair.name == "gemma4_assistant":
        return "scaled"
    # a model with a scale of its own is no case of this row
    return None if hasattr(body(draft), "embed") else "raw"


def _put_embedding(draft: OpenDraft, target: Given, value: str) -> OpenDraft:
    if value == "raw":
        return variants.with_raw_table(draft)
    table = body(draft).embed_tokens
    return with_parts(draft, embed_tokens=variants.Scaled(table, table.weight.shape[1] ** 0.5))


def _map(draft: OpenDraft) -> str | None:
    if draft.pair.name == "standalone":
        return None if draft.module.token_map is None else "absolute"
    return (
        None
        if _said_map(draft.facts.config) is None
        else ("absolute" if isinstance(draft.checkpoint, variants.Restated) else "offset")
    )


def _said_map(c: Any) -> str | None:
    """What every engine takes the map for."""
    return "offset" if getattr(c, "draft_vocab", c.vocab) < c.vocab else None


def _without(name: str, part: str, *drafts: str) -> Fact:
    """A norm that could be left out."""

    def put(draft: OpenDraft, target: Given, value: bool) -> OpenDraft:
        return with_parts(draft, **{part: nn.Identity()})

    return Fact(name, drafts, lambda draft: True, lambda draft, target: (False,), put)


def _elsewhere(name: str, now: Value, others: Sequence[Value], how: Callable[[Value], dict[str, Any]]) -> Fact:
    """Where an assistant's queries stand and what they see."""

    def put(draft: OpenDraft, target: Given, value: Value) -> OpenDraft:
        return with_layers(draft, lambda layer: variants.Elsewhere(layer, **how(value)))

    return Fact(name, ("gemma4_assistant",), lambda draft: now, lambda draft, target: others, put)


FACTS: tuple[Fact, ...] = (
    _flag("fc_norm", EAGLE3, "use_aux_hidden_state"),
    _flag("norm_before_fc", EAGLE3, "use_aux_hidden_state",
          lambda draft: NORM_HIDES if draft.facts.config.fc_norm and not draft.facts.config.norm_before_fc else ""),
    _flag("norm_before_residual", EAGLE3),
    _flag("norm_before_head", EAGLE3),
    _flag("feedback_normed", EAGLE3, idle=lambda draft: NOT_FED_BACK if draft.pair.name == "peagle" else ""),
    _stated("later_norm", EAGLE3, lambda c: c.later_norm if c.layers > 1 else None,
            lambda c, target: ("input_layernorm", "hidden_norm"), lambda c, value: {"later_norm": value}),
    _stated("draft layers", (*AUX, "gemma4_assistant", "standalone"), _depth,
            lambda c, target: (c.layers - 1,) if c.layers > 1 else (), _first_layers),
    _stated("experts a token", (*MODULES[:1], "standalone"), _experts,
            lambda c, target: [n for n in EXPERTS if n <= c.experts], lambda c, value: {"experts_per_token": value}),
    _flag("norm_topk_prob", (*MODULES[:1], "standalone")),
    _stated("rope theta", ROPED, lambda c: _rope(c) and c.rope.theta, _thetas,
            lambda c, value: {"rope": replace(c.rope, theta=value)}),
    _stated("rope scaling", ROPED, _stretching, _stretchings,
            lambda c, value: {"rope": replace(value, theta=c.rope.theta)}),
    _stated("rope pairs", ("eagle3_mla",), _pairing, lambda c, target: ("halves", "interleaved"),
            lambda c, value: {"rope_interleaved": value == "interleaved"}),
    _stated("causal block", ("dflash",), lambda c: all(c.causal), lambda c, target: (True, False),
            lambda c, value: {"causal": (value,) * c.layers}),
    _rope_of("sliding"),
    _rope_of("full"),
    _stated("softcap", ("gemma4_assistant",), lambda c: c.softcap or 0.0, lambda c, target: (0.0, SOFTCAP),
            lambda c, value: {"softcap": value or None}),
    Fact("rope pairs", ("eagle3", "peagle", "dflash", *MODULES[:1], "standalone"), _pairs,
         lambda draft, target: ("halves", "interleaved"),
         lambda draft, target, value: with_layers(draft, variants.interleaved)),
    Fact("capture points", AUX, lambda draft: draft.capture_points or None, lambda draft, target: (),
         lambda draft, target, value: with_points(draft, value), True),
    Fact("capture shift", AUX, lambda draft: 0 if draft.capture_points else None, _shifts,
         lambda draft, target, value: with_points(draft, [c + value for c in draft.capture_points]), True),
    Fact("capture order", AUX, lambda draft: tuple(range(len(draft.capture_points))) or None, _orders,
         lambda draft, target, value: with_points(draft, [draft.capture_points[i] for i in value]), True),
    Fact("target state", (*EAGLE3, *MODULES, "gemma4_assistant"), _state,
         lambda draft, target: ("before the final norm",), _put_state, True),
    Fact("embedding", (*ROPED, "gemma4_assistant"), _embedding, lambda draft, target: ("raw", "scaled"), _put_embedding,
         idle=lambda draft: NORM_HIDES if draft.pair.name in (*EAGLE3, *MODULES) else ""),
    Fact("input order", MODULES[:1], lambda draft: "embedding first", lambda draft, target: ("state first",),
         lambda draft, target, value: variants.with_swapped_inputs(draft)),
    _without("norm of the embedding", "pre_fc_norm_embedding", *MODULES[:1]),
    _without("norm of the state", "pre_fc_norm_hidden", *MODULES[:1]),
    _without("norm behind fc", "hidden_norm", "dflash"),
    _without("final norm", "norm", *MODULES[:1], "dflash", "gemma4_assistant", "standalone"),
    Fact("feedback", (*MODULES[:1], "gemma4_assistant"), lambda draft: "after the final norm",
         lambda draft, target: ("before the final norm",),
         lambda draft, target, value: variants.with_raw_feedback(draft)),
    _elsewhere("query position", 0, (-1, 1), lambda value: {"by": value}),
    _elsewhere("last key", True, (False,), lambda value: {"hides_last": True}),
    Fact("vocabulary map", (*AUX, "standalone"), _map, lambda draft, target: ("offset", "absolute", "none"),
         lambda draft, target, value: variants.with_map(draft, mapped_ids(draft, value)), read=_said_map),
)  # fmt: skip
"""config first, then what is handed over, then what is read and said"""
