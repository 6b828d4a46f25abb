"""Bugs of what stands before Gemma 4's towers: patches that are pooled later, and spectra of sound."""

from typing import Any

import numpy as np
import torch

from harness.planting import Bug

CLAIMS = "suites/correctness/test_tower_inputs.py"
PATCHES = f"{CLAIMS}::test_patches_are_cut_as_by_transformers"
SPECTRA = f"{CLAIMS}::test_spectra_are_those_of_transformers"


def places_of_squares(cut: Any) -> Any:
    """Every patch at the place of its square, which is where the pooled token stands."""

    def squares(picture: Any, c: Any) -> Any:
        x, places = cut(picture, c)
        return x, np.where(places < 0, places, places // c.pool)

    return squares


def uncentred(run: Any) -> Any:
    """Frames that start at their sample in place of having it in the middle."""

    def starting(waveform: np.ndarray, c: Any) -> np.ndarray:
        return run(np.append(waveform[c.frame // 2 :], np.zeros(c.frame // 2, dtype=np.float32)), c)

    return starting


def filling_as_sound(prepare: Any) -> Any:
    """A frame counts as sound as soon as it begins in the waveform."""

    def inputs(waveforms: Any, c: Any) -> Any:
        made = prepare(waveforms, c)
        begins = torch.arange(made["input_features_mask"].shape[1]) * c.hop
        return made | {"input_features_mask": begins < torch.tensor([len(w) for w in waveforms])[:, None]}

    return inputs


def even_in_hertz(_: Any) -> Any:
    """Bands of equal width, as if mel were hertz."""

    def filters(c: Any) -> np.ndarray:
        edges = np.linspace(c.low, c.high, c.features + 2)
        hertz = np.linspace(0, c.rate // 2, c.points // 2 + 1)[:, None]
        widths = np.diff(edges)
        return np.minimum((hertz - edges[:-2]) / widths[:-1], (edges[2:] - hertz) / widths[1:]).clip(min=0)

    return filters


BUGS = (
    Bug(
        "patches-at-the-place-of-their-square",
        "positions of pooled tokens handed to a tower that embeds patches",
        "suites.patches.patches",
        places_of_squares,
        PATCHES,
    ),
    Bug(
        "spectra-not-centred",
        "frames without the half frame of zeros before the first sample",
        "suites.spectra.spectrum",
        uncentred,
        SPECTRA,
    ),
    Bug(
        "spectra-symmetric-window",
        "np.hanning is symmetric; an analysis window is periodic",
        "suites.spectra.hann",
        lambda _: lambda frame: np.hanning(frame).astype(np.float32),
        SPECTRA,
    ),
    Bug(
        "spectra-of-filling",
        "frames that reach beyond the waveform handed over as sound",
        "suites.patches.spectrum_inputs",
        filling_as_sound,
        SPECTRA,
    ),
    Bug(
        "spectra-bands-of-equal-width",
        "a filter bank spread in hertz, not in mel",
        "suites.spectra.mel_filters",
        even_in_hertz,
        SPECTRA,
    ),
)
