"""Claim: the witness tells what passes through the model at every capture point, and its weights hide no mistake.

Born of transformers' own `hidden_states`, whose last entry is taken after the final norm.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from harness import witness
from harness.checkpoints import CheckpointError
from harness.compare import Mismatch, bit_equal

pytestmark = pytest.mark.correctness

LLAMA = {
    "model_type": "llama",
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "attention_bias": True,
    "tie_word_embeddings": False,
    "max_position_embeddings": 64,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return witness.create(LLAMA, tmp_path_factory.mktemp("llama"), seed=3)


@pytest.fixture(scope="module")
def model(folder: Path) -> witness.Witness:
    return witness.load(folder, dtype=torch.float64)


def test_every_capture_point_is_seen_where_it_passes(model):
    tokens = torch.arange(14).reshape(2, 7)
    out = model.run(tokens)
    with torch.no_grad(), witness.StayWide():
        states = model.model(tokens, output_hidden_states=True).hidden_states
        last = model.decoder.norm(out.aux[:, :, 3])
        logits = model.model.lm_head(out.hidden)

    assert out.aux.shape == (2, 7, 4, 32)
    for c in range(3):
        bit_equal(f"capture point {c}", out.aux[:, :, c], states[c])
    bit_equal("hidden", out.hidden, states[3])
    bit_equal("the last capture point, normed", last, out.hidden)
    bit_equal("logits", logits, out.logits)
    with pytest.raises(Mismatch):
        bit_equal("the last capture point", out.aux[:, :, 3], states[3])


def test_weights_hide_no_mistake(folder):
    weights = load_file(folder / "model.safetensors")
    norms = [tensor for name, tensor in weights.items() if "norm" in name]
    biases = [tensor for name, tensor in weights.items() if name.endswith(".bias")]

    assert norms
    assert biases
    assert all(tensor.std() > 0.05 and abs(tensor.mean() - 1) < 0.2 for tensor in norms)
    assert all(tensor.std() > 0.05 for tensor in biases)


def test_equal_seeds_give_equal_weights_and_leave_the_config(folder, tmp_path):
    before = dict(LLAMA)
    again = load_file(witness.create(LLAMA, tmp_path / "again", seed=3) / "model.safetensors")
    other = load_file(witness.create(LLAMA, tmp_path / "other", seed=4) / "model.safetensors")

    for name, tensor in load_file(folder / "model.safetensors").items():
        bit_equal(name, again[name], tensor)
        assert not torch.equal(other[name], tensor)
    assert before == LLAMA


def test_greedy_decoding_takes_the_largest_logit_and_stops_at_the_end(model):
    prompts = torch.arange(10).reshape(2, 5)
    tokens = model.generate(prompts, 6)
    chosen = model.run(torch.cat([prompts, tokens], 1)).logits.argmax(-1)[:, 4:-1]
    assert torch.equal(tokens, chosen)

    end = int(tokens[0, 2])
    stopped = model.generate(prompts, 6, eos_token_id=end)
    first = int((tokens[0] == end).nonzero()[0])
    assert torch.equal(stopped[0, : first + 1], tokens[0, : first + 1])
    assert (stopped[0, first + 1 :] == -1).all()


def test_a_checkpoint_with_a_hole_is_refused(folder, tmp_path):
    weights = load_file(folder / "model.safetensors")
    del weights["model.norm.weight"]
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    witness.save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})

    with pytest.raises(CheckpointError, match=r"missing_keys \['model\.norm\.weight'\]"):
        witness.load(tmp_path)
    with pytest.raises(CheckpointError, match="model_type"):
        witness.build({"vocab_size": 8})
    with pytest.raises(CheckpointError, match="no_such_model"):
        witness.build({"model_type": "no_such_model"})
