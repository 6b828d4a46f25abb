"""Claim: what the zoo ships is what its recipes made, and what a recipe saves opens as what was trained.

Born of a card that quoted an acceptance length of a target that loops, and of trainers whose files another reader takes
for another draft.
"""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from suites.benchmarks.shipped import ZOO
from suites.catalog import open_speculation
from suites.zoo.entries import DRAFTS, TARGETS, target_of
from suites.zoo.measure import repeated_share
from suites.zoo.muon import orthogonal
from suites.zoo.published import draft_config
from suites.zoo.train_draft import DraftRecipe, new_draft, save_draft
from suites.zoo.train_target import closes_repeat

pytestmark = pytest.mark.correctness

FIRST = {"llama", "llama-eagle3"}
"""trained before there were entries; their records have a form of their own"""
LARGEST = 30_000_000
"""bytes of all weights"""


def record(name: str) -> dict[str, object]:
    found: dict[str, object] = json.loads((ZOO / name / "training.json").read_text(encoding="utf-8"))
    return found


@pytest.mark.parametrize("name", sorted({**TARGETS, **DRAFTS}.keys() - FIRST))
def test_a_record_states_the_recipe_of_its_entry(name: str) -> None:
    recipe = {**TARGETS, **DRAFTS}[name]

    assert record(name)["recipe"] == json.loads(json.dumps(dataclasses.asdict(recipe)))


def test_all_weights_together_are_small() -> None:
    sizes = {name: (ZOO / name / "model.safetensors").stat().st_size for name in [*TARGETS, *DRAFTS]}

    assert sum(sizes.values()) <= LARGEST, sizes


@pytest.mark.parametrize("name", DRAFTS)
def test_every_pair_was_measured_on_text_that_does_not_loop(name: str) -> None:
    (case,) = [c for c in record(name)["measured"]["cases"] if (c["temperature"], c["num_tokens"]) == (0.0, 64)]  # type: ignore[index]

    assert case["acceptance_length"] >= 2
    assert case["repeated_share"] <= 0.5
    assert f"| {case['acceptance_length']:.3f} |" in (ZOO / name / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", DRAFTS)
def test_a_saved_draft_opens_as_what_was_trained(name: str, tmp_path: Path) -> None:
    recipe, of = DRAFTS[name], ZOO / target_of(name)
    target = AutoModelForCausalLM.from_pretrained(of, dtype=torch.float32).eval()
    draft, tokens = written(target, recipe, tmp_path), torch.arange(5, 17).view(1, -1)

    opened = open_speculation(of, tmp_path, side="reference")
    out = opened.target(tokens, capture=opened.draft.capture_points)
    if hasattr(draft, "target"):
        draft.join(opened.target.module)
    steps = draft.unroll(tokens, draft.read(out), recipe.draft_steps)

    torch.testing.assert_close(opened.draft.unroll(tokens, out, recipe.draft_steps), steps, equal_nan=True)


@torch.no_grad()
def written(target: torch.nn.Module, recipe: DraftRecipe, folder: Path) -> torch.nn.Module:
    """A draft before its first step, with weights that bfloat16 holds."""
    vocab = recipe.draft_vocab or target.config.vocab_size
    ids = torch.randperm(target.config.vocab_size, generator=torch.Generator().manual_seed(1))[:vocab].sort().values
    config = draft_config(recipe.way, target.config, recipe.architecture, mask=116)
    draft = new_draft(target, config, recipe, ids).eval().requires_grad_(False)
    for parameter in draft.parameters():
        # norms away from 1, so that none can be taken for another
        parameter.add_(torch.randn_like(parameter), alpha=0.05).copy_(parameter.bfloat16())
    for name in ("embed_tokens", "lm_head"):
        if f"{name}.weight" in getattr(draft.c, "optional", ()):
            table = target.get_input_embeddings() if name == "embed_tokens" else target.lm_head
            getattr(draft, name).weight.copy_(table.weight)
    save_draft(draft, config, recipe, folder)
    return draft


def test_a_repeat_is_seen_where_the_measure_counts_it() -> None:
    text = torch.randint(0, 3, (4, 40), generator=torch.Generator().manual_seed(0))

    share = closes_repeat(text)[:, 3:].float().mean().item()

    assert share == pytest.approx(repeated_share(text.tolist()))
    assert 0 < share < 1


@pytest.mark.parametrize("shape", [(3, 8, 20), (2, 20, 8), (1, 16, 16)])
def test_muon_moves_along_the_orthogonal_factor(shape: tuple[int, ...]) -> None:
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    left, _, right = torch.linalg.svd(matrices, full_matrices=False)

    found = orthogonal(matrices)

    # the polynomial stops between 0.7 and 1.2: the singular vectors are what it keeps
    along = left.mT @ found @ right.mT
    values = along.diagonal(dim1=1, dim2=2)
    assert ((values > 0.5) & (values < 1.3)).all()
    torch.testing.assert_close(along, torch.diag_embed(values), atol=1e-4, rtol=0)
