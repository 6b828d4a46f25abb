"""Gemma 4 with its towers: tiny configs with every feature, prompts of many kinds, and the published sizes.

A prompt is text with images, videos and sounds at some columns; each sequence shows some of them and has text in the
place of the others.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from suites.draws import Drawn, random_tokens
from suites.families.gemma4 import DENSE, EDGE, FULL, SIZES, SLIDING, gemma4_targets
from suites.families.gemma4 import PUBLISHED as TEXTS

TYPES = {"image": 1, "video": 2, "audio": 3}
"""`mm_token_type_ids`"""
eps = st.sampled_from([1e-6, 1e-2])


@st.composite
def vision_configs(draw: st.DrawFn) -> dict[str, Any]:
    """`vision_config`, spelled as on the hub."""
    groups = draw(st.sampled_from([1, 2]))
    return {
        "model_type": "gemma4_vision",
        "hidden_size": draw(st.sampled_from([12, 16])),
        "intermediate_size": draw(st.sampled_from([20, 24])),
        "num_hidden_layers": draw(st.integers(1, 2)),
        "num_attention_heads": groups * draw(st.integers(1, 2)),
        "num_key_value_heads": groups,
        "head_dim": draw(st.sampled_from([4, 8, 12])),
        "patch_size": draw(st.sampled_from([1, 2])),
        "pooling_kernel_size": draw(st.sampled_from([2, 3])),
        "position_embedding_size": draw(st.sampled_from([9, 16])),
        "rms_norm_eps": draw(eps),
        "rope_parameters": {"rope_type": "default", "rope_theta": draw(st.sampled_from([3.0, 100.0]))},
        "standardize": draw(st.booleans()),
        "use_clipped_linears": draw(st.booleans()),
        "default_output_length": 280,
    }


@st.composite
def audio_configs(draw: st.DrawFn) -> dict[str, Any]:
    """`audio_config`: chunks and contexts of any size, a convolution of one frame or of several."""
    heads = draw(st.sampled_from([1, 2, 3]))
    return {
        "model_type": "gemma4_audio",
        "hidden_size": heads * draw(st.sampled_from([4, 8])),
        "num_hidden_layers": draw(st.integers(1, 2)),
        "num_attention_heads": heads,
        "subsampling_conv_channels": [draw(st.sampled_from([8, 12])), draw(st.sampled_from([3, 4]))],
        "conv_kernel_size": draw(st.integers(1, 4)),
        "residual_weight": draw(st.sampled_from([0.5, 0.25])),
        "attention_chunk_size": draw(st.integers(1, 6)),
        "attention_context_left": draw(st.integers(2, 7)),
        "attention_context_right": draw(st.integers(0, 3)),
        "attention_logit_cap": draw(st.sampled_from([50.0, 1.0])),
        "gradient_clipping": draw(st.sampled_from([1e10, 1.0])),
        "rms_norm_eps": draw(eps),
        "use_clipped_linears": draw(st.booleans()),
        "output_proj_dims": draw(st.sampled_from([12, 20])),
    }


def _shell(text: Mapping[str, Any], first: int, **towers: Any) -> dict[str, Any]:
    """A config around a text model; its placeholders are numbered from `first`."""
    return {
        "model_type": "gemma4",
        "architectures": ["Gemma4ForConditionalGeneration"],
        "text_config": dict(text),
        **towers,
        **{f"{kind}_token_id": first + i for i, kind in enumerate(TYPES)},
        "boi_token_id": 3,
        "eoi_token_id": 4,
        "boa_token_id": 5,
        "eoa_token_index": 6,
        "tie_word_embeddings": text["tie_word_embeddings"],
    }


@st.composite
def gemma4_multimodals(draw: st.DrawFn) -> Drawn:
    """A target with both towers around a text model of any size; placeholders inside the vocabulary or beyond it."""
    text = draw(st.sampled_from(SIZES).flatmap(gemma4_targets))
    keys = {**text.keys, "pad_token_id": draw(st.sampled_from([0, 7]))}
    first = keys["vocab_size"] + draw(st.sampled_from([-3, 5]))
    towers = {"vision_config": draw(vision_configs()), "audio_config": draw(audio_configs())}
    return Drawn(json.dumps(_shell(keys, first, **towers)), text.seed)


VISION = {
    "model_type": "gemma4_vision",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "patch_size": 2,
    "pooling_kernel_size": 3,
    "position_embedding_size": 12,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
    "standardize": True,
    "use_clipped_linears": True,
}
AUDIO = {
    "model_type": "gemma4_audio",
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "subsampling_conv_channels": [8, 4],
    "conv_kernel_size": 3,
    "residual_weight": 0.25,
    "attention_chunk_size": 3,
    "attention_context_left": 5,
    "attention_context_right": 2,
    "attention_logit_cap": 1.0,
    "gradient_clipping": 1.0,
    "rms_norm_eps": 1e-2,
    "use_clipped_linears": True,
    "output_proj_dims": 12,
}
SHORT = {
    "num_hidden_layers": 5,
    "layer_types": [SLIDING, FULL, SLIDING, SLIDING, FULL],
    "pad_token_id": 7,
}
MULTIMODAL = _shell({**DENSE, **SHORT}, 328, vision_config=VISION, audio_config=AUDIO)
"""as the 31B is, small, but with an audio tower, too"""
MULTIMODAL_EDGE = _shell({**EDGE, **SHORT, "num_kv_shared_layers": 2}, 400, vision_config=VISION, audio_config=AUDIO)
"""as E2B is, small: an input of its own for every layer, images causal; placeholders beyond the vocabulary"""

PINNED, PINNED_EDGE = Drawn(json.dumps(MULTIMODAL), 4), Drawn(json.dumps(MULTIMODAL_EDGE), 5)


@dataclass(frozen=True)
class Item:
    """What stands among text."""

    kind: str
    size: tuple[int, ...]
    """squares across and down of an image, or of each frame of a video; frames of a sound"""


@dataclass(frozen=True)
class Layout:
    """Where items stand in a prompt of several sequences."""

    items: tuple[Item, ...]
    gaps: tuple[int, ...]
    """tokens of text before each item, and after the last"""
    shown: tuple[tuple[bool, ...], ...]
    """for each sequence, which items it has; the others are text there"""
    frames: int = 2
    """of every video"""
    marked: bool = True
    """a token of text between frames of a video; without it they are one run"""
    filling: int = 1
    """squares of patches, and frames of sound, that fill up a batch beyond its largest"""


@st.composite
def items(draw: st.DrawFn) -> Item:
    """Any one."""
    kind = draw(st.sampled_from(list(TYPES)))
    if kind == "audio":
        return Item(kind, (draw(st.integers(1, 33)),))
    return Item(kind, (draw(st.integers(1, 3)), draw(st.integers(1, 2))))


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    """One to three sequences with up to three items each; the first has all."""
    among = draw(st.lists(items(), min_size=1, max_size=3))
    others = st.lists(st.booleans(), min_size=len(among), max_size=len(among)).map(tuple)
    gaps = draw(st.lists(st.integers(0, 4), min_size=len(among), max_size=len(among)))
    return Layout(
        tuple(among),
        (*gaps, draw(st.integers(1, 5))),
        ((True,) * len(among), *draw(st.lists(others, max_size=2))),
        frames=draw(st.integers(1, 3)),
        marked=draw(st.booleans()),
        filling=draw(st.integers(0, 2)),
    )


PINNED_LAYOUT = Layout(
    (Item("image", (3, 2)), Item("audio", (23,)), Item("video", (1, 2)), Item("image", (2, 1)), Item("audio", (9,))),
    (2, 1, 2, 1, 2, 3),
    ((True,) * 5, (False, True, False, True, False)),
)


@dataclass(frozen=True)
class Prompt:
    """Tokens with items among them, for a config and a layout."""

    config: str
    layout: Layout
    seed: int

    @cached_property
    def keys(self) -> dict[str, Any]:
        return json.loads(self.config)

    def pattern(self, item: Item) -> list[int]:
        """The type of each token of an item."""
        if item.kind == "audio":
            return [TYPES["audio"]] * -(-item.size[0] // 4)
        frame = [TYPES[item.kind]] * (item.size[0] * item.size[1])
        if item.kind == "image":
            return frame
        mark = [0] if self.layout.marked else []
        return [*frame, *(mark + frame) * (self.layout.frames - 1)]

    @cached_property
    def spans(self) -> list[tuple[int, int]]:
        """First and last column, plus one, of each item."""
        found, at = [], 0
        for item, gap in zip(self.layout.items, self.layout.gaps, strict=False):
            found.append((at + gap, at + gap + len(self.pattern(item))))
            at = found[-1][1]
        return found

    @property
    def width(self) -> int:
        return self.spans[-1][1] + self.layout.gaps[-1]

    @cached_property
    def types(self) -> Tensor:
        """[B, T]"""
        types = torch.zeros(len(self.layout.shown), self.width, dtype=torch.long)
        for row, shown in enumerate(self.layout.shown):
            for item, (start, stop), here in zip(self.layout.items, self.spans, shown, strict=True):
                types[row, start:stop] = torch.tensor(self.pattern(item)) * here
        return types

    @cached_property
    def tokens(self) -> Tensor:
        """[B, T]"""
        # no token of text is a placeholder: these are the vocabulary's last, or beyond it
        text = random_tokens(self.keys["text_config"]["vocab_size"] - 3, len(self.types), self.width, self.seed)
        for kind, number in TYPES.items():
            text[self.types == number] = self.keys[f"{kind}_token_id"]
        return text

    def inputs(self, start: int = 0, stop: int | None = None) -> dict[str, Tensor]:
        """What goes with the tokens of some columns, as transformers names it."""
        stop, within = self.width if stop is None else stop, {kind: [] for kind in TYPES}
        for row, shown in enumerate(self.layout.shown):
            for number, (item, here) in enumerate(zip(self.layout.items, shown, strict=True)):
                if here and start <= self.spans[number][0] < stop:
                    within[item.kind].append((item.size, self.seed + 100 * row + 10 * number))
        named = {"mm_token_type_ids": self.types[:, start:stop]}
        if within["image"]:
            named["pixel_values"], named["image_position_ids"] = self.pictures(within["image"])
        if within["video"]:
            frames = [(size, seed + i) for size, seed in within["video"] for i in range(self.layout.frames)]
            pixels, places = (t.unflatten(0, (-1, self.layout.frames)) for t in self.pictures(frames))
            named["pixel_values_videos"], named["video_position_ids"] = pixels, places
        if within["audio"]:
            named["input_features"], named["input_features_mask"] = self.sounds(within["audio"])
        return named

    def pictures(self, among: list[tuple[tuple[int, ...], int]]) -> tuple[Tensor, Tensor]:
        """Patches of pictures and their places, filled up: [I, P, C] and [I, P, 2]"""
        vision = self.keys["vision_config"]
        side, numbers = vision["pooling_kernel_size"], 3 * vision["patch_size"] ** 2
        most = (max(size[0] * size[1] for size, _ in among) + self.layout.filling) * side**2
        places = torch.full((len(among), most, 2), -1)
        # filling is not zero: nobody may look at it
        pixels = torch.full((len(among), most, numbers), 0.7, dtype=torch.float64)
        for at, picture, (size, seed) in zip(places, pixels, among, strict=True):
            columns, rows = size[0] * side, size[1] * side
            grid = torch.stack(torch.meshgrid(torch.arange(columns), torch.arange(rows), indexing="xy"), -1)
            at[: columns * rows] = grid.flatten(0, 1)
            # of its own seed and size: the same picture whatever stands beside it
            generator = torch.Generator().manual_seed(seed)
            picture[: columns * rows] = torch.rand(columns * rows, numbers, generator=generator)
        return pixels, places

    def sounds(self, among: list[tuple[tuple[int, ...], int]]) -> tuple[Tensor, Tensor]:
        """Spectra of sounds and where they are: [U, R, Z] and [U, R]"""
        lengths = torch.tensor([size[0] for size, _ in among])
        most, pitches = int(lengths.max()) + self.layout.filling, self.keys["audio_config"]["subsampling_conv_channels"]
        spectra = torch.ones(len(among), most, pitches[0], dtype=torch.float64)
        for spectrum, ((frames,), seed) in zip(spectra, among, strict=True):
            generator = torch.Generator().manual_seed(seed)
            spectrum[:frames] = torch.randn(frames, pitches[0], generator=generator)
        return spectra, torch.arange(most) < lengths[:, None]

    @property
    def cuts(self) -> list[int]:
        """Columns before which the prompt may be cut: no item and no run of images goes through them."""
        inside = (self.types == 1) | (self.types == 2)
        through = (inside[:, :-1] & inside[:, 1:]).any(0).tolist()
        return [
            column
            for column in range(1, self.width)
            if not through[column - 1] and not any(start < column < stop for start, stop in self.spans)
        ]


def _published(text: str, **towers: Any) -> dict[str, Any]:
    """A config as the hub has it."""
    return {
        "architectures": ["Gemma4ForConditionalGeneration"],
        "audio_token_id": 258_881,
        "boa_token_id": 256_000,
        "boi_token_id": 255_999,
        "dtype": "bfloat16",
        "eoa_token_id": 258_883,
        "eoa_token_index": 258_883,
        "eoi_token_id": 258_882,
        "image_token_id": 258_880,
        "initializer_range": 0.02,
        "model_type": "gemma4",
        "text_config": TEXTS[text],
        "tie_word_embeddings": True,
        "video_token_id": 258_884,
        "vision_soft_tokens_per_image": 280,
        **towers,
    }


SMALL_VISION = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "default_output_length": 280,
    "global_head_dim": 64,
    "head_dim": 64,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 768,
    "intermediate_size": 3072,
    "max_position_embeddings": 131_072,
    "model_type": "gemma4_vision",
    "num_attention_heads": 12,
    "num_hidden_layers": 16,
    "num_key_value_heads": 12,
    "patch_size": 16,
    "pooling_kernel_size": 3,
    "position_embedding_size": 10_240,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_theta": 100.0, "rope_type": "default"},
    "standardize": False,
    "use_clipped_linears": True,
}
LARGE_VISION = {
    **SMALL_VISION,
    "global_head_dim": 72,
    "head_dim": 72,
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_attention_heads": 16,
    "num_hidden_layers": 27,
    "num_key_value_heads": 16,
    "standardize": True,
    "use_clipped_linears": False,
}
PUBLISHED_AUDIO = {
    "attention_chunk_size": 12,
    "attention_context_left": 13,
    "attention_context_right": 0,
    "attention_invalid_logits_value": -1e9,
    "attention_logit_cap": 50.0,
    "conv_kernel_size": 5,
    "gradient_clipping": 1e10,
    "hidden_act": "silu",
    "hidden_size": 1024,
    "model_type": "gemma4_audio",
    "num_attention_heads": 8,
    "num_hidden_layers": 12,
    "output_proj_dims": 1536,
    "residual_weight": 0.5,
    "rms_norm_eps": 1e-6,
    "subsampling_conv_channels": [128, 32],
    "use_clipped_linears": True,
}
PUBLISHED: Mapping[str, dict[str, Any]] = {
    **{
        name: _published(name, vision_config=SMALL_VISION, audio_config=PUBLISHED_AUDIO)
        for name in ("gemma-4-E2B", "gemma-4-E4B")
    },
    **{
        name: _published(name, vision_config=LARGE_VISION, audio_config=None)
        for name in ("gemma-4-26B-A4B", "gemma-4-31B")
    },
}
"""`config.json` of each published size with towers; the large ones hear nothing. Small towers are transformers'
defaults, clipped; the large one is that of rnagabh/gemma4-vision-encoder, which was cut out of gemma-4-31B-it."""
