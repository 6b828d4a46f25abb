"""Bugs of Kimi K2.5 around its text model: the tower, the squares, the names."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from harness.planting import Bug
from suites.bugs.deepseek import built

CLAIMS = "suites/correctness/test_witness_kimi_k25.py"
IMAGES = f"{CLAIMS}::test_images_equal_transformers_at_every_capture_point"
CLIPS = f"{CLAIMS}::test_clips_in_two_passes_equal_transformers"
SAVED = f"{CLAIMS}::test_names_as_transformers_saves_them_are_the_same_model"
TIED = f"{CLAIMS}::test_the_head_is_tied_where_the_outer_config_says_so"

TOWER, SHELL = "reference.targets.moonvit", "reference.targets.kimi_k25"


def bilinear(_: Any) -> Any:
    """The table of positions resampled in straight lines."""

    def resample(table: Tensor, height: int, width: int) -> Tensor:
        return F.interpolate(table.permute(2, 0, 1)[None], (height, width), mode="bilinear")[0].permute(1, 2, 0)

    return resample


def corner(_: Any) -> Any:
    """The corner of the table in place of the whole; beyond its end the last row and column."""

    def crop(table: Tensor, height: int, width: int) -> Tensor:
        down, across = (torch.arange(n).clamp(max=s - 1) for n, s in zip((height, width), table.shape[:2], strict=True))
        return table[down[:, None], across]

    return crop


def rows_first(angles: Any) -> Any:
    """The first of two pairs turned by the row."""
    return lambda *grid: angles(*grid).unflatten(-1, (-1, 2)).flip(-1).flatten(1)


def waving(place: Any) -> Any:
    """An image given the wave of a first frame."""

    def positions(self: Any, frames: int, height: int, width: int) -> Tensor:
        right = place(self, frames, height, width)
        zeros = torch.zeros_like(right[:, ::2])
        return right if frames > 1 else right + torch.cat([zeros, zeros + 1], 1)

    return positions


def by_column(project: Any) -> Any:
    """The patches of a square read column by column."""
    return lambda self, squares: project(self, squares.unflatten(1, (2, 2)).transpose(1, 2).flatten(1, 2))


def first_frame(clip: Any) -> Any:
    """A clip known by its first frame."""
    return lambda self, p, frames, height, width: clip(self, p[: height * width], 1, height, width)


def swap_gelu(projector: Any) -> None:
    projector.proj[1] = nn.GELU("tanh")


BUGS = (
    Bug(
        "moonvit-positions-bilinear",
        "a table resampled in straight lines",
        f"{TOWER}.resample",
        bilinear,
        IMAGES,
    ),
    Bug(
        "moonvit-positions-cropped",
        "a table read from its corner",
        f"{TOWER}.resample",
        corner,
        IMAGES,
    ),
    Bug(
        "moonvit-rows-before-columns",
        "the two axes of its rope swapped",
        f"{TOWER}.grid_angles",
        rows_first,
        IMAGES,
    ),
    Bug(
        "moonvit-images-wave",
        "an image read as a clip of one frame with its wave",
        f"{TOWER}.PositionTable.forward",
        waving,
        IMAGES,
    ),
    Bug(
        "moonvit-exact-gelu",
        "gelu in its exact form",
        f"{TOWER}.gelu",
        lambda gelu: F.gelu,
        IMAGES,
    ),
    Bug(
        "moonvit-first-frame-alone",
        "a clip pooled to its first frame",
        f"{TOWER}.MoonVitTower.clip",
        first_frame,
        CLIPS,
    ),
    Bug(
        "kimi-k25-squares-by-column",
        "rows and columns of a square swapped on the way to the projector",
        f"{SHELL}.PatchMerger.forward",
        by_column,
        IMAGES,
    ),
    Bug(
        "kimi-k25-projector-tanh-gelu",
        "the tower's gelu in the projector",
        f"{SHELL}.PatchMerger.__init__",
        built(swap_gelu),
        IMAGES,
    ),
    Bug(
        "kimi-k25-saved-layers-unknown",
        "transformers' save_pretrained calls layers of text blocks",
        f"{SHELL}.CHECKPOINT_NAMES",
        lambda names: names[1:],
        SAVED,
    ),
    Bug(
        "kimi-k25-inner-tie",
        "tie_word_embeddings read from the inner config",
        f"{SHELL}.replace",
        lambda replace: lambda text, **facts: text,
        TIED,
    ),
)
