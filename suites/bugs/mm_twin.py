"""Bugs of twins that see and hear: where features stand, who sees them, and what a draft reads of them."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from harness.planting import Bug

CLAIMS = "suites/correctness/test_twin_mm.py"
REFERENCE = f"{CLAIMS}::test_the_target_is_the_reference"
PASSES = f"{CLAIMS}::test_in_two_passes_the_target_is_the_reference_in_one[gemma3_mm]"
MANY = f"{CLAIMS}::test_two_ranks_compute_what_one_computes[gemma3_mm]"
SAYS = f"{CLAIMS}::test_the_twin_says_what_the_reference_says_after_a_prompt_with_images"
READS = f"{CLAIMS}::test_a_draft_reads_an_image_as_its_target_saw_it"
ROOT = f"{CLAIMS}::test_a_draft_reads_the_token_after_the_prompt_from_the_table"
KERNELS = f"{CLAIMS}::test_with_an_image_the_kernels_compute_what_aten_computes[gemma3_mm]"

SHELL, ATEN = "optimized.shell", "optimized.ops.aten.Aten"


def sensed(change: Callable[[Any, Any], Any]) -> Callable[[Any], Any]:
    """A prompt whose features are changed once they stand among its tokens: (shell, media) -> media."""
    return lambda sense: lambda self, *given, **inputs: change(self, sense(self, *given, **inputs))


def scaled(shell: Any, media: Any) -> Any:
    """Features times sqrt(H)."""
    embeds = media.embeds * torch.where(media.holes, shell.c.hidden**0.5, 1.0)[..., None].to(media.embeds.dtype)
    return media._replace(embeds=embeds)


def first_rank_sees(shell: Any, media: Any) -> Any:
    """Ranks after the first read placeholders where the first reads features."""
    blind = media.embeds.masked_fill(media.holes[..., None], 0)
    return media._replace(embeds=blind) if shell.at.group.rank else media


def window_from_the_end(attend: Any) -> Any:
    """What a token sees ahead taken for where it stands."""

    def call(self: Any, q: Tensor, k: Tensor, v: Tensor, positions: Tensor, scale: float, *sight: Any) -> Tensor:
        window, num_slots, ends = (*sight, None, None, None)[:3]
        return attend(self, q, k, v, positions if ends is None else ends, scale, window, num_slots)

    return call


def padding_taken_for_zero(known: Any) -> Any:
    """Tables asked for id 0 in the places of features, whatever the padding is."""

    def call(self: Any, tokens: Tensor) -> Tensor:
        ids = known(self, tokens)
        return ids.masked_fill(ids != tokens, 0)

    return call


def on_every_layer(build: Any) -> Any:
    """Images look ahead on full layers, too."""

    def init(self: Any, c: Any, *rest: Any) -> None:
        build(self, c, *rest)
        self.kind = replace(self.kind, sees_image=c.sliding.sees_image)

    return init


def root_of_the_last_row(start: Any) -> Any:
    """The token after a prompt read anew for the last prompt of the batch alone."""

    def call(self: Any, *given: Any, embeds: Tensor | None = None) -> Any:
        for row, column in enumerate(given[-1][:-1].tolist() if embeds is not None else ()):
            embeds[row, column] = embeds[row + 1, 0]
        return start(self, *given, embeds)

    return call


BUGS = (
    Bug(
        "mm twin: images causal",
        "attention backends that take no mask of images and say nothing",
        f"{SHELL}.ends_of",
        lambda ends: lambda blocks, positions: positions,
        f"{REFERENCE}[gemma3_mm]",
    ),
    Bug(
        "mm twin: last token of an image unseen",
        "the end of an image counted as the first token behind it, then excluded",
        f"{SHELL}.ends_of",
        lambda ends: lambda blocks, positions: torch.maximum(ends(blocks, positions) - 1, positions),
        f"{REFERENCE}[gemma4_unified]",
    ),
    Bug(
        "mm twin: images one run",
        "all images of a prompt taken for one",
        f"{SHELL}.ends_of",
        lambda ends: lambda blocks, positions: ends(blocks.clamp(max=0), positions),
        f"{REFERENCE}[gemma4_mm]",
    ),
    Bug(
        "mm twin: ends of images by column of the call",
        "a mask of images laid over the first slots of the cache",
        f"{SHELL}.ends_of",
        lambda ends: lambda blocks, positions: torch.maximum(ends(blocks, positions - positions[:, :1]), positions),
        PASSES,
    ),
    Bug(
        "mm twin: window counted from the end of an image",
        "a query's reach ahead taken for its position",
        f"{ATEN}.attend",
        window_from_the_end,
        f"{REFERENCE}[gemma3_mm]",
    ),
    Bug(
        "mm twin: kernels see no image",
        "a kernel without the argument that the other form has",
        "optimized.ops.launch.Triton.attend",
        lambda attend: lambda self, *given: attend(self, *given[:7]),
        KERNELS,
    ),
    Bug(
        "mm twin: images ahead on full layers",
        "Gemma 3's mask on every layer of Gemma 4",
        "optimized.targets.gemma4.Gemma4Attention.__init__",
        on_every_layer,
        f"{REFERENCE}[gemma4_mm]",
    ),
    Bug(
        "mm twin: features scaled",
        "features multiplied by sqrt(H) like embeddings",
        f"{SHELL}.Shell.sense",
        sensed(scaled),
        f"{REFERENCE}[gemma3_mm]",
    ),
    Bug(
        "mm twin: padding taken for zero",
        "inputs of the layers for id 0 in the places of features",
        "optimized.targets.gemma4_shell.Gemma4Shell.known",
        padding_taken_for_zero,
        f"{REFERENCE}[gemma4_mm]",
    ),
    Bug(
        "mm twin: the first rank alone sees",
        "features made on one rank and not handed to the others",
        f"{SHELL}.Shell.sense",
        sensed(first_rank_sees),
        MANY,
    ),
    Bug(
        "mm twin: a chunk ends inside an image",
        "chunked prefill that knows no images: split spans stay causal",
        f"{SHELL}.Media.cuts",
        lambda cuts: lambda self, positions: iter(range(1, positions.shape[1] + 1)),
        f"{SAYS}[gemma3_mm]",
    ),
    Bug(
        "mm twin: features of the first chunk in every chunk",
        "embeddings of a prompt read by column of the chunk",
        f"{SHELL}.Media.columns",
        lambda columns: lambda self, begin, end: columns(self, 0, end - begin),
        f"{SAYS}[kimi_k25]",
    ),
    Bug(
        "mm twin: a draft reads images one place late",
        "the embeddings of a prompt handed to a draft without the shift of its tokens",
        "optimized.drafting.Recurrent.ahead",
        lambda ahead: (
            lambda self, chunk: ahead(self, chunk._replace(h=chunk.h.roll(1, 1), holes=chunk.holes.roll(1, 1)))
        ),
        READS,
    ),
    Bug(
        "a draft reads images one place late",
        "the same in the reference",
        "reference.decoding.embed_ahead",
        lambda ahead: lambda draft, following, h, holes: ahead(draft, following, h.roll(1, 1), holes.roll(1, 1)),
        READS,
    ),
    Bug(
        "only the token after the last prompt read anew",
        "SGLang #27846",
        "reference.drafting.Recurrent.start",
        root_of_the_last_row,
        ROOT,
    ),
)
