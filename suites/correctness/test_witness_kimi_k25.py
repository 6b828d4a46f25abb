"""Claim: the reference of Kimi K2.5 computes what transformers computes: text, images and clips, layer by layer.

Born of SGLang #28343, whose captures on this model were partial sums, of #25454, where they came from the wrong layer,
and of transformers' own `save_pretrained`, which renames the layers of the text model with those of the tower.
"""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.torch import load_file

from harness import witness
from harness.checkpoints import SINGLE, CheckpointError, rename, save_checkpoint
from harness.compare import bit_equal, hold
from reference.config import ConfigError
from reference.outputs import TargetOutput
from reference.targets.kimi_k25 import KimiK25Config, KimiK25Target
from suites.catalog import OpenTarget, open_target
from suites.draws import FIXED_ROPES, Drawn, folders, random_tokens
from suites.families.kimi_k25 import (
    CLIP,
    IMAGE,
    KIMI,
    MOVING,
    PINNED_KIMI,
    PUBLISHED,
    STILL,
    Picture,
    Prompt,
    Row,
    kimi_targets,
    outside_stream,
    rows,
)
from suites.shells import count_parameters, without_memory

pytestmark = [pytest.mark.correctness, pytest.mark.pair("kimi_k25")]


def hold_all(out: TargetOutput, outside: witness.WitnessOutput, target: OpenTarget) -> None:
    """Every capture point, the final hidden state and the logits; the tower's layers come before the text's."""
    size = {"depth": target.num_layers + target.config.vision.layers, "width": target.config.hidden}
    for c in range(target.num_layers + 1):
        hold(f"capture point {c}", out.aux[:, :, c], outside.aux[:, :, c], **size)
    hold("hidden", out.hidden, outside.hidden, **size)
    hold("logits", out.logits, outside.logits, **size)


@given(drawn=kimi_targets(), stills=rows())
@example(drawn=PINNED_KIMI, stills=STILL)
def test_images_equal_transformers_at_every_capture_point(drawn: Drawn, stills: tuple[Row, ...]) -> None:
    prompt = Prompt(drawn.config, stills, drawn.seed)
    with folders(drawn) as (path, _):
        target = open_target(path, dtype=torch.float64)
        outside = witness.load(path, dtype=torch.float64).run(prompt.tokens, inputs=prompt.inputs())

    out = target(prompt.tokens, None, range(target.num_layers + 1), **prompt.inputs())

    hold_all(out, outside, target)


@given(drawn=kimi_targets(kinds=FIXED_ROPES), moving=rows(max_frames=3), cut=st.integers(0, 40))
@example(drawn=PINNED_KIMI, moving=MOVING, cut=5)
def test_clips_in_two_passes_equal_transformers(drawn: Drawn, moving: tuple[Row, ...], cut: int) -> None:
    prompt = Prompt(drawn.config, moving, drawn.seed)
    with folders(drawn) as (path, _):
        target = open_target(path, dtype=torch.float64)
        model = witness.load(path, dtype=torch.float64)
    outside = model.run(prompt.tokens, inputs={"inputs_embeds": outside_stream(model, prompt)})

    tokens, width, points = prompt.tokens, prompt.width, range(target.num_layers + 1)
    cut = [*prompt.cuts, width][cut % (len(prompt.cuts) + 1)]
    cache, columns = target.module.new_cache(len(tokens), width), torch.arange(width).expand_as(tokens)
    parts = [
        target.module(tokens[:, a:b], columns[:, a:b], points, cache, **prompt.inputs(a, b))
        for a, b in sorted({(0, cut), (cut, width)} - {(width, width)})
    ]

    hold_all(TargetOutput(*(torch.cat(part, 1) for part in zip(*parts, strict=True))), outside, target)


@given(drawn=kimi_targets(), batch=st.integers(1, 3), width=st.integers(1, 16))
@example(drawn=PINNED_KIMI, batch=2, width=12)
def test_the_shell_reads_text_as_transformers_does(drawn: Drawn, batch: int, width: int) -> None:
    tokens = random_tokens(drawn.keys["text_config"]["vocab_size"], batch, width, drawn.seed)
    with folders(drawn) as (path, _):
        target = open_target(path, dtype=torch.float64)
        outside = witness.load(path, dtype=torch.float64).run(tokens)

    out = target(tokens, capture=range(target.num_layers + 1))

    hold_all(out, outside, target)


def test_the_shell_captures_what_the_text_model_does(tmp_path: Path) -> None:
    witness.create(KIMI, tmp_path / "shell", seed=3)
    shell, prefix = open_target(tmp_path / "shell"), "language_model."
    state = shell.module.state_dict()
    inner = {n.removeprefix(prefix): t.clone() for n, t in state.items() if n.startswith(prefix)}
    save_checkpoint(tmp_path / "text", KIMI["text_config"], inner)
    tokens = random_tokens(329, 2, 12, 0)

    outs = [target(tokens, capture=range(8)) for target in (shell, open_target(tmp_path / "text"))]

    for name, both in zip(TargetOutput._fields, zip(*outs, strict=True), strict=True):
        bit_equal(name, *both)


def test_one_placeholder_may_stand_for_images_and_clips(tmp_path: Path) -> None:
    path = witness.create(KIMI, tmp_path / "two", seed=4)
    hub = {key: value for key, value in KIMI.items() if key not in ("image_token_id", "video_token_id")}
    save_checkpoint(tmp_path / "one", {**hub, "media_placeholder_token_id": 330}, load_file(path / SINGLE))
    clips = ((2, Picture(CLIP, 2, 1, 2), 3),)
    images = ((2, Picture(IMAGE, 2, 1, 2), 3),)

    two, one = (
        open_target(tmp_path / name)(prompt.tokens, **prompt.inputs())
        for name, prompt in (
            ("two", Prompt(PINNED_KIMI.config, clips, 0)),
            ("one", Prompt(PINNED_KIMI.config, images, 0)),
        )
    )

    bit_equal("logits", one.logits, two.logits)


def test_names_as_transformers_saves_them_are_the_same_model(tmp_path: Path) -> None:
    path = witness.create(KIMI, tmp_path / "hub", seed=4)
    saved = (
        ("language_model.model.layers.", "language_model.model.blocks."),
        ("vision_tower.patch_embed.proj.", "vision_tower.encoder.patch_embed.proj."),
        ("mm_projector.pre_norm.", "model.mm_projector.pre_norm."),
    )
    tensors = {rename(name, saved): tensor for name, tensor in load_file(path / SINGLE).items()}
    save_checkpoint(tmp_path / "saved", KIMI, tensors)

    hub, other = open_target(path), open_target(tmp_path / "saved")

    assert len(other.ledger.entries) == len(hub.ledger.entries) == len(tensors)
    for (name, want), got in zip(hub.module.state_dict().items(), other.module.state_dict().values(), strict=True):
        bit_equal(name, got, want)


def test_the_head_is_tied_where_the_outer_config_says_so(tmp_path: Path) -> None:
    path = witness.create({**KIMI, "tie_word_embeddings": True}, tmp_path / "tied", seed=4)
    tokens = random_tokens(329, 2, 9, 0)

    out = open_target(path, dtype=torch.float64)(tokens)

    hold("logits", out.logits, witness.load(path, dtype=torch.float64).run(tokens).logits, depth=7, width=96)


PROMPT = Prompt(PINNED_KIMI.config, MOVING, 0)
MISFITS = {
    "fewer pictures than placeholders": ({"image_grid_thw": torch.tensor([[1, 2, 6]])}, r"6 placeholders .* fill 3"),
    "a grid that squares do not fill": ({"image_grid_thw": torch.tensor([[1, 3, 8]])}, "squares of 2 by 2"),
    "patches that no grid has": ({"pixel_values": torch.zeros(23, 3, 2, 2)}, "do not fit 23 patches"),
    "more frames than waves": ({"image_grid_thw": torch.tensor([[6, 2, 2]])}, "6 frames; the tower reads 3"),
}


@pytest.mark.parametrize("case", MISFITS)
def test_pictures_and_placeholders_must_match(case: str) -> None:
    changes, message = MISFITS[case]
    inputs = {**PROMPT.inputs(), **changes}
    patches = int(inputs["image_grid_thw"].prod())
    with folders(PINNED_KIMI) as (path, _):
        target = open_target(path)

    inputs["pixel_values"] = changes.get("pixel_values", PROMPT.inputs()["pixel_values"][:patches])

    with pytest.raises(ValueError, match=message):
        target(PROMPT.tokens, **inputs)


REFUSED = {
    "pos_emb_type": "learned",
    "merge_type": "sd2",
    "hidden_act": "silu",
    "num_attention_heads": 3,
    "merge_kernel_size": [2],
    "vt_hidden_size": 32,
    "text_hidden_size": 95,
    "dropout": 0.5,
}


@pytest.mark.parametrize("key", REFUSED)
def test_what_the_tower_cannot_be_is_refused_and_named(key: str) -> None:
    vision = {**KIMI["vision_config"], key: REFUSED[key]}

    with pytest.raises(ConfigError, match=r"vision_config\."):
        KimiK25Config.from_hf({**KIMI, "vision_config": vision})


def test_a_packed_checkpoint_is_refused(tmp_path: Path) -> None:
    path = witness.create(KIMI, tmp_path / "whole", seed=4)
    packed = {**KIMI["text_config"], "quantization_config": {"quant_method": "compressed-tensors"}}
    save_checkpoint(tmp_path / "packed", {**KIMI, "text_config": packed}, load_file(path / SINGLE))

    with pytest.raises(CheckpointError, match=r"text_config\.quantization_config"):
        open_target(tmp_path / "packed")


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_size_has_the_parameters_of_transformers(name: str) -> None:
    with without_memory():
        ours = KimiK25Target(KimiK25Config.from_hf(PUBLISHED[name]))
        theirs = witness.build(PUBLISHED[name])

    assert count_parameters(ours) == count_parameters(theirs)


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_older_spelling_of_a_config_is_the_newer_one(name: str) -> None:
    shallow = {**PUBLISHED[name], "text_config": {**PUBLISHED[name]["text_config"], "num_hidden_layers": 1}}
    with without_memory():
        newer = KimiK25Config.from_hf(witness.build(shallow).config.to_dict())

    older = KimiK25Config.from_hf(shallow)

    # the hub has one placeholder; transformers adds another
    assert older.video_token == older.image_token
    assert older == replace(newer, video_token=newer.image_token)
