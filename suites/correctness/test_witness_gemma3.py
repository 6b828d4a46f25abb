"""Claim: the reference of Gemma 3 computes what transformers computes, text and images, layer by layer.

Born of SGLang #39286: captured states without the residual, overwritten in place, under a text that was right; of
SGLang #32383, where a change of norms moved them; and of ports that made image attention causal, used one rope for
both kinds of layers, or multiplied by w where the norm says 1 + w.
"""

from pathlib import Path

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.torch import load_file

from harness import witness
from harness.checkpoints import SINGLE, open_checkpoint, rename, save_checkpoint
from harness.compare import bit_equal, hold
from harness.pairs import Pair
from reference.config import ConfigError
from reference.outputs import TargetOutput
from suites.catalog import PAIRS, TARGET_TYPES, OpenTarget, open_target
from suites.draws import Drawn, folders, random_tokens
from suites.families.gemma3 import (
    PINNED_LAYOUT,
    PINNED_MULTIMODAL,
    PINNED_TEXT,
    PUBLISHED,
    Layout,
    Prompt,
    gemma3_multimodals,
    gemma3_texts,
    layouts,
)

pytestmark = pytest.mark.correctness
text = pytest.mark.pair("gemma3")
images = pytest.mark.pair("gemma3_mm")


def hold_all(out: TargetOutput, outside: witness.WitnessOutput, target: OpenTarget, extra: int = 0) -> None:
    """Every capture point, the final hidden state and the logits; `extra` layers stand before the text model."""
    size = {"depth": target.num_layers + extra, "width": target.config.hidden}
    for c in range(target.num_layers + 1):
        hold(f"capture point {c}", out.aux[:, :, c], outside.aux[:, :, c], **size)
    hold("hidden", out.hidden, outside.hidden, **size)
    hold("logits", out.logits, outside.logits, **size)


@text
@given(drawn=gemma3_texts(), batch=st.integers(1, 3), width=st.integers(1, 32), start=st.sampled_from([0, 5]))
@example(drawn=PINNED_TEXT, batch=2, width=24, start=5)
def test_text_equals_transformers_at_every_capture_point(drawn: Drawn, batch: int, width: int, start: int) -> None:
    tokens = random_tokens(drawn.keys["vocab_size"], batch, width, drawn.seed)
    positions = torch.arange(width).expand(batch, width) + start
    with folders(drawn) as (path, _):
        target = open_target(path, dtype=torch.float64)
        outside = witness.load(path, dtype=torch.float64).run(tokens, positions)

    out = target(tokens, positions, capture=range(target.num_layers + 1))

    hold_all(out, outside, target)


@text
@given(drawn=gemma3_texts(), width=st.integers(2, 24), cut=st.integers(1, 23))
@example(drawn=PINNED_TEXT, width=20, cut=9)
def test_text_in_two_passes_equals_text_in_one(drawn: Drawn, width: int, cut: int) -> None:
    tokens = random_tokens(drawn.keys["vocab_size"], 2, width, drawn.seed)
    with folders(drawn) as (path, _):
        target = open_target(path, dtype=torch.float64)
        outside = witness.load(path, dtype=torch.float64).run(tokens)

    cache, columns = target.module.new_cache(2, width + 3), torch.arange(width).expand(2, width)
    cut = min(cut, width - 1)
    parts = [
        target.module(tokens[:, at], columns[:, at], range(target.num_layers + 1), cache)
        for at in (slice(cut), slice(cut, width))
    ]

    hold_all(TargetOutput(*(torch.cat(both, 1) for both in zip(*parts, strict=True))), outside, target)


@images
@given(drawn=gemma3_multimodals(), layout=layouts())
@example(drawn=PINNED_MULTIMODAL, layout=PINNED_LAYOUT)
@example(drawn=PINNED_MULTIMODAL, layout=Layout((1, 0, 2), ((True, True),), marked=False))
def test_images_equal_transformers_at_every_capture_point(drawn: Drawn, layout: Layout) -> None:
    prompt = Prompt(drawn.config, layout, drawn.seed)
    with folders(drawn) as (path, _):
        target = open_target(path, dtype=torch.float64)
        outside = witness.load(path, dtype=torch.float64).run(prompt.tokens, inputs=prompt.inputs())

    out = target(prompt.tokens, None, range(target.num_layers + 1), **prompt.inputs())

    hold_all(out, outside, target, extra=target.config.vision.layers)


@images
@given(drawn=gemma3_multimodals(), layout=layouts(), cut=st.integers(0, 40))
@example(drawn=PINNED_MULTIMODAL, layout=PINNED_LAYOUT, cut=5)
def test_images_in_two_passes_equal_images_in_one(drawn: Drawn, layout: Layout, cut: int) -> None:
    prompt = Prompt(drawn.config, layout, drawn.seed)
    tokens, width, batch = prompt.tokens, prompt.width, len(layout.shown)
    with folders(drawn) as (path, _):
        target = open_target(path, dtype=torch.float64)
        outside = witness.load(path, dtype=torch.float64).run(tokens, inputs=prompt.inputs())

    cut = prompt.cuts[cut % len(prompt.cuts)]
    cache, columns = target.module.new_cache(batch, width), torch.arange(width).expand(batch, width)
    parts = [
        target.module(tokens[:, a:b], columns[:, a:b], range(target.num_layers + 1), cache, **prompt.inputs(a, b))
        for a, b in ((0, cut), (cut, width))
    ]

    whole = TargetOutput(*(torch.cat(both, 1) for both in zip(*parts, strict=True)))
    hold_all(whole, outside, target, extra=target.config.vision.layers)


@images
@given(drawn=gemma3_multimodals(), layout=layouts())
@example(drawn=PINNED_MULTIMODAL, layout=PINNED_LAYOUT)
def test_placeholders_are_images_without_being_told(drawn: Drawn, layout: Layout) -> None:
    prompt = Prompt(drawn.config, layout, drawn.seed)
    with folders(drawn) as (path, _):
        target = open_target(path)

    told = target(prompt.tokens, **prompt.inputs())
    untold = target(prompt.tokens, pixel_values=prompt.inputs()["pixel_values"])

    bit_equal("logits", untold.logits, told.logits)


@images
def test_the_shell_reads_text_as_the_text_model_does(tmp_path: Path) -> None:
    keys = PINNED_MULTIMODAL.keys
    witness.create(keys, tmp_path / "shell", seed=3)
    shell = open_target(tmp_path / "shell")
    prefix = "language_model."
    inner = {n.removeprefix(prefix): t for n, t in shell.module.state_dict().items() if n.startswith(prefix)}
    save_checkpoint(tmp_path / "text", keys["text_config"], {n: t.clone() for n, t in inner.items()})
    tokens = random_tokens(331, 2, 12, 0)

    outs = [target(tokens, capture=range(8)) for target in (shell, open_target(tmp_path / "text"))]

    for name, both in zip(TargetOutput._fields, zip(*outs, strict=True), strict=True):
        bit_equal(name, *both)


# how one checkpoint is spelled: transformers' file, the hub's, and transformers' memory
SPELLINGS = {
    "hub": (("vision_tower.", "vision_tower.vision_model."),),
    "new": (
        ("language_model.model.", "model.language_model."),
        ("language_model.lm_head.", "lm_head."),
        ("vision_tower.", "model.vision_tower."),
        ("multi_modal_projector.", "model.multi_modal_projector."),
    ),
}


@images
@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("tied", [True, False])
def test_every_spelling_of_a_checkpoint_is_the_same_model(spelling: str, tied: bool, tmp_path: Path) -> None:
    keys = {**PINNED_MULTIMODAL.keys, "tie_word_embeddings": tied}
    path = witness.create(keys, tmp_path / "saved", seed=4)
    tensors = {rename(name, SPELLINGS[spelling]): t for name, t in load_file(path / SINGLE).items()}
    save_checkpoint(tmp_path / "spelled", keys, tensors)

    saved, spelled = open_target(path), open_target(tmp_path / "spelled")

    assert {e.parameter for e in saved.ledger.entries} == {e.parameter for e in spelled.ledger.entries}
    assert len(spelled.ledger.entries) == len(tensors) == len(open_checkpoint(path).headers)
    for (name, want), got in zip(saved.module.state_dict().items(), spelled.module.state_dict().values(), strict=True):
        bit_equal(name, got, want)


def pair_of(name: str) -> Pair:
    return PAIRS[TARGET_TYPES[PUBLISHED[name]["model_type"]]]


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes_have_the_parameters_of_transformers(name: str) -> None:
    pair = pair_of(name)
    with torch.device("meta"):
        ours = pair.reference(pair.read_config(PUBLISHED[name]))
        theirs = witness.build(PUBLISHED[name])

    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_older_spelling_of_a_config_is_the_newer_one(name: str) -> None:
    pair = pair_of(name)
    with torch.device("meta"):
        newer = witness.build(PUBLISHED[name]).config.to_dict()

    assert pair.read_config(PUBLISHED[name]) == pair.read_config(newer)


TEXT_KEYS = PINNED_TEXT.keys
REFUSED = {
    "final_logit_softcapping": {"text_config": {**TEXT_KEYS, "final_logit_softcapping": 30.0}},
    "use_bidirectional_attention": {"text_config": {**TEXT_KEYS, "use_bidirectional_attention": True}},
    "layer_types": {"text_config": {**TEXT_KEYS, "layer_types": ["full_attention"]}},
    "rope_parameters": {"text_config": {**TEXT_KEYS, "rope_parameters": {"rope_theta": 1e6}}},
    "tie_word_embeddings": {"tie_word_embeddings": None, "text_config": {**TEXT_KEYS, "tie_word_embeddings": False}},
    "mm_tokens_per_image": {"mm_tokens_per_image": 16},
}
"""what readers disagree on, or what has no mathematics here: key -> change of the pinned config"""


@images
@pytest.mark.parametrize("key", REFUSED)
def test_what_cannot_be_read_in_one_way_is_refused_and_named(key: str) -> None:
    with pytest.raises(ConfigError, match=key):
        PAIRS["gemma3_mm"].read_config({**PINNED_MULTIMODAL.keys, **REFUSED[key]})


@images
def test_images_and_placeholders_must_match() -> None:
    prompt = Prompt(PINNED_MULTIMODAL.config, PINNED_LAYOUT, 0)
    with folders(PINNED_MULTIMODAL) as (path, _):
        target = open_target(path)

    with pytest.raises(
        ValueError, match=r"27 placeholders of images \(id 330, 9 tokens an image\), but features fill 18"
    ):
        target(prompt.tokens, pixel_values=prompt.inputs()["pixel_values"][:2])


@text
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_norms_and_the_embedding_round_as_transformers_rounds(dtype: torch.dtype) -> None:
    tokens = random_tokens(331, 2, 40, 0)
    with folders(PINNED_TEXT) as (path, _):
        ours, theirs = open_target(path, dtype=dtype).module, witness.load(path, dtype=dtype).decoder

    h = ours.embed(tokens)

    bit_equal("embedding", h, theirs.embed_tokens(tokens).detach())
    bit_equal("norm", ours.norm(h), theirs.norm(h).detach())
