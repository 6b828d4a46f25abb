"""Weights in eight bits, with a scale for each block of a matrix: what they stand for.

    w[i, j] = q[i, j] * s[i // rows, j // columns]        the last blocks of a row or a column may be cut short

So the hub has DeepSeek V3: float8 weights, and beside `X.weight` a float32 `X.weight_scale_inv`, which multiplies in
spite of its name. The config says so under `quantization_config`; a multimodal one under its text's.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

KEY, SUFFIX = "quantization_config", "_scale_inv"
DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)
# what engines do with activations, which modules were left whole (their tensors say so), how scales were rounded
INERT = {"quant_method", "fmt", "activation_scheme", "modules_to_not_convert", "ignored_layers", "scale_fmt"}


class ScaleError(ValueError):
    """Weights that are packed in a way that is not read here."""


@dataclass(frozen=True)
class BlockScales:
    """One scale a block of so many rows and columns."""

    rows: int
    columns: int

    def grid(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """How many blocks a matrix of this shape has, down and across."""
        return -(-shape[0] // self.rows), -(-shape[1] // self.columns)

    def expand(self, q: Tensor, scale: Tensor) -> Tensor:
        """Weights in float32.

        q      [M, X]
        scale  [C, Y]  C blocks down, Y across
        ->     [M, X]
        """
        whole = scale.float().repeat_interleave(self.rows, 0).repeat_interleave(self.columns, 1)
        return q.float() * whole[: q.shape[0], : q.shape[1]]


def read_scales(config: Mapping[str, Any], file: Path, path: str = "") -> tuple[BlockScales | None, dict[str, Any]]:
    """How a config says that weights are packed, None where they are whole; and the config without it.

    errors: ScaleError for any way but float8 in blocks
    """
    rest = {key: value for key, value in config.items() if key != KEY}
    found = None if config.get(KEY) is None else _blocks(config[KEY], f"{file}: config key '{path}{KEY}'")
    inner = config.get("text_config")
    if isinstance(inner, Mapping) and inner.get(KEY) is not None:
        below, rest["text_config"] = read_scales(inner, file, "text_config.")
        if found not in (None, below):
            raise ScaleError(f"{file}: config keys '{KEY}' and 'text_config.{KEY}' differ; keep the one that is true")
        found = below
    return found, rest


def _blocks(said: Any, where: str) -> BlockScales:
    method = said.get("quant_method") if isinstance(said, Mapping) else None
    if method != "fp8":
        raise ScaleError(
            f"{where} packs weights by {method!r}; only 'fp8' in blocks is read; fetch a checkpoint in bfloat16, or "
            "unpack this one with the tool that packed it and remove the key"
        )
    size = said.get("weight_block_size")
    if not isinstance(size, list) or len(size) != 2 or not all(type(n) is int and n > 0 for n in size):
        raise ScaleError(f"{where} has 'weight_block_size' {size!r}; two sizes are expected, as [128, 128]")
    unread = sorted(set(said) - INERT - {"weight_block_size"})
    if unread or said.get("activation_scheme", "dynamic") != "dynamic":
        raise ScaleError(f"{where} has {unread or ['activation_scheme']}, which may change the weights and is not read")
    return BlockScales(*size)


class Stored(Protocol):
    """A tensor on disk."""

    @property
    def file(self) -> Path: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> torch.dtype: ...


def match_scales(blocks: BlockScales | None, headers: Mapping[str, Stored]) -> dict[str, str]:
    """The scale of every weight in eight bits, by name; errors: ScaleError where one is missing or does not fit."""
    found = {}
    for name, header in headers.items():
        scale = headers.get(name + SUFFIX)
        if header.dtype not in DTYPES and scale is None:
            continue
        what = f"{header.file}: tensor {name!r} is {header.dtype}"
        if header.dtype not in DTYPES:
            raise ScaleError(f"{what}, and {name + SUFFIX!r} scales it; save it in eight bits, or without a scale")
        if scale is None or blocks is None:
            raise ScaleError(
                f"{what}, and nothing scales it; save {name + SUFFIX!r} and the config key {KEY!r} with it, or the "
                "weight in bfloat16"
            )
        if len(header.shape) != 2 or scale.shape != blocks.grid(header.shape):
            raise ScaleError(
                f"{what} {list(header.shape)}, and its scale is {list(scale.shape)}, which is not one for each "
                f"{blocks.rows} by {blocks.columns} of a matrix"
            )
        found[name] = name + SUFFIX
    return found
