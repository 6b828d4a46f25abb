"""Claim: the reference of Gemma 4 Unified computes what transformers computes, for text, images, video and sound.

Born of SGLang #27167, which brought this family in without a test, of engines that leave image attention causal where
a backend has no mask for it, and of transformers itself: a bare forward pass lets images look ahead on full layers,
the masks of its `create_masks_for_generate` do not. Patches and sound enter without an encoder, so a wrong row is a
wrong token at once.
"""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from harness import witness
from harness.checkpoints import SINGLE, rename, save_checkpoint
from harness.compare import bit_equal, hold
from reference.config import ConfigError
from reference.outputs import TargetOutput
from reference.targets.gemma4_unified import Gemma4UnifiedConfig, Gemma4UnifiedTarget
from suites.catalog import OpenTarget, open_target
from suites.draws import Drawn, folders, random_tokens
from suites.families.gemma4_unified import (
    PINNED_LAYOUT,
    PINNED_UNIFIED,
    PUBLISHED,
    SOUND_ALONE,
    SUPPRESSED,
    TOUCHING,
    UNIFIED,
    Layout,
    Prompt,
    gemma4_unifieds,
    layouts,
)

pytestmark = [pytest.mark.correctness, pytest.mark.pair("gemma4_unified")]


def seen_as_stated(outside: witness.Witness, tokens: Tensor, inputs: dict[str, Tensor]) -> witness.WitnessOutput:
    """A pass with the masks that the model itself states for generation, from the types of tokens."""
    masks = outside.model.create_masks_for_generate(
        config=outside.model.config,
        inputs_embeds=torch.zeros(*tokens.shape, 1, dtype=torch.float64),
        attention_mask=None,
        past_key_values=None,
        position_ids=None,
        mm_token_type_ids=inputs["mm_token_type_ids"],
    )
    return outside.run(tokens, inputs={**inputs, "attention_mask": masks})


def both(drawn: Drawn, dtype: torch.dtype = torch.float64) -> tuple[OpenTarget, witness.Witness]:
    """The page and the witness, from one folder."""
    with folders(drawn) as (path, _):
        return open_target(path, dtype=dtype), witness.load(path, dtype=dtype)


def hold_all(out: TargetOutput, want: witness.WitnessOutput, target: OpenTarget) -> None:
    """Every capture point, the final hidden state and the logits; patches pass two layers before the first."""
    size = {"depth": target.num_layers + 2, "width": target.config.hidden}
    for c in range(target.num_layers + 1):
        hold(f"capture point {c}", out.aux[:, :, c], want.aux[:, :, c], **size)
    hold("hidden", out.hidden, want.hidden, **size)
    hold("logits", out.logits, want.logits, **size)


@given(drawn=gemma4_unifieds(), layout=layouts())
@example(drawn=PINNED_UNIFIED, layout=PINNED_LAYOUT)
@example(drawn=PINNED_UNIFIED, layout=TOUCHING)
def test_every_sense_equals_transformers_at_every_capture_point(drawn: Drawn, layout: Layout) -> None:
    prompt = Prompt(drawn.config, layout, drawn.seed)
    target, outside = both(drawn)

    out = target(prompt.tokens, None, range(target.num_layers + 1), **prompt.inputs())

    hold_all(out, seen_as_stated(outside, prompt.tokens, prompt.inputs()), target)


@given(drawn=gemma4_unifieds(), layout=layouts(), cut=st.integers(0, 40))
@example(drawn=PINNED_UNIFIED, layout=PINNED_LAYOUT, cut=3)
@torch.no_grad()
def test_two_passes_with_a_cache_equal_one(drawn: Drawn, layout: Layout, cut: int) -> None:
    prompt = Prompt(drawn.config, layout, drawn.seed)
    target, outside = both(drawn)
    tokens, width, points = prompt.tokens, prompt.width, range(target.num_layers + 1)

    cut = prompt.cuts[cut % len(prompt.cuts)]
    # more slots than tokens: empty ones must stay out of sight
    cache, columns = target.module.new_cache(len(tokens), width + 3), torch.arange(width).expand_as(tokens)
    parts = [
        target.module(tokens[:, a:b], columns[:, a:b], points, cache, **prompt.inputs(a, b))
        for a, b in ((0, cut), (cut, width))
    ]

    whole = TargetOutput(*(torch.cat(pair, 1) for pair in zip(*parts, strict=True)))
    hold_all(whole, seen_as_stated(outside, tokens, prompt.inputs()), target)


@torch.no_grad()
def greedy(target: OpenTarget, prompt: Prompt, num_tokens: int, suppressed: tuple[int, ...]) -> Tensor:
    """The plainest loop: a pass over the prompt, a pass a token, and ids that are never chosen.

    ->  [B, num_tokens]
    """
    batch, width = prompt.tokens.shape
    cache, new = target.module.new_cache(batch, width + num_tokens), []
    logits = target.module(prompt.tokens, cache=cache, **prompt.inputs()).logits
    for position in range(width, width + num_tokens):
        choice = logits[:, -1].index_fill(1, torch.tensor(suppressed, dtype=torch.int64), -torch.inf)
        new.append(choice.argmax(-1, keepdim=True))
        logits = target.module(new[-1], torch.full((batch, 1), position), cache=cache).logits
    return torch.cat(new, 1)


def test_text_after_sound_is_what_transformers_generates() -> None:
    # sound is causal on every path; with images, generate's own paths see what plain forward passes see
    prompt = Prompt(PINNED_UNIFIED.config, SOUND_ALONE, 7)
    target, outside = both(PINNED_UNIFIED)
    # what decoding must not emit: the marks, and here the tokens that it would begin with
    first = greedy(target, prompt, 1, ())
    suppressed = (*target.config.suppressed, *first.flatten().tolist())
    outside.model.generation_config.suppress_tokens = list(suppressed)

    with witness.StayWide():
        want = outside.generate(prompt.tokens, 6, inputs=prompt.inputs())

    assert torch.equal(greedy(target, prompt, 6, suppressed), want)
    assert not torch.isin(want[:, 0], first).any()


@given(layout=layouts())
@example(layout=PINNED_LAYOUT)
def test_placeholders_tell_without_types(layout: Layout) -> None:
    prompt = Prompt(PINNED_UNIFIED.config, layout, 0)
    module = Gemma4UnifiedTarget(Gemma4UnifiedConfig.from_hf(prompt.keys)).double()
    inputs = prompt.inputs()
    untold = {name: value for name, value in inputs.items() if name != "mm_token_type_ids"}

    bit_equal("logits", module(prompt.tokens, **untold).logits, module(prompt.tokens, **inputs).logits)


def test_video_is_causal_in_the_dialect_that_has_it_so() -> None:
    prompt = Prompt(PINNED_UNIFIED.config, PINNED_LAYOUT, 0)
    target, outside = both(PINNED_UNIFIED)
    inputs = prompt.inputs()
    types = inputs["mm_token_type_ids"]

    target.module.c = replace(target.config, video_sees_ahead=False)
    out = target(prompt.tokens, None, range(target.num_layers + 1), **inputs)

    hold_all(
        out, seen_as_stated(outside, prompt.tokens, {**inputs, "mm_token_type_ids": types.where(types != 2, 0)}), target
    )


def test_the_shell_reads_text_as_the_text_model_does(tmp_path: Path) -> None:
    shell = open_target(witness.create(UNIFIED, tmp_path / "shell", seed=3))
    prefix = "language_model."
    inner = {n.removeprefix(prefix): t for n, t in shell.module.state_dict().items() if n.startswith(prefix)}
    tensors = {name: tensor.clone() for name, tensor in inner.items() if name != "lm_head.weight"}
    save_checkpoint(tmp_path / "text", UNIFIED["text_config"], tensors)
    tokens = random_tokens(300, 2, 12, 0)

    outs = [target(tokens, capture=range(6)) for target in (shell, open_target(tmp_path / "text"))]

    for name, pair in zip(TargetOutput._fields, zip(*outs, strict=True), strict=True):
        bit_equal(name, *pair)


IN_MEMORY = (
    ("model.vision_embedder.", "model.embed_vision."),
    ("model.embed_vision.embedding_projection.", "model.embed_vision.multimodal_embedder.embedding_projection."),
)
"""transformers' own names beside those it saves"""


@pytest.mark.parametrize("tied", [True, False])
def test_both_spellings_of_a_checkpoint_are_the_same_model(tied: bool, tmp_path: Path) -> None:
    keys = {**UNIFIED, "tie_word_embeddings": tied}
    path = witness.create(keys, tmp_path / "saved", seed=4)
    tensors = {rename(name, IN_MEMORY): tensor for name, tensor in load_file(path / SINGLE).items()}
    save_checkpoint(tmp_path / "spelled", keys, tensors)

    saved, spelled = open_target(path), open_target(tmp_path / "spelled")

    assert {e.parameter for e in saved.ledger.entries} == {e.parameter for e in spelled.ledger.entries}
    for (name, want), got in zip(saved.module.state_dict().items(), spelled.module.state_dict().values(), strict=True):
        bit_equal(name, got, want)


@pytest.mark.parametrize("absent", ["vision_config", "audio_config"])
def test_a_sense_may_be_absent(absent: str, tmp_path: Path) -> None:
    path = witness.create({**UNIFIED, absent: None}, tmp_path)
    tokens = random_tokens(300, 1, 6, 0)
    target = open_target(path, dtype=torch.float64)

    out = target(tokens, capture=range(target.num_layers + 1))

    hold_all(out, witness.load(path, dtype=torch.float64).run(tokens), target)


def test_placeholders_without_features_are_padding() -> None:
    target, outside = both(PINNED_UNIFIED)
    tokens = random_tokens(300, 2, 8, 0)
    tokens[0, 2:5] = torch.tensor([UNIFIED[f"{kind}_token_id"] for kind in ("image", "video", "audio")])

    out = target(tokens, capture=range(target.num_layers + 1))

    hold_all(out, outside.run(tokens), target)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes_have_the_parameters_of_transformers(name: str) -> None:
    with torch.device("meta"):
        ours = Gemma4UnifiedTarget(Gemma4UnifiedConfig.from_hf(PUBLISHED[name]))
        theirs = witness.build(PUBLISHED[name])

    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())
    assert ours.c == Gemma4UnifiedConfig.from_hf(theirs.config.to_dict())
    assert ours.c.suppressed == SUPPRESSED


@pytest.mark.parametrize("spelling", ["eoa_token_index", "eoa_token_id"])
def test_both_spellings_of_the_end_of_audio_are_read(spelling: str) -> None:
    keys = {name: value for name, value in UNIFIED.items() if name != "eoa_token_index"}

    assert Gemma4UnifiedConfig.from_hf({**keys, spelling: 17}).end_of_audio == 17


VISION, SOUND, TEXT = (UNIFIED[f"{name}_config"] for name in ("vision", "audio", "text"))
REFUSED = {
    "eoa_token_id": {"eoa_token_id": 17},
    "output_proj_dims": {"vision_config": {**VISION, "output_proj_dims": 24}},
    "model_patch_size": {"vision_config": {**VISION, "model_patch_size": 5}},
    "audio_samples_per_token": {"audio_config": {**SOUND, "audio_samples_per_token": 640}},
    "hidden_size_per_layer_input": {"text_config": {**TEXT, "hidden_size_per_layer_input": 8}},
    "text_config.model_type": {"text_config": {**TEXT, "model_type": "gemma4_text"}},
    "tie_word_embeddings": {"tie_word_embeddings": None, "text_config": {**TEXT, "tie_word_embeddings": False}},
    "two meanings": {"video_token_id": UNIFIED["image_token_id"]},
    "vision_soft_tokens": {"vision_soft_tokens": 280},
}
"""what readers disagree on, or what has no mathematics here: words of the message -> change of the pinned config"""


@pytest.mark.parametrize("words", REFUSED)
def test_what_cannot_be_read_in_one_way_is_refused_and_named(words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Gemma4UnifiedConfig.from_hf({**UNIFIED, **REFUSED[words]})


WRONG_INPUTS = {
    "placeholders of images": {"image_position_ids": lambda places: places.clone().fill_(-1)},
    "placeholders of sound": {"input_features_mask": torch.zeros_like},
    "for both, or for neither": {"image_position_ids": lambda places: places.index_fill(-1, torch.tensor(0), -1)},
    r"for 0\.\.4": {"image_position_ids": lambda places: places + 4},
    "image_position_ids": {"image_position_ids": lambda places: None},
    "input_features_mask": {"input_features_mask": lambda mask: None},
}
"""words of the message -> change of what goes with the pinned prompt"""


@pytest.mark.parametrize("words", WRONG_INPUTS)
def test_inputs_that_do_not_fit_the_tokens_are_refused(words: str) -> None:
    prompt = Prompt(PINNED_UNIFIED.config, PINNED_LAYOUT, 0)
    module = Gemma4UnifiedTarget(Gemma4UnifiedConfig.from_hf(prompt.keys)).double()
    inputs = prompt.inputs()

    with pytest.raises(ValueError, match=words):
        module(
            prompt.tokens, **{**inputs, **{name: change(inputs[name]) for name, change in WRONG_INPUTS[words].items()}}
        )
