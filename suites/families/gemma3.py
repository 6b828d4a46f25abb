"""Gemma 3: tiny configs with every feature, prompts with images, and the sizes as they are published."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from suites.draws import SEEDS, VOCABS, Drawn, random_tokens, ropes, variant
from suites.scripted import TINY

SLIDING, FULL = "sliding_attention", "full_attention"


@st.composite
def gemma3_texts(draw: st.DrawFn, min_layers: int = 1, max_layers: int = 7, ranks: int = 1) -> Drawn:
    """A text target: any order of sliding and full layers, a score scale that the head's width does not give.

    ranks   how many can share it
    """
    groups, layers = ranks * draw(st.sampled_from([1, 2, 4])), draw(st.integers(min_layers, max_layers))
    # transformers wants heads that divide the hidden size, which nothing needs
    queries = [n for n in (1, 2, 3) if 48 % (groups * n) == 0]
    config = {
        "model_type": "gemma3_text",
        "architectures": ["Gemma3ForCausalLM"],
        "vocab_size": draw(st.sampled_from(VOCABS)),
        "hidden_size": draw(st.sampled_from([48, 96])),
        "intermediate_size": ranks * draw(st.sampled_from([48, 80])),
        "num_hidden_layers": layers,
        "num_attention_heads": groups * draw(st.sampled_from(queries)),
        "num_key_value_heads": groups,
        "head_dim": draw(st.sampled_from([8, 16])),
        "query_pre_attn_scalar": draw(st.sampled_from([8, 16, 21])),
        "sliding_window": draw(st.integers(1, 12)),
        "layer_types": draw(st.lists(st.sampled_from([SLIDING, FULL]), min_size=layers, max_size=layers)),
        "max_position_embeddings": 64,
        "rms_norm_eps": draw(st.sampled_from([1e-6, 1e-2])),
        "rope_parameters": {
            FULL: draw(ropes(("default", "linear", "llama3", "yarn"))),
            SLIDING: {"rope_type": "default", "rope_theta": draw(st.sampled_from([50.0, 10_000.0]))},
        },
        "attention_bias": draw(st.booleans()),
        "tie_word_embeddings": draw(st.booleans()),
        "hidden_activation": "gelu_pytorch_tanh",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    return Drawn(json.dumps(config), draw(SEEDS))


TEXT = {
    "model_type": "gemma3_text",
    "architectures": ["Gemma3ForCausalLM"],
    "vocab_size": 331,
    "hidden_size": 96,
    "intermediate_size": 80,
    "num_hidden_layers": 7,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "query_pre_attn_scalar": 21,
    "sliding_window": 5,
    "layer_types": [SLIDING, SLIDING, FULL, SLIDING, SLIDING, FULL, SLIDING],
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {
        FULL: {"rope_type": "linear", "factor": 8.0, "rope_theta": 1_000_000.0},
        SLIDING: {"rope_type": "default", "rope_theta": 10_000.0},
    },
    "attention_bias": True,
    "tie_word_embeddings": True,
    "hidden_activation": "gelu_pytorch_tanh",
}
"""the pinned text target: biases, a window narrower than the prompts, both ropes, a tied head"""


def tiny_gemma3(seed: int, vocab: int = 13, **changes: Any) -> Drawn:
    """Three layers, the middle one full, and a window shorter than the text, beside `suites.scripted.tiny_draft`."""
    few = {"num_hidden_layers": 3, "layer_types": [SLIDING, FULL, SLIDING], "sliding_window": 3}
    return variant(TEXT, seed, **{**TINY, **few, "vocab_size": vocab, **changes})


POOLINGS = ((2, 1), (2, 2), (4, 2), (5, 2), (6, 3))
"""patches and squares along one side of an image; of five patches the last is left over"""


@st.composite
def gemma3_multimodals(draw: st.DrawFn) -> Drawn:
    """A target with images: squares of one patch or of several, a placeholder inside the vocabulary or beyond it."""
    text = draw(gemma3_texts(max_layers=4))
    keys, heads = text.keys, draw(st.sampled_from([1, 2, 4]))
    patch, (side, squares) = draw(st.sampled_from([2, 3])), draw(st.sampled_from(POOLINGS))
    vocab, tied = keys["vocab_size"], keys["tie_word_embeddings"]
    config = {
        "model_type": "gemma3",
        "architectures": ["Gemma3ForConditionalGeneration"],
        "text_config": keys,
        "vision_config": {
            "model_type": "siglip_vision_model",
            "hidden_size": heads * draw(st.sampled_from([4, 8])),
            "intermediate_size": draw(st.sampled_from([24, 40])),
            "num_hidden_layers": draw(st.integers(1, 3)),
            "num_attention_heads": heads,
            # a rest that fills no patch is left over
            "image_size": side * patch + draw(st.integers(0, patch - 1)),
            "patch_size": patch,
            "vision_use_head": draw(st.booleans()),
            "layer_norm_eps": draw(st.sampled_from([1e-6, 1e-2])),
        },
        "mm_tokens_per_image": squares**2,
        "boi_token_index": vocab - 3,
        "eoi_token_index": vocab - 2,
        "image_token_index": draw(st.sampled_from([vocab - 1, vocab + 5])),
        "tie_word_embeddings": tied,
    }
    return Drawn(json.dumps(config), text.seed)


MULTIMODAL = {
    "model_type": "gemma3",
    "architectures": ["Gemma3ForConditionalGeneration"],
    "text_config": TEXT,
    "vision_config": {
        "model_type": "siglip_vision_model",
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 24,
        "patch_size": 4,
        "vision_use_head": True,
    },
    "mm_tokens_per_image": 9,
    "boi_token_index": 328,
    "eoi_token_index": 329,
    "image_token_index": 330,
    "tie_word_embeddings": True,
}
"""the pinned target with images: nine tokens an image, wider than the text's window, squares of four patches"""

PINNED_TEXT, PINNED_MULTIMODAL = Drawn(json.dumps(TEXT), 3), Drawn(json.dumps(MULTIMODAL), 4)


@dataclass(frozen=True)
class Layout:
    """Where images stand in a prompt of several sequences."""

    gaps: tuple[int, ...]
    """tokens of text before each image, and after the last"""
    shown: tuple[tuple[bool, ...], ...]
    """for each sequence, which images it has; the others are text there"""
    marked: bool = True
    """a token at each end of an image; without them two images without a gap are one run"""


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    """One to three sequences with up to two images each, one at least."""
    batch, images = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    shown = [[draw(st.booleans()) for _ in range(images)] for _ in range(batch)]
    shown[0][0] = True
    gaps = draw(st.lists(st.integers(0, 9), min_size=images, max_size=images))
    return Layout((*gaps, draw(st.integers(1, 9))), tuple(map(tuple, shown)), draw(st.booleans()))


PINNED_LAYOUT = Layout((2, 3, 6), ((True, True), (False, True)))


@dataclass(frozen=True)
class Prompt:
    """Tokens with images among them, for a config and a layout."""

    config: str
    layout: Layout
    seed: int

    @cached_property
    def keys(self) -> dict[str, Any]:
        return json.loads(self.config)

    @cached_property
    def starts(self) -> list[int]:
        """First column of each image."""
        columns, at, edge = [], 0, int(self.layout.marked)
        for gap in self.layout.gaps[:-1]:
            columns.append(at + gap + edge)
            at = columns[-1] + self.size + edge
        return columns

    @property
    def size(self) -> int:
        return self.keys["mm_tokens_per_image"]

    @property
    def width(self) -> int:
        return self.starts[-1] + self.size + int(self.layout.marked) + self.layout.gaps[-1]

    @cached_property
    def tokens(self) -> Tensor:
        """[B, T]"""
        # no token of text is the placeholder, whose id is the vocabulary's last or beyond it
        text = random_tokens(self.keys["text_config"]["vocab_size"] - 1, len(self.layout.shown), self.width, self.seed)
        for row, shown in enumerate(self.layout.shown):
            for start in (s for s, here in zip(self.starts, shown, strict=True) if here):
                text[row, start : start + self.size] = self.keys["image_token_index"]
                if self.layout.marked:
                    text[row, start - 1], text[row, start + self.size] = (
                        self.keys["boi_token_index"],
                        self.keys["eoi_token_index"],
                    )
        return text

    @property
    def token_type_ids(self) -> Tensor:
        """[B, T]"""
        return (self.tokens == self.keys["image_token_index"]).long()

    def inputs(self, start: int = 0, stop: int | None = None) -> dict[str, Tensor]:
        """What goes with the tokens of some columns: their types, and their images where there are any."""
        stop = self.width if stop is None else stop
        side = self.keys["vision_config"]["image_size"]
        generator = torch.Generator().manual_seed(self.seed)
        rows = []
        for shown in self.layout.shown:
            pixels = torch.randn(len(shown), 3, side, side, generator=generator)
            rows += [p for p, s, here in zip(pixels, self.starts, shown, strict=True) if here and start <= s < stop]
        named = {"token_type_ids": self.token_type_ids[:, start:stop]}
        return {**named, "pixel_values": torch.stack(rows).double()} if rows else named

    @property
    def cuts(self) -> list[int]:
        """Columns before which the prompt may be cut: no image goes through them."""
        inside = self.token_type_ids.bool()
        through = (inside[:, :-1] & inside[:, 1:]).any(0).tolist()
        return [column for column in range(1, self.width) if not through[column - 1]]


def _published(**text: Any) -> dict[str, Any]:
    """A config with images as the hub has it: what equals the class's default is left out."""
    return {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "boi_token_index": 255_999,
        "eoi_token_index": 256_000,
        "eos_token_id": [1, 106],
        "image_token_index": 262_144,
        "initializer_range": 0.02,
        "mm_tokens_per_image": 256,
        "model_type": "gemma3",
        "text_config": {
            "model_type": "gemma3_text",
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
            "sliding_window": 1024,
            **text,
        },
        "torch_dtype": "bfloat16",
        "vision_config": {
            "hidden_size": 1152,
            "image_size": 896,
            "intermediate_size": 4304,
            "model_type": "siglip_vision_model",
            "num_attention_heads": 16,
            "num_hidden_layers": 27,
            "patch_size": 14,
            "vision_use_head": False,
        },
    }


PUBLISHED: Mapping[str, dict[str, Any]] = {
    "gemma-3-1b": {
        "architectures": ["Gemma3ForCausalLM"],
        "attention_bias": False,
        "attn_logit_softcapping": None,
        "cache_implementation": "hybrid",
        "final_logit_softcapping": None,
        "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": 1152,
        "intermediate_size": 6912,
        "max_position_embeddings": 32_768,
        "model_type": "gemma3_text",
        "num_attention_heads": 4,
        "num_hidden_layers": 26,
        "num_key_value_heads": 1,
        "query_pre_attn_scalar": 256,
        "rms_norm_eps": 1e-6,
        "rope_local_base_freq": 10_000,
        "rope_scaling": None,
        "rope_theta": 1_000_000,
        "sliding_window": 512,
        "sliding_window_pattern": 6,
        "torch_dtype": "bfloat16",
        "vocab_size": 262_144,
    },
    "gemma-3-4b": _published(hidden_size=2560, intermediate_size=10_240, num_hidden_layers=34),
    "gemma-3-12b": _published(
        hidden_size=3840,
        intermediate_size=15_360,
        num_hidden_layers=48,
        num_attention_heads=16,
        num_key_value_heads=8,
    ),
    "gemma-3-27b": _published(
        hidden_size=5376,
        intermediate_size=21_504,
        num_hidden_layers=62,
        num_attention_heads=32,
        num_key_value_heads=16,
        head_dim=128,
        query_pre_attn_scalar=168,
    ),
}
"""`config.json` of each published size, in the older spelling of the hub"""
