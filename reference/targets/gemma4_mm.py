"""Gemma 4 with its towers: images, frames of videos and sounds among the tokens of gemma4.py.

    (1)  f = W_vision norm_1(tower of gemma4_vision.py)      for images, and for the frames of videos
    (2)  f = W_audio norm_1(tower of gemma4_audio.py)
             norm_1 has no weight; its eps is the tower's
    (3)  x' = padding where x is a placeholder, else x
    (4)  h_0 = sqrt(H) Emb(x'), but f where x is a placeholder: f is not scaled
    (5)  p as in gemma4.py (2), from this h_0 and from x'
    (6)  tokens of one image see each other both ways on sliding layers, within the window, if the config says "vision"

then gemma4.py (3) to (12). An image, in the sense of (6), is a run of tokens of type 1 (image) or 2 (video frame),
`mm_token_type_ids`; sound is of type 3 and causal. Without types, placeholders tell. A run is read in one pass: it sees
ahead. Source: transformers `modeling_gemma4.py`.
Letters: reference/README.md, and here: I images, J videos of F frames, P and Q patches, C numbers a patch, U sounds, R
frames a sound, Z numbers a frame, M features.
"""

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from reference.config import ConfigError, Keys
from reference.ops.blocks import runs
from reference.ops.norm import WideRMSNorm
from reference.targets import gemma4
from reference.targets.gemma4 import Gemma4Config, Gemma4Target
from reference.targets.gemma4_audio import Gemma4AudioConfig, Gemma4AudioTower
from reference.targets.gemma4_shell import Gemma4Shell
from reference.targets.gemma4_vision import Gemma4VisionConfig, Gemma4VisionTower


@dataclass(frozen=True)
class Gemma4MmConfig:
    """Every fact that changes the equations above."""

    text: Gemma4Config
    vision: Gemma4VisionConfig | None = None
    audio: Gemma4AudioConfig | None = None
    """None for a model without this tower"""
    image_token: int = 258_880
    video_token: int = 258_884
    audio_token: int = 258_881
    padding_token: int = 0

    def __post_init__(self) -> None:
        placeholders = {"image": self.image_token, "video": self.video_token, "audio": self.audio_token}
        if len(set(placeholders.values())) < len(placeholders):
            raise ConfigError(f"config keys '*_token_id' give one placeholder two meanings: {placeholders}")
        if self.padding_token >= self.vocab:
            raise ConfigError(f"config key 'text_config.pad_token_id' is {self.padding_token}, of {self.vocab} tokens")

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
        """Tensors that a checkpoint may hold and nothing reads: (pattern of our name, why)."""
        return tuple((f"language_model.{pattern}", why) for pattern, why in self.text.ignored)

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> "Gemma4MmConfig":
        """Read `config.json`; errors: ConfigError for missing, unknown or unsupported keys."""
        keys = Keys(config)
        for marker in ("boi_token_id", "eoi_token_id", "boa_token_id", "eoa_token_id", "eoa_token_index"):
            keys.get(marker)  # tokens like any other around an image or a sound
        keys.get("vision_soft_tokens_per_image")  # of the processor
        inner = keys.below("text_config")
        inner.expect("model_type", "gemma4_text")
        text = Gemma4Config.from_hf({"model_type": "gemma4_text", **inner.config})
        tied = keys.flag("tie_word_embeddings", None)
        if tied is None and not text.tied_head:
            raise ConfigError(
                "config key 'text_config.tie_word_embeddings' is false and 'tie_word_embeddings' is missing: "
                "readers differ on which of them decides; state both"
            )
        vision, audio = (None if keys.get(n) is None else keys.below(n) for n in ("vision_config", "audio_config"))
        facts = cls(
            # where both are stated the outer one decides: transformers writes the inner one's default beside it
            text=replace(text, tied_head=tied is not False),
            vision=None if vision is None else Gemma4VisionConfig.from_hf(vision),
            audio=None if audio is None else Gemma4AudioConfig.from_hf(audio),
            image_token=keys.count("image_token_id", 258_880, 0),
            video_token=keys.count("video_token_id", 258_884, 0),
            audio_token=keys.count("audio_token_id", 258_881, 0),
            padding_token=inner.count("pad_token_id", 0, 0),
        )
        keys.finish()
        return facts


# how published checkpoints spell our parameter names: (their prefix, ours)
CHECKPOINT_NAMES = (("model.", ""), ("lm_head.", "language_model.lm_head."))

# as the text model; the towers, and what follows them, are replicated
TP_PLAN = {f"language_model.{name}": split for name, split in gemma4.TP_PLAN.items()}


class Gemma4Projector(nn.Module):
    """Equations (1) and (2) behind the towers."""

    def __init__(self, width: int, hidden: int, eps: float) -> None:
        super().__init__()
        self.norm = WideRMSNorm(None, eps)
        self.embedding_projection = nn.Linear(width, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [M, X] -> [M, H]"""
        return self.embedding_projection(self.norm(x))


class Gemma4MmTarget(Gemma4Shell):
    """The whole target: the towers, their projectors, and the text model of gemma4.py; (3) to (5): gemma4_shell.py."""

    def __init__(self, c: Gemma4MmConfig) -> None:
        super().__init__()
        self.c = c
        if c.vision is not None:
            self.vision_tower = Gemma4VisionTower(c.vision)
            self.embed_vision = Gemma4Projector(c.vision.hidden, c.hidden, c.vision.eps)
        if c.audio is not None:
            self.audio_tower = Gemma4AudioTower(c.audio)
            self.embed_audio = Gemma4Projector(c.audio.out, c.hidden, c.audio.eps)
        self.language_model = Gemma4Target(c.text)

    def see(self, pixels: Tensor, places: Tensor | None) -> Tensor:
        """Equation (1); errors: ValueError.

        pixels  [I, P, C] or [J, F, P, C]
        places  [I, P, 2] or [J, F, P, 2]
        ->      [M, H]
        """
        if places is None:
            raise ValueError("patches were given without their positions; pass image_position_ids, video_position_ids")
        if self.c.vision is None:
            raise ValueError("patches were given to a model without a vision tower (vision_config is null)")
        return self.embed_vision(self.vision_tower(pixels.flatten(0, -3), places.flatten(0, -3)))

    def hear(self, sounds: Tensor, mask: Tensor | None) -> Tensor:
        """Equation (2); errors: ValueError.

        sounds  [U, R, Z]
        mask    [U, R]     true for sound, false for filling
        ->      [M, H]
        """
        if mask is None:
            raise ValueError("sound was given without its mask; pass input_features_mask")
        if self.c.audio is None:
            raise ValueError("sound was given to a model without an audio tower (audio_config is null)")
        return self.embed_audio(self.audio_tower(sounds, mask))

    def blocks(self, types: Tensor) -> Tensor:
        """Equation (6).

        types  [B, T]
        ->     [B, T]
        """
        return runs((types == 1) | (types == 2))
