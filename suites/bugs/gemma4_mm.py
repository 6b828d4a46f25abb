"""Bugs of Gemma 4's towers, and of how their features stand among tokens."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from harness.planting import Bug

CLAIMS = "suites/correctness/test_witness_gemma4_mm.py"
EQUAL = f"{CLAIMS}::test_every_capture_point_equals_transformers"
TWO_PASSES = f"{CLAIMS}::test_two_passes_equal_one"
UNTOLD = f"{CLAIMS}::test_placeholders_tell_what_types_would"
ORDER = f"{CLAIMS}::test_the_order_of_patches_is_of_no_account"

SHELL, VISION, AUDIO = (f"reference.targets.gemma4_{name}" for name in ("mm", "vision", "audio"))
TEXT = "reference.targets.gemma4.Gemma4Target"


def pooled_in_order(pool: Any) -> Any:
    """Squares made of patches that follow each other in the batch, wherever they stand."""

    def by_order(self: Any, p: Tensor, places: Tensor) -> Tensor:
        side = self.c.square
        square = torch.arange(len(p)) // side**2
        across = int(places[:, 0].max() + 1) // side
        return pool(self, p, side * torch.stack([square % across, square // across], -1))

    return by_order


def unscaled(pool: Any) -> Any:
    """A mean that is not multiplied by sqrt(F) before it is standardized."""

    def plain(self: Any, p: Tensor, places: Tensor) -> Tensor:
        return pool(self, p / self.c.hidden**0.5, places)

    return plain


def with_filling(hear: Any) -> Any:
    """Sounds heard with their filling, whose tokens are dropped afterwards."""

    def forward(self: Any, sounds: Tensor, mask: Tensor) -> Tensor:
        lengths = [-(-length // 4) for length in mask.sum(1).tolist()]
        return torch.cat([self.hear(sound)[:length] for sound, length in zip(sounds, lengths, strict=True)])

    return forward


def centred_conv(right: Any) -> Any:
    """A convolution that reads as many frames ahead as behind."""

    def forward(self: Any, b: Tensor) -> Tensor:
        x = F.glu(self.linear_start(self.pre_layer_norm(b)), -1).T
        ahead = (self.kernel - 1) // 2
        x = self.depthwise_conv1d(F.pad(x, (self.kernel - 1 - ahead, ahead))).T
        return self.linear_end(F.silu(self.conv_norm(x.clamp(-self.limit, self.limit)))) + b

    return forward


def channels_first(right: Any) -> Any:
    """Rows of a spectrum and channels flattened in the other order."""

    def forward(self: Any, sound: Tensor) -> Tensor:
        x = self.layer1(self.layer0(sound[None].to(self.input_proj_linear.weight.dtype)))
        return self.input_proj_linear(x.movedim(1, 0).flatten(1))

    return forward


def built(change: Callable[[Any, Any], None]) -> Callable[[Any], Any]:
    """A part that is changed once it is built."""

    def plant(build: Any) -> Any:
        def init(self: Any, c: Any) -> None:
            build(self, c)
            change(self, c)

        return init

    return plant


def typed(change: Callable[[Tensor], Tensor | None]) -> Callable[[Any], Any]:
    """The whole target with other types than it is told."""

    def plant(forward: Any) -> Any:
        def told(self: Any, *args: Any, mm_token_type_ids: Tensor | None = None, **inputs: Any) -> Any:
            types = None if mm_token_type_ids is None else change(mm_token_type_ids)
            return forward(self, *args, mm_token_type_ids=types, **inputs)

        return told

    return plant


def untold_is_text(forward: Any) -> Any:
    """Without types every token is text."""

    def told(self: Any, tokens: Tensor, *args: Any, mm_token_type_ids: Tensor | None = None, **inputs: Any) -> Any:
        types = torch.zeros_like(tokens) if mm_token_type_ids is None else mm_token_type_ids
        return forward(self, tokens, *args, mm_token_type_ids=types, **inputs)

    return told


def on_every_layer(sight: Any) -> Any:
    """Images look ahead on full layers, too."""

    def everywhere(self: Any, kind: Any, *place: Any) -> Tensor:
        return sight(self, replace(kind, sees_image=self.c.sliding.sees_image), *place)

    return everywhere


def config_eps(layer: Any, c: Any) -> None:
    """Every norm of the conformer with the eps of the config."""
    for norm in (layer.norm_pre_attn, layer.norm_post_attn, layer.norm_out):
        norm.eps = c.eps


BUGS = (
    Bug(
        "gemma4-tower-axes-swapped",
        "rows before columns in the rope of the tower",
        f"{VISION}.Gemma4VisionAttention.turn",
        lambda turn: lambda self, x, places: turn(self, x, places.flip(-1)),
        EQUAL,
    ),
    Bug(
        "gemma4-tower-filling-seen",
        "a batch of images of several sizes without a mask",
        f"{VISION}.attend",
        lambda attend: lambda q, k, v, visible, scale: attend(q, k, v, torch.ones_like(visible), scale),
        EQUAL,
    ),
    Bug(
        "gemma4-tower-scores-scaled",
        "head_dim^-1/2 on scores that have none",
        f"{VISION}.attend",
        lambda attend: lambda q, k, v, visible, scale: attend(q, k, v, visible, q.shape[-1] ** -0.5),
        EQUAL,
    ),
    Bug(
        "gemma4-tower-pooled-in-order",
        "patches pooled as they come in place of where they stand",
        f"{VISION}.Gemma4VisionTower.pool",
        pooled_in_order,
        ORDER,
    ),
    Bug(
        "gemma4-tower-unscaled",
        "sqrt(F) left out: the norm behind it hides that unless features are standardized",
        f"{VISION}.Gemma4VisionTower.pool",
        unscaled,
        EQUAL,
    ),
    Bug(
        "gemma4-pixels-not-centred",
        "pixels from 0 to 1 taken for pixels from -1 to 1",
        f"{VISION}.Gemma4PatchEmbedder.forward",
        lambda embed: lambda self, pixels, places: embed(self, pixels / 2 + 0.5, places),
        EQUAL,
    ),
    Bug(
        "gemma4-clamps-dropped",
        "readers without use_clipped_linears: the bounds are loaded and not used",
        "reference.ops.clipped.ClippedLinear.forward",
        lambda forward: lambda self, x: self.linear(x),
        EQUAL,
    ),
    Bug(
        "gemma4-features-scaled",
        "features multiplied by sqrt(H) like embeddings",
        f"{SHELL}.Gemma4MmTarget.see",
        lambda see: lambda self, *given: see(self, *given) * self.c.hidden**0.5,
        EQUAL,
    ),
    Bug(
        "gemma4-padding-taken-for-zero",
        "inputs of the layers for id 0 in the places of features, whatever the padding is",
        f"{TEXT}.per_layer_inputs",
        lambda inputs: lambda self, h, tokens: inputs(self, h, tokens.masked_fill(tokens == 7, 0)),
        EQUAL,
    ),
    Bug(
        "gemma4-mm-images-causal",
        "text-only masks under a config that says 'vision'",
        f"{SHELL}.runs",
        lambda runs: lambda inside: torch.full_like(runs(inside), -1),
        EQUAL,
    ),
    Bug(
        "gemma4-videos-causal",
        "SGLang gemma4_mm.py: video left causal where the config does not leave it so",
        f"{SHELL}.Gemma4MmTarget.forward",
        typed(lambda types: types.masked_fill(types == 2, 0)),
        EQUAL,
    ),
    Bug(
        "gemma4-sounds-see-ahead",
        "every type but text taken for an image",
        f"{SHELL}.Gemma4MmTarget.forward",
        typed(lambda types: types.masked_fill(types == 3, 1)),
        EQUAL,
    ),
    Bug(
        "gemma4-images-ahead-on-full-layers",
        "Gemma 3's mask on every layer; a bare forward pass of the unified model",
        f"{TEXT}.sight",
        on_every_layer,
        EQUAL,
    ),
    Bug(
        "gemma4-images-only-when-told",
        "mm_token_type_ids absent: images read as text",
        f"{SHELL}.Gemma4MmTarget.forward",
        untold_is_text,
        UNTOLD,
    ),
    Bug(
        "gemma4-images-by-column-of-the-call",
        "blocks of images laid over the first columns of the cache",
        "reference.targets.gemma4.later_of_block",
        lambda ahead: lambda blocks, slots, *places: ahead(blocks, slots - slots[:, :1], *places),
        TWO_PASSES,
    ),
    Bug(
        "gemma4-sounds-with-filling",
        "SGLang and transformers tell filling by opposite masks; read wrongly, or not at all, sounds run into it",
        f"{AUDIO}.Gemma4AudioTower.forward",
        with_filling,
        EQUAL,
    ),
    Bug(
        "gemma4-distance-off-by-one",
        "the relative shift of Transformer-XL one column short",
        f"{AUDIO}.Gemma4AudioAttention.near",
        lambda near: lambda self, q, distance: near(self, q, distance - 1),
        EQUAL,
    ),
    Bug(
        "gemma4-waves-interleaved",
        "sines and cosines in turns",
        f"{AUDIO}.waves",
        lambda waves: lambda *given: waves(*given).unflatten(1, (2, -1)).transpose(1, 2).flatten(1),
        EQUAL,
    ),
    Bug(
        "gemma4-conformer-sees-ahead",
        "the convolution of a conformer centred, as it mostly is",
        f"{AUDIO}.Gemma4LightConv.forward",
        centred_conv,
        EQUAL,
    ),
    Bug(
        "gemma4-conformer-whole-residual",
        "both feed-forward blocks added in full",
        f"{AUDIO}.Gemma4AudioFeedForward.__init__",
        built(lambda block, c: setattr(block, "residual", 1.0)),
        EQUAL,
    ),
    Bug(
        "gemma4-conformer-eps-of-the-config",
        "rms_norm_eps used where transformers keeps its own 1e-6",
        f"{AUDIO}.Gemma4AudioLayer.__init__",
        built(config_eps),
        EQUAL,
    ),
    Bug(
        "gemma4-conformer-unbounded",
        "gradient_clipping taken for a matter of training",
        f"{AUDIO}.bounded",
        lambda bounded: lambda x, limit: x,
        EQUAL,
    ),
    Bug(
        "gemma4-spectrum-channels-first",
        "channels and pitch flattened in the other order",
        f"{AUDIO}.Gemma4Subsample.forward",
        channels_first,
        EQUAL,
    ),
    Bug(
        "gemma4-towers-names-unknown",
        "a loader that knows the names of the text model alone: the shell's have one word more in front",
        f"{SHELL}.CHECKPOINT_NAMES",
        lambda names: names[1:],
        EQUAL,
    ),
)
