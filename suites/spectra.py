"""From waveforms to what Gemma 4's audio tower reads: log-mel spectra, and which of their frames are sound.

    x    = scale * waveform; its first 480,000 samples, zeros up to the longest of a batch and a multiple of 128
    f_i  = `frame` samples of [frame // 2 zeros; x] from i * hop, and one more
    e_i  = (f_ij - p f_i,j-1), the first times 1 - p        preemphasis of HTK; without its flavor f_i,j+1 - p f_ij
    m_i  = log(|FFT(hann * e_i)| mel + floor)               FFT of the power of two that holds a frame, or its double
    y_i  = (m_i - mean) / std; 0 unless all that f_i reads of x, and the one more, is waveform

Every fact stands under `feature_extractor` in the checkpoint's `processor_config.json`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from reference.config import ConfigError, Keys

LONGEST, MULTIPLE = 480_000, 128
"""samples; what transformers' extractor does unless it is told otherwise"""


@dataclass(frozen=True)
class SpectrumFacts:
    """Every fact that changes how waveforms become spectra; they come at `rate` samples a second."""

    features: int = 128
    rate: int = 16_000
    frame: int = 320
    hop: int = 160
    low: float = 0.0
    high: float = 8000.0
    preemphasis: float = 0.0
    htk_flavor: bool = True
    overdrive: bool = False
    scale: float = 1.0
    floor: float = 1e-3
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()

    @classmethod
    def from_hf(cls, keys: Keys) -> "SpectrumFacts":
        """Read `feature_extractor`; errors: ConfigError for what is unknown or unsupported."""
        for name in ("feature_extractor_type", "return_attention_mask"):
            keys.get(name)
        keys.expect("padding_side", "right")
        keys.expect("padding_value", 0, 0.0)
        # noise that differs from call to call
        keys.expect("dither", 0, 0.0)
        features, rate = keys.count("feature_size", 128), keys.count("sampling_rate", 16_000)
        facts = cls(
            features,
            rate,
            frame=round(rate * keys.number("frame_length_ms", 20.0) / 1000),
            hop=round(rate * keys.number("hop_length_ms", 10.0) / 1000),
            low=_number(keys, "min_frequency", 0.0),
            high=_number(keys, "max_frequency", 8000.0),
            preemphasis=_number(keys, "preemphasis", 0.0),
            htk_flavor=keys.flag("preemphasis_htk_flavor", True),
            overdrive=keys.flag("fft_overdrive", False),
            scale=keys.number("input_scale_factor", 1.0),
            floor=keys.number("mel_floor", 1e-3),
            mean=_bands(keys, "per_bin_mean", features),
            std=_bands(keys, "per_bin_stddev", features),
        )
        for name, used in (("frame_length", facts.frame), ("hop_length", facts.hop), ("fft_length", facts.points)):
            if keys.get(name, used) != used:
                raise ConfigError(
                    f"config key {keys.path + name!r} is {keys.get(name)}, but transformers reads milliseconds alone "
                    f"and would use {used}; state frame_length_ms and hop_length_ms, and remove it"
                )
        keys.finish()
        return facts

    @property
    def points(self) -> int:
        """of the transform"""
        return 2 ** ((self.frame - 1).bit_length() + self.overdrive)


def _number(keys: Keys, name: str, default: float) -> float:
    """Zero or a positive number; errors: ConfigError."""
    value = keys.get(name, default)
    return 0.0 if value == 0 and not isinstance(value, bool) else keys.number(name, default)


def _bands(keys: Keys, name: str, features: int) -> tuple[float, ...]:
    """A number for each band, or nothing; transformers saves them inside two lists more."""
    value: Any = keys.get(name, [])
    while isinstance(value, list) and len(value) == 1 and isinstance(value[0], list):
        value = value[0]
    numbers = isinstance(value, list | tuple) and all(isinstance(x, int | float) for x in value)
    if not numbers or len(value) not in (0, features):
        raise ConfigError(f"config key {keys.path + name!r} is {value!r}; {features} numbers are expected, or none")
    return tuple(map(float, value))


def mel_filters(c: SpectrumFacts) -> np.ndarray:
    """Triangles between frequencies that are evenly spread in mel, as HTK has them.

    ->  [N/2 + 1, Z]  float64; N points of the transform
    """
    low, high = (2595 * np.log10(1 + hertz / 700) for hertz in (c.low, c.high))
    edges = 700 * (np.power(10, np.linspace(low, high, c.features + 2) / 2595) - 1)
    hertz = np.linspace(0, c.rate // 2, c.points // 2 + 1)[:, None]
    widths = np.diff(edges)
    return np.minimum((hertz - edges[:-2]) / widths[:-1], (edges[2:] - hertz) / widths[1:]).clip(min=0)


def hann(frame: int) -> np.ndarray:
    """A window of one period: the zero it ends on is that of the next.

    ->  [M]  float32
    """
    return np.hanning(frame + 1)[:-1].astype(np.float32)


def spectrum(waveform: np.ndarray, c: SpectrumFacts) -> np.ndarray:
    """Log-mel spectra of all frames that a filled waveform has.

    waveform  [M]  float32
    ->        [R, Z]  float32
    """
    x = np.pad(waveform * np.float32(c.scale), (c.frame // 2, 0))
    if len(x) <= c.frame:
        return np.zeros((0, c.features), dtype=np.float32)
    frames = np.lib.stride_tricks.sliding_window_view(x, c.frame + 1)[:: c.hop]
    before, now = frames[:, :-1], frames[:, 1:]
    if c.preemphasis == 0:
        shaped = before
    elif c.htk_flavor:
        shaped = np.concatenate([before[:, :1] * (1 - c.preemphasis), (now - c.preemphasis * before)[:, :-1]], -1)
    else:
        shaped = now - c.preemphasis * before
    sizes = np.abs(np.fft.rfft(shaped * hann(c.frame), c.points))
    log = np.log(sizes @ mel_filters(c) + c.floor)
    log = log - np.array(c.mean) if c.mean else log
    log = log / np.array(c.std) if c.std else log
    return log.astype(np.float32)


def spectrum_inputs(waveforms: Sequence[np.ndarray], c: SpectrumFacts) -> dict[str, Tensor]:
    """`input_features` [U, R, Z] and `input_features_mask` [U, R]; errors: ValueError for what fills no frame."""
    lengths = [min(len(waveform), LONGEST) for waveform in waveforms]
    needed = c.frame - c.frame // 2 + 1
    if min(lengths) < needed:
        raise ValueError(f"a sound of {min(lengths)} samples fills no frame; at least {needed} are needed")
    filled = np.zeros((len(lengths), -(-max(lengths) // MULTIPLE) * MULTIPLE), dtype=np.float32)
    for row, waveform, length in zip(filled, waveforms, lengths, strict=True):
        row[:length] = waveform[:length]
    spectra = np.stack([spectrum(row, c) for row in filled])
    last = np.arange(spectra.shape[1]) * c.hop + needed - 1
    mask = last < np.array(lengths)[:, None]
    return {
        "input_features": torch.from_numpy(spectra * mask[..., None]),
        "input_features_mask": torch.from_numpy(mask),
    }
