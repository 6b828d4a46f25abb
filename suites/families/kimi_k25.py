"""Kimi K2.5: tiny configs with every feature, prompts with images and clips, and the size as it is published."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from harness.witness import StayWide, Witness
from suites.draws import Drawn, random_tokens
from suites.families.deepseek import SIGMOID, THIRD, deepseek_targets

IMAGE, CLIP = "image", "clip"
NAMES = {IMAGE: ("pixel_values", "image_grid_thw"), CLIP: ("pixel_values_videos", "video_grid_thw")}


@st.composite
def kimi_targets(draw: st.DrawFn, **text: Any) -> Drawn:
    """A target with a tower: any table of positions, squares of two patches or four."""
    # where the text model has no q-LoRA, transformers 5.17 saves its query as if it were the tower's
    inner = draw(deepseek_targets(models=(THIRD,), max_layers=3, query_ranks=(24,), **text))
    keys, heads, side = inner.keys, draw(st.sampled_from([1, 2, 4])), draw(st.sampled_from([2, 3, 8]))
    vocab, width = keys["vocab_size"], heads * draw(st.sampled_from([4, 8]))
    config = {
        "model_type": "kimi_k25",
        "architectures": ["Kimi_K25ForConditionalGeneration"],
        "text_config": {**keys, "model_type": "kimi_k2"},
        "vision_config": {
            "model_type": "kimi_k25_vision",
            "hidden_size": width,
            "intermediate_size": draw(st.sampled_from([24, 40])),
            "num_hidden_layers": draw(st.integers(1, 2)),
            "num_attention_heads": heads,
            "patch_size": draw(st.sampled_from([2, 3])),
            "pos_emb_height": side,
            "pos_emb_width": side,
            "pos_emb_time": 3,
            "merge_kernel_size": draw(st.sampled_from([[2, 2], [1, 2], [2, 1]])),
            "rope_parameters": {"rope_type": "axial", "rope_theta": draw(st.sampled_from([100.0, 10_000.0]))},
        },
        "projection_hidden_size": width,
        "projection_layer_norm_eps": draw(st.sampled_from([1e-5, 1e-2])),
        "image_token_id": vocab - 1,
        "video_token_id": draw(st.sampled_from([vocab - 2, vocab + 5])),
        "tie_word_embeddings": keys["tie_word_embeddings"],
    }
    return Drawn(json.dumps(config), inner.seed)


TEXT = {**SIGMOID, "model_type": "kimi_k2", "n_group": 1, "topk_group": 1, "num_nextn_predict_layers": 0}
KIMI = {
    "model_type": "kimi_k25",
    "architectures": ["Kimi_K25ForConditionalGeneration"],
    "text_config": TEXT,
    "vision_config": {
        "model_type": "kimi_k25_vision",
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "patch_size": 2,
        "pos_emb_height": 5,
        "pos_emb_width": 5,
        "pos_emb_time": 3,
        "merge_kernel_size": [2, 2],
        "rope_parameters": {"rope_type": "axial", "rope_theta": 10_000.0},
    },
    "projection_hidden_size": 16,
    "image_token_id": 330,
    "video_token_id": 329,
    "tie_word_embeddings": False,
}
"""the pinned target: seven layers of text, a table of positions that fits none of its images"""
PINNED_KIMI = Drawn(json.dumps(KIMI), 4)


@dataclass(frozen=True)
class Picture:
    """An image or a clip, its size in squares of patches."""

    kind: str
    frames: int
    rows: int
    columns: int

    @property
    def tokens(self) -> int:
        return self.rows * self.columns


Row = tuple[int | Picture, ...]
"""a sequence: counts of tokens of text, and pictures"""


@st.composite
def rows(draw: st.DrawFn, max_frames: int = 1) -> tuple[Row, ...]:
    """One or two sequences, one picture at least."""
    size = st.integers(1, 3)
    frames = st.integers(1, max_frames)
    picture = st.builds(Picture, st.sampled_from([IMAGE, CLIP]), frames, size, size)
    drawn = draw(st.lists(st.lists(st.one_of(st.integers(1, 4), picture), max_size=3), min_size=1, max_size=2))
    return ((*drawn[0], draw(picture)), *map(tuple, drawn[1:]))


STILL: tuple[Row, ...] = (
    (3, Picture(IMAGE, 1, 2, 3), 2, Picture(CLIP, 1, 1, 2), 4),
    (1, Picture(CLIP, 1, 3, 1), Picture(IMAGE, 1, 1, 1), 5),
)
MOVING: tuple[Row, ...] = (
    (2, Picture(CLIP, 3, 2, 1), 2, Picture(IMAGE, 1, 2, 3), 2),
    (4, Picture(CLIP, 2, 1, 2), 3),
)


@dataclass(frozen=True)
class Prompt:
    """Tokens with pictures among them, for a config."""

    config: str
    rows: tuple[Row, ...]
    seed: int

    @cached_property
    def keys(self) -> dict[str, Any]:
        return json.loads(self.config)

    @cached_property
    def placed(self) -> list[tuple[int, int, Picture]]:
        """Sequence, first column and picture, in reading order."""
        found = []
        for number, row in enumerate(self.rows):
            column = 0
            for piece in row:
                if isinstance(piece, Picture):
                    found.append((number, column, piece))
                column += piece.tokens if isinstance(piece, Picture) else piece
        return found

    @cached_property
    def width(self) -> int:
        return max(sum(p.tokens if isinstance(p, Picture) else p for p in row) for row in self.rows) + 1

    @cached_property
    def tokens(self) -> Tensor:
        """[B, T]; shorter sequences end in more text"""
        # no token of text is a placeholder
        text = random_tokens(self.keys["text_config"]["vocab_size"] - 2, len(self.rows), self.width, self.seed)
        ids = {IMAGE: self.keys["image_token_id"], CLIP: self.keys["video_token_id"]}
        for row, column, picture in self.placed:
            text[row, column : column + picture.tokens] = ids[picture.kind]
        return text

    @cached_property
    def pixels(self) -> list[tuple[Tensor, Tensor]]:
        """Patches [P, 3, Y, X] and grid [1, 3] of each picture."""
        vision, generator = self.keys["vision_config"], torch.Generator().manual_seed(self.seed)
        side, (down, across) = vision["patch_size"], vision["merge_kernel_size"]
        grids = [(p.frames, p.rows * down, p.columns * across) for _, _, p in self.placed]
        return [
            (torch.randn(t * h * w, 3, side, side, generator=generator).double(), torch.tensor([[t, h, w]]))
            for t, h, w in grids
        ]

    def inputs(self, start: int = 0, stop: int | None = None) -> dict[str, Tensor]:
        """What goes with the tokens of some columns: their pictures, where there are any."""
        stop, named = self.width if stop is None else stop, {}
        for kind, names in NAMES.items():
            chosen = [
                pixels
                for (_, column, picture), pixels in zip(self.placed, self.pixels, strict=True)
                if picture.kind == kind and start <= column < stop
            ]
            if chosen:
                named |= {name: torch.cat(parts) for name, parts in zip(names, zip(*chosen, strict=True), strict=True)}
        return named

    @property
    def cuts(self) -> list[int]:
        """Columns before which the prompt may be cut: no picture goes through them."""
        inside = {c for _, first, p in self.placed for c in range(first + 1, first + p.tokens)}
        return [column for column in range(1, self.width) if column not in inside]


@torch.no_grad()
def outside_stream(outside: Witness, prompt: Prompt) -> Tensor:
    """What the witness's own tower, projector and table put before its first layer.

    Its forward pass cannot be asked: transformers 5.17 cuts the features of a clip into pieces for all its frames
    after it has merged them.
    ->  [B, T, H]
    """
    shell = outside.model.model
    columns = torch.zeros_like(prompt.tokens, dtype=torch.bool)
    for row, column, picture in prompt.placed:
        columns[row, column : column + picture.tokens] = True
    with StayWide():
        h = shell.get_input_embeddings()(prompt.tokens.masked_fill(columns, 0))
        for (row, column, picture), (pixels, grid) in zip(prompt.placed, prompt.pixels, strict=True):
            merged = shell.vision_tower(pixels, grid_thw=grid).pooler_output
            h[row, column : column + picture.tokens] = shell.mm_projector(merged).squeeze(1)
    return h


# what transformers 4 wrote into the config of a model inside another
WRITTEN_ALONG = {
    "add_cross_attention": False,
    "bad_words_ids": None,
    "chunk_size_feed_forward": 0,
    "diversity_penalty": 0.0,
    "do_sample": False,
    "max_length": 20,
    "num_beams": 1,
    "repetition_penalty": 1.0,
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
    "torchscript": False,
    "typical_p": 1.0,
}

PUBLISHED: Mapping[str, dict[str, Any]] = {
    "Kimi-K2.5": {
        "architectures": ["KimiK25ForConditionalGeneration"],
        "auto_map": {"AutoConfig": "configuration_kimi_k25.KimiK25Config"},
        "bos_token_id": 163_584,
        "dtype": "bfloat16",
        "eos_token_id": 163_585,
        "ignore_index": -100,
        "media_placeholder_token_id": 163_605,
        "model_type": "kimi_k25",
        "pad_token_id": 163_839,
        "text_config": {
            **WRITTEN_ALONG,
            "architectures": ["DeepseekV3ForCausalLM"],
            "attention_bias": False,
            "attention_dropout": 0.0,
            "aux_loss_alpha": 0.001,
            "ep_size": 1,
            "first_k_dense_replace": 1,
            "hidden_act": "silu",
            "hidden_size": 7168,
            "initializer_range": 0.02,
            "intermediate_size": 18_432,
            "kv_lora_rank": 512,
            "max_position_embeddings": 262_144,
            "model_type": "kimi_k2",
            "moe_intermediate_size": 2048,
            "moe_layer_freq": 1,
            "n_group": 1,
            "n_routed_experts": 384,
            "n_shared_experts": 1,
            "norm_topk_prob": True,
            "num_attention_heads": 64,
            "num_experts_per_tok": 8,
            "num_hidden_layers": 61,
            "num_key_value_heads": 64,
            "num_nextn_predict_layers": 0,
            "q_lora_rank": 1536,
            "qk_nope_head_dim": 128,
            "qk_rope_head_dim": 64,
            "rms_norm_eps": 1e-5,
            "rope_scaling": {
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "factor": 64.0,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
                "original_max_position_embeddings": 4096,
                "type": "yarn",
            },
            "rope_theta": 50_000.0,
            "routed_scaling_factor": 2.827,
            "scoring_func": "sigmoid",
            "seq_aux": True,
            "tie_word_embeddings": False,
            "topk_group": 1,
            "topk_method": "noaux_tc",
            "v_head_dim": 128,
            "vocab_size": 163_840,
        },
        "tie_word_embeddings": False,
        "use_unified_vision_chunk": True,
        "video_placeholder": "<|kimi_k25_video_placeholder|>",
        "vision_config": {
            "init_pos_emb_height": 64,
            "init_pos_emb_time": 4,
            "init_pos_emb_width": 64,
            "merge_kernel_size": [2, 2],
            "merge_type": "sd2_tpool",
            "mm_hidden_size": 1152,
            "mm_projector_type": "patchmerger",
            "patch_size": 14,
            "pos_emb_type": "divided_fixed",
            "projector_hidden_act": "gelu",
            "projector_ln_eps": 1e-5,
            "text_hidden_size": 7168,
            "video_attn_type": "spatial_temporal",
            "vt_hidden_size": 1152,
            "vt_intermediate_size": 4304,
            "vt_num_attention_heads": 16,
            "vt_num_hidden_layers": 27,
        },
    }
}
"""`config.json` in the spelling of the hub, without how its weights are packed; the text's sizes are Kimi K2's"""
