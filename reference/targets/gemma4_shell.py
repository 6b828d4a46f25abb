"""What the shells around the text model of Gemma 4 have in common: images, videos and sounds among tokens.

A shell says how it sees (`see`), hears (`hear`) and which tokens make an image (`blocks`). A placeholder is embedded as
padding, its feature stands in its place unscaled, and the tables of gemma4.py (2) are asked for padding there, too.
Letters: reference/README.md, and here: I images, J videos of F frames, P and Q patches, C numbers a patch, U sounds, R
frames or stretches a sound, Z numbers each, M features.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from reference.ops.cache import Cache
from reference.ops.shell import Sensed, Shell
from reference.outputs import TargetOutput
from reference.targets.gemma4 import Gemma4Target


class Gemma4Shell(Shell):
    """Features among the tokens of gemma4.py."""

    c: Any
    language_model: Gemma4Target
    see: Callable[[Tensor, Tensor | None], Tensor]
    """patches of images, or of the frames of videos, and their places -> features [M, H]"""
    hear: Callable[[Tensor, Tensor | None], Tensor]
    """sounds and their mask -> features [M, H]"""
    blocks: Callable[[Tensor], Tensor]
    """types [B, T] -> the number of the image that a token belongs to, -1 for none, [B, T]"""

    def shared_kv(self, cache: Cache) -> dict[str, tuple[Tensor, Tensor]]:
        """The last keys and values of each kind of layer, by slot: what the Gemma 4 assistant reads."""
        return self.language_model.shared_kv(cache)

    def holes(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Placeholders of images, of videos and of sounds.

        tokens  [B, T]
        ->      [B, T], [B, T], [B, T]
        """
        return tokens == self.c.image_token, tokens == self.c.video_token, tokens == self.c.audio_token

    def known(self, tokens: Tensor) -> Tensor:
        """Padding where a token is a placeholder, whose id may lie beyond the vocabulary.

        tokens  [B, T]
        ->      [B, T]
        """
        images, videos, sounds = self.holes(tokens)
        return tokens.masked_fill(images | videos | sounds, self.c.padding_token)

    def sense(
        self,
        h: Tensor,
        tokens: Tensor,
        pixel_values: Tensor | None = None,
        image_position_ids: Tensor | None = None,
        pixel_values_videos: Tensor | None = None,
        video_position_ids: Tensor | None = None,
        input_features: Tensor | None = None,
        input_features_mask: Tensor | None = None,
        mm_token_type_ids: Tensor | None = None,
    ) -> Sensed:
        """Put what is seen and heard into the stream; errors: ValueError.

        h                    [B, T, H]
        tokens               [B, T]
        pixel_values         [I, P, C]
        image_position_ids   [I, P, 2]
        pixel_values_videos  [J, F, Q, C]
        video_position_ids   [J, F, Q, 2]
        input_features       [U, R, Z]
        input_features_mask  [U, R]
        mm_token_type_ids    [B, T]
        """
        images, videos, sounds = self.holes(tokens)
        filled = torch.zeros_like(images)
        for holes, given, where, make, what in (
            (images, pixel_values, image_position_ids, self.see, "images"),
            (videos, pixel_values_videos, video_position_ids, self.see, "videos"),
            (sounds, input_features, input_features_mask, self.hear, "sound"),
        ):
            if given is not None:
                h, filled = self.place(h, holes, make(given, where), what), filled | holes
        types = mm_token_type_ids
        if types is None and (pixel_values is not None or pixel_values_videos is not None):
            types = images.long() + 2 * videos.long()
        return Sensed(h, filled, None if types is None else self.blocks(types))

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        capture: Sequence[int] = (),
        cache: Cache | None = None,
        slots: Tensor | None = None,
        visible: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_position_ids: Tensor | None = None,
        pixel_values_videos: Tensor | None = None,
        video_position_ids: Tensor | None = None,
        input_features: Tensor | None = None,
        input_features_mask: Tensor | None = None,
        mm_token_type_ids: Tensor | None = None,
    ) -> TargetOutput:
        """Predict the token after each of `tokens`; without a cache the tokens see each other alone.

        tokens               [B, T]
        positions            [B, T]        0..T-1 when absent
        slots                [B, T]        the positions when absent; only read with a cache
        visible              [B, T, S]     by position and `blocks` when absent; sliding layers narrow it
        pixel_values         [I, P, C]     patches of the images among these tokens, in order; numbers from 0 to 1
        image_position_ids   [I, P, 2]     column and row of each, -1 and -1 for filling
        pixel_values_videos  [J, F, Q, C]  of the videos
        video_position_ids   [J, F, Q, 2]
        input_features       [U, R, Z]     sound
        input_features_mask  [U, R]        true where there is sound
        mm_token_type_ids    [B, T]        1 image, 2 video, 3 sound; with images or videos, by placeholder when absent
        ->                   logits [B, T, V], hidden [B, T, H], aux [B, T, A, H]
        """
        known = self.known(tokens)
        images, videos = (pixel_values, image_position_ids), (pixel_values_videos, video_position_ids)
        given = (*images, *videos, input_features, input_features_mask, mm_token_type_ids)
        h, _, blocks = self.sense(self.language_model.embed(known), tokens, *given)
        where = (positions, capture, cache, slots, visible)
        blocks = blocks if visible is None else None
        return self.language_model(known, *where, embeds=h, per_layer_tokens=known, blocks=blocks)
