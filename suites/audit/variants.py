"""A draft that runs with another fact: the same weights under another config, or a copy that reads or says otherwise.

Nothing here changes the draft that it is given. Parameters are shared, and modules are copied as far as they differ.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from harness.checkpoints import Checkpoint, state_of
from harness.conventions import DEFAULT, LayerIds
from reference.drafts.standalone import StandaloneDraft
from reference.ops.attention import Attention
from reference.outputs import TargetOutput
from suites.opened import OpenDraft

NOTHING = nn.Identity()


@dataclass(frozen=True)
class Restated(Checkpoint):
    """A checkpoint whose vocabulary map holds target ids, read as the offsets that they stand for."""

    values: Mapping[str, Tensor] = field(default_factory=dict)
    """tensor -> what is read in its place"""

    def read(self, name: str) -> Tensor:
        """As `Checkpoint.read`."""
        return self.values[name] if name in self.values else super().read(name)


def cloned(module: nn.Module) -> Any:
    """A copy of a module whose parts can be replaced one by one; the parts themselves are shared."""
    twin = copy.copy(module)
    for table in ("_parameters", "_buffers", "_modules"):
        twin.__dict__[table] = dict(module.__dict__[table])
    return twin


def replaced(module: nn.Module, **parts: Any) -> Any:
    """A copy with other parts or other methods."""
    twin = cloned(module)
    for name, part in parts.items():
        setattr(twin, name, part)
    return twin


def body(draft: OpenDraft) -> Any:
    """The module whose config and layers are the draft's: of a model that drafts alone, that model."""
    return draft.module.model if isinstance(draft.module, StandaloneDraft) else draft.module


def with_body(draft: OpenDraft, module: Any) -> OpenDraft:
    """The draft around another body."""
    if isinstance(draft.module, StandaloneDraft):
        module = replaced(draft.module, model=module, c=module.c)
    return replace(draft, modules=(module,), facts=replace(draft.facts, config=module.c))


def with_parts(draft: OpenDraft, **parts: Any) -> OpenDraft:
    """The draft with other parts or methods of its body."""
    return with_body(draft, replaced(body(draft), **parts))


def with_config(draft: OpenDraft, **facts: Any) -> OpenDraft:
    """The same weights under a config with other facts; a norm without a weight has ones, a bias zeros."""
    old = body(draft)
    with torch.device("meta"):
        module = type(old)(replace(old.c, **facts))
    # by every name: a tied table stands under two
    state = {**old.state_dict(), **state_of(old)}
    like = next(old.parameters())
    missing = {
        name: (torch.ones if "norm" in name else torch.zeros)(value.shape, dtype=like.dtype, device=like.device)
        for name, value in state_of(module).items()
        if name not in state
    }
    module.load_state_dict({**state, **missing}, strict=False, assign=True)
    if hasattr(old, "target"):
        # a draft that speaks through its target's table and keys
        object.__setattr__(module, "target", old.target)
    return with_body(draft, module.eval().requires_grad_(False))


def with_points(draft: OpenDraft, points: Sequence[int]) -> OpenDraft:
    """The draft beside a target that captures elsewhere."""
    told = LayerIds((), tuple(points), DEFAULT, "audit", f"capture points {tuple(points)}")
    return replace(draft, facts=replace(draft.facts, layer_ids=told))


def before_final_norm(draft: OpenDraft, last: int) -> OpenDraft:
    """The draft handed the last layer's output in the place of the normed state; last: layers of the target."""

    def read(out: TargetOutput) -> Tensor:
        """out -> [B, T, H]"""
        return out.aux[:, :, 0]

    return with_points(with_parts(draft, read=read), (last,))


class Scaled(nn.Module):
    """A table whose rows are multiplied."""

    def __init__(self, table: nn.Embedding, factor: float) -> None:
        super().__init__()
        self.table, self.factor = table, factor

    @property
    def weight(self) -> Tensor:
        """The rows as they are stored."""
        return self.table.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens [B, T] -> [B, T, H]"""
        return self.table(tokens) * self.factor


class RawTable:
    """A target whose table a draft reads without its scale."""

    def __init__(self, target: Any) -> None:
        self.target = target

    def embed(self, tokens: Tensor) -> Tensor:
        """tokens [B, T] -> [B, T, H]"""
        return self.target.embed_tokens(tokens)

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return self.target(*arguments, **named)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.target, name)


def with_raw_table(draft: OpenDraft) -> OpenDraft:
    """A draft that embeds by its target's table, without the target's scale."""
    module = cloned(draft.module)
    object.__setattr__(module, "target", RawTable(draft.module.target))
    return with_body(draft, module)


class Elsewhere(nn.Module):
    """A layer of an assistant that stands at another position, or does not see the last key."""

    def __init__(self, layer: nn.Module, by: int = 0, hides_last: bool = False) -> None:
        super().__init__()
        self.layer, self.by, self.hides_last = layer, by, hides_last

    def forward(self, h: Tensor, positions: Tensor, visible: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """One layer.

        h          [B, T, H]
        positions  [B, T]
        visible    [B, T, S]
        keys       [B, S, G, D]
        values     [B, S, G, D]
        ->         [B, T, H]
        """
        if self.hides_last:
            slot = torch.arange(visible.shape[2], device=visible.device)
            last = (visible * slot).amax(-1, keepdim=True)
            # the first token keeps its own
            visible = visible & ((slot != last) | (visible.sum(-1, keepdim=True) == 1))
        return self.layer(h, positions + self.by, visible, keys, values)


def with_layers(draft: OpenDraft, change: Callable[[Any], Any]) -> OpenDraft:
    """The draft with every layer changed."""
    return with_parts(draft, layers=nn.ModuleList(change(layer) for layer in body(draft).layers))


def interleaved(layer: Any) -> Any:
    """A layer whose rope turns neighbours (x_2i, x_{2i+1}): rows of q and k in the order that makes them its halves."""
    attn: Attention = layer.self_attn
    dim = attn.rope.dim
    order = torch.cat([torch.arange(0, dim, 2), torch.arange(1, dim, 2), torch.arange(dim, attn.head_dim)])
    parts: dict[str, Any] = {}
    for name in ("q_proj", "k_proj"):
        linear = getattr(attn, name)
        rows = (torch.arange(0, linear.out_features, attn.head_dim)[:, None] + order).flatten()
        bias = None if linear.bias is None else nn.Parameter(linear.bias[rows], requires_grad=False)
        parts[name] = replaced(linear, weight=nn.Parameter(linear.weight[rows], requires_grad=False), bias=bias)
    for name in ("q_norm", "k_norm"):
        norm = getattr(attn, name)
        if hasattr(norm, "weight"):
            parts[name] = replaced(norm, weight=nn.Parameter(norm.weight[order], requires_grad=False))
    return replaced(layer, self_attn=replaced(attn, **parts))


def with_swapped_inputs(draft: OpenDraft) -> OpenDraft:
    """A module whose `fc` meets the hidden state first and the embedding second."""
    fc = draft.module.fc
    weight = nn.Parameter(fc.weight.roll(fc.weight.shape[1] // 2, 1), requires_grad=False)
    return with_parts(draft, fc=replaced(fc, weight=weight))


def with_raw_feedback(draft: OpenDraft) -> OpenDraft:
    """A draft whose next step reads the state before its final norm; what its head reads stays normed."""
    module = body(draft)
    return with_parts(draft, norm=NOTHING, lm_head=nn.Sequential(module.norm, module.lm_head))


def with_map(draft: OpenDraft, ids: Tensor) -> OpenDraft:
    """A draft whose ids mean these target ids; where two mean the same, their probabilities add up.

    ids  [Vd]
    """
    vocab = draft.facts.config.vocab

    def to_target(draft_ids: Tensor) -> Tensor:
        """draft_ids [B, T] -> [B, T]"""
        return ids[draft_ids]

    def spread(logits: Tensor) -> Tensor:
        """logits [B, T, Vd] -> [B, T, V]"""
        top = logits.amax(-1, keepdim=True)
        sums = logits.new_zeros(*logits.shape[:2], vocab).index_add_(2, ids, (logits - top).exp())
        return sums.log() + top

    # of a model that drafts alone, the map is the draft's and not the model's
    module = replaced(draft.module, to_target=to_target, spread=spread)
    return replace(draft, modules=(module,))
