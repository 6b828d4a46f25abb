"""What a model makes of a text at every capture point, with given states in the place of those that arrived.

A wrong layer spoils all that come after it. So each layer may be handed the state that it should have read: what then
arrives at the next capture point is the error of one layer alone, and one pass tells of all of them. In the reference
hooks stand before the layers; a twin adds up its stream where the next norm reads it, so there a tap stands in the
place of that norm.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from optimized.ops.kinds import GEMMA4
from suites.opened import OpenTarget

States = dict[str, Tensor]
Take = Callable[[int, Tensor], Tensor]
"""(capture point, what arrived [..., H]) -> what is read there"""


def walk(
    target: OpenTarget,
    tokens: Tensor,
    positions: Tensor | None = None,
    given: Mapping[int, Tensor] | None = None,
    capture: Sequence[int] = (),
) -> States:
    """hidden.0 .. hidden.L as they arrive, final and target_logits; aux as the target hands it over, where it is asked.

    tokens     [B, T]
    positions  [B, T]
    given      capture point -> [B, T, H], read there whatever arrived
    """
    arrived: States = {}

    def take(point: int, state: Tensor) -> Tensor:
        name, handed = f"hidden.{point}", (given or {}).get(point)
        # ranks hold the same stream: the first to come tells it
        arrived.setdefault(name, state.detach().clone().view(*tokens.shape, -1))
        return state if handed is None else handed.to(state).view(state.shape)

    with ExitStack() as stack:
        for module in target.modules:
            stack.enter_context(tapped(getattr(module, "language_model", module), take))
        out = target(tokens, positions, capture)
    points = {f"hidden.{c}": arrived[f"hidden.{c}"] for c in range(target.num_layers + 1)}
    captured = {"aux": out.aux} if capture else {}
    return {**points, "final": out.hidden, "target_logits": out.logits, **captured}


def tapped(text: Any, take: Take) -> Any:
    """A context in which a text model of either side asks `take` at each capture point."""
    if isinstance(text, nn.Module):
        return _hooked(text, take)
    return _patched(_ends(text, take) if hasattr(text.layers[0], "end") else _norms(text, take))


@contextmanager
def _hooked(text: Any, take: Take) -> Iterator[None]:
    """The reference: whatever stands at a capture point is the first thing that is read."""

    def before(point: int, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return take(point, args[0]), *args[1:]

    readers = [*text.layers, text.norm]
    hooks = [reader.register_forward_pre_hook(partial(before, c)) for c, reader in enumerate(readers)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _patched(places: list[tuple[Any, str, Any]]) -> Iterator[None]:
    """Attributes of objects replaced for a while."""
    before = [vars(owner).get(name) for owner, name, _ in places]
    for owner, name, value in places:
        setattr(owner, name, value)
    try:
        yield
    finally:
        for (owner, name, _), value in zip(places, before, strict=True):
            if value is None:
                delattr(owner, name)
            else:
                setattr(owner, name, value)


def _norms(text: Any, take: Take) -> list[tuple[Any, str, Any]]:
    """A twin whose next norm adds a layer's last branch to the stream."""

    def tap(point: int, norm: Any, *read: Any) -> tuple[Tensor, Tensor]:
        return norm(take(point, norm(*read)[1]), None)

    opened = [(layer, "input_layernorm") for layer in text.layers] + [(text, "norm")]
    return [(owner, name, partial(tap, c, getattr(owner, name))) for c, (owner, name) in enumerate(opened)]


def _ends(text: Any, take: Take) -> list[tuple[Any, str, Any]]:
    """Gemma 4's twin, whose layers end in the norm of what follows."""

    def tap(point: int, end: Any, branch: Tensor, stream: Tensor, following: Any) -> tuple[Tensor, Tensor]:
        read = take(point, end(branch, stream, following)[1])
        return text.at.ops.add_rmsnorm(read, None, following.weight, text.c.eps, GEMMA4)

    ends = [(layer, "end", partial(tap, i + 1, layer.end)) for i, layer in enumerate(text.layers)]
    return [(text, "embed", lambda tokens, embed=text.embed: take(0, embed(tokens))), *ends]
