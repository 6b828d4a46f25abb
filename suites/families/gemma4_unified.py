"""Gemma 4 Unified: tiny configs, prompts with images, videos and sound among text, and the size that is published."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from suites.draws import Drawn, random_tokens
from suites.families.gemma4 import DENSE, FULL, SLIDING, gemma4_targets
from suites.families.gemma4 import PUBLISHED as TEXTS

MARKS = 8
"""ids at the end of the vocabulary that no token of text has: placeholders and the marks around them"""


def shell(
    text: dict[str, Any], vision: dict[str, Any] | None, sound: dict[str, Any] | None, far: bool
) -> dict[str, Any]:
    """A config around a text model; `far` puts placeholders beyond the vocabulary."""
    first = text["vocab_size"] - MARKS
    image, video, audio = (first + i + (100 if far else 0) for i in range(3))
    return {
        "model_type": "gemma4_unified",
        "architectures": ["Gemma4UnifiedForConditionalGeneration"],
        "text_config": {
            **text,
            "model_type": "gemma4_unified_text",
            "architectures": ["Gemma4UnifiedForCausalLM"],
            "pad_token_id": 3,
        },
        "vision_config": vision,
        "audio_config": sound,
        "image_token_id": image,
        "video_token_id": video,
        "audio_token_id": audio,
        "boi_token_id": first + 3,
        "eoi_token_id": first + 4,
        "boa_token_id": first + 5,
        "eoa_token_index": first + 6,
        "tie_word_embeddings": text["tie_word_embeddings"],
    }


@st.composite
def gemma4_unifieds(draw: st.DrawFn) -> Drawn:
    """A target with images, videos and sound; patches of one pixel or more, embedded wider than the stream or not."""
    text, eps = draw(gemma4_targets("dense")), st.sampled_from([1e-6, 1e-2])
    width = draw(st.sampled_from([16, 40, 64]))
    vision = {
        "patch_size": draw(st.integers(1, 2)),
        "pooling_kernel_size": draw(st.integers(1, 3)),
        "mm_embed_dim": width,
        "output_proj_dims": width,
        "mm_posemb_size": draw(st.sampled_from([3, 9])),
        "rms_norm_eps": draw(eps),
    }
    sound = {"audio_embed_dim": draw(st.sampled_from([20, 32])), "rms_norm_eps": draw(eps)}
    return Drawn(json.dumps(shell(text.keys, vision, sound, draw(st.booleans()))), text.seed)


TEXT = {
    **DENSE,
    "num_hidden_layers": 5,
    "layer_types": [SLIDING, SLIDING, FULL, SLIDING, FULL],
    "sliding_window": 3,
    "num_global_key_value_heads": 2,
}
UNIFIED = shell(
    TEXT,
    {
        "patch_size": 2,
        "pooling_kernel_size": 2,
        "mm_embed_dim": 40,
        "mm_posemb_size": 5,
        "output_proj_dims": 40,
        "rms_norm_eps": 1e-2,
    },
    {"audio_embed_dim": 20, "rms_norm_eps": 1e-2},
    far=True,
)
"""the pinned target: a window narrower than its images, placeholders beyond the vocabulary"""
PINNED_UNIFIED = Drawn(json.dumps(UNIFIED), 5)


@dataclass(frozen=True)
class Piece:
    """Something among text."""

    kind: str
    """image, video or audio"""
    gap: int
    """tokens of text before it"""
    across: int = 1
    """columns of patches; frames of sound"""
    down: int = 1
    """rows of patches"""
    frames: int = 1
    """of a video"""

    @property
    def size(self) -> int:
        """Tokens of one image, of one video frame, of one sound."""
        return self.across * self.down


@dataclass(frozen=True)
class Layout:
    """Where pieces stand in a prompt of several sequences."""

    pieces: tuple[Piece, ...]
    tail: int
    shown: tuple[tuple[bool, ...], ...]
    """for each sequence, which pieces it has; the others are text there"""
    marked: bool = True
    """a token at each end of an image, a frame, a sound; without them what stands together is one run"""


@st.composite
def pieces(draw: st.DrawFn) -> Piece:
    kind, gap, side = draw(st.sampled_from(["image", "video", "audio"])), draw(st.integers(0, 4)), st.integers(1, 3)
    if kind == "audio":
        return Piece(kind, gap, draw(side))
    return Piece(kind, gap, draw(side), draw(side), draw(side) if kind == "video" else 1)


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    """One to three sequences with one to three pieces, one shown at least."""
    found = draw(st.lists(pieces(), min_size=1, max_size=3))
    rows = st.lists(st.booleans(), min_size=len(found), max_size=len(found)).map(tuple)
    shown = [tuple(True for _ in found), *draw(st.lists(rows, max_size=2))]
    return Layout(tuple(found), draw(st.integers(1, 5)), tuple(shown), draw(st.booleans()))


PINNED_LAYOUT = Layout(
    (Piece("image", 2, 3, 2), Piece("video", 1, 2, 2, 2), Piece("audio", 1, 3)),
    3,
    ((True, True, True), (False, True, True), (True, False, False)),
)
TOUCHING = Layout(
    (Piece("image", 1, 2, 2), Piece("video", 0, 2, 1, 2), Piece("image", 0, 1, 3)), 2, ((True,) * 3,), False
)
"""images and frames with nothing between them: one run"""
SOUND_ALONE = Layout((Piece("audio", 2, 3),), 3, ((True,), (False,), (True,)))
TYPES = {"image": 1, "video": 2, "audio": 3}


@dataclass(frozen=True)
class Prompt:
    """Tokens with images, videos and sound among them, for a config and a layout."""

    config: str
    layout: Layout
    seed: int

    @cached_property
    def keys(self) -> dict[str, Any]:
        return json.loads(self.config)

    @cached_property
    def starts(self) -> list[list[int]]:
        """First column of each piece, of each frame of it."""
        columns, at, edge = [], 0, int(self.layout.marked)
        for piece in self.layout.pieces:
            at += piece.gap
            columns.append([at + edge + i * (piece.size + 2 * edge) for i in range(piece.frames)])
            at = columns[-1][-1] + piece.size + edge
        return columns

    @property
    def width(self) -> int:
        last = self.layout.pieces[-1]
        return self.starts[-1][-1] + last.size + int(self.layout.marked) + self.layout.tail

    @cached_property
    def token_type_ids(self) -> Tensor:
        """[B, T]"""
        types = torch.zeros(len(self.layout.shown), self.width, dtype=torch.int64)
        for row, shown in enumerate(self.layout.shown):
            for piece, starts, here in zip(self.layout.pieces, self.starts, shown, strict=True):
                for start in starts if here else ():
                    types[row, start : start + piece.size] = TYPES[piece.kind]
        return types

    @cached_property
    def tokens(self) -> Tensor:
        """[B, T]"""
        text = random_tokens(
            self.keys["text_config"]["vocab_size"] - MARKS, len(self.layout.shown), self.width, self.seed
        )
        for kind, number in TYPES.items():
            text = text.where(self.token_type_ids != number, self.keys[f"{kind}_token_id"])
        return text

    def inputs(self, start: int = 0, stop: int | None = None) -> dict[str, Tensor]:
        """What goes with the tokens of some columns: their types, and the pieces that stand there."""
        stop = self.width if stop is None else stop
        generator = torch.Generator().manual_seed(self.seed)
        made: dict[str, list[tuple[Tensor, Tensor]]] = {kind: [] for kind in TYPES}
        for shown in self.layout.shown:
            for piece, starts, here in zip(self.layout.pieces, self.starts, shown, strict=True):
                made_now = self.sound(piece, generator) if piece.kind == "audio" else self.patches(piece, generator)
                if here and start <= starts[0] < stop:
                    made[piece.kind].append(made_now)
        named = {"mm_token_type_ids": self.token_type_ids[:, start:stop]}
        for kind, tensors in BATCHES.items():
            for part, (name, value, own) in zip(zip(*made[kind], strict=True), tensors, strict=False):
                named[name] = fill(part, value, own)
        return named

    def patches(self, piece: Piece, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Pixels and positions of a piece: [F, P, C] and [F, P, 2], without the first dim for an image."""
        vision = self.keys["vision_config"]
        pixels = 3 * (vision["patch_size"] * vision["pooling_kernel_size"]) ** 2
        shape = (piece.frames, piece.size) if piece.kind == "video" else (piece.size,)
        x = torch.rand(*shape, pixels, generator=generator).double()
        places = torch.tensor([(column, row) for row in range(piece.down) for column in range(piece.across)])
        return x, places.expand(*shape, 2)

    def sound(self, piece: Piece, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Stretches and mask of a piece: [R, Z] and [R]."""
        x = torch.randn(piece.across, self.keys["audio_config"]["audio_embed_dim"], generator=generator).double()
        return x, torch.ones(piece.across, dtype=torch.bool)

    @property
    def cuts(self) -> list[int]:
        """Columns before which the prompt may be cut: neither a piece nor a run of images goes through them."""
        through = set()
        for piece, starts in zip(self.layout.pieces, self.starts, strict=True):
            through |= set(range(starts[0] + 1, starts[-1] + piece.size))
        seen = (self.token_type_ids == 1) | (self.token_type_ids == 2)
        touching = (seen[:, :-1] & seen[:, 1:]).any(0).tolist()
        return [c for c in range(1, self.width) if c not in through and not touching[c - 1]]


def fill(parts: Sequence[Tensor], value: float, own: int) -> Tensor:
    """A batch of parts of different sizes: each dim but the last `own` is filled up, with one more than any has."""
    free = parts[0].dim() - own
    sizes = [max(part.shape[dim] for part in parts) + 1 for dim in range(free)]
    batch = parts[0].new_full((len(parts), *sizes, *parts[0].shape[free:]), value)
    for row, part in zip(batch, parts, strict=True):
        row[tuple(slice(size) for size in part.shape)] = part
    return batch


NOISE = 0.7
"""in patches and stretches that are filling: whoever reads it is seen"""
BATCHES = {
    "image": (("pixel_values", NOISE, 1), ("image_position_ids", -1, 1)),
    "video": (("pixel_values_videos", NOISE, 1), ("video_position_ids", -1, 1)),
    "audio": (("input_features", NOISE, 1), ("input_features_mask", False, 0)),
}
"""kind of piece -> its tensors in transformers' words: (name, filling, dims that are not filled up)"""


PUBLISHED = {
    "gemma-4-12B": {
        "model_type": "gemma4_unified",
        "architectures": ["Gemma4UnifiedForConditionalGeneration"],
        "audio_config": {
            "model_type": "gemma4_unified_audio",
            "audio_embed_dim": 640,
            "audio_samples_per_token": 640,
            "hidden_size": 640,
            "output_proj_dims": 640,
            "rms_norm_eps": 1e-06,
        },
        "audio_token_id": 258_881,
        "boa_token_id": 256_000,
        "boi_token_id": 255_999,
        "dtype": "bfloat16",
        "eoa_token_index": 258_883,
        "eoi_token_id": 258_882,
        "image_token_id": 258_880,
        "initializer_range": 0.02,
        "text_config": {
            **TEXTS["gemma-4-12B"],
            "model_type": "gemma4_unified_text",
            "architectures": None,
            "attention_bias": False,
            "enable_moe_block": False,
            "moe_intermediate_size": None,
            "num_experts": None,
            "num_kv_shared_layers": 0,
            "pad_token_id": 0,
            "rope_parameters": {
                FULL: {"partial_rotary_factor": 0.25, "rope_theta": 1_000_000.0, "rope_type": "proportional"},
                SLIDING: {"rope_theta": 10_000.0, "rope_type": "default"},
            },
            "top_k_experts": None,
            "use_cache": True,
            "use_double_wide_mlp": False,
        },
        "tie_word_embeddings": True,
        "video_token_id": 258_884,
        "vision_config": {
            "model_type": "gemma4_unified_vision",
            "mm_embed_dim": 3840,
            "mm_posemb_size": 1120,
            "model_patch_size": 48,
            "num_soft_tokens": 280,
            "output_proj_dims": 3840,
            "patch_size": 16,
            "pooling_kernel_size": 3,
            "rms_norm_eps": 1e-06,
        },
    },
}
"""`config.json` as the hub has it"""
SUPPRESSED = (258_883, 258_882)
"""`suppress_tokens` of its `generation_config.json`"""
PROCESSOR_CONFIG = {
    "audio_ms_per_token": 40,
    "audio_seq_length": 750,
    "feature_extractor": {
        "audio_samples_per_token": 640,
        "feature_extractor_type": "Gemma4UnifiedAudioFeatureExtractor",
        "feature_size": 640,
        "padding_side": "right",
        "padding_value": 0.0,
        "return_attention_mask": True,
        "sampling_rate": 16_000,
    },
    "image_processor": {
        "do_convert_rgb": True,
        "do_normalize": False,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.0, 0.0, 0.0],
        "image_processor_type": "Gemma4UnifiedImageProcessor",
        "image_std": [1.0, 1.0, 1.0],
        "max_soft_tokens": 280,
        "patch_size": 16,
        "pooling_kernel_size": 3,
        "resample": 3,
        "rescale_factor": 0.00392156862745098,
    },
    "image_seq_length": 280,
    "processor_class": "Gemma4UnifiedProcessor",
    "video_processor": {
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "do_sample_frames": True,
        "image_mean": [0.0, 0.0, 0.0],
        "image_std": [1.0, 1.0, 1.0],
        "max_soft_tokens": 70,
        "num_frames": 32,
        "patch_size": 16,
        "pooling_kernel_size": 3,
        "resample": 3,
        "rescale_factor": 0.00392156862745098,
        "return_metadata": False,
        "video_processor_type": "Gemma4UnifiedVideoProcessor",
    },
}
"""`processor_config.json` as transformers' processors save it"""
