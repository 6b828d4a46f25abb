"""Bugs of Gemma 4 Unified: patches, places, sound, who sees whom, what is read from a checkpoint."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from harness.planting import Bug

CLAIMS = "suites/correctness/test_witness_gemma4_unified.py"
SENSES = f"{CLAIMS}::test_every_sense_equals_transformers_at_every_capture_point"
TWO_PASSES = f"{CLAIMS}::test_two_passes_with_a_cache_equal_one"
DIALECT = f"{CLAIMS}::test_video_is_causal_in_the_dialect_that_has_it_so"
UNTOLD = f"{CLAIMS}::test_placeholders_tell_without_types"
ABSENT = f"{CLAIMS}::test_placeholders_without_features_are_padding"
SIZES = f"{CLAIMS}::test_published_sizes_have_the_parameters_of_transformers"
SPELLINGS = f"{CLAIMS}::test_both_spellings_of_a_checkpoint_are_the_same_model"
END_OF_AUDIO = f"{CLAIMS}::test_both_spellings_of_the_end_of_audio_are_read"
INPUTS = f"{CLAIMS}::test_inputs_that_do_not_fit_the_tokens_are_refused"
PATCHES = "suites/correctness/test_patches.py::test_patches_are_cut_as_by_transformers"
SOUND = "suites/correctness/test_patches.py::test_sound_is_cut_as_by_transformers"

PAGE, TARGET = "reference.targets.gemma4_unified", "reference.targets.gemma4_unified.Gemma4UnifiedTarget"


def embedder(change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> Callable[[Any], Any]:
    """The patch embedder with other pixels and places."""
    return lambda forward: lambda self, pixels, places: forward(self, *change(pixels, places))


def without_first_norm(forward: Any) -> Any:
    """The patch as it is, straight into the matrix."""

    def plain(self: Any, pixels: Tensor, places: Tensor) -> Tensor:
        real = (places != -1).any(-1)
        x, (column, row) = pixels[real].to(self.patch_dense.weight.dtype), places[real].unbind(-1)
        p = self.patch_ln2(self.patch_dense(x))
        return self.pos_norm(p + (self.pos_embedding[column, 0] + self.pos_embedding[row, 1]))

    return plain


def places_after_the_norm(forward: Any) -> Any:
    """Positions added to what is normed, not before."""

    def late(self: Any, pixels: Tensor, places: Tensor) -> Tensor:
        real = (places != -1).any(-1)
        x, (column, row) = pixels[real].to(self.patch_dense.weight.dtype), places[real].unbind(-1)
        p = self.pos_norm(self.patch_ln2(self.patch_dense(self.patch_ln1(x))))
        return p + (self.pos_embedding[column, 0] + self.pos_embedding[row, 1])

    return late


def suppressing(forward: Any) -> Any:
    """An engine that puts what must not be emitted into the logits of every pass."""

    def masked(self: Any, *args: Any, **inputs: Any) -> Any:
        out = forward(self, *args, **inputs)
        marks = torch.tensor(self.c.suppressed)
        return out._replace(logits=out.logits.index_fill(-1, marks, torch.finfo(out.logits.dtype).min))

    return masked


def untold_is_text(forward: Any) -> Any:
    """Without types every token is text."""

    def told(self: Any, tokens: Tensor, *place: Any, mm_token_type_ids: Tensor | None = None, **inputs: Any) -> Any:
        types = torch.zeros_like(tokens) if mm_token_type_ids is None else mm_token_type_ids
        return forward(self, tokens, *place, mm_token_type_ids=types, **inputs)

    return told


def padding_of_llama(read: Any) -> Any:
    """Placeholders without features read as id 0."""
    return lambda cls, config: replace(read(cls, config), padding_token=0)


def channels_first(cut: Any) -> Any:
    """Each patch as three pictures, one a colour."""

    def planes(picture: Any, c: Any) -> Any:
        x, places = cut(picture, c)
        return x.reshape(len(x), -1, 3).swapaxes(1, 2).reshape(len(x), -1), places

    return planes


def squeezed(grid: Any) -> Any:
    """The same grid for every picture, whatever its shape."""

    def square(height: int, width: int, c: Any) -> tuple[int, int]:
        return grid(1000, 1000, c)

    return square


def side_by_side(cut: Any) -> Any:
    """Small patches of a square one after the other, not merged into its rows."""

    def apart(picture: Any, c: Any) -> Any:
        x, places = cut(picture, c)
        half = c.side // 2
        squares = x.reshape(len(x), 2, half, 2, half, 3)
        return squares.swapaxes(2, 3).reshape(len(x), -1), places

    return apart


BUGS = (
    Bug(
        "unified-rows-for-columns",
        "positions are (column, row); most code says (row, column)",
        f"{PAGE}.PatchEmbedder.forward",
        embedder(lambda pixels, places: (pixels, places.flip(-1))),
        SENSES,
    ),
    Bug(
        "unified-filling-embedded",
        "positions clamped to 0 for the filling, which is then kept",
        f"{PAGE}.PatchEmbedder.forward",
        embedder(lambda pixels, places: (pixels, places.clamp(min=0))),
        SENSES,
    ),
    Bug(
        "unified-corner-dropped",
        "filling told from patches by a position of 0, which is the upper left corner",
        f"{PAGE}.PatchEmbedder.forward",
        embedder(lambda pixels, places: (pixels, places.masked_fill((places == 0).all(-1, keepdim=True), -1))),
        SENSES,
    ),
    Bug(
        "unified-patch-norm-missing",
        "one of three norms of the patch embedder left out",
        f"{PAGE}.PatchEmbedder.forward",
        without_first_norm,
        SENSES,
    ),
    Bug(
        "unified-places-after-norm",
        "positions added behind the last norm, as vision towers do",
        f"{PAGE}.PatchEmbedder.forward",
        places_after_the_norm,
        SENSES,
    ),
    Bug(
        "unified-projection-without-norm",
        "the norm without a weight has no tensor, so loading does not miss it",
        f"{PAGE}.Projection.forward",
        lambda forward: lambda self, x: self.embedding_projection(x.to(self.embedding_projection.weight.dtype)),
        SENSES,
    ),
    Bug(
        "unified-features-scaled",
        "features multiplied by sqrt(H) like embeddings",
        f"{TARGET}.place",
        lambda place: lambda self, h, holes, f, what: place(self, h, holes, f * self.c.hidden**0.5, what),
        SENSES,
    ),
    Bug(
        "unified-sound-mask-inverted",
        "Gemma 4's tower marks filling with true, Unified marks sound",
        f"{TARGET}.hear",
        lambda hear: lambda self, stretches, mask: hear(self, stretches, ~mask),
        SENSES,
    ),
    Bug(
        "unified-sound-filling-kept",
        "a mask of sound that nobody reads",
        f"{TARGET}.hear",
        lambda hear: lambda self, stretches, mask: hear(self, stretches, torch.ones_like(mask)),
        SENSES,
    ),
    Bug(
        "unified-images-causal",
        "engines whose attention has no mask: a warning, and causal images",
        f"{TARGET}.blocks",
        lambda blocks: lambda self, types: torch.full_like(types, -1),
        SENSES,
    ),
    Bug(
        "unified-sound-sees-ahead",
        "every token that is no text taken for an image",
        f"{TARGET}.blocks",
        lambda blocks: lambda self, types: blocks(self, types.clamp(max=1)),
        SENSES,
    ),
    Bug(
        "unified-video-causal",
        "SGLang gemma4_mm.py: spans of images alone",
        f"{TARGET}.blocks",
        lambda blocks: lambda self, types: blocks(self, types.masked_fill(types == 2, 0)),
        SENSES,
    ),
    Bug(
        "unified-video-dialect-unread",
        "a fact of the config that no code asks for",
        f"{TARGET}.blocks",
        lambda blocks: lambda self, types: blocks(self, types.clamp(max=2).masked_fill(types == 2, 1)),
        DIALECT,
    ),
    Bug(
        "unified-one-run",
        "all images of a prompt taken for one: a token sees images still to come",
        f"{PAGE}.runs",
        lambda runs: lambda inside: inside.long() - 1,
        SENSES,
    ),
    Bug(
        "unified-images-on-full-layers",
        "transformers' plain forward pass: images look ahead on full layers, too",
        "reference.targets.gemma4.Gemma4Target.sight",
        lambda sight: lambda self, kind, *place: sight(self, replace(kind, sees_image=True), *place),
        SENSES,
    ),
    Bug(
        "unified-suppressed-logits",
        "SGLang gemma4_unified.py: marks suppressed in the forward pass, which a draft's claims then compare",
        f"{TARGET}.forward",
        suppressing,
        SENSES,
    ),
    Bug(
        "unified-nothing-suppressed",
        "marks of the config that no decoding loop is told about",
        f"{PAGE}.Gemma4UnifiedConfig.suppressed",
        lambda suppressed: property(lambda self: ()),
        SIZES,
    ),
    Bug(
        "unified-untold-is-text",
        "mm_token_type_ids absent: images read as text",
        f"{TARGET}.forward",
        untold_is_text,
        UNTOLD,
    ),
    Bug(
        "unified-embedder-in-memory-unknown",
        "the embedder's names on disk are not those of transformers' memory",
        f"{PAGE}.CHECKPOINT_NAMES",
        lambda names: names[-2:],
        SPELLINGS,
    ),
    Bug(
        "unified-end-of-audio-one-spelling",
        "eoa_token_index in transformers' files, eoa_token_id in engines'",
        f"{PAGE}._end_of_audio",
        lambda read: lambda keys: (keys.get("eoa_token_id"), keys.count("eoa_token_index", 258_883, 0))[1],
        END_OF_AUDIO,
    ),
    Bug(
        "unified-half-filling-kept",
        "one -1 of two: transformers drops the patch, SGLang keeps it",
        f"{PAGE}.PatchEmbedder._check",
        lambda check: lambda self, places: None,
        INPUTS,
    ),
    Bug(
        "unified-placeholders-as-id-0",
        "a placeholder without features embedded as the table's first row, not as padding",
        f"{PAGE}.Gemma4UnifiedConfig.from_hf",
        padding_of_llama,
        ABSENT,
    ),
    Bug(
        "unified-runs-by-slot-of-the-call",
        "a mask of images laid over the first columns of the cache",
        "reference.targets.gemma4.later_of_block",
        lambda ahead: lambda blocks, slots, *place: ahead(blocks, slots - slots[:, :1], *place),
        TWO_PASSES,
    ),
    Bug(
        "patches-channels-first",
        "pixels of a patch ordered as convolutions have them",
        "suites.patches.patches",
        channels_first,
        PATCHES,
    ),
    Bug(
        "patches-side-by-side",
        "small patches of a square one after the other",
        "suites.patches.patches",
        side_by_side,
        PATCHES,
    ),
    Bug(
        "patches-squeezed",
        "pictures resized to one shape, as Gemma 3 does",
        "suites.patches.grid",
        squeezed,
        PATCHES,
    ),
    Bug(
        "sound-end-lost",
        "a waveform cut to whole stretches in place of filled up",
        "suites.patches.stretches",
        lambda cut: lambda waveform, c: cut(waveform[: max(len(waveform) // c.samples, 1) * c.samples], c),
        SOUND,
    ),
)
