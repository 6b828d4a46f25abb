"""From pictures, clips and waveforms to what Gemma 4 reads: patches with their places, and sound.

    square  = patch_size * pooling_kernel_size             pixels along what becomes one token
    shrink  = sqrt(max_soft_tokens * square^2 / (height * width))
    rows    = floor(shrink * height / square), columns alike     at least 1, the other as the picture's shape allows
    x       = (scale * resize(picture) - mean) / std       a patch row by row, channels last; mean, std if do_normalize
    frames  = waveform and zeros up to a multiple of audio_samples_per_token

Gemma 4 with its towers reads patches of `patch_size` pixels, which its tower pools, and spectra (suites/spectra.py);
Gemma 4 Unified reads a square as one patch, and frames of the waveform. Every fact stands in the checkpoint's
`processor_config.json`, whose `processor_class` says which of the two it is. The resizing is pillow's, on bytes, which
is what transformers does without torchvision; with it, a resized byte may differ by one or two. Frames of a clip are
counted in whole numbers; transformers' step is a float32, which differs where num_frames is no power of two.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import floor, sqrt
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from harness.checkpoints import CheckpointError, read_json
from reference.config import ConfigError, Keys
from suites.pixels import read_channels
from suites.spectra import SpectrumFacts, spectrum_inputs

PROCESSOR = "processor_config.json"
UNIFIED = {"Gemma4Processor": False, "Gemma4UnifiedProcessor": True}
# who wrote it, for which prompts, and how frames are handed over
WRITTEN_ALONG = (
    "image_processor_type",
    "video_processor_type",
    "feature_extractor_type",
    "processor_class",
    "image_seq_length",
    "data_format",
    "input_data_format",
    "device",
    "return_metadata",
    "video_metadata",
    "disable_grouping",
)


@dataclass(frozen=True)
class PatchFacts:
    """Every fact that changes how pictures become patches."""

    side: int
    """pixels along a patch"""
    most: int
    """tokens a picture, filling included"""
    pool: int = 1
    """patches along a token"""
    mean: tuple[float, ...] = (0.0, 0.0, 0.0)
    std: tuple[float, ...] = (1.0, 1.0, 1.0)
    scale: float = 1 / 255
    resample: int = Image.Resampling.BICUBIC
    num_frames: int = 32
    """of a clip"""

    @classmethod
    def from_hf(cls, keys: Keys, unified: bool) -> "PatchFacts":
        """Read `image_processor` or `video_processor`; errors: ConfigError for what is unknown or unsupported."""
        for step in ("do_resize", "do_rescale", "do_convert_rgb", "default_to_square", "do_sample_frames"):
            keys.expect(step, True)
        for name in (*WRITTEN_ALONG, "image_mean", "image_std"):
            keys.get(name)
        keys.expect("size")
        keys.expect("fps")
        resample = keys.count("resample", 3, 0)
        if resample not in [int(filter_) for filter_ in Image.Resampling]:
            raise ConfigError(f"config key {keys.path + 'resample'!r} is {resample}; pillow's filters are 0 to 5")
        shift = {
            "mean": read_channels(keys, "image_mean", 0.0, 0.0),
            "std": read_channels(keys, "image_std", 1e-6, 1.0),
        }
        side, pool = keys.count("patch_size", 16), keys.count("pooling_kernel_size", 3)
        facts = cls(
            side=side * pool if unified else side,
            pool=1 if unified else pool,
            most=keys.count("max_soft_tokens", 70 if "video" in keys.path else 280),
            **(shift if keys.flag("do_normalize", "video" in keys.path) else {}),
            scale=keys.number("rescale_factor", 1 / 255),
            resample=resample,
            num_frames=keys.count("num_frames", 32),
        )
        keys.finish()
        return facts


@dataclass(frozen=True)
class SoundFacts:
    """Every fact that changes how waveforms become stretches; they come at `rate` samples a second."""

    samples: int
    rate: int = 16_000

    @classmethod
    def from_hf(cls, keys: Keys) -> "SoundFacts":
        """Read `feature_extractor`; errors: ConfigError."""
        for name in (*WRITTEN_ALONG, "return_attention_mask"):
            keys.get(name)
        keys.expect("padding_side", "right")
        keys.expect("padding_value", 0, 0.0)
        facts = cls(keys.count("audio_samples_per_token", 640), keys.count("sampling_rate", 16_000))
        # transformers reads it for nothing but the filling of a batch
        keys.expect("feature_size", facts.samples)
        keys.finish()
        return facts


@dataclass(frozen=True)
class Processor:
    """What stands before the target."""

    images: PatchFacts
    videos: PatchFacts
    sounds: SoundFacts | SpectrumFacts

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "Processor":
        """Read `processor_config.json`; errors: ConfigError."""
        keys = Keys(config)
        name = keys.need("processor_class")
        if name not in UNIFIED:
            raise ConfigError(f"config key 'processor_class' is {name!r}; known are {', '.join(UNIFIED)}")
        unified = UNIFIED[name]
        for name in ("image_seq_length", "audio_seq_length", "audio_ms_per_token", "auto_map"):
            keys.get(name)  # of prompts: how many placeholders stand for one piece
        facts = cls(
            PatchFacts.from_hf(keys.below("image_processor"), unified),
            PatchFacts.from_hf(keys.below("video_processor"), unified),
            (SoundFacts if unified else SpectrumFacts).from_hf(keys.below("feature_extractor")),
        )
        keys.finish()
        return facts


def read_processor(folder: str | os.PathLike[str]) -> Processor:
    """The facts of a checkpoint folder; errors: CheckpointError."""
    file = Path(folder) / PROCESSOR
    try:
        return Processor.from_hf(read_json(file))
    except ConfigError as error:
        raise CheckpointError(f"{file}: {error}") from error


def grid(height: int, width: int, c: PatchFacts) -> tuple[int, int]:
    """Rows and columns of tokens that a picture is resized to; errors: ValueError where it is too small for one."""
    square = c.side * c.pool
    shrink = sqrt(c.most * square**2 / (height * width))
    rows, columns = floor(shrink * height / square), floor(shrink * width / square)
    if rows == columns == 0:
        raise ValueError(f"a picture of {width} by {height} pixels has room for no square of {square} pixels")
    if rows == 0:
        return 1, min(width // height, c.most)
    if columns == 0:
        return min(height // width, c.most), 1
    return rows, columns


def patches(picture: Image.Image, c: PatchFacts) -> tuple[np.ndarray, np.ndarray]:
    """One picture of any size and mode: its patches in reading order, and the column and row of each, then filling.

    ->  [P, C] float32 and [P, 2] int64
    """
    rows, columns = (c.pool * count for count in grid(picture.height, picture.width, c))
    size = (columns * c.side, rows * c.side)
    whole = picture.convert("RGB")
    whole = whole if whole.size == size else whole.resize(size, c.resample)
    # float64 until the bytes are scaled, float32 from there on: as transformers rounds
    scaled = (np.asarray(whole, dtype=np.float64) * c.scale).astype(np.float32)
    mean, std = (np.array(channels, dtype=np.float32) for channels in (c.mean, c.std))
    cut = ((scaled - mean) / std).reshape(rows, c.side, columns, c.side, 3).swapaxes(1, 2)
    x = np.zeros((c.most * c.pool**2, 3 * c.side**2), dtype=np.float32)
    x[: rows * columns] = cut.reshape(rows * columns, -1)
    places = np.full((len(x), 2), -1, dtype=np.int64)
    places[: rows * columns] = np.stack(np.meshgrid(np.arange(columns), np.arange(rows)), -1).reshape(-1, 2)
    return x, places


def image_inputs(pictures: Sequence[Image.Image], c: PatchFacts) -> dict[str, Tensor]:
    """`pixel_values` [I, P, C] and `image_position_ids` [I, P, 2]."""
    x, places = (np.stack(part) for part in zip(*(patches(picture, c) for picture in pictures), strict=True))
    return {"pixel_values": torch.from_numpy(x), "image_position_ids": torch.from_numpy(places)}


def sampled(total: int, num_frames: int) -> list[int]:
    """Which frames of a clip are read: spread evenly from the first; errors: ValueError where there are too few."""
    if num_frames > total:
        raise ValueError(f"{num_frames} frames cannot be read from a clip of {total}")
    return [i * total // num_frames for i in range(num_frames)]


def video_inputs(clips: Sequence[Sequence[Image.Image]], c: PatchFacts) -> dict[str, Tensor]:
    """`pixel_values_videos` [J, F, P, C] and `video_position_ids` [J, F, P, 2] of whole clips."""
    chosen = [image_inputs([clip[i] for i in sampled(len(clip), c.num_frames)], c) for clip in clips]
    return {
        "pixel_values_videos": torch.stack([clip["pixel_values"] for clip in chosen]),
        "video_position_ids": torch.stack([clip["image_position_ids"] for clip in chosen]),
    }


def stretches(waveform: np.ndarray, c: SoundFacts) -> np.ndarray:
    """One waveform, filled up with zeros.

    ->  [R, Z] float32
    """
    x = np.zeros((-(-len(waveform) // c.samples), c.samples), dtype=np.float32)
    x.reshape(-1)[: len(waveform)] = waveform
    return x


def sound_inputs(waveforms: Sequence[np.ndarray], c: SoundFacts | SpectrumFacts) -> dict[str, Tensor]:
    """`input_features` [U, R, Z] and `input_features_mask` [U, R] of waveforms at `c.rate` samples a second."""
    if isinstance(c, SpectrumFacts):
        return spectrum_inputs(waveforms, c)
    cut = [stretches(waveform, c) for waveform in waveforms]
    x = np.zeros((len(cut), max(map(len, cut)), c.samples), dtype=np.float32)
    for row, rows in zip(x, cut, strict=True):
        row[: len(rows)] = rows
    mask = np.arange(x.shape[1]) < np.array([len(rows) for rows in cut])[:, None]
    return {"input_features": torch.from_numpy(x), "input_features_mask": torch.from_numpy(mask)}
