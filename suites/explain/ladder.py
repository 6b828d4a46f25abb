"""The ladder: how far a dump is from the reference at each place of the way, and the first place beyond its budget.

    hidden.0 .. hidden.L   final   target_logits   aux   fused   logits.1   feedback.1   logits.2 ..   map

Where the dump tells a state, the reference goes on from that state: a rung then holds the error of what lies between it
and the rung before, and a fault that is repaired further up is still seen where it is. What the dump does not tell the
reference makes itself, and the rung's budget grows by the layers in between.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from harness.compare import weigh
from reference.drafting import Block, Parallel, Standalone
from reference.outputs import TargetOutput
from suites.explain.dump import Dump, DumpError
from suites.explain.states import States, walk
from suites.opened import OpenDraft, OpenTarget

ALONE = (Block, Parallel, Standalone)
"""ways of drafting whose later steps read nothing of the earlier ones but tokens"""


class Rung(NamedTuple):
    """One place and how far two results are apart there."""

    name: str
    used: float
    """share of the budget; 1 is the limit"""
    error: float
    """largest difference over the root mean square of what was wanted"""
    worst: tuple[int, ...]
    """where the budget is used most"""

    @property
    def place(self) -> str:
        """Its name, and the layer that writes it."""
        kind, _, number = self.name.partition(".")
        if kind != "hidden":
            return self.name
        return f"{self.name} (the embedding)" if number == "0" else f"{self.name} (layer {int(number) - 1})"


class Ladder(NamedTuple):
    """All places of a dump, in the order of the way."""

    rungs: tuple[Rung, ...]

    @property
    def first(self) -> Rung | None:
        """The first place beyond its budget; None where nothing is."""
        return next((rung for rung in self.rungs if rung.used > 1), None)

    @property
    def error(self) -> float:
        """The largest error of any place."""
        return max((rung.error for rung in self.rungs), default=0.0)

    @property
    def used(self) -> float:
        """The largest share of a budget."""
        return max((rung.used for rung in self.rungs), default=0.0)


def climb(dump: Dump, target: OpenTarget, draft: OpenDraft | None = None, made: States | None = None) -> Ladder:
    """Hold a dump to the reference, rung by rung.

    target, draft  of the reference side
    made           what `walk` said of this target and this dump, where it was asked before
    errors: DumpError where a tensor does not fit the models, or tells of a draft and none is given
    """
    _check(dump, target, draft)
    made = walk(target, dump.tokens, dump.positions, dump.numbered("hidden")) if made is None else made
    want: States = dict(made)
    if draft is not None:
        want |= drafted(dump, draft, made)
    sizes = _sizes(dump, target, draft)
    return Ladder(tuple(_rung(dump, name, want, sizes) for name in sorted(dump.tensors, key=_place)))


@torch.no_grad()
def drafted(dump: Dump, draft: OpenDraft, made: States, num_steps: int = 0) -> States:
    """aux, fused, logits.k, feedback.k and map of the reference's draft over a dump's own states."""
    width, number = made["final"].dtype, num_steps or dump.num_steps
    aux = made.get("aux")
    if aux is None and draft.capture_points:
        aux = torch.stack([made[f"hidden.{c}"] for c in draft.capture_points], 2)
    want: States = {} if aux is None else {"aux": aux}
    handed = dump.tensors["aux"].to(width) if "aux" in dump.tensors else aux
    handed = made["final"].new_zeros(*dump.tokens.shape, 0, 1) if handed is None else handed
    want["fused"] = draft.module.read(TargetOutput(made["target_logits"], made["final"], handed))
    want |= mapped(draft)
    if number:
        first = dump.tensors.get("fused", want["fused"]).to(width)
        want |= _steps(draft.module, dump.tokens, first, number, dump.numbered("feedback"))
    return want


def mapped(draft: OpenDraft) -> States:
    """What every id of a draft means, as the draft itself says."""
    ids = torch.arange(draft.facts.config.draft_vocab) if hasattr(draft.module, "d2t") else None
    return {} if ids is None else {"map": draft.module.to_target(ids[None].to(draft.side.device))[0]}


def _steps(module: Any, tokens: Tensor, first: Tensor, number: int, given: Mapping[int, Tensor]) -> States:
    """Teacher-forced draft steps, each of which reads the feedback that the dump tells of the step before."""
    told: list[Tensor] = []
    feeds_back = not issubclass(module.way, ALONE)

    def before(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        handed = given.get(len(told)) if feeds_back else None
        if handed is None:
            return args
        unknown = handed.isnan().all(-1, keepdim=True)
        return args[0], torch.where(unknown, args[1], handed.to(args[1])), *args[2:]

    hooks = [
        module.register_forward_pre_hook(before),
        module.register_forward_hook(lambda _, args, step: told.append(step.feedback)),
    ]
    try:
        logits = module.unroll(tokens, first, number)
    finally:
        for hook in hooks:
            hook.remove()
    want = {f"logits.{k}": logits[k - 1] for k in range(1, number + 1)}
    return want | ({f"feedback.{k}": told[k - 1] for k in range(1, number + 1)} if feeds_back else {})


def _check(dump: Dump, target: OpenTarget, draft: OpenDraft | None) -> None:
    vocab, layers = target.config.vocab, target.num_layers
    if int(dump.tokens.min()) < 0 or int(dump.tokens.max()) >= vocab:
        raise DumpError(f"tensor 'tokens' holds ids beyond 0..{vocab - 1}; was it made with another target?")
    above = [c for c in dump.numbered("hidden") if c > layers]
    if above:
        raise DumpError(f"tensor 'hidden.{above[0]}': capture points of this target are 0..{layers}")
    width = target.config.hidden
    for point, state in dump.numbered("hidden").items():
        # states are read by the reference's layers, so they must fit before anything is run
        if state.shape[-1] != width:
            wanted = [*dump.tokens.shape, width]
            raise DumpError(f"tensor 'hidden.{point}' is {list(state.shape)}, the checkpoint makes {wanted}")
    of_draft = [name for name in dump.tensors if _place(name)[0] >= 3]
    if draft is None and of_draft:
        raise DumpError(f"tensor {of_draft[0]!r} tells of a draft; pass --draft")


def _rung(dump: Dump, name: str, want: States, sizes: Mapping[str, tuple[int, int]]) -> Rung:
    if name not in want:
        raise DumpError(f"tensor {name!r}: this draft has none; leave it out")
    got, wanted = dump.tensors[name], want[name]
    if got.shape != wanted.shape:
        raise DumpError(f"tensor {name!r} is {list(got.shape)}, the checkpoint makes {list(wanted.shape)}")
    if name == "map":
        same = torch.equal(got, wanted)
        return Rung(name, 0.0 if same else math.inf, 0.0 if same else float((got != wanted).double().mean()), ())
    if name.startswith(("logits.", "feedback.")):
        # columns without a next token, and rows that their maker could not compute
        unknown = got.isnan().all(-1) | wanted.isnan().all(-1)
        if bool(unknown.all()):
            return Rung(name, math.inf, math.inf, ())
        got, wanted = (x.masked_fill(unknown[..., None], 0.0) for x in (got, wanted))
    depth, width = sizes[name]
    near = weigh(name, got, wanted, dtype=dump.dtype, depth=depth, width=width)
    return Rung(name, near.used, near.rel, near.worst)


def _sizes(dump: Dump, target: OpenTarget, draft: OpenDraft | None) -> dict[str, tuple[int, int]]:
    """Layers since the last state that was told, and the features that each sums over; by rung."""
    hidden, sizes, since = target.config.hidden, {}, 1
    for c in range(target.num_layers + 1):
        sizes[f"hidden.{c}"] = (since, hidden)
        since = 1 if f"hidden.{c}" in dump.tensors else since + 1
    sizes |= dict.fromkeys(("final", "target_logits", "aux"), (since, hidden))
    if draft is None:
        return sizes
    c = draft.facts.config
    since = 1 if "aux" in dump.tensors else since + 1
    sizes["fused"] = (since, len(draft.capture_points or (0,)) * hidden)
    since = 1 if "fused" in dump.tensors else since + 1
    for k in range(1, dump.num_steps + 1):
        sizes |= dict.fromkeys((f"logits.{k}", f"feedback.{k}"), (since + k * c.layers, 2 * max(c.hidden, hidden)))
    return sizes


def _place(name: str) -> tuple[int, int, str]:
    """Where a tensor stands on the way."""
    kind, _, number = name.partition(".")
    order = ("hidden", "final", "target_logits", "aux", "fused", "steps", "map")
    return (5, int(number), {"logits": "a", "feedback": "b"}[kind]) if number and kind != "hidden" else (
        order.index(kind), int(number or 0), ""
    )  # fmt: skip
