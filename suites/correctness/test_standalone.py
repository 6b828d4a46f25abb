"""Claim: a model that drafts alone says what it says as a target, reads no state of its target, and keeps to its map.

Born of vLLM's draft models, which must have their target's vocabulary and were once handed its hidden states, and of
SGLang's STANDALONE, which refuses a draft of another width because the two share a buffer.
"""

from pathlib import Path

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from harness.checkpoints import CheckpointError
from harness.compare import bit_equal, hold
from suites.catalog import open_draft, open_speculation, open_target
from suites.draws import Drawn, folders, random_tokens, write_target
from suites.families.gemma3 import tiny_gemma3
from suites.families.qwen3_moe import tiny_qwen3_moe
from suites.opened import OpenSpeculation
from suites.scripted import SIDES, tiny_target

pytestmark = [pytest.mark.correctness, pytest.mark.pair("llama-standalone")]

VOCAB = 13
TARGET = tiny_target(7)
ALONE = {
    "narrower": tiny_target(9, hidden_size=32, num_hidden_layers=1),
    "deeper": tiny_target(9, num_hidden_layers=5),
    "of another family": tiny_gemma3(9),
    "with experts": tiny_qwen3_moe(9),
}
DRAFTS = st.sampled_from(sorted(ALONE))
MAP = torch.tensor([3, 1, 12, 8, 0])
PROMPTS = [torch.tensor([1, 2, 3, 4]), torch.tensor([5]), torch.tensor([6, 7, 8])]


def beside(draft: Drawn, side: str = "reference", token_map: Tensor | None = None, tp_size: int = 1) -> OpenSpeculation:
    """Both opened from folders that are gone afterwards."""
    with folders(TARGET) as (path, _), folders(draft) as (alone, _):
        how = {"side": side, "dtype": torch.float64, "tp_size": tp_size}
        return open_speculation(path, alone, token_map=token_map, **how)


@pytest.mark.parametrize("side", SIDES)
@given(name=DRAFTS, seed=st.integers(0, 99))
@example(name="narrower", seed=0)
def test_it_says_what_it_says_as_a_target(side: str, name: str, seed: int) -> None:
    tokens = random_tokens(VOCAB, 2, 7, seed)
    with folders(ALONE[name]) as (path, _):
        how = {"side": side, "dtype": torch.float64}
        target, draft = open_target(path, **how), open_draft(path, **how)
        mapped = open_draft(path, token_map=MAP, **how)

    logits = target(tokens).logits
    bit_equal("logits", draft(tokens, torch.empty(0)).logits, logits)
    bit_equal("logits of the map", mapped(tokens, torch.empty(0)).logits, logits[..., MAP])


@given(name=DRAFTS, seed=st.integers(0, 99))
@example(name="narrower", seed=0)
def test_its_first_step_has_read_the_whole_text(name: str, seed: int) -> None:
    spec = beside(ALONE[name])
    tokens = random_tokens(VOCAB, 2, 7, seed)

    steps = spec.draft.unroll(tokens, spec.target(tokens), 3)

    for k in range(3):
        for column in range(7 - k - 1):
            alone = spec.draft.module.model(tokens[:, : column + k + 2]).logits[:, -1]
            hold("logits", steps[k, :, column], alone, depth=5, width=96)
        assert bool(steps[k, :, 7 - k - 1 :].isnan().all())


@pytest.mark.parametrize("side", SIDES)
def test_as_a_draft_of_itself_it_is_always_right(side: str) -> None:
    said = beside(TARGET, side).generate(PROMPTS, 13, 3)

    assert said.accepted == [[3, 3, 3]] * 3


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("name", ALONE)
def test_what_the_target_thinks_is_nothing_to_it(side: str, name: str) -> None:
    spec = beside(ALONE[name], side)
    plain = spec.generate(PROMPTS, 10, 0).tokens

    mapped = beside(ALONE[name], side, MAP)

    bit_equal("tokens", spec.generate(PROMPTS, 10, 3).tokens, plain)
    bit_equal("tokens of the map", mapped.generate(PROMPTS, 10, 3).tokens, plain)
    drawn = mapped.generate(PROMPTS, 10, 3, temperature=1.0, seed=5)
    bit_equal(
        "drawn tokens",
        drawn.tokens,
        beside(ALONE[name], "reference", MAP).generate(PROMPTS, 10, 3, temperature=1.0, seed=5).tokens,
    )


def test_only_ids_of_the_map_are_proposed() -> None:
    draft = beside(ALONE["narrower"], "reference", MAP).draft.module
    logits = draft(random_tokens(VOCAB, 2, 5, 1), None).logits

    wide = draft.spread(logits)

    bit_equal("spread", wide[..., MAP], logits)
    assert sorted(wide[0, 0].isfinite().nonzero()[:, 0].tolist()) == sorted(MAP.tolist())
    bit_equal("greedy", wide.argmax(-1), draft.to_target(logits.argmax(-1)))


@pytest.mark.parametrize("ranks", [2])
def test_ranks_say_what_one_says(ranks: int) -> None:
    whole, shared = (beside(ALONE["deeper"], "optimized", MAP, size) for size in (1, ranks))

    bit_equal("tokens", shared.generate(PROMPTS, 10, 3).tokens, whole.generate(PROMPTS, 10, 3).tokens)


@pytest.mark.parametrize(
    ("token_map", "word"),
    [
        (torch.tensor([0.5]), "int64"),
        (torch.tensor([], dtype=torch.int64), "int64"),
        (torch.tensor([1, 13]), r"legal are 0\.\.12"),
        (torch.tensor([-1, 3]), r"legal are 0\.\.12"),
        (torch.tensor([3, 3]), "twice"),
    ],
    ids=["fractions", "empty", "too large", "negative", "twice"],
)
def test_a_map_that_is_none_is_refused(token_map: Tensor, word: str) -> None:
    with pytest.raises(CheckpointError, match=word):
        beside(ALONE["narrower"], "reference", token_map)


def test_another_vocabulary_is_refused_with_both_sizes(tmp_path: Path) -> None:
    target = open_target(write_target(TARGET, tmp_path / "target"))

    with pytest.raises(CheckpointError, match=r"14 tokens.*13"):
        open_draft(write_target(tiny_target(3, vocab=14), tmp_path / "draft"), target)
