"""Rotary position embedding and the ways published configs stretch it.

A pair (x_i, x_{i + D/2}) turns by the angle position * f_i ("halves", as in Llama checkpoints).

    default   f_i = theta^(-2i/D)
    linear    f_i / factor
    dynamic   theta' = theta * (factor * n / m - (factor - 1))^(D / (D - 2))   for n seen > m trained positions
    llama3    f_i / factor below the low frequency, f_i above the high one, a blend between
    yarn      interpolated below beta_slow turns, kept above beta_fast, a ramp between; cos and sin times m
    proportional   f_i / factor for the first partial_rotary_factor of the pairs, 0 for the rest: they stand still,
                   and a pair still spans half of the head (elsewhere a partial rope pairs up its own features)

Sources: arXiv 2104.09864, 2306.15595 (linear), 2309.00071 (yarn); transformers `modeling_rope_utils.py`.
Frequencies are float32, as transformers computes them, in every dtype of the model: they are facts of the
checkpoint, and a float64 model with other frequencies would be another model.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn", "proportional")


@dataclass(frozen=True)
class Rope:
    """Every fact of one rope; fields that its type does not use keep their defaults."""

    dim: int
    """features of a head that turn, D or partial_rotary_factor * D"""
    theta: float = 10_000.0
    kind: str = "default"
    factor: float = 1.0
    original_length: int = 0
    """positions seen in training before stretching (dynamic, llama3, yarn)"""
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 0.0
    mscale_all_dim: float = 0.0
    attention_factor: float | None = None
    truncate: bool = True
    pairs: int = 0
    """pairs that turn, the first of them (proportional)"""

    @classmethod
    def from_hf(cls, config: dict[str, Any], head_dim: int) -> "Rope":
        """Read `rope_parameters` (new) or `rope_theta` with `rope_scaling` (old); errors: ValueError if unknown."""
        given = _parameters(config)
        kind = given.pop("rope_type", "default")
        if kind not in ROPE_TYPES:
            raise ValueError(f"rope_type {kind!r} is not one of {', '.join(ROPE_TYPES)}")
        partial = _positive(given, "partial_rotary_factor", 1.0)
        facts = {
            "theta": _positive(given, "rope_theta", 10_000.0),
            "factor": _positive(given, "factor", 1.0),
            "original_length": int(_positive(given, "original_max_position_embeddings", 0)),
        }
        if facts["theta"] <= 1:
            raise ValueError(f"rope_theta is {facts['theta']}; a base above 1 is expected")
        if kind in ("dynamic", "llama3", "yarn") and not facts["original_length"]:
            raise ValueError(
                f"rope_type {kind!r} needs 'original_max_position_embeddings' or 'max_position_embeddings'"
            )
        names = {f for f in cls.__dataclass_fields__ if f not in ("dim", "kind", "pairs", *facts)}
        unknown = sorted(set(given) - names)
        if unknown:
            raise ValueError(
                f"rope parameters {unknown} of type {kind!r} are not known and would change the mathematics"
            )
        truncate = given.pop("truncate", True)
        if not isinstance(truncate, bool):
            raise ValueError(f"rope parameter 'truncate' is {truncate!r}; true or false is expected")
        numbers = {name: _positive(given, name, 0.0 if name.startswith("mscale") else 1.0) for name in list(given)}
        dim = int(head_dim * partial)
        if dim > head_dim or dim < 2 or dim % 2 or (kind == "dynamic" and dim == 2):
            raise ValueError(f"rope turns {dim} of {head_dim} features of a head; an even part of them is expected")
        if kind == "proportional":
            return cls(dim=head_dim, kind=kind, pairs=dim // 2, truncate=truncate, **facts, **numbers)
        return cls(dim=dim, kind=kind, truncate=truncate, **facts, **numbers)

    @property
    def scale(self) -> float:
        """What cos and sin are multiplied by: 1 except for yarn."""
        if self.kind != "yarn":
            return 1.0
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return yarn_mscale(self.factor, self.mscale) / yarn_mscale(self.factor, self.mscale_all_dim)
        return yarn_mscale(self.factor, 1.0)

    def frequencies(self, seen: int = 0) -> Tensor:
        """Angle per position of each pair, float32 [dim/2].

        seen   positions in view, the largest plus one; only `dynamic` reads it
        """
        plain = _frequencies(self.theta, self.dim)
        if self.kind == "linear":
            return plain / self.factor
        if self.kind == "proportional":
            return torch.cat([plain[: self.pairs], plain.new_zeros(self.dim // 2 - self.pairs)]) / self.factor
        if self.kind == "dynamic" and seen > self.original_length:
            # in float32, as transformers has it: frequencies are facts of the checkpoint to the last bit
            stretch = self.factor * torch.tensor(seen) / self.original_length - (self.factor - 1)
            return _frequencies(self.theta * stretch ** (self.dim / (self.dim - 2)), self.dim)
        if self.kind == "llama3":
            return self._llama3(plain)
        if self.kind == "yarn":
            return self._yarn()
        return plain

    def _llama3(self, plain: Tensor) -> Tensor:
        turns = self.original_length * plain / (2 * math.pi)
        blend = ((turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)).clamp(0, 1)
        return (1 - blend) * plain / self.factor + blend * plain

    def _yarn(self) -> Tensor:
        def dim_of(turns: float) -> float:
            return self.dim * math.log(self.original_length / (turns * 2 * math.pi)) / (2 * math.log(self.theta))

        low, high = dim_of(self.beta_fast), dim_of(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, self.dim - 1)
        ramp = ((torch.arange(self.dim // 2, dtype=torch.float32) - low) / max(high - low, 0.001)).clamp(0, 1)
        powers = self.theta ** (torch.arange(0, self.dim, 2, dtype=torch.float32) / self.dim)
        return ramp / (self.factor * powers) + (1 - ramp) / powers


def _parameters(config: dict[str, Any]) -> dict[str, Any]:
    """Every rope key of a config under its new name, without those that are null.

    Files spell them in up to three places; ValueError where two of them differ.
    """
    found: dict[str, Any] = {}
    top = [(name, config.get(name)) for name in ("rope_theta", "partial_rotary_factor")]
    for place in ("rope_parameters", "rope_scaling"):
        nested = config.get(place) or {}
        if not isinstance(nested, dict):
            raise ValueError(f"config key {place!r} is {nested!r}; a mapping is expected")
        for name, value in [*nested.items(), *top]:
            ours = "rope_type" if name == "type" else name
            if value is not None and found.setdefault(ours, value) != value:
                raise ValueError(f"config states {ours!r} as {found[ours]!r} and as {value!r}; keep one of them")
    found.setdefault("original_max_position_embeddings", config.get("max_position_embeddings"))
    return {name: value for name, value in found.items() if value is not None}


def _positive(given: dict[str, Any], name: str, default: float) -> float:
    value = given.pop(name, default)
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < 1e18 or value == 0 != default:
        raise ValueError(f"rope parameter {name!r} is {value!r}; a positive number is expected")
    return float(value)


def yarn_mscale(factor: float, mscale: float) -> float:
    """Yarn's correction of the attention temperature, 0.1 m ln(factor) + 1."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _frequencies(theta: float | Tensor, dim: int) -> Tensor:
    return 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)


def turn_neighbours(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn every pair of neighbours (x_2i, x_{2i+1}): "interleaved", as in DeepSeek checkpoints.

    x    [..., D]
    cos  [..., D/2]
    sin  [..., D/2]
    ->   [..., D]
    """
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)


def rotate(x: Tensor, positions: Tensor, rope: Rope, interleaved: bool = False) -> Tensor:
    """Turn the first `rope.dim` features of every head by its position; the rest passes through.

    x            [B, T, N, D]
    positions    [B, T]
    interleaved  a pair is (x_2i, x_{2i+1}) in place of (x_i, x_{i + D/2})
    ->           [B, T, N, D]
    """
    seen = int(positions.max()) + 1 if rope.kind == "dynamic" else 0
    angle = positions[..., None].float() * rope.frequencies(seen).to(x.device)  # [B, T, R/2]
    angle = torch.cat([angle, angle], -1)[:, :, None]
    cos, sin = (angle.cos() * rope.scale).to(x.dtype), (angle.sin() * rope.scale).to(x.dtype)
    turned, rest = x[..., : rope.dim], x[..., rope.dim :]
    if interleaved:
        half = rope.dim // 2
        return torch.cat([turn_neighbours(turned, cos[..., :half], sin[..., :half]), rest], -1)
    a, b = turned.chunk(2, -1)
    return torch.cat([turned * cos + torch.cat([-b, a], -1) * sin, rest], -1)
