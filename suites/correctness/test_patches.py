"""Claim: pictures, clips and sound reach Gemma 4 Unified as transformers' own processors would hand them over.

Born of the ways in which patches are cut wrongly: columns for rows, channels first, a picture squeezed out of its
shape, small patches side by side where a square of them is one; and of waveforms that lose what fills no stretch.
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
from safetensors.torch import load_file
from torch import Tensor

from harness import witness
from harness.checkpoints import CheckpointError
from harness.compare import bit_equal
from suites.catalog import open_target
from suites.draws import folders
from suites.families.gemma4_unified import PINNED_UNIFIED, PROCESSOR_CONFIG, UNIFIED
from suites.patches import (
    PROCESSOR,
    PatchFacts,
    Processor,
    SoundFacts,
    grid,
    image_inputs,
    read_processor,
    sampled,
    sound_inputs,
    video_inputs,
)

pytestmark = [pytest.mark.correctness, pytest.mark.pair("gemma4_unified")]

IMAGES = PROCESSOR_CONFIG["image_processor"]
SOUNDS = PROCESSOR_CONFIG["feature_extractor"]
GOLDEN = Path(__file__).parent.parent / "golden" / "patches.safetensors"
"""what transformers' processors made once, with torchvision at hand: suites/golden/make_patches.py"""


def pictures(sizes: list[tuple[int, int]], seed: int) -> list[Image.Image]:
    """Noise, the hardest thing to resize: [(width, height)]"""
    noise = np.random.default_rng(seed)
    return [Image.fromarray(noise.integers(0, 256, (height, width, 3), dtype=np.uint8)) for width, height in sizes]


def with_images(**changes: Any) -> PatchFacts:
    return Processor.from_hf({**PROCESSOR_CONFIG, "image_processor": {**IMAGES, **changes}}).images


def merged(small: Tensor, places: Tensor, side: int, pool: int, most: int) -> tuple[Tensor, Tensor]:
    """Small patches of one picture put where they stand in the picture, and the picture cut again into large ones.

    ->  [P, C] and [P, 2]
    """
    real = places[:, 0] >= 0
    columns, rows = (places[real].max(0).values + 1).tolist()
    part = side // pool
    whole = torch.zeros(rows * part, columns * part, 3)
    for pixels, (x, y) in zip(small[real], places[real].tolist(), strict=True):
        whole[y * part : (y + 1) * part, x * part : (x + 1) * part] = pixels.view(part, part, 3)
    corners = [(x, y) for y in range(rows // pool) for x in range(columns // pool)]
    cut = [whole[y * side : (y + 1) * side, x * side : (x + 1) * side].flatten() for x, y in corners]
    filling = most - len(cut)
    patches = torch.cat((torch.stack(cut), torch.zeros(filling, 3 * side**2)))
    return patches, torch.cat((torch.tensor(corners), torch.full((filling, 2), -1)))


shares = st.lists(st.sampled_from([0.25, 0.4, 0.5]), min_size=3, max_size=3)


@given(
    sizes=st.lists(st.tuples(st.integers(6, 60), st.integers(6, 60)), min_size=1, max_size=2),
    part=st.integers(1, 3),
    pool=st.integers(1, 3),
    normalize=st.booleans(),
    mean=shares,
    std=shares,
    seed=st.integers(0, 2**20),
)
@example(sizes=[(47, 31), (9, 60)], part=2, pool=3, normalize=True, mean=[0.4, 0.5, 0.25], std=[0.5, 0.25, 0.4], seed=0)
@example(sizes=[(60, 42), (400, 2), (3, 130)], part=3, pool=2, normalize=False, mean=[0.4] * 3, std=[0.5] * 3, seed=1)
def test_patches_are_cut_as_by_transformers(
    sizes: list[tuple[int, int]], part: int, pool: int, normalize: bool, mean: list[float], std: list[float], seed: int
) -> None:
    settings = {"patch_size": part, "pooling_kernel_size": pool, "max_soft_tokens": 70}
    settings |= {"do_normalize": normalize, "image_mean": mean, "image_std": std}
    given_pictures = pictures(sizes, seed)

    ours = image_inputs(given_pictures, with_images(**settings))

    # the processor of Gemma 4 with an encoder: the same pictures in small patches, which are merged here by place
    theirs = witness.process({**settings, "image_processor_type": "Gemma4ImageProcessor"}, given_pictures)
    pairs = [
        merged(small, places, part * pool, pool, 70)
        for small, places in zip(theirs["pixel_values"], theirs["image_position_ids"], strict=True)
    ]
    want, places = (torch.stack(both) for both in zip(*pairs, strict=True))
    bit_equal("image_position_ids", ours["image_position_ids"], places)
    bit_equal("pixel_values", ours["pixel_values"], want.float())


def as_bytes(pixels: Tensor) -> Tensor:
    """Pixels as they were before they were scaled, whose last bit is rounded here and there at different places."""
    return (pixels * 255).round().to(torch.uint8)


def test_patches_are_those_of_the_processors_that_need_torchvision() -> None:
    golden = load_file(GOLDEN)
    facts = with_images(patch_size=2, pooling_kernel_size=3, max_soft_tokens=70, num_frames=4)
    shown = [Image.fromarray(golden[f"picture_{i}"].numpy()) for i in range(3)]
    clip = [Image.fromarray(frame.numpy()) for frame in golden["clip"]]

    ours = {**image_inputs(shown, facts), **video_inputs([clip], facts)}

    bit_equal("image_position_ids", ours["image_position_ids"], golden["image_position_ids"])
    bit_equal("video_position_ids", ours["video_position_ids"], golden["video_position_ids"])
    # the first picture and the frames keep their size: of the others, pillow and torchvision make different bytes
    bit_equal("picture", as_bytes(ours["pixel_values"][0]), as_bytes(golden["pixel_values"][0]))
    bit_equal("clip", as_bytes(ours["pixel_values_videos"]), as_bytes(golden["pixel_values_videos"]))


@pytest.mark.parametrize(
    ("width", "height", "shape"), [(400, 2, (1, 70)), (2, 400, (70, 1)), (5, 60, (28, 2)), (48, 48, (8, 8))]
)
def test_thin_pictures_keep_one_row_of_patches(width: int, height: int, shape: tuple[int, int]) -> None:
    facts = with_images(patch_size=2, pooling_kernel_size=3, max_soft_tokens=70)

    assert grid(height, width, facts) == shape


def test_a_clip_is_its_pictures_and_frames_are_spread_evenly() -> None:
    facts = with_images(patch_size=2, max_soft_tokens=70, num_frames=3)
    clip = pictures([(20, 14)] * 8, 3)

    videos = video_inputs([clip], facts)

    # frames 0, 2 and 5 of 8: floor(i * 8 / 3)
    frames = image_inputs([clip[0], clip[2], clip[5]], facts)
    bit_equal("pixels", videos["pixel_values_videos"][0], frames["pixel_values"])
    bit_equal("places", videos["video_position_ids"][0], frames["image_position_ids"])
    assert sampled(32, 32) == list(range(32))
    with pytest.raises(ValueError, match="33 frames"):
        sampled(32, 33)


@given(
    lengths=st.lists(st.integers(1, 90), min_size=1, max_size=3),
    samples=st.sampled_from([2, 7, 20]),
    seed=st.integers(0, 2**20),
)
@example(lengths=[41, 20, 3], samples=20, seed=0)
def test_sound_is_cut_as_by_transformers(lengths: list[int], samples: int, seed: int) -> None:
    settings = {**SOUNDS, "audio_samples_per_token": samples, "feature_size": samples}
    noise = np.random.default_rng(seed)
    waveforms = [noise.standard_normal(length).astype(np.float32) for length in lengths]

    ours = sound_inputs(waveforms, Processor.from_hf({**PROCESSOR_CONFIG, "feature_extractor": settings}).sounds)

    theirs = witness.process(settings, waveforms)
    bit_equal("input_features", ours["input_features"], theirs["input_features"])
    bit_equal("input_features_mask", ours["input_features_mask"], theirs["input_features_mask"])


def test_the_published_settings_are_read_and_reach_the_target(tmp_path: Path) -> None:
    small = {"patch_size": 2, "pooling_kernel_size": 2, "max_soft_tokens": 6, "num_frames": 2}
    sounds = {**SOUNDS, "audio_samples_per_token": 20, "feature_size": 20}
    parts = {"image_processor": {**IMAGES, **small}, "feature_extractor": sounds}
    videos = {"video_processor": {**PROCESSOR_CONFIG["video_processor"], **small}}
    (tmp_path / PROCESSOR).write_text(json.dumps({**PROCESSOR_CONFIG, **parts, **videos}))
    facts = read_processor(tmp_path)
    inputs = image_inputs(pictures([(8, 12)], 0), facts.images)
    inputs |= video_inputs([pictures([(12, 8)] * 4, 1)], facts.videos)
    inputs |= sound_inputs([np.ones(50, dtype=np.float32)], facts.sounds)
    holes = {"image": 6, "video": 12, "audio": 3}
    tokens = torch.tensor(
        [[1, *(UNIFIED[f"{kind}_token_id"] for kind, count in holes.items() for _ in range(count)), 2]]
    )
    with folders(PINNED_UNIFIED) as (path, _):
        target = open_target(path)

    out = target(tokens, **inputs)

    assert bool(torch.isfinite(out.logits).all())
    published = Processor.from_hf(PROCESSOR_CONFIG)
    assert published.images == PatchFacts(side=48, most=280, scale=0.00392156862745098)
    assert published.videos == PatchFacts(side=48, most=70, scale=0.00392156862745098)
    assert published.sounds == SoundFacts(samples=640, rate=16_000)


@pytest.mark.parametrize(
    ("part", "changes"),
    [
        ("image_processor", {"do_resize": False}),
        ("image_processor", {"resample": 9}),
        ("image_processor", {"size": {"height": 224, "width": 224}}),
        ("image_processor", {"image_std": [0.5, 0.0, 0.5]}),
        ("video_processor", {"fps": 2}),
        ("video_processor", {"do_flip": True}),
        ("feature_extractor", {"feature_size": 128}),
        ("feature_extractor", {"padding_side": "left"}),
        ("feature_extractor", {"dither": 0.1}),
    ],
)
def test_settings_that_would_be_dropped_are_refused(part: str, changes: dict[str, Any], tmp_path: Path) -> None:
    wrong = {**PROCESSOR_CONFIG, part: {**PROCESSOR_CONFIG[part], **changes}}
    (tmp_path / PROCESSOR).write_text(json.dumps(wrong))

    with pytest.raises(CheckpointError, match=f"{PROCESSOR}.*{next(iter(changes))}"):
        read_processor(tmp_path)
