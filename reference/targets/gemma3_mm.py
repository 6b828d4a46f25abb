"""Gemma 3 with images: a SigLIP tower whose patches are pooled into tokens of the text model.

    (1)  p_0 = W_patch patch + position                      every patch of an image, no overlap
    (2)  s_i = p_i + Attn(LN_1(p_i))                         all patches see all, no rope
    (3)  p_{i+1} = s_i + W_2 gelu(W_1 LN_2(s_i))
    (4)  f = W_proj norm(mean of LN_post(p) over squares)    sqrt(tokens an image) squares a side; norm of gemma3.py
    (5)  h_0 = Emb(x) * sqrt(H), or f where x is the image placeholder: f is not scaled
    (6)  a token sees slots at or before its own, and every token of the image it belongs to

    then gemma3.py (2) to (5); its sliding layers keep of (6) what lies above position - window.

An image is a run of tokens of type 1 (`token_type_ids`); with `pixel_values` alone, the placeholders are of type 1.
A run is read in one pass: it sees ahead. Report: arXiv 2503.19786; the tower: arXiv 2303.15343.
Letters: reference/README.md, and here: I images, C channels, P patches an image, F features of the tower.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import isqrt
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reference.config import ConfigError, Keys
from reference.ops.attention import attend
from reference.ops.blocks import later_of_block
from reference.ops.cache import Cache
from reference.ops.mlp import gelu
from reference.ops.norm import GemmaRMSNorm
from reference.ops.shell import Sensed, Shell
from reference.ops.stream import seat
from reference.outputs import TargetOutput
from reference.targets import gemma3
from reference.targets.gemma3 import Gemma3Config, Gemma3Target


@dataclass(frozen=True)
class SiglipConfig:
    """Every fact that changes equations (1) to (3)."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    image_size: int
    patch_size: int
    channels: int = 3
    eps: float = 1e-6

    @property
    def side(self) -> int:
        """Patches along one side of an image."""
        return self.image_size // self.patch_size

    @classmethod
    def from_hf(cls, keys: Keys) -> "SiglipConfig":
        """Read `vision_config`; errors: ConfigError."""
        keys.expect("hidden_act", "gelu_pytorch_tanh")
        keys.flag("vision_use_head")  # a pooling head that no text model reads
        facts = cls(
            hidden=keys.count("hidden_size"),
            intermediate=keys.count("intermediate_size"),
            layers=keys.count("num_hidden_layers"),
            heads=keys.count("num_attention_heads"),
            image_size=keys.count("image_size"),
            patch_size=keys.count("patch_size"),
            channels=keys.count("num_channels", 3),
            eps=keys.number("layer_norm_eps", 1e-6),
        )
        keys.finish()
        if facts.hidden % facts.heads:
            raise ConfigError(f"config key {keys.path + 'num_attention_heads'!r} does not divide {facts.hidden}")
        return facts


@dataclass(frozen=True)
class Gemma3MmConfig:
    """Every fact that changes the equations above."""

    text: Gemma3Config
    vision: SiglipConfig
    tokens_per_image: int = 256
    image_token: int = 262_144

    def __post_init__(self) -> None:
        squares, side = isqrt(self.tokens_per_image), self.vision.side
        # a square is side // squares patches wide; what is left over at the far edges is dropped
        if squares**2 != self.tokens_per_image or squares > side or side // (side // squares) != squares:
            raise ConfigError(
                f"config key 'mm_tokens_per_image' is {self.tokens_per_image}; {side} by {side} patches cannot be "
                "pooled into as many"
            )

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

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> "Gemma3MmConfig":
        """Read `config.json`; errors: ConfigError for missing, unknown or unsupported keys."""
        keys = Keys(config)
        for marker in ("boi_token_index", "eoi_token_index", "boi_token_id", "eoi_token_id"):
            keys.get(marker)  # tokens like any other around an image
        text = Gemma3Config.from_hf(keys.below("text_config").config, "text_config.")
        tied = keys.flag("tie_word_embeddings", None)
        if tied is None and not text.tied_head:
            raise ConfigError(
                "config key 'text_config.tie_word_embeddings' is false and 'tie_word_embeddings' is missing: "
                "readers differ on which of them decides; state both"
            )
        facts = cls(
            # where both are stated the outer one decides: transformers writes the inner one's default beside it
            text=replace(text, tied_head=tied is not False),
            vision=SiglipConfig.from_hf(keys.below("vision_config")),
            tokens_per_image=keys.count("mm_tokens_per_image", 256),
            image_token=keys.count("image_token_index", keys.count("image_token_id", 262_144, 0), 0),
        )
        keys.finish()
        return facts


# how published checkpoints spell our parameter names: (their prefix, ours); files carry the older spelling
CHECKPOINT_NAMES = (
    ("model.", ""),
    ("language_model.model.", "language_model."),
    ("lm_head.", "language_model.lm_head."),
    ("vision_tower.vision_model.", "vision_tower."),
)

# tensors that may be there and no forward pass reads: (our name, why)
IGNORED = (("vision_tower.head.*", "SigLIP's own pooling head; the projector reads the patches"),)

# as the text model; the tower and the projector are replicated
TP_PLAN = {f"language_model.{name}": split for name, split in gemma3.TP_PLAN.items()}


class SiglipAttention(nn.Module):
    """Attention among the patches of one image."""

    def __init__(self, c: SiglipConfig) -> None:
        super().__init__()
        self.head_dim = c.hidden // c.heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(c.hidden, c.hidden) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        """x [I, P, F] -> [I, P, F]"""
        q, k, v = (project(x).unflatten(-1, (-1, self.head_dim)) for project in (self.q_proj, self.k_proj, self.v_proj))
        everyone = x.new_ones(len(x), x.shape[1], x.shape[1], dtype=torch.bool)
        return self.out_proj(attend(q, k, v, everyone, self.head_dim**-0.5).flatten(2))


class SiglipMLP(nn.Module):
    """The two-layer block of equation (3)."""

    def __init__(self, c: SiglipConfig) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(c.hidden, c.intermediate), nn.Linear(c.intermediate, c.hidden)

    def forward(self, x: Tensor) -> Tensor:
        """x [I, P, F] -> [I, P, F]"""
        return self.fc2(gelu(self.fc1(x)))


class SiglipLayer(nn.Module):
    """Equations (2) and (3)."""

    def __init__(self, c: SiglipConfig) -> None:
        super().__init__()
        self.layer_norm1, self.layer_norm2 = nn.LayerNorm(c.hidden, c.eps), nn.LayerNorm(c.hidden, c.eps)
        self.self_attn, self.mlp = SiglipAttention(c), SiglipMLP(c)

    def forward(self, p: Tensor) -> Tensor:
        """p [I, P, F] -> [I, P, F]"""
        s = p + self.self_attn(self.layer_norm1(p))  # (2)
        return s + self.mlp(self.layer_norm2(s))  # (3)


class SiglipTower(nn.Module):
    """Equations (1) to (3) and the norm after them."""

    def __init__(self, c: SiglipConfig) -> None:
        super().__init__()
        patch = nn.Conv2d(c.channels, c.hidden, c.patch_size, stride=c.patch_size)
        position = nn.Embedding(c.side**2, c.hidden)
        self.embeddings = nn.ModuleDict({"patch_embedding": patch, "position_embedding": position})
        self.encoder = nn.ModuleDict({"layers": nn.ModuleList(SiglipLayer(c) for _ in range(c.layers))})
        self.post_layernorm = nn.LayerNorm(c.hidden, c.eps)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """pixel_values [I, C, Y, Y] -> [I, P, F]"""
        patch, position = self.embeddings["patch_embedding"], self.embeddings["position_embedding"]
        p = patch(pixel_values.to(patch.weight.dtype)).flatten(2).transpose(1, 2) + position.weight  # (1)
        for layer in self.encoder["layers"]:
            p = layer(p)
        return self.post_layernorm(p)


class Gemma3Projector(nn.Module):
    """Equation (4) from the tower's last norm on."""

    def __init__(self, c: Gemma3MmConfig) -> None:
        super().__init__()
        self.side, self.square = c.vision.side, c.vision.side // isqrt(c.tokens_per_image)
        self.mm_input_projection_weight = nn.Parameter(torch.zeros(c.vision.hidden, c.hidden))
        self.mm_soft_emb_norm = GemmaRMSNorm(c.vision.hidden, c.vision.eps)

    def forward(self, patches: Tensor) -> Tensor:
        """Patches in reading order to tokens in reading order.

        patches  [I, P, F]
        ->       [I, U, H]  U tokens an image
        """
        grid = patches.transpose(1, 2).unflatten(2, (self.side, self.side))
        squares = F.avg_pool2d(grid, self.square).flatten(2).transpose(1, 2)
        return self.mm_soft_emb_norm(squares) @ self.mm_input_projection_weight


def image_runs(token_type_ids: Tensor) -> Tensor:
    """The number of the run of type 1 that a token stands in, -1 outside of any.

    token_type_ids  [B, T]
    ->              [B, T]
    """
    image = token_type_ids == 1
    starts = image & ~F.pad(image, (1, 0))[:, :-1]
    return (starts.long().cumsum(1) - 1).masked_fill(~image, -1)


class Gemma3MmTarget(Shell):
    """The whole target: the tower, the projector, and the text model of gemma3.py."""

    def __init__(self, c: Gemma3MmConfig) -> None:
        super().__init__()
        self.c = c
        self.vision_tower = SiglipTower(c.vision)
        self.multi_modal_projector = Gemma3Projector(c)
        self.language_model = Gemma3Target(c.text)

    def features(self, pixel_values: Tensor) -> Tensor:
        """Equations (1) to (4).

        pixel_values  [I, C, Y, Y]
        ->            [I, U, H]  U tokens an image
        """
        return self.multi_modal_projector(self.vision_tower(pixel_values))

    def known(self, tokens: Tensor) -> Tensor:
        """The placeholder's id may lie beyond the vocabulary.

        tokens  [B, T]
        ->      [B, T]
        """
        beyond = self.c.image_token >= self.c.vocab
        return tokens.masked_fill(tokens == self.c.image_token, 0) if beyond else tokens

    def sense(
        self, h: Tensor, tokens: Tensor, pixel_values: Tensor | None = None, token_type_ids: Tensor | None = None
    ) -> Sensed:
        """Equation (5), and the runs of (6); errors: ValueError where images and placeholders do not match.

        h               [B, T, H]
        tokens          [B, T]
        pixel_values    [I, C, Y, Y]  in the order of their placeholders, sequence by sequence
        token_type_ids  [B, T]
        """
        placeholder = tokens == self.c.image_token
        if token_type_ids is None and pixel_values is not None:
            token_type_ids = placeholder.long()
        blocks = None if token_type_ids is None else image_runs(token_type_ids)
        if pixel_values is None:
            return Sensed(h, torch.zeros_like(placeholder), blocks)
        features = self.features(pixel_values).flatten(0, 1)
        what = f"images (id {self.c.image_token}, {self.c.tokens_per_image} tokens an image)"
        return Sensed(self.place(h, placeholder, features, what), placeholder, blocks)

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        capture: Sequence[int] = (),
        cache: Cache | None = None,
        slots: Tensor | None = None,
        visible: Tensor | None = None,
        pixel_values: Tensor | None = None,
        token_type_ids: Tensor | None = None,
    ) -> TargetOutput:
        """Predict the token after each of `tokens`; without a cache the tokens see each other alone.

        tokens          [B, T]
        positions       [B, T]        0..T-1 when absent
        slots           [B, T]        the positions when absent; only read with a cache
        visible         [B, T, S]     equation (6) when absent; sliding layers narrow it
        pixel_values    [I, C, Y, Y]  of the images among these tokens
        token_type_ids  [B, T]        1 in an image; with images, the placeholders when absent
        ->              logits [B, T, V], hidden [B, T, H], aux [B, T, A, H]
        """
        ruled = visible is None
        positions, slots, visible = seat(tokens, positions, cache, slots, visible)
        h = self.language_model.embed(self.known(tokens))
        h, _, blocks = self.sense(h, tokens, pixel_values, token_type_ids)  # (5)
        if ruled and blocks is not None:
            # without a cache, slots are the columns themselves
            columns = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens) if cache is None else slots
            held = positions if cache is None else cache.positions
            visible = visible | later_of_block(blocks, columns, positions, held)  # (6)
        return self.language_model.decode(h, positions, capture, cache, slots, visible)
