"""Gemma 4 Unified: patches of images and frames of sound enter the text model of gemma4.py through no encoder.

    (1)  p = LN_2(W_patch LN_1(x) + b)                    x: the pixels of a patch, row by row, channels last
    (2)  e = LN_3(p + E_0[column] + E_1[row])             a table of positions for each axis
    (3)  f = W_vision norm_1(e)                           for images, and for the frames of videos
    (4)  f = W_audio norm_1(a)                            a: the samples of a stretch of sound
             norm_1 has no weight; LN is with weight and bias
    (5)  h_0 = sqrt(H) Emb(x), with padding for x where x is a placeholder; f in its place, not scaled
    (6)  tokens of one image see each other both ways on sliding layers, as gemma4.py has it

then gemma4.py (3) to (12). A patch whose column and row are both -1 fills up a batch and is dropped. An image, in the
sense of (6), is a run of tokens of type 1 (image) or 2 (video frame), `mm_token_type_ids`; sound is of type 3 and
causal. Without types, placeholders tell. A run is read in one pass: it sees ahead.

Logits are as the head gives them: what decoding must not emit stands in `generation_config.json` (`suppress_tokens`).
Source: transformers `modeling_gemma4_unified.py`; for (6) its `create_masks_for_generate`, as Gemma 4's other sizes and
the engines have it: a plain forward pass there lets images look ahead on full layers and beyond the window, too.
Letters: reference/README.md, and here: I images, J videos of F frames, P and Q patches, C numbers a patch, E width of
an embedded patch, M patches or stretches that are not dropped, U sounds, R stretches a sound, Z samples a stretch.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from reference.config import ConfigError, Keys
from reference.ops.blocks import runs
from reference.ops.norm import WideRMSNorm
from reference.targets import gemma4
from reference.targets.gemma4 import Gemma4Config, Gemma4Target
from reference.targets.gemma4_shell import Gemma4Shell

TEXT_TYPE = "gemma4_unified_text"


@dataclass(frozen=True)
class PatchConfig:
    """Every fact that changes equations (1) to (3)."""

    side: int
    """pixels along one side of a patch"""
    hidden: int
    positions: int
    """columns, and rows, that have an embedding"""
    eps: float = 1e-6

    @classmethod
    def from_hf(cls, keys: Keys) -> "PatchConfig":
        """Read `vision_config`; errors: ConfigError."""
        facts = cls(
            # a patch is a square of smaller ones, a notion of Gemma 4 with an encoder
            side=keys.count("patch_size", 16) * keys.count("pooling_kernel_size", 3),
            hidden=keys.count("mm_embed_dim", 3840),
            positions=keys.count("mm_posemb_size", 1120),
            eps=keys.number("rms_norm_eps", 1e-6),
        )
        keys.expect("model_patch_size", facts.side)
        keys.expect("output_proj_dims", facts.hidden)
        keys.get("num_soft_tokens")  # of the processor
        keys.finish()
        return facts


@dataclass(frozen=True)
class SoundConfig:
    """Every fact that changes equation (4)."""

    samples: int
    """of a waveform, a token"""
    eps: float = 1e-6

    @classmethod
    def from_hf(cls, keys: Keys) -> "SoundConfig":
        """Read `audio_config`; errors: ConfigError."""
        names = ("audio_embed_dim", "audio_samples_per_token", "hidden_size", "output_proj_dims")
        stated = {name: keys.count(name) for name in names if keys.get(name) is not None}
        if len(set(stated.values())) > 1:
            raise ConfigError(f"config keys {keys.path}* are names of one number, and disagree: {stated}")
        facts = cls(next(iter(stated.values()), 640), keys.number("rms_norm_eps", 1e-6))
        keys.finish()
        return facts


@dataclass(frozen=True)
class Gemma4UnifiedConfig:
    """Every fact that changes the equations above."""

    text: Gemma4Config
    vision: PatchConfig | None = None
    audio: SoundConfig | None = None
    """None for a model without this sense"""
    image_token: int = 258_880
    video_token: int = 258_884
    audio_token: int = 258_881
    padding_token: int = 0
    """what a placeholder is embedded as"""
    end_of_image: int = 258_882
    end_of_audio: int = 258_883
    video_sees_ahead: bool = True
    """whether (6) counts video frames as images. The config says "vision", and transformers means both by it; SGLang
    leaves video causal: `replace(config, video_sees_ahead=False)` is that dialect"""

    def __post_init__(self) -> None:
        placeholders = {"image": self.image_token, "video": self.video_token, "audio": self.audio_token}
        if len(set(placeholders.values())) < len(placeholders):
            raise ConfigError(f"config keys '*_token_id' give one placeholder two meanings: {placeholders}")

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

    @property
    def suppressed(self) -> tuple[int, ...]:
        """Marks that published generation configs never let be emitted. A fact of decoding: logits stay as they are."""
        return (self.end_of_audio, self.end_of_image)

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> "Gemma4UnifiedConfig":
        """Read `config.json`; errors: ConfigError for missing, unknown or unsupported keys."""
        keys = Keys(config)
        for marker in ("boi_token_id", "boa_token_id"):
            keys.get(marker)  # tokens like any other before an image or a sound
        inner = keys.below("text_config")
        inner.expect("model_type", TEXT_TYPE)
        text = Gemma4Config.from_hf({"model_type": TEXT_TYPE, **inner.config})
        if text.per_layer_width or text.experts:
            raise ConfigError(
                "config keys 'text_config.hidden_size_per_layer_input' and 'text_config.enable_moe_block' must be off: "
                "the unified text model has neither"
            )
        tied = keys.flag("tie_word_embeddings", None)
        if tied is None and not text.tied_head:
            raise ConfigError(
                "config key 'text_config.tie_word_embeddings' is false and 'tie_word_embeddings' is missing: "
                "readers differ on which of them decides; state both"
            )
        senses = {
            name: None if keys.get(f"{name}_config") is None else read(keys.below(f"{name}_config"))
            for name, read in (("vision", PatchConfig.from_hf), ("audio", SoundConfig.from_hf))
        }
        facts = cls(
            # where both are stated the outer one decides: transformers writes the inner one's default beside it
            text=replace(text, tied_head=tied is not False),
            **senses,
            image_token=keys.count("image_token_id", 258_880, 0),
            video_token=keys.count("video_token_id", 258_884, 0),
            audio_token=keys.count("audio_token_id", 258_881, 0),
            padding_token=inner.count("pad_token_id", 0, 0),
            end_of_image=keys.count("eoi_token_id", 258_882, 0),
            end_of_audio=_end_of_audio(keys),
        )
        keys.finish()
        return facts


def _end_of_audio(keys: Keys) -> int:
    """The mark after a sound: `eoa_token_index` in files of transformers, `eoa_token_id` in those of engines."""
    names = ("eoa_token_index", "eoa_token_id")
    stated = {name: keys.count(name, 258_883, 0) for name in names if keys.get(name) is not None}
    if len(set(stated.values())) > 1:
        raise ConfigError(f"config keys 'eoa_token_index' and 'eoa_token_id' disagree: {stated}; keep one of them")
    return next(iter(stated.values()), 258_883)


# how published checkpoints spell our parameter names: (their prefix, ours); the first three as transformers has them
# in memory, where the table of positions lies inside what `embed_vision` names
CHECKPOINT_NAMES = (
    ("model.embed_vision.multimodal_embedder.", "embed_vision."),
    ("model.embed_vision.patch_", "vision_embedder.patch_"),
    ("model.embed_vision.pos_", "vision_embedder.pos_"),
    ("model.", ""),
    ("lm_head.", "language_model.lm_head."),
)

# as the text model; what embeds patches and sound is replicated
TP_PLAN = {f"language_model.{name}": split for name, split in gemma4.TP_PLAN.items()}


class PatchEmbedder(nn.Module):
    """Equations (1) and (2)."""

    def __init__(self, c: PatchConfig) -> None:
        super().__init__()
        self.positions, numbers = c.positions, 3 * c.side**2
        self.patch_ln1 = nn.LayerNorm(numbers)
        self.patch_dense = nn.Linear(numbers, c.hidden)
        self.patch_ln2 = nn.LayerNorm(c.hidden)
        self.pos_embedding = nn.Parameter(torch.zeros(c.positions, 2, c.hidden))
        self.pos_norm = nn.LayerNorm(c.hidden)

    def forward(self, pixels: Tensor, places: Tensor) -> Tensor:
        """Embed the patches that are none of the filling.

        pixels  [I, P, C]
        places  [I, P, 2]  column and row, -1 and -1 for filling
        ->      [M, E]     image by image
        """
        self._check(places)
        real = (places != -1).any(-1)
        x, (column, row) = pixels[real].to(self.patch_dense.weight.dtype), places[real].unbind(-1)
        p = self.patch_ln2(self.patch_dense(self.patch_ln1(x)))  # (1)
        return self.pos_norm(p + (self.pos_embedding[column, 0] + self.pos_embedding[row, 1]))  # (2)

    def _check(self, places: Tensor) -> None:
        """Refuse positions that have no embedding; errors: ValueError."""
        half = (places == -1).any(-1) != (places == -1).all(-1)
        if bool(half.any()):
            raise ValueError(
                f"a patch stands at {places[half][0].tolist()} (column, row): readers differ on whether one -1 means "
                "filling; use -1 for both, or for neither"
            )
        if bool(((places < -1) | (places >= self.positions)).any()):
            raise ValueError(
                f"patches stand at {int(places.min())}..{int(places.max())}, embeddings are there for "
                f"0..{self.positions - 1}"
            )


class Projection(nn.Module):
    """Equations (3) and (4): the norm without a weight, and the way into the stream."""

    def __init__(self, width: int, hidden: int, eps: float) -> None:
        super().__init__()
        self.norm = WideRMSNorm(None, eps)
        self.embedding_projection = nn.Linear(width, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [M, E] -> [M, H]"""
        return self.embedding_projection(self.norm(x.to(self.embedding_projection.weight.dtype)))


class Gemma4UnifiedTarget(Gemma4Shell):
    """The whole target: patches, sound, and the text model of gemma4.py; (5): gemma4_shell.py."""

    def __init__(self, c: Gemma4UnifiedConfig) -> None:
        super().__init__()
        self.c = c
        if c.vision is not None:
            self.vision_embedder = PatchEmbedder(c.vision)
            self.embed_vision = Projection(c.vision.hidden, c.hidden, c.vision.eps)
        if c.audio is not None:
            self.embed_audio = Projection(c.audio.samples, c.hidden, c.audio.eps)
        self.language_model = Gemma4Target(c.text)

    def see(self, pixels: Tensor, places: Tensor | None) -> Tensor:
        """Equations (1) to (3); errors: ValueError.

        pixels  [I, P, C] or [J, F, P, C]
        places  [I, P, 2] or [J, F, P, 2]
        ->      [M, H]
        """
        if places is None:
            raise ValueError("patches were given without their positions; pass image_position_ids, video_position_ids")
        if self.c.vision is None:
            raise ValueError("patches were given to a model without vision (vision_config is null)")
        return self.embed_vision(self.vision_embedder(pixels.flatten(0, -3), places.flatten(0, -3)))

    def hear(self, stretches: Tensor, mask: Tensor | None) -> Tensor:
        """Equation (4); errors: ValueError.

        stretches  [U, R, Z]
        mask       [U, R]     true for sound, false for filling
        ->         [M, H]
        """
        if mask is None:
            raise ValueError("sound was given without its mask; pass input_features_mask")
        if self.c.audio is None:
            raise ValueError("sound was given to a model without hearing (audio_config is null)")
        return self.embed_audio(stretches[mask.bool()])

    def blocks(self, types: Tensor) -> Tensor:
        """Equation (6): the number of the image that a token belongs to, -1 for none.

        types  [B, T]
        ->     [B, T]
        """
        return runs((types == 1) | (types == 2) if self.c.video_sees_ahead else types == 1)
