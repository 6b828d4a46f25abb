"""Parts of a model that a port may have read otherwise and that no config speaks of: the same weights, another model.

Each change is given a text model, or a draft's body, and gives it back changed, or itself where it has no such part.
Weights are shared and nothing that is given is changed.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reference.ops.attention import Attention
from reference.ops.mla import Latent
from reference.ops.mlp import gelu
from reference.ops.norm import GemmaRMSNorm
from suites.audit import variants
from suites.audit.variants import interleaved, replaced


def rewritten(module: nn.Module, change: Callable[[Any], Any]) -> Any:
    """The module with every part changed for which `change` has something to give; itself where there is none."""
    if (found := change(module)) is not None:
        return found
    parts = {name: (part, rewritten(part, change)) for name, part in module.named_children()}
    others = {name: other for name, (part, other) in parts.items() if other is not part}
    return replaced(module, **others) if others else module


def _each(change: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda text: rewritten(text, change)


def _plain_norm(module: Any) -> Any:
    """1 + w read as w."""
    if isinstance(module, GemmaRMSNorm):
        return replaced(module, weight=nn.Parameter(module.weight - 1, requires_grad=False))
    return None


def _raised_norm(module: Any) -> Any:
    """w read as 1 + w."""
    is_norm = "Norm" in type(module).__name__ and getattr(module, "weight", None) is not None
    if is_norm and not isinstance(module, GemmaRMSNorm):
        return replaced(module, weight=nn.Parameter(module.weight + 1, requires_grad=False))
    return None


def _swapped(module: Any) -> Any:
    """Gate and up in each other's place."""
    if hasattr(module, "gate_proj") and hasattr(module, "up_proj"):
        return replaced(module, gate_proj=module.up_proj, up_proj=module.gate_proj)
    return None


def _unnormed_heads(module: Any) -> Any:
    """Queries and keys that no norm has seen."""
    if isinstance(getattr(module, "q_norm", None), nn.Module) and not isinstance(module.q_norm, nn.Identity):
        return replaced(module, **{name: nn.Identity() for name in ("q_norm", "k_norm") if hasattr(module, name)})
    return None


def _neighbours(module: Any) -> Any:
    """Rope that turns neighbours."""
    return interleaved(module) if isinstance(getattr(module, "self_attn", None), Attention) else None


def _unscaled_layer(module: Any) -> Any:
    """A layer without the number that it is multiplied by."""
    scalar = getattr(module, "layer_scalar", None)
    return None if scalar is None else replaced(module, layer_scalar=torch.ones_like(scalar))


def _embedding(text: Any) -> Any:
    """Rows of the table without the scale of the model, or with one where it has none."""
    table = getattr(text, "embed_tokens", None)
    if table is None:
        return text
    tokens = torch.zeros(1, 1, dtype=torch.int64)

    def embed(tokens: Tensor) -> Tensor:
        """tokens [B, T] -> [B, T, H]"""
        return table(tokens)

    if hasattr(text, "embed") and not torch.equal(text.embed(tokens), table(tokens)):
        return replaced(text, embed=embed)
    return replaced(text, embed_tokens=variants.Scaled(table, text.c.hidden**0.5))


def _swapped_norms(module: Any) -> Any:
    """The norms of the embedding and of the state in each other's place."""
    if hasattr(module, "input_layernorm") and hasattr(module, "hidden_norm"):
        return replaced(module, input_layernorm=module.hidden_norm, hidden_norm=module.input_layernorm)
    return None


def _swapped_halves(module: Any) -> Any:
    """A layer, or an assistant, that reads the state before the embedding."""
    if hasattr(module, "pre_projection"):
        both = module.pre_projection
        weight = nn.Parameter(both.weight.roll(both.in_features // 2, 1), requires_grad=False)
        return replaced(module, pre_projection=replaced(both, weight=weight))
    if not (hasattr(module, "hidden_norm") and hasattr(module, "self_attn")):
        return None
    attn, width = module.self_attn, module.hidden_norm.weight.shape[0]
    readers = {n: p for n, p in attn.named_children() if getattr(p, "in_features", 0) == 2 * width}
    rolled = {n: nn.Parameter(p.weight.roll(width, 1), requires_grad=False) for n, p in readers.items()}
    parts = {n: replaced(p, weight=rolled[n]) for n, p in readers.items()}
    return replaced(module, self_attn=replaced(attn, **parts)) if parts else None


def _reversed_norms(module: Any) -> Any:
    """The norms of the aux states in the other order."""
    norms = getattr(module, "fc_norm", None)
    return None if norms is None or len(norms) < 2 else replaced(module, fc_norm=nn.ModuleList(reversed(norms)))


def _rescaled(width: Callable[[Any], int]) -> Callable[[Any], Any]:
    """Scores of attention multiplied by width^-1/2 in the place of their own scale."""

    def change(module: Any) -> Any:
        if not (hasattr(module, "o_proj") and hasattr(module, "q_proj")):
            return None
        factor = float(width(module)) ** -0.5
        if hasattr(module, "scale"):
            return None if abs(module.scale - factor) < 1e-12 else replaced(module, scale=factor)
        # no scale of its own: it lies in the norm of the queries
        weight = getattr(getattr(module, "q_norm", None), "weight", None)
        if weight is None or factor == 1:
            return None
        return replaced(
            module, q_norm=replaced(module.q_norm, weight=nn.Parameter(weight * factor, requires_grad=False))
        )

    return lambda text: rewritten(text, change)


def _yarn(power: int) -> Callable[[Any], Any]:
    """Scores over latents with another power of yarn's factor in their scale, which has its square."""

    def change(module: Any) -> Any:
        c = getattr(module, "c", None)
        if not isinstance(c, Latent) or c.rope.kind == "default":
            return None
        plain = (c.nope_dim + c.rope_dim) ** -0.5
        scale = plain * (c.scale / plain) ** (power / 2)

        def attend(*read: Any) -> Tensor:
            """As `written`, whatever scale it is told."""
            return module.attend(*read[:-1], scale)

        return replaced(module, attend=attend)

    return lambda text: rewritten(text, change)


def _normed(eps: float) -> Callable[[Any], Any]:
    """One eps in the norms of the stream and of latents."""

    def change(module: Any) -> Any:
        return replaced(module, eps=eps) if isinstance(getattr(module, "eps", None), float) else None

    return lambda text: rewritten(text, change) if hasattr(text.c, "latent_norm_eps") else text


def _head(module: Any) -> int:
    """Features of a head."""
    return int(module.q_norm.weight.shape[0]) if hasattr(module.q_norm, "weight") else int(module.head_dim)


def _acting(act: Callable[[Tensor], Tensor]) -> Callable[[Any], Any]:
    """Another activation between gate and up."""
    return _each(lambda module: replaced(module, act=act) if getattr(module, "act", act) is not act else None)


def _evenly(module: Any) -> Any:
    """Experts without a scale of their own."""
    scale = getattr(module, "per_expert_scale", None)
    return None if scale is None else replaced(module, per_expert_scale=nn.Parameter(torch.ones_like(scale)))


def _reversed_states(module: Any) -> Any:
    """Aux states joined in the other order."""
    if not hasattr(module, "fuse") or getattr(module, "fc", None) is None:
        return module

    def fuse(aux: Tensor) -> Tensor:
        """aux [B, T, A, X] -> [B, T, H]"""
        return module.fuse(aux.flip(2))

    return replaced(module, fuse=fuse)


PARTS: Mapping[str, Callable[[Any], Any]] = {
    "norms: w for 1 + w": _each(_plain_norm),
    "norms: 1 + w for w": _each(_raised_norm),
    "embedding: the other scale": _embedding,
    "gate and up: swapped": _each(_swapped),
    "norms of heads: off": _each(_unnormed_heads),
    "rope pairs: neighbours": _each(_neighbours),
    "layer scale: off": _each(_unscaled_layer),
    "input norms: swapped": _each(_swapped_norms),
    "input halves: swapped": _each(_swapped_halves),
    "norms of aux states: reversed": _each(_reversed_norms),
    "aux states: fused in reverse": _reversed_states,
    "attention scale: none": _rescaled(lambda module: 1),
    "attention scale: a head's width": _rescaled(lambda module: _head(module) if hasattr(module, "q_norm") else 1),
    "attention scale: the heads' width": _rescaled(lambda module: module.o_proj.in_features),
    "attention scale: without yarn": _yarn(0),
    "attention scale: yarn once": _yarn(1),
    "eps of every norm: 1e-05": _normed(1e-5),
    "eps of every norm: 1e-06": _normed(1e-6),
    "activation: silu": _acting(F.silu),
    "activation: gelu": _acting(F.gelu),
    "activation: gelu, tanh": _acting(gelu),
    "scale of experts: off": _each(_evenly),
    "final norm: off": lambda text: replaced(text, norm=nn.Identity()),
}
"""of a model; the model itself where it has no such part"""
