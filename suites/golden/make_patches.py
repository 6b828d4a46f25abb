"""Make the golden patches: what transformers' processors of Gemma 4, both kinds, make of pictures and clips.

They need torchvision, which is no dependency of draftproof, so this script runs alone in an environment of its own and
imports nothing of the project:

    python3.11 -m venv golden_venv
    golden_venv/bin/pip install torch==2.13.0 torchvision==0.28.0 --index-url https://download.pytorch.org/whl/cpu
    golden_venv/bin/pip install transformers==5.17.0 pillow
    golden_venv/bin/python suites/golden/make_patches.py suites/golden/patches.safetensors

The first picture, and every frame, has the size that it is resized to: its bytes must come out as they went in. The
others say where patches stand.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import Gemma4UnifiedAudioFeatureExtractor
from transformers.models.gemma4.image_processing_gemma4 import Gemma4ImageProcessor
from transformers.models.gemma4.video_processing_gemma4 import Gemma4VideoProcessor
from transformers.models.gemma4_unified.image_processing_gemma4_unified import Gemma4UnifiedImageProcessor
from transformers.models.gemma4_unified.video_processing_gemma4_unified import Gemma4UnifiedVideoProcessor

SMALL = {"patch_size": 2, "pooling_kernel_size": 3, "max_soft_tokens": 70}
SIZES = ((60, 42), (31, 90), (50, 8))
"""width and height"""
FRAMES, READ = 6, 4
LENGTHS = (50, 20)


def make(out: Path) -> None:
    """Draw the inputs and store them beside what the processors return."""
    noise = np.random.default_rng(0)
    pictures = [noise.integers(0, 256, (height, width, 3), dtype=np.uint8) for width, height in SIZES]
    clip = noise.integers(0, 256, (FRAMES, 30, 84, 3), dtype=np.uint8)
    waveforms = [noise.standard_normal(length).astype(np.float32) for length in LENGTHS]
    images = Gemma4UnifiedImageProcessor(**SMALL)([Image.fromarray(p) for p in pictures], return_tensors="pt")
    metadata = [{"total_num_frames": FRAMES, "fps": 24}]
    videos = Gemma4UnifiedVideoProcessor(**SMALL, num_frames=READ)([clip], video_metadata=metadata, return_tensors="pt")
    extractor = Gemma4UnifiedAudioFeatureExtractor(feature_size=20, audio_samples_per_token=20)
    sounds = extractor(waveforms, return_tensors="pt")
    tensors = {f"picture_{i}": torch.from_numpy(p) for i, p in enumerate(pictures)}
    tensors |= {f"waveform_{i}": torch.from_numpy(w) for i, w in enumerate(waveforms)}
    tensors |= {"clip": torch.from_numpy(clip)}
    tensors |= {name: images[name] for name in ("pixel_values", "image_position_ids")}
    tensors |= {name: videos[name] for name in ("pixel_values_videos", "video_position_ids")}
    tensors |= {name: sounds[name] for name in ("input_features", "input_features_mask")}
    # with an encoder; the first picture and the clip as bytes, which is all that is compared of them
    images = Gemma4ImageProcessor(**SMALL)([Image.fromarray(p) for p in pictures], return_tensors="pt")
    videos = Gemma4VideoProcessor(**SMALL, num_frames=READ)([clip], video_metadata=metadata, return_tensors="pt")
    tensors["towers.image_position_ids"] = images["image_position_ids"].short()
    tensors["towers.video_position_ids"] = videos["video_position_ids"].short()
    tensors["towers.picture"] = (images["pixel_values"][0] * 255).round().to(torch.uint8)
    tensors["towers.clip"] = (videos["pixel_values_videos"] * 255).round().to(torch.uint8)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    make(parser.parse_args().out)
