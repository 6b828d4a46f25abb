"""Claim: pictures reach the tower as transformers' own processor would hand them over, bit for bit.

Born of the ways in which a processor is rewritten: sides swapped in the resize, another filter, a mean subtracted
before the scaling, channels last. Text comes out of all of them, about another picture.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from harness import witness
from harness.checkpoints import CheckpointError
from harness.compare import bit_equal
from suites.catalog import open_target
from suites.draws import folders
from suites.families.gemma3 import PINNED_LAYOUT, PINNED_MULTIMODAL, Prompt
from suites.pixels import PREPROCESSOR, PixelConfig, pixel_values, read_pixel_config

pytestmark = [pytest.mark.correctness, pytest.mark.pair("gemma3_mm")]

GEMMA3 = {
    "do_convert_rgb": None,
    "do_normalize": True,
    "do_pan_and_scan": None,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_processor_type": "Gemma3ImageProcessor",
    "image_seq_length": 256,
    "image_std": [0.5, 0.5, 0.5],
    "pan_and_scan_max_num_crops": None,
    "pan_and_scan_min_crop_size": None,
    "pan_and_scan_min_ratio_to_activate": None,
    "processor_class": "Gemma3Processor",
    "resample": 2,
    "rescale_factor": 0.00392156862745098,
    "size": {"height": 896, "width": 896},
}
"""`preprocessor_config.json` as the hub has it"""

shares = st.lists(st.sampled_from([0.25, 0.4, 0.5, 0.6]), min_size=3, max_size=3)


def pictures(sizes: list[tuple[int, int]], seed: int) -> list[Image.Image]:
    """Noise, the hardest thing to resize: [(width, height)]"""
    noise = np.random.default_rng(seed)
    return [Image.fromarray(noise.integers(0, 256, (height, width, 3), dtype=np.uint8)) for width, height in sizes]


@given(
    sizes=st.lists(st.tuples(st.integers(4, 40), st.integers(4, 40)), min_size=1, max_size=3),
    height=st.integers(4, 32),
    width=st.integers(4, 32),
    mean=shares,
    std=shares,
    resample=st.sampled_from([0, 1, 2, 3]),
    seed=st.integers(0, 2**20),
)
@example(sizes=[(47, 31), (9, 20)], height=24, width=16, mean=[0.4, 0.5, 0.6], std=[0.5, 0.25, 0.6], resample=2, seed=0)
def test_pictures_are_prepared_as_by_transformers(
    sizes: list[tuple[int, int]],
    height: int,
    width: int,
    mean: list[float],
    std: list[float],
    resample: int,
    seed: int,
) -> None:
    size = {"height": height, "width": width}
    config = {**GEMMA3, "size": size, "image_mean": mean, "image_std": std, "resample": resample}
    given_pictures = pictures(sizes, seed)

    ours = pixel_values(given_pictures, PixelConfig.from_hf(config))

    bit_equal("pixel_values", ours, witness.preprocess(config, given_pictures))


@pytest.mark.parametrize("mode", ["L", "RGBA", "P"])
def test_every_mode_becomes_red_green_and_blue(mode: str) -> None:
    config = {**GEMMA3, "do_convert_rgb": True, "size": {"height": 8, "width": 8}}
    given_pictures = [picture.convert(mode) for picture in pictures([(13, 11)], 1)]

    ours = pixel_values(given_pictures, PixelConfig.from_hf(config))

    bit_equal("pixel_values", ours, witness.preprocess(config, given_pictures))


def test_the_published_settings_are_read_and_an_image_reaches_the_target(tmp_path: Path) -> None:
    (tmp_path / PREPROCESSOR).write_text(json.dumps({**GEMMA3, "size": {"height": 24, "width": 24}}))
    prompt = Prompt(PINNED_MULTIMODAL.config, PINNED_LAYOUT, 0)
    pixels = pixel_values(pictures([(30, 20), (20, 30), (24, 24)], 2), read_pixel_config(tmp_path))
    with folders(PINNED_MULTIMODAL) as (path, _):
        target = open_target(path)

    out = target(prompt.tokens, pixel_values=pixels, token_type_ids=prompt.token_type_ids)

    assert PixelConfig.from_hf(GEMMA3) == PixelConfig(896, 896, (0.5,) * 3, (0.5,) * 3, 0.00392156862745098, 2)
    assert bool(torch.isfinite(out.logits).all())


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"do_pan_and_scan": True}, "do_pan_and_scan"),
        ({"do_normalize": False}, "do_normalize"),
        ({"resample": 9}, "resample"),
        ({"image_std": [0.5, 0.0, 0.5]}, "image_std"),
        ({"size": {"shortest_edge": 224}}, "size.height"),
        ({"do_flip": True}, "do_flip"),
    ],
)
def test_settings_that_would_be_dropped_are_refused(changes: dict[str, Any], names: str, tmp_path: Path) -> None:
    (tmp_path / PREPROCESSOR).write_text(json.dumps({**GEMMA3, **changes}))

    with pytest.raises(CheckpointError, match=f"{PREPROCESSOR}.*{names}"):
        read_pixel_config(tmp_path)
