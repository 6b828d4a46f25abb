"""Single edits of a target, and of a draft beyond those that an audit asks about: what a port may have read otherwise.

Facts of the config come from one table: a field's name -> what it could be instead; ropes and kinds of layers inside a
config are walked through. What no config says (a norm's "1 +", the scale of an embedding, a swap) is a change of the
model around the same weights. Nothing that is given is changed. Drafts: `suites/audit/candidates.py` first.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import partial
from typing import Any

import torch

from harness.checkpoints import state_of
from reference.config import ConfigError
from reference.ops.rope import Rope
from suites.audit import candidates, variants
from suites.audit.variants import replaced
from suites.explain.parts import PARTS
from suites.opened import OpenDraft, OpenTarget

OFF = (False,)
Others = Callable[[Any, Any], Iterable[Any]]
"""(what it is, the config that it stands in) -> what it could be instead"""


def _windows(now: tuple[int | None, ...], c: Any) -> Sequence[Any]:
    """No window, one token less or more in it, and the kinds of layers counted from another one."""
    lengths = (tuple(w and w + by for w in now) for by in (-1, 1))
    return ((None,) * len(now), *lengths, (*now[1:], now[0]), (now[-1], *now[:-1])) if any(now) else ()


def _ropes(now: Rope, c: Any) -> Sequence[Rope]:
    """That of the other kind of layers; what is stretched, as the plain rope of another model."""
    local = (c.local_rope,) if hasattr(c, "local_rope") else ()
    dim, thetas = now.dim, tuple(theta for theta in candidates.THETAS if theta != now.theta)
    if now.kind == "proportional":
        # where a part of the pairs turns: that part as a narrower head
        dim, thetas = 2 * now.pairs, (now.theta,)
    return (*local, *(Rope(dim, theta) for theta in thetas if now.kind != "default"))


OTHERS: Mapping[str, Others] = {
    "eps": lambda now, c: (1e-5, 1e-6),
    "latent_norm_eps": lambda now, c: dict.fromkeys((c.eps, 1e-5, 1e-6)),
    "theta": lambda now, c: candidates.THETAS,
    "kind": lambda now, c: ("default",),
    "attention_factor": lambda now, c: (None, 1.0) if c.kind == "yarn" else (),
    "mscale_all_dim": lambda now, c: (0.0, 1.0) if c.kind == "yarn" else (),
    "pairs": lambda now, c: (c.dim // 2,) if c.kind == "proportional" else (),
    "rope": _ropes,
    "local_rope": lambda now, c: (c.rope,),
    "query_scale": lambda now, c: (1.0, c.head_dim**-0.5, (c.hidden / c.heads) ** -0.5),
    "window": lambda now, c: () if now is None else (None, now - 1, now + 1),
    "windows": _windows,
    "causal": lambda now, c: ((True,) * len(now), (False,) * len(now)),
    "mask_token": lambda now, c: (0,),
    "softcap": lambda now, c: (30.0,) if now is None else (None,),
    "logit_scale": lambda now, c: (1.0,),
    "attention_bias": lambda now, c: OFF,
    "qkv_bias": lambda now, c: OFF,
    "o_bias": lambda now, c: OFF,
    "mlp_bias": lambda now, c: OFF,
    "fc_bias": lambda now, c: OFF,
    "qk_norm": lambda now, c: OFF,
    "tied_head": lambda now, c: (True,),
    "norm_topk_prob": lambda now, c: (not now,),
    "rope_interleaved": lambda now, c: (not now,),
    "routed_scaling": lambda now, c: (1.0,),
    "experts_per_token": lambda now, c: (now - 1, now + 1) if now > 1 else (),
    "groups_kept": lambda now, c: (c.groups,),
}


Make = Callable[[Any], Any]
"""a model -> another around the same weights"""
AUDITED = {"rope.theta": "rope theta", "rope.kind": "rope scaling", "rope_interleaved": "rope pairs"}
"""rows above -> the audit's row of drafts that says the same"""


@dataclass(frozen=True)
class Edit:
    """One thing read otherwise."""

    name: str
    target: Callable[[OpenTarget], OpenTarget] | None = None
    """None: the target stays as it is"""
    draft: Callable[[OpenDraft, OpenTarget], OpenDraft] | None = None


def edits(target: OpenTarget, draft: OpenDraft | None = None) -> Iterator[Edit]:
    """Every single edit of a pair of the reference side whose weights are there; those of the draft cost less."""
    of_draft: dict[str, Make] = {}
    if draft is not None:
        audited = candidates.candidates(draft, target)
        told = {edit.fact for edit in audited}
        yield from (Edit(f"draft's {edit.name}", draft=edit.apply) for edit in audited if not edit.idle)
        of_draft = dict(_models(variants.body(draft)))
        for name, make in of_draft.items():
            if not _is_told(name, told):
                yield Edit(f"draft's {name}", draft=partial(_with_body, make))
    for name, make in _models(text_model(target)):
        yield Edit(f"target's {name}", target=partial(_with_text, make))
        if name in of_draft:
            # read through one and the same line of code
            yield Edit(f"both's {name}", partial(_with_text, make), partial(_with_body, of_draft[name]))


def _is_told(name: str, told: set[str]) -> bool:
    """Whether the audit's table has this row of a draft."""
    path = name.partition(":")[0]
    if path.count(".") > 1 and path.split(".")[-1] in ("theta", "kind"):
        return any(fact.startswith("rope of") for fact in told)
    return AUDITED.get(path, path) in told


def _models(module: Any) -> Iterator[tuple[str, Make]]:
    """Other models around the weights of one: (what is said of it, how it is made)."""
    for path, said, field, value in config_edits(module.c):
        if _fits(module, field, value):
            yield f"{path}: {said}", partial(_with_fact, field, value)
    for name, change in PARTS.items():
        if change(module) is not module:
            yield name, change


def _with_text(make: Callable[[Any], Any], target: OpenTarget) -> OpenTarget:
    return with_text(target, make(text_model(target)))


def _with_body(make: Callable[[Any], Any], draft: OpenDraft, target: OpenTarget) -> OpenDraft:
    return variants.with_body(draft, make(variants.body(draft)))


def config_edits(c: Any) -> Iterator[tuple[str, str, str, Any]]:
    """For every fact of the table: (its dotted name, its other value in words, a field of the config, that field)."""
    for path, owner, now in _leaves(c):
        name = path.split(".")[-1]
        for other in OTHERS[name](now, owner) if name in OTHERS else ():
            if other != now:
                field, _, inner = path.partition(".")
                yield path, _said(other), field, _replaced(getattr(c, field), inner, other) if inner else other


def _leaves(c: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Every field of a config and of the configs inside it: (dotted name, the config that has it, value)."""
    for field in fields(c):
        value = getattr(c, field.name)
        yield f"{path}{field.name}", c, value
        if is_dataclass(value):
            yield from _leaves(value, f"{path}{field.name}.")


def _replaced(c: Any, path: str, value: Any) -> Any:
    field, _, inner = path.partition(".")
    return replace(c, **{field: _replaced(getattr(c, field), inner, value) if inner else value})


def _said(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, Rope):
        return f"{value.kind} over {value.dim}, theta {value.theta:g}"
    return "none" if value is None else f"{value:g}" if isinstance(value, int | float) else str(value)


def text_model(target: OpenTarget) -> Any:
    """The text model of a target."""
    return getattr(target.module, "language_model", target.module)


def with_text(target: OpenTarget, text: Any) -> OpenTarget:
    """The target around another text model."""
    if target.module is text_model(target):
        return replace(target, modules=(text,), config=text.c)
    return replace(target, modules=(replaced(target.module, language_model=text),))


def _fits(module: Any, field: str, value: Any) -> bool:
    """Whether the weights that are there are all that the other config asks for."""
    try:
        with torch.device("meta"):
            asked = state_of(type(module)(replace(module.c, **{field: value})))
    except (ConfigError, ValueError, RuntimeError):
        return False
    have = {**module.state_dict(), **state_of(module)}
    return all(name in have and have[name].shape == tensor.shape for name, tensor in asked.items())


def _with_fact(field: str, value: Any, module: Any) -> Any:
    """The same weights under a config with another fact; a tied head takes the table's place again."""
    with torch.device("meta"):
        other = type(module)(replace(module.c, **{field: value}))
    have = {**module.state_dict(), **state_of(module)}
    other.load_state_dict({name: have[name] for name in other.state_dict()}, strict=True, assign=True)
    other.tie()
    if hasattr(module, "target"):
        # a draft that speaks through its target's table and keys
        object.__setattr__(other, "target", module.target)
    return other.eval().requires_grad_(False)
