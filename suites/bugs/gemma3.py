"""Bugs of Gemma 3: norms, ropes, windows, images, names."""

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from harness.planting import Bug

CLAIMS = "suites/correctness/test_witness_gemma3.py"
TEXT = f"{CLAIMS}::test_text_equals_transformers_at_every_capture_point"
TWO_PASSES = f"{CLAIMS}::test_text_in_two_passes_equals_text_in_one"
IMAGES = f"{CLAIMS}::test_images_equal_transformers_at_every_capture_point"
IMAGE_PASSES = f"{CLAIMS}::test_images_in_two_passes_equal_images_in_one"
ROUNDING = f"{CLAIMS}::test_norms_and_the_embedding_round_as_transformers_rounds"
SPELLINGS = f"{CLAIMS}::test_every_spelling_of_a_checkpoint_is_the_same_model"
SIZES = f"{CLAIMS}::test_published_sizes_have_the_parameters_of_transformers"
OLDER = f"{CLAIMS}::test_the_older_spelling_of_a_config_is_the_newer_one"
UNTOLD = f"{CLAIMS}::test_placeholders_are_images_without_being_told"
PIXELS = "suites/correctness/test_pixels.py::test_pictures_are_prepared_as_by_transformers"

PAGE, SHELL = "reference.targets.gemma3", "reference.targets.gemma3_mm"


def built(change: Callable[[Any, Any], None]) -> Callable[[Any], Any]:
    """A layer that is changed once it is built."""

    def plant(build: Any) -> Any:
        def init(self: Any, c: Any, index: int) -> None:
            build(self, c, index)
            change(self.self_attn, c)

        return init

    return plant


def norm(scale: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Any], Any]:
    """The norm with another last step: (normed in float32, weight) -> result."""

    def forward(self: Any, x: Tensor) -> Tensor:
        wide = x if x.dtype == torch.float64 else x.float()
        return scale(wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps), self.weight).to(x.dtype)

    return lambda right: forward


def layer_without(post: str) -> Callable[[Any], Any]:
    """A layer that norms the sum instead of what is added: as if post-norms were those of BERT."""

    def forward(self: Any, h: Tensor, *place: Any) -> Tensor:
        added = self.self_attn(self.input_layernorm(h), *place)
        early = post == "post_attention_layernorm"
        s = self.post_attention_layernorm(h + added) if early else h + self.post_attention_layernorm(added)
        more = self.mlp(self.pre_feedforward_layernorm(s))
        return s + self.post_feedforward_layernorm(more) if early else self.post_feedforward_layernorm(s + more)

    return lambda right: forward


def without_residual(captured: Any) -> Any:
    """What each layer adds, in place of what has run up to it."""

    def deltas(stream: Any, points: Any) -> Tensor:
        return captured([stream[0], *(b - a for a, b in pairwise(stream))], points)

    return deltas


def unwindowed_images(narrow: Any) -> Any:
    """Tokens that see ahead are taken to see everything behind, too."""

    def wide(visible: Tensor, positions: Tensor, held: Tensor, window: int | None) -> Tensor:
        ahead = (visible & (held[:, None, :] > positions[:, :, None])).any(-1, keepdim=True)
        return torch.where(ahead, visible, narrow(visible, positions, held, window))

    return wide


def by_column(project: Any) -> Any:
    """Patches read column by column."""

    def forward(self: Any, patches: Tensor) -> Tensor:
        grid = patches.unflatten(1, (self.side, self.side)).transpose(1, 2).flatten(1, 2)
        return project(self, grid)

    return forward


def pattern_from_zero(read: Any) -> Any:
    """The first layer of every pattern full in place of the last."""

    def windows(keys: Any, layers: int) -> tuple[int | None, ...]:
        right = read(keys, layers)
        return right if keys.get("layer_types") else (right[-1], *right[:-1])

    return windows


def prepared(**change: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Facts of a processor read wrongly."""

    def plant(read: Any) -> Any:
        def from_hf(cls: Any, config: Any) -> Any:
            right = read(cls, config)
            return replace(right, **{name: wrong(right) for name, wrong in change.items()})

        return from_hf

    return plant


def untold_is_text(forward: Any) -> Any:
    """Without types every token is text."""

    def told(self: Any, tokens: Tensor, *place: Any, token_type_ids: Tensor | None = None, **inputs: Any) -> Any:
        types = torch.zeros_like(tokens) if token_type_ids is None else token_type_ids
        return forward(self, tokens, *place, token_type_ids=types, **inputs)

    return told


BUGS = (
    Bug(
        "gemma3-one-rope",
        "ports with one rope for both kinds of layers: the global one used on sliding layers",
        f"{PAGE}.Gemma3Layer.__init__",
        built(lambda attention, c: setattr(attention, "rope", c.rope)),
        TEXT,
    ),
    Bug(
        "gemma3-linear-factor-ignored",
        "SGLang gemma3_causal.py on a CPU: the linear factor of the global layers ignored",
        f"{PAGE}._ropes",
        lambda read: lambda *args: (replace(read(*args)[0], kind="default"), read(*args)[1]),
        TEXT,
    ),
    Bug(
        "gemma3-scale-from-head-dim",
        "head_dim^-1/2 in place of query_pre_attn_scalar^-1/2; equal in every size but 27B",
        f"{PAGE}.Gemma3Layer.__init__",
        built(lambda attention, c: setattr(attention, "scale", c.head_dim**-0.5)),
        TEXT,
    ),
    Bug(
        "gemma3-window-one-longer",
        "a window counted without the token itself",
        f"{PAGE}.narrow",
        lambda narrow: lambda v, p, held, w: narrow(v, p, held, w and w + 1),
        TEXT,
    ),
    Bug(
        "gemma3-window-by-column",
        "a window that counts columns of the call instead of positions",
        f"{PAGE}.narrow",
        lambda narrow: lambda v, p, held, w: narrow(v, p - p[:, :1], held, w),
        TWO_PASSES,
    ),
    Bug(
        "gemma3-norm-times-w",
        "a norm of Llama used for Gemma: 1 + w read as w",
        "reference.ops.norm.GemmaRMSNorm.forward",
        norm(lambda x, w: x * w),
        TEXT,
    ),
    Bug(
        "gemma3-norm-cast-before-weight",
        "transformers #29402: x cast before 1 + w is multiplied in",
        "reference.ops.norm.GemmaRMSNorm.forward",
        norm(lambda x, w: x.to(w.dtype) * (1 + w)),
        ROUNDING,
    ),
    Bug(
        "gemma3-post-attention-norm-after-add",
        "norms behind a block put behind the sum",
        f"{PAGE}.Gemma3Layer.forward",
        layer_without("post_attention_layernorm"),
        TEXT,
    ),
    Bug(
        "gemma3-post-feedforward-norm-after-add",
        "norms behind a block put behind the sum",
        f"{PAGE}.Gemma3Layer.forward",
        layer_without("post_feedforward_layernorm"),
        TEXT,
    ),
    Bug(
        "gemma3-embedding-unscaled",
        "a draft's reading of the shared table used for the target",
        f"{PAGE}.Gemma3Target.embed",
        lambda embed: lambda self, tokens: self.embed_tokens(tokens),
        TEXT,
    ),
    Bug(
        "gemma3-embedding-scale-unrounded",
        "transformers #29402: sqrt(H) kept wider than the weight",
        f"{PAGE}.Gemma3Target.embed",
        lambda embed: lambda self, t: (self.embed_tokens(t).float() * self.c.hidden**0.5).to(self.norm.weight.dtype),
        ROUNDING,
    ),
    Bug(
        "gemma3-capture-without-residual",
        "SGLang #39286",
        f"{PAGE}.captured",
        without_residual,
        TEXT,
    ),
    Bug(
        "gemma3-capture-one-late",
        "SGLang #25454",
        f"{PAGE}.captured",
        lambda captured: lambda stream, points: captured([*stream[1:], stream[-1]], points),
        TEXT,
    ),
    Bug(
        "gemma3-exact-gelu",
        "gelu in its exact form",
        f"{PAGE}.gelu",
        lambda gelu: F.gelu,
        TEXT,
    ),
    Bug(
        "gemma3-pattern-from-zero",
        "every P-th layer full, counted from layer 0",
        f"{PAGE}._windows",
        pattern_from_zero,
        OLDER,
    ),
    Bug(
        "gemma3-images-causal",
        "vLLM and SGLang text-only masks: image attention left causal",
        f"{SHELL}.later_of_block",
        lambda ahead: lambda *args: torch.zeros_like(ahead(*args)),
        IMAGES,
    ),
    Bug(
        "gemma3-images-one-run",
        "all images of a prompt taken for one: a token sees images still to come",
        f"{SHELL}.image_runs",
        lambda runs: lambda ids: (ids == 1).long() - 1,
        IMAGES,
    ),
    Bug(
        "gemma3-images-beyond-the-window",
        "transformers before create_masks_for_vision_model: an image sees all of itself on sliding layers",
        f"{PAGE}.narrow",
        unwindowed_images,
        IMAGES,
    ),
    Bug(
        "gemma3-images-scaled",
        "features multiplied by sqrt(H) like embeddings",
        f"{SHELL}.Gemma3MmTarget.features",
        lambda features: lambda self, pixels: features(self, pixels) * self.c.hidden**0.5,
        IMAGES,
    ),
    Bug(
        "gemma3-image-runs-by-slot-of-the-call",
        "a mask of images laid over the first columns of the cache",
        f"{SHELL}.later_of_block",
        lambda ahead: lambda runs, slots, *places: ahead(runs, slots - slots[:, :1], *places),
        IMAGE_PASSES,
    ),
    Bug(
        "gemma3-patches-by-column",
        "rows and columns of patches swapped on the way to the projector",
        f"{SHELL}.Gemma3Projector.forward",
        by_column,
        IMAGES,
    ),
    Bug(
        "gemma3-tower-exact-gelu",
        "gelu in its exact form",
        f"{SHELL}.gelu",
        lambda gelu: F.gelu,
        IMAGES,
    ),
    Bug(
        "gemma3-images-only-when-told",
        "token_type_ids absent: images read as text",
        f"{SHELL}.Gemma3MmTarget.forward",
        untold_is_text,
        UNTOLD,
    ),
    Bug(
        "gemma3-hub-tower-unknown",
        "the tower's name on the hub has one word more than in transformers' memory",
        f"{SHELL}.CHECKPOINT_NAMES",
        lambda names: names[:-1],
        SPELLINGS,
    ),
    Bug(
        "gemma3-head-of-siglip-refused",
        "a strict reader without a list of what may be there",
        f"{SHELL}.IGNORED",
        lambda names: (),
        IMAGES,
    ),
    Bug(
        "gemma3-heads-as-llama",
        "a key that the file leaves out taken as Llama would take it",
        f"{PAGE}.LEFT_OUT['num_key_value_heads']",
        lambda heads: 8,
        SIZES,
    ),
    Bug(
        "pixels-sides-swapped",
        "pillow counts width first, configs height first",
        "suites.pixels.PixelConfig.from_hf",
        prepared(height=lambda c: c.width, width=lambda c: c.height),
        PIXELS,
    ),
    Bug(
        "pixels-mean-unscaled",
        "the mean of bytes taken from numbers in 0..1",
        "suites.pixels.PixelConfig.from_hf",
        prepared(mean=lambda c: tuple(m * c.scale for m in c.mean)),
        PIXELS,
    ),
)
