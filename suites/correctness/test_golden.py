"""Claim: the EAGLE-3 reference computes what two trainers compute, at draft steps 1, 2 and 3.

Born of vLLM #42764: `norm_output` and `fc_norm` of a published draft went unread, and a first-step test cannot see it.
The golden tensors were made by SpecForge and speculators themselves (suites/golden/make_golden.py) and stored.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from harness.checkpoints import read_json, save_checkpoint, state_of
from reference.drafts.eagle3 import Eagle3Config
from reference.targets.llama import LlamaConfig, LlamaTarget
from suites.catalog import OpenDraft, open_draft, open_target
from suites.draws import LLAMA

pytestmark = [pytest.mark.correctness, pytest.mark.pair("eagle3")]

GOLDEN = Path(__file__).parent.parent / "golden"
CASES = sorted(folder.name for folder in GOLDEN.iterdir() if (folder / "golden.safetensors").is_file())
LARGEST_ERROR = 1e-5
"""float32, absolute, as published for these trainers against each other"""


def open_case(name: str, root: Path) -> tuple[OpenDraft, dict[str, Tensor]]:
    """A stored draft, joined to a target that has the embedding it was made with."""
    golden = load_file(GOLDEN / name / "golden.safetensors")
    # SpecForge says `norm_output` of the norm before the head, speculators of the feedback
    meaning = "head" if name.startswith("specforge") else None
    facts = Eagle3Config.from_hf(read_json(GOLDEN / name / "config.json"), norm_output=meaning)
    sizes = {"vocab_size": facts.vocab, "hidden_size": facts.aux_width, "num_attention_heads": 2, "head_dim": 8}
    config = {**LLAMA, **sizes}
    state = state_of(LlamaTarget(LlamaConfig.from_hf(config)))
    weights = {key: torch.zeros_like(value) for key, value in state.items()}
    draft = GOLDEN / name
    if facts.aux_width != facts.hidden:
        # a draft of another width cannot share the target's table and has to ship its own
        draft = root / "draft"
        tensors = load_file(GOLDEN / name / "model.safetensors")
        table = {"embed_tokens.weight": golden["embed_tokens.weight"]}
        save_checkpoint(draft, read_json(GOLDEN / name / "config.json"), tensors | table)
    elif "embed_tokens.weight" in golden:
        weights["embed_tokens.weight"] = golden["embed_tokens.weight"]
    save_checkpoint(root / "target", config, weights)
    return open_draft(draft, open_target(root / "target"), norm_output=meaning), golden


def test_every_stored_case_is_here() -> None:
    outside = {name.split("_")[0] for name in CASES}

    assert outside == {"specforge", "speculators"}
    assert len(CASES) >= 12


@pytest.mark.parametrize("name", CASES)
def test_the_reference_equals_the_trainer_at_every_step(name: str, tmp_path: Path) -> None:
    draft, golden = open_case(name, tmp_path)
    hidden = draft.fuse(golden["aux"])

    logits = draft.module.unroll(golden["tokens"], hidden, num_steps=3)

    assert torch.equal(logits.isnan(), golden["logits"].isnan())
    known = ~logits.isnan()
    for step in range(3):
        error = (logits[step] - golden["logits"][step])[known[step]].abs().max()
        assert error <= LARGEST_ERROR, f"{name}: draft step {step + 1} differs by {error:.3g}"
