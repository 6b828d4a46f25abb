"""Claim: Gemma 4 with its towers computes what transformers computes: images, videos and sounds, layer by layer.

Born of what ports of the towers leave out and text still comes out of: SGLang, which leaves videos causal where the
config does not; masks that let images look ahead on full layers, too; audio masks read upside down (transformers 5.17
does so in eager attention); an input of every layer for the id of a placeholder instead of padding; clamps around
every weight that a reader without `use_clipped_linears` drops.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from harness import checkpoints, witness
from harness.checkpoints import read_json, rename, save_checkpoint, state_of
from harness.compare import bit_equal, hold
from harness.shapes import watch
from reference.config import ConfigError
from reference.ops import clipped
from reference.outputs import TargetOutput
from reference.targets import gemma4_audio, gemma4_mm, gemma4_shell, gemma4_vision
from reference.targets.gemma4_mm import CHECKPOINT_NAMES, Gemma4MmConfig, Gemma4MmTarget
from suites.catalog import OpenTarget, open_target
from suites.draws import Drawn, folders, random_tokens
from suites.families.gemma4 import drawn_of
from suites.families.gemma4_mm import (
    AUDIO,
    MULTIMODAL,
    PINNED,
    PINNED_EDGE,
    PINNED_LAYOUT,
    PUBLISHED,
    VISION,
    Item,
    Layout,
    Prompt,
    gemma4_multimodals,
    layouts,
)

pytestmark = [pytest.mark.correctness, pytest.mark.pair("gemma4_mm")]


TOUCHING = Layout((Item("image", (3, 2)), Item("video", (2, 1))), (1, 0, 2), ((True, True),), frames=3, marked=False)
"""an image and the frames of a video without a token between them"""


def both(drawn: Drawn, dtype: torch.dtype = torch.float64) -> tuple[OpenTarget, witness.Witness]:
    """The page and the witness, from one folder."""
    with folders(drawn) as (path, _):
        return open_target(path, dtype=dtype), witness.load(path, dtype=dtype)


def opened(drawn: Drawn, dtype: torch.dtype = torch.float32) -> OpenTarget:
    with folders(drawn) as (path, _):
        return open_target(path, dtype=dtype)


@pytest.fixture(scope="module")
def edge() -> OpenTarget:
    return opened(PINNED_EDGE)


def scale_of(target: OpenTarget) -> dict[str, int]:
    """How deep and how wide an error runs: the towers stand before the text model."""
    c = target.config
    return {"depth": c.layers + c.vision.layers + c.audio.layers, "width": max(c.hidden, 4 * c.audio.hidden)}


@given(drawn=gemma4_multimodals(), layout=layouts())
@example(drawn=PINNED, layout=PINNED_LAYOUT)
@example(drawn=PINNED_EDGE, layout=PINNED_LAYOUT)
@example(drawn=PINNED, layout=TOUCHING)
def test_every_capture_point_equals_transformers(drawn: Drawn, layout: Layout) -> None:
    prompt = Prompt(drawn.config, layout, drawn.seed)
    target, outside = both(drawn)

    out = target(prompt.tokens, None, range(target.num_layers + 1), **prompt.inputs())

    want = outside.run(prompt.tokens, inputs=prompt.inputs())
    for c in range(target.num_layers + 1):
        hold(f"capture point {c}", out.aux[:, :, c], want.aux[:, :, c], **scale_of(target))
    hold("hidden", out.hidden, want.hidden, **scale_of(target))
    hold("logits", out.logits, want.logits, **scale_of(target))


@given(drawn=gemma4_multimodals(), layout=layouts(), cut=st.integers(0, 60))
@example(drawn=PINNED, layout=PINNED_LAYOUT, cut=4)
@example(drawn=PINNED_EDGE, layout=PINNED_LAYOUT, cut=4)
@torch.no_grad()
def test_two_passes_equal_one(drawn: Drawn, layout: Layout, cut: int) -> None:
    prompt = Prompt(drawn.config, layout, drawn.seed)
    tokens, width, batch = prompt.tokens, prompt.width, len(layout.shown)
    target = opened(drawn, torch.float64)
    points, cut = range(target.num_layers + 1), prompt.cuts[cut % len(prompt.cuts)]

    # more slots than tokens: empty ones must stay out of sight
    cache, columns = target.module.new_cache(batch, width + 3), torch.arange(width).expand(batch, width)
    parts = [
        target.module(tokens[:, a:b], columns[:, a:b], points, cache, **prompt.inputs(a, b))
        for a, b in ((0, cut), (cut, width))
    ]

    want = target(tokens, None, points, **prompt.inputs())
    whole = TargetOutput(*(torch.cat(chunks, 1) for chunks in zip(*parts, strict=True)))
    for name in TargetOutput._fields:
        hold(name, getattr(whole, name), getattr(want, name), **scale_of(target))


@torch.no_grad()
def test_what_follows_is_what_transformers_generates() -> None:
    prompt = Prompt(PINNED.config, PINNED_LAYOUT, 1)
    # float32: `generate` of a float64 model would mix the two
    target, outside = both(PINNED, torch.float32)

    cache = target.module.new_cache(2, prompt.width + 5)
    token = target.module(prompt.tokens, cache=cache, **prompt.inputs()).logits[:, -1:].argmax(-1)
    new = [token]
    for i in range(5):
        token = target.module(token, torch.full((2, 1), prompt.width + i), cache=cache).logits.argmax(-1)
        new.append(token)

    bit_equal("tokens", torch.cat(new, 1), outside.generate(prompt.tokens, 6, inputs=prompt.inputs()))


@pytest.mark.parametrize("layout", [PINNED_LAYOUT, TOUCHING])
def test_placeholders_tell_what_types_would(layout: Layout) -> None:
    prompt = Prompt(PINNED.config, layout, 2)
    target, given_inputs = opened(PINNED), prompt.inputs()

    told = target(prompt.tokens, **given_inputs)
    untold = target(prompt.tokens, **{n: t for n, t in given_inputs.items() if n != "mm_token_type_ids"})

    bit_equal("logits", untold.logits, told.logits)


@torch.no_grad()
def test_the_order_of_patches_is_of_no_account() -> None:
    prompt = Prompt(PINNED.config, Layout((Item("image", (3, 2)),), (0, 1), ((True,),), filling=2), 3)
    given_inputs = prompt.inputs()
    pixels, places = given_inputs["pixel_values"], given_inputs["image_position_ids"]
    order = torch.randperm(pixels.shape[1], generator=torch.Generator().manual_seed(0))
    target = opened(PINNED, torch.float64)

    shuffled = target.module.see(pixels[:, order], places[:, order])

    hold("features", shuffled, target.module.see(pixels, places), **scale_of(target))


def test_every_call_keeps_its_shape_lines() -> None:
    prompt, target = Prompt(PINNED.config, PINNED_LAYOUT, 2), opened(PINNED)

    with watch(gemma4_mm, gemma4_shell, gemma4_vision, gemma4_audio, clipped) as seen:
        target(prompt.tokens, **prompt.inputs())
        target.module.shared_kv(target.module.new_cache(1, 1))

    assert [name for name, calls in seen.calls.items() if not calls] == []


def test_the_shell_reads_text_as_the_text_model_does(edge: OpenTarget, tmp_path: Path) -> None:
    prefix = "language_model."
    inner = {n.removeprefix(prefix): t for n, t in edge.module.state_dict().items() if n.startswith(prefix)}
    save_checkpoint(tmp_path, PINNED_EDGE.keys["text_config"], {n: t.clone() for n, t in inner.items()})
    tokens = random_tokens(331, 2, 12, 0)

    outs = [target(tokens, capture=range(6)) for target in (edge, open_target(tmp_path))]

    for name, pair in zip(TargetOutput._fields, zip(*outs, strict=True), strict=True):
        bit_equal(name, *pair)


@pytest.mark.parametrize("absent", ["vision", "audio"])
def test_a_tower_that_is_not_there_is_legally_absent(absent: str) -> None:
    prompt = Prompt(PINNED.config, PINNED_LAYOUT, 1)
    target = opened(drawn_of(MULTIMODAL, **{f"{absent}_config": None}))

    assert not [name for name in target.module.state_dict() if absent in name]
    with pytest.raises(ValueError, match=f"{absent}_config is null"):
        target(prompt.tokens, **prompt.inputs())


@pytest.mark.parametrize("drawn", [PINNED, PINNED_EDGE], ids=["large", "edge"])
def test_the_hubs_spelling_and_the_saved_one_read_alike(drawn: Drawn) -> None:
    with folders(drawn) as (path, _):
        saved = read_json(path / checkpoints.CONFIG)

    assert saved["vision_config"]["rope_parameters"]["rope_type"] == "axial"
    assert Gemma4MmConfig.from_hf(saved) == Gemma4MmConfig.from_hf(drawn.keys)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes_have_the_parameters_of_transformers(name: str) -> None:
    def shapes(state: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
        return {rename(n, CHECKPOINT_NAMES): tuple(t.shape) for n, t in state.items()}

    with torch.device("meta"):
        ours = Gemma4MmTarget(Gemma4MmConfig.from_hf(PUBLISHED[name]))
        theirs = witness.build(PUBLISHED[name])

    stored = {n: t for n, t in theirs.state_dict().items() if n != "lm_head.weight"}
    assert shapes(state_of(ours)) == shapes(stored)
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"vision_config": {**VISION, "pooling_kernel_size": 1}}, "vision_config.pooling_kernel_size"),
        ({"vision_config": {**VISION, "attention_bias": True}}, "vision_config.attention_bias"),
        ({"vision_config": {**VISION, "head_dim": 6}}, "multiple of four"),
        ({"vision_config": {**VISION, "num_attention_heads": 3}}, "vision_config"),
        ({"vision_config": {**VISION, "rope_parameters": {"rope_type": "yarn"}}}, "rope_parameters.rope_type"),
        ({"vision_config": {**VISION, "layer_types": []}}, "vision_config.layer_types"),
        ({"audio_config": {**AUDIO, "hidden_act": "gelu"}}, "audio_config.hidden_act"),
        ({"audio_config": {**AUDIO, "attention_invalid_logits_value": 1e-9}}, "attention_invalid_logits_value"),
        ({"audio_config": {**AUDIO, "attention_context_left": 1}}, "attention_context_left"),
        ({"audio_config": {**AUDIO, "subsampling_conv_channels": [8]}}, "subsampling_conv_channels"),
        ({"audio_config": {**AUDIO, "num_attention_heads": 3}}, "audio_config"),
        ({"text_config": {**MULTIMODAL["text_config"], "model_type": "gemma3_text"}}, "text_config.model_type"),
        ({"text_config": {**MULTIMODAL["text_config"], "pad_token_id": 331}}, "pad_token_id"),
        ({"image_token_id": 5, "video_token_id": 5}, "two meanings"),
        ({"image_token_index": 5}, "image_token_index"),
        (
            {"tie_word_embeddings": None, "text_config": {**MULTIMODAL["text_config"], "tie_word_embeddings": False}},
            "tie_word_embeddings",
        ),
    ],
)
def test_a_config_that_cannot_be_read_in_one_way_is_refused(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        Gemma4MmConfig.from_hf({**MULTIMODAL, **changes})


def picture(*places: tuple[int, int]) -> dict[str, Tensor]:
    """An image with patches at (column, row)."""
    return {"pixel_values": torch.zeros(1, len(places), 12), "image_position_ids": torch.tensor([places])}


def sound(numbers: int, *mask: bool) -> dict[str, Tensor]:
    """Frames of so many numbers, real where the mask says so."""
    return {"input_features": torch.zeros(1, len(mask), numbers), "input_features_mask": torch.tensor([mask])}


def grid(columns: int, rows: int) -> list[tuple[int, int]]:
    return [(x, y) for y in range(rows) for x in range(columns)]


UNREADABLE = {
    "fill no grid of 6 by 3": picture(*grid(6, 3)[:-1], (0, 0)),
    "image 0 fill no grid of 3 by 6": picture(*grid(3, 6)[:-1], (2, -1)),
    "fill no grid of 4 by 4": picture(*grid(4, 4)),
    "15 columns and 3 rows; embeddings are there for 12": picture(*grid(15, 3)),
    "without their positions": {**picture(*grid(3, 3)), "image_position_ids": None},
    "hold 0 placeholders of images, but features fill 2": picture(*grid(6, 3), (-1, -1)),
    "without its mask": {**sound(8, True), "input_features_mask": None},
    "false behind it": sound(8, False, True),
    "true up to the end": sound(8, False, False),
    "has 12 numbers; 8 are expected": sound(12, True, True),
}
"""what readers would take differently, or not at all: the message -> inputs"""


@pytest.mark.parametrize("message", UNREADABLE)
def test_inputs_that_fit_no_prompt_are_refused(edge: OpenTarget, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        edge(torch.ones(1, 4, dtype=torch.long), **UNREADABLE[message])
