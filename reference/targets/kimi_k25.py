"""Kimi K2.5: the vision tower of moonvit.py around the text model of deepseek.py.

    (1)  f = W_2 gelu(W_1 [LN_pre(m) of the patches of one square])    m: moonvit.py (4)
    (2)  h_0 = Emb(x), or f where x is a placeholder

then deepseek.py (2) to (9), which reads images like text: causally. Report: arXiv 2602.02276.
Letters: reference/README.md, and here: P and Q patches of all images and of all clips, C channels, F features of the
tower, U squares, K patches a square.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from reference.config import Keys
from reference.ops.cache import Cache
from reference.ops.shell import Sensed, Shell
from reference.ops.stream import seat
from reference.outputs import TargetOutput
from reference.targets import deepseek
from reference.targets.deepseek import DeepseekConfig, DeepseekTarget
from reference.targets.moonvit import MoonVitConfig, MoonVitTower

# what older transformers wrote of decoding, heads and training into every config inside a config
WRITTEN_ALONG = frozenset(
    {
        "bad_words_ids",
        "begin_suppress_tokens",
        "cross_attention_hidden_size",
        "decoder_start_token_id",
        "diversity_penalty",
        "do_sample",
        "early_stopping",
        "encoder_no_repeat_ngram_size",
        "exponential_decay_length_penalty",
        "forced_bos_token_id",
        "forced_eos_token_id",
        "length_penalty",
        "max_length",
        "min_length",
        "no_repeat_ngram_size",
        "num_beam_groups",
        "num_beams",
        "num_return_sequences",
        "output_scores",
        "prefix",
        "pruned_heads",
        "remove_invalid_values",
        "repetition_penalty",
        "return_dict_in_generate",
        "sep_token_id",
        "suppress_tokens",
        "task_specific_params",
        "temperature",
        "tf_legacy_loss",
        "tie_weights",
        "top_k",
        "top_p",
        "torchscript",
        "typical_p",
        "use_bfloat16",
    }
)


@dataclass(frozen=True)
class KimiK25Config:
    """Every fact that changes the equations above."""

    text: DeepseekConfig
    vision: MoonVitConfig
    image_token: int
    video_token: int
    """the same as image_token where a file has one placeholder for both"""

    @property
    def vocab(self) -> int:
        return self.text.vocab

    @property
    def hidden(self) -> int:
        return self.text.hidden

    @property
    def layers(self) -> int:
        return self.text.layers

    @property
    def tied_head(self) -> bool:
        return self.text.tied_head

    @property
    def ignored(self) -> tuple[tuple[str, str], ...]:
        """Tensors that may be there and no forward pass reads: (our name, why)."""
        return tuple((f"language_model.{pattern}", why) for pattern, why in self.text.ignored)

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "KimiK25Config":
        """Read `config.json`; errors: ConfigError for missing, unknown or unsupported keys."""
        keys = Keys(config)
        for inert in (
            "ignore_index",
            "use_unified_vision_chunk",
            "video_placeholder",
            "vision_start_token_id",
            "vision_end_token_id",
        ):
            keys.get(inert)  # of the loss, of the processor, and tokens like any other around an image
        inner = {k: v for k, v in keys.below("text_config").config.items() if k not in WRITTEN_ALONG}
        text = DeepseekConfig.from_hf(inner, "text_config.")
        below = keys.below("vision_config")
        eps = keys.number("projection_layer_norm_eps", 1e-5) if "projection_layer_norm_eps" in config else None
        vision = MoonVitConfig.from_hf(below.config, below.path, text.hidden, eps)
        keys.expect("projection_hidden_size", vision.hidden)
        image = keys.count("media_placeholder_token_id", keys.count("image_token_id", 163_605, 0), 0)
        facts = cls(
            text=replace(text, tied_head=keys.flag("tie_word_embeddings", text.tied_head)),
            vision=vision,
            image_token=image,
            video_token=keys.count("video_token_id", image, 0),
        )
        keys.finish()
        return facts


# how published checkpoints spell our parameter names: (their prefix, ours)
CHECKPOINT_NAMES = (
    # as transformers 5.17 saves what it has read under the published names
    ("language_model.model.blocks.", "language_model.model.layers."),
    ("vision_tower.encoder.patch_embed.", "vision_tower.patch_embed."),
    ("model.mm_projector.", "mm_projector."),
    ("language_model.model.", "language_model."),
)

# as the text model; the tower and the projector are replicated
TP_PLAN = {f"language_model.{name}": split for name, split in deepseek.TP_PLAN.items()}


class PatchMerger(nn.Module):
    """Equation (1)."""

    def __init__(self, c: KimiK25Config) -> None:
        super().__init__()
        wide = c.vision.hidden * c.vision.square[0] * c.vision.square[1]
        self.pre_norm = nn.LayerNorm(c.vision.hidden, c.vision.projector_eps)
        self.proj = nn.Sequential(nn.Linear(wide, wide), nn.GELU(), nn.Linear(wide, c.hidden))

    def forward(self, squares: Tensor) -> Tensor:
        """squares [U, K, F] -> [U, H]"""
        return self.proj(self.pre_norm(squares).flatten(1))


class KimiK25Target(Shell):
    """The whole target: the tower, the projector, and the text model of deepseek.py."""

    def __init__(self, c: KimiK25Config) -> None:
        super().__init__()
        self.c = c
        self.vision_tower = MoonVitTower(c.vision)
        self.mm_projector = PatchMerger(c)
        self.language_model = DeepseekTarget(c.text)

    def features(self, pixel_values: Tensor, grid_thw: Tensor) -> Tensor:
        """Equation (1).

        pixel_values  [P, C, Y, X]
        grid_thw      [I, 3]
        ->            [U, H]
        """
        return self.mm_projector(self.vision_tower(pixel_values, grid_thw))

    def known(self, tokens: Tensor) -> Tensor:
        """A placeholder's id may lie beyond the vocabulary.

        tokens  [B, T]
        ->      [B, T]
        """
        return tokens.masked_fill((tokens == self.c.image_token) | (tokens == self.c.video_token), 0)

    def sense(
        self,
        h: Tensor,
        tokens: Tensor,
        pixel_values: Tensor | None = None,
        image_grid_thw: Tensor | None = None,
        pixel_values_videos: Tensor | None = None,
        video_grid_thw: Tensor | None = None,
    ) -> Sensed:
        """Equation (2); errors: ValueError.

        h                    [B, T, H]
        tokens               [B, T]
        pixel_values         [P, C, Y, X]
        image_grid_thw       [I, 3]
        pixel_values_videos  [Q, C, Y, X]
        video_grid_thw       [J, 3]
        """
        holes = torch.zeros_like(tokens, dtype=torch.bool)
        for token, pixels, grid, what in (
            (self.c.image_token, pixel_values, image_grid_thw, "images"),
            (self.c.video_token, pixel_values_videos, video_grid_thw, "clips"),
        ):
            if pixels is not None and grid is not None:
                h = self.place(h, tokens == token, self.features(pixels, grid), f"{what} (id {token})")
                holes = holes | (tokens == token)
        return Sensed(h, holes, None)

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        capture: Sequence[int] = (),
        cache: Cache | None = None,
        slots: Tensor | None = None,
        visible: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_grid_thw: Tensor | None = None,
        pixel_values_videos: Tensor | None = None,
        video_grid_thw: Tensor | None = None,
    ) -> TargetOutput:
        """Predict the token after each of `tokens`; without a cache the tokens see each other alone.

        tokens               [B, T]
        positions            [B, T]        0..T-1 when absent
        slots                [B, T]        the positions when absent; only read with a cache
        visible              [B, T, S]     by position when absent
        pixel_values         [P, C, Y, X]  patches of the images among these tokens, in order
        image_grid_thw       [I, 3]        frames, rows and columns of patches of each
        pixel_values_videos  [Q, C, Y, X]  patches of the clips
        video_grid_thw       [J, 3]
        ->                   logits [B, T, V], hidden [B, T, H], aux [B, T, A, H]
        """
        positions, slots, visible = seat(tokens, positions, cache, slots, visible)
        pixels = (pixel_values, image_grid_thw, pixel_values_videos, video_grid_thw)
        h = self.sense(self.language_model.embed(self.known(tokens)), tokens, *pixels).h  # (2)
        return self.language_model.decode(h, positions, capture, cache, slots, visible)
