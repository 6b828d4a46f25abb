"""From pictures to `pixel_values`: what a processor does before a target with images reads them.

    y = (scale * resize(x) - mean) / std        channel by channel

Every fact stands in the checkpoint's `preprocessor_config.json`. The resizing is pillow's, on bytes, which is what
transformers does without torchvision; with it, the last byte of a resized picture may differ.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from harness.checkpoints import CheckpointError, read_json
from reference.config import ConfigError, Keys

PREPROCESSOR = "preprocessor_config.json"
PAN_AND_SCAN = ("max_num_crops", "min_crop_size", "min_ratio_to_activate")


@dataclass(frozen=True)
class PixelConfig:
    """Every fact that changes the equation above."""

    height: int
    width: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    scale: float = 1 / 255
    resample: int = Image.Resampling.BILINEAR

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "PixelConfig":
        """Read `preprocessor_config.json`; errors: ConfigError for what is missing, unknown or unsupported."""
        keys = Keys(config)
        for step in ("do_resize", "do_rescale", "do_normalize", "do_convert_rgb", "default_to_square"):
            keys.expect(step, True)
        keys.expect("do_pan_and_scan", False)
        for name in PAN_AND_SCAN:
            keys.get(f"pan_and_scan_{name}")
        for name in ("image_processor_type", "processor_class", "image_seq_length", "data_format", "device"):
            keys.get(name)  # who wrote it, and for which prompts
        size, resample = keys.below("size"), keys.count("resample", 2, 0)
        if resample not in [int(filter_) for filter_ in Image.Resampling]:
            raise ConfigError(f"config key 'resample' is {resample}; pillow's filters are 0 to 5")
        facts = cls(
            height=size.count("height"),
            width=size.count("width"),
            mean=read_channels(keys, "image_mean", least=0.0),
            std=read_channels(keys, "image_std", least=1e-6),
            scale=keys.number("rescale_factor", 1 / 255),
            resample=resample,
        )
        size.finish()
        keys.finish()
        return facts


def read_channels(keys: Keys, name: str, least: float, default: float = 0.5) -> tuple[float, ...]:
    """A number for red, green and blue each; errors: ConfigError."""
    value = keys.get(name, [default] * 3)
    numbers = isinstance(value, list | tuple) and all(isinstance(x, int | float) and x >= least for x in value)
    if not numbers or len(value) != 3:
        raise ConfigError(f"config key {name!r} is {value!r}; three numbers from {least} are expected")
    return tuple(map(float, value))


def read_pixel_config(folder: str | os.PathLike[str]) -> PixelConfig:
    """The facts of a checkpoint folder; errors: CheckpointError."""
    file = Path(folder) / PREPROCESSOR
    try:
        return PixelConfig.from_hf(read_json(file))
    except ConfigError as error:
        raise CheckpointError(f"{file}: {error}") from error


def pixel_values(pictures: Sequence[Image.Image], c: PixelConfig) -> Tensor:
    """Pictures of any size and mode as a target reads them.

    ->  [I, 3, Y, X]  float32; I pictures, Y by X pixels
    """
    mean, std = (np.array(channels, dtype=np.float32) for channels in (c.mean, c.std))
    rows = []
    for picture in pictures:
        resized = picture.convert("RGB").resize((c.width, c.height), c.resample)
        # float64 until the bytes are scaled, float32 from there on: as transformers rounds
        scaled = (np.asarray(resized, dtype=np.float64) * c.scale).astype(np.float32)
        rows.append(torch.from_numpy((scaled - mean) / std).permute(2, 0, 1))
    return torch.stack(rows)
