"""Claim: pictures, clips and sound reach the towers of Gemma 4 as transformers' own processors would hand them over.

Born of the ways in which spectra go wrong: frames that start where they should be centred, a window that is symmetric
in place of periodic, power for magnitude, frames that are half filling taken for sound; and of patches handed to a
tower that pools them as if they were pooled already.
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
from harness.compare import bit_equal, hold
from suites.catalog import open_target
from suites.draws import folders
from suites.families.gemma4_mm import MULTIMODAL, PINNED
from suites.families.gemma4_unified import PROCESSOR_CONFIG
from suites.patches import PROCESSOR, PatchFacts, Processor, image_inputs, read_processor, sound_inputs, video_inputs
from suites.spectra import LONGEST, SpectrumFacts

pytestmark = [pytest.mark.correctness, pytest.mark.pair("gemma4_mm")]

SOUNDS = {
    "dither": 0.0,
    "feature_extractor_type": "Gemma4AudioFeatureExtractor",
    "feature_size": 128,
    "fft_length": 512,
    "fft_overdrive": False,
    "frame_length": 320,
    "hop_length": 160,
    "input_scale_factor": 1.0,
    "max_frequency": 8000.0,
    "mel_floor": 0.001,
    "min_frequency": 0.0,
    "padding_side": "right",
    "padding_value": 0.0,
    "per_bin_mean": None,
    "per_bin_stddev": None,
    "preemphasis": 0.0,
    "preemphasis_htk_flavor": True,
    "return_attention_mask": True,
    "sampling_rate": 16_000,
}
IMAGES = {**PROCESSOR_CONFIG["image_processor"], "image_processor_type": "Gemma4ImageProcessor"}
VIDEOS = {**PROCESSOR_CONFIG["video_processor"], "video_processor_type": "Gemma4VideoProcessor"}
TOWERS = {
    **PROCESSOR_CONFIG,
    "processor_class": "Gemma4Processor",
    "feature_extractor": SOUNDS,
    "image_processor": IMAGES,
    "video_processor": VIDEOS,
}
"""`processor_config.json` as transformers' processors save it"""
GOLDEN = Path(__file__).parent.parent / "golden" / "patches.safetensors"
"""what transformers' processors made once, with torchvision at hand: suites/golden/make_patches.py"""


def with_images(**changes: Any) -> PatchFacts:
    return Processor.from_hf({**TOWERS, "image_processor": {**IMAGES, **changes}}).images


def with_sounds(settings: dict[str, Any]) -> SpectrumFacts:
    facts = Processor.from_hf({**TOWERS, "feature_extractor": settings}).sounds
    assert isinstance(facts, SpectrumFacts)
    return facts


def pictures(sizes: list[tuple[int, int]], seed: int) -> list[Image.Image]:
    """Noise, the hardest thing to resize: [(width, height)]"""
    noise = np.random.default_rng(seed)
    return [Image.fromarray(noise.integers(0, 256, (height, width, 3), dtype=np.uint8)) for width, height in sizes]


def waveforms(lengths: list[int], seed: int) -> list[np.ndarray]:
    noise = np.random.default_rng(seed)
    return [noise.standard_normal(length).astype(np.float32) for length in lengths]


@given(
    sizes=st.lists(st.tuples(st.integers(6, 60), st.integers(6, 60)), min_size=1, max_size=2),
    part=st.integers(1, 3),
    pool=st.integers(1, 3),
    normalize=st.booleans(),
    seed=st.integers(0, 2**20),
)
@example(sizes=[(47, 31), (9, 60)], part=2, pool=3, normalize=True, seed=0)
@example(sizes=[(60, 42), (400, 2), (3, 130)], part=3, pool=2, normalize=False, seed=1)
def test_patches_are_cut_as_by_transformers(
    sizes: list[tuple[int, int]], part: int, pool: int, normalize: bool, seed: int
) -> None:
    settings = {"patch_size": part, "pooling_kernel_size": pool, "max_soft_tokens": 70, "do_normalize": normalize}
    settings |= {"image_mean": [0.4, 0.5, 0.25], "image_std": [0.5, 0.25, 0.4]}
    given_pictures = pictures(sizes, seed)

    ours = image_inputs(given_pictures, with_images(**settings))

    theirs = witness.process({**settings, "image_processor_type": "Gemma4ImageProcessor"}, given_pictures)
    bit_equal("image_position_ids", ours["image_position_ids"], theirs["image_position_ids"])
    bit_equal("pixel_values", ours["pixel_values"], theirs["pixel_values"].float())


def as_bytes(pixels: Tensor) -> Tensor:
    """Pixels as they were before they were scaled, whose last bit is rounded here and there at different places."""
    return (pixels * 255).round().to(torch.uint8)


def test_patches_are_those_of_the_processors_that_need_torchvision() -> None:
    golden = load_file(GOLDEN)
    facts = with_images(patch_size=2, pooling_kernel_size=3, max_soft_tokens=70, num_frames=4)
    shown = [Image.fromarray(golden[f"picture_{i}"].numpy()) for i in range(3)]
    clip = [Image.fromarray(frame.numpy()) for frame in golden["clip"]]

    ours = {**image_inputs(shown, facts), **video_inputs([clip], facts)}

    for name in ("image_position_ids", "video_position_ids"):
        bit_equal(name, ours[name], golden[f"towers.{name}"].long())
    # the first picture and the frames keep their size: of the others, pillow and torchvision make different bytes
    bit_equal("picture", as_bytes(ours["pixel_values"][0]), golden["towers.picture"])
    bit_equal("clip", as_bytes(ours["pixel_values_videos"]), golden["towers.clip"])


@st.composite
def settings(draw: st.DrawFn) -> dict[str, Any]:
    """`feature_extractor` with facts off their defaults: few bands, frames of any length."""
    bands = draw(st.sampled_from([5, 20]))
    shift = {"per_bin_mean": [0.1 * i for i in range(bands)], "per_bin_stddev": [1 + 0.1 * i for i in range(bands)]}
    return {
        "feature_extractor_type": "Gemma4AudioFeatureExtractor",
        "feature_size": bands,
        "sampling_rate": draw(st.sampled_from([8000, 16_000])),
        "frame_length_ms": draw(st.sampled_from([4.0, 7.3, 20.0])),
        "hop_length_ms": draw(st.sampled_from([2.0, 10.0])),
        "min_frequency": draw(st.sampled_from([0.0, 125.0])),
        "max_frequency": draw(st.sampled_from([3000.0, 4000.0])),
        "preemphasis": draw(st.sampled_from([0.0, 0.97])),
        "preemphasis_htk_flavor": draw(st.booleans()),
        "fft_overdrive": draw(st.booleans()),
        "input_scale_factor": draw(st.sampled_from([1.0, 0.5])),
        "mel_floor": draw(st.sampled_from([1e-3, 1e-5])),
        **(shift if draw(st.booleans()) else {}),
    }


HTK = {"feature_size": 20, "preemphasis": 0.97, "frame_length_ms": 7.3, "fft_overdrive": True, "max_frequency": 4000.0}
PLAIN = {"feature_extractor_type": "Gemma4AudioFeatureExtractor"}


@given(given_settings=settings(), lengths=st.lists(st.integers(170, 900), min_size=1, max_size=3), seed=st.integers(0))
@example(given_settings=SOUNDS, lengths=[1600, 161, 641], seed=0)
@example(given_settings={**PLAIN, **HTK}, lengths=[700, 300], seed=1)
@example(given_settings={**PLAIN, **HTK, "preemphasis_htk_flavor": False}, lengths=[256], seed=2)
def test_spectra_are_those_of_transformers(given_settings: dict[str, Any], lengths: list[int], seed: int) -> None:
    facts, given_waveforms = with_sounds(given_settings), waveforms(lengths, seed)

    ours = sound_inputs(given_waveforms, facts)

    theirs = witness.process(given_settings, given_waveforms)
    bit_equal("input_features_mask", ours["input_features_mask"], theirs["input_features_mask"])
    # in bits, where both multiply by the same library; a sum of the frequencies in another order is the same sound
    hold("input_features", ours["input_features"], theirs["input_features"], depth=1, width=facts.points)


def test_sound_ends_where_transformers_ends_it() -> None:
    tone = np.sin(np.arange(LONGEST + 500, dtype=np.float32) / 7)
    coarse = {"feature_size": 2, "hop_length_ms": 500.0}

    ours = sound_inputs([tone], with_sounds(coarse))

    theirs = witness.process({**coarse, **PLAIN}, [tone])
    bit_equal("input_features_mask", ours["input_features_mask"], theirs["input_features_mask"])
    with pytest.raises(ValueError, match="160 samples fills no frame; at least 161"):
        sound_inputs([tone[:400], tone[:160]], with_sounds(SOUNDS))


def test_the_published_settings_are_read_and_reach_the_towers(tmp_path: Path) -> None:
    small = {"patch_size": 2, "pooling_kernel_size": 3, "max_soft_tokens": 6, "num_frames": 2}
    parts = {"image_processor": {**IMAGES, **small}, "video_processor": {**VIDEOS, **small}}
    parts["feature_extractor"] = {**SOUNDS, "feature_size": 8}
    (tmp_path / PROCESSOR).write_text(json.dumps({**TOWERS, **parts}))
    facts = read_processor(tmp_path)
    inputs = image_inputs(pictures([(12, 18)], 0), facts.images)
    inputs |= video_inputs([pictures([(18, 12)] * 4, 1)], facts.videos)
    inputs |= sound_inputs(waveforms([1600], 2), facts.sounds)
    # 6 squares an image and a frame; 9 frames of sound, of which four make a token
    holes = {"image": 6, "video": 12, "audio": 3}
    tokens = torch.tensor(
        [[1, *(MULTIMODAL[f"{kind}_token_id"] for kind, count in holes.items() for _ in range(count)), 2]]
    )
    with folders(PINNED) as (path, _):
        target = open_target(path)

    out = target(tokens, **inputs)

    assert bool(torch.isfinite(out.logits).all())
    published = Processor.from_hf(TOWERS)
    assert published.images == PatchFacts(side=16, pool=3, most=280, scale=0.00392156862745098)
    assert published.videos == PatchFacts(side=16, pool=3, most=70, scale=0.00392156862745098)
    assert published.sounds == SpectrumFacts()


@pytest.mark.parametrize(
    ("part", "changes"),
    [
        ("image_processor", {"do_pan_and_scan": True}),
        ("video_processor", {"do_sample_frames": False}),
        ("feature_extractor", {"dither": 0.1}),
        ("feature_extractor", {"frame_length": 400}),
        ("feature_extractor", {"per_bin_mean": [0.5, 0.5]}),
        ("feature_extractor", {"mel_scale": "slaney"}),
        ("feature_extractor", {"padding_side": "left"}),
    ],
)
def test_settings_that_would_be_dropped_are_refused(part: str, changes: dict[str, Any], tmp_path: Path) -> None:
    wrong = {**TOWERS, part: {**TOWERS[part], **changes}}
    (tmp_path / PROCESSOR).write_text(json.dumps(wrong))

    with pytest.raises(CheckpointError, match=f"{PROCESSOR}.*{next(iter(changes))}"):
        read_processor(tmp_path)


@pytest.mark.parametrize("said", [{}, {"processor_class": "Gemma3Processor"}])
def test_which_of_the_two_processors_it_is_must_be_said(said: dict[str, str], tmp_path: Path) -> None:
    unsaid = {name: value for name, value in TOWERS.items() if name != "processor_class"}
    (tmp_path / PROCESSOR).write_text(json.dumps({**unsaid, **said}))

    with pytest.raises(CheckpointError, match=f"{PROCESSOR}.*processor_class"):
        read_processor(tmp_path)
