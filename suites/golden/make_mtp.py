"""Make mtp.safetensors: a multi-token module around a layer of Qwen3-MoE and what speculators 0.9.0 computes with it.

speculators has the module (`MTPLayerMixin`: two norms, projection, a decoder layer, the final norm), its training
steps (`MTPDraftModel`) and the reader of published `mtp.` names (`MTPConverter`); it puts them around the layers of
Qwen3, Qwen3-Next and Qwen3.5. Here they are put around transformers' layer of Qwen3-MoE, by the functions that it has
for that. Its training steps are passes of their own: step k sees the keys of step k alone, at the positions of step 1.
Environment and habits: make_golden.py.

    golden_venv/bin/python suites/golden/make_mtp.py suites/golden
"""

import argparse
import json
import os
import tempfile
import zlib
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ["TORCHDYNAMO_DISABLE"] = "1"

import torch
from safetensors.torch import save_file
from speculators import SpeculatorsConfig, VerifierConfig
from speculators.convert.mtp.converter import MTPConverter
from speculators.models import base_components
from speculators.models.mtp import MTPDraftModel, MTPSpeculatorConfig
from speculators.models.mtp.model_definitions import _create_mtp_layer_class, mtp_model_classes
from speculators.proposals.greedy import GreedyTokenProposalConfig
from torch import Tensor
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import (
    Qwen3MoeDecoderLayer,
    Qwen3MoeRMSNorm,
    Qwen3MoeRotaryEmbedding,
)

BATCH, TOKENS, STEPS, HIDDEN, VOCAB, EXPERTS, WIDTH = 2, 9, 3, 24, 61, 4, 8
BODY = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": 20,
    "moe_intermediate_size": WIDTH,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts": EXPERTS,
    "num_experts_per_tok": 2,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
}
CASES: dict[str, dict[str, Any]] = {"normed": {"norm_topk_prob": True}, "raw": {"norm_topk_prob": False}}


def shapes() -> dict[str, tuple[int, ...]]:
    """Every tensor of the module as published: name and shape."""
    layer, heads, keys = "mtp.layers.0.", 32, 16
    named: dict[str, tuple[int, ...]] = {
        "mtp.fc.weight": (HIDDEN, 2 * HIDDEN),
        "mtp.pre_fc_norm_embedding.weight": (HIDDEN,),
        "mtp.pre_fc_norm_hidden.weight": (HIDDEN,),
        "mtp.norm.weight": (HIDDEN,),
        f"{layer}input_layernorm.weight": (HIDDEN,),
        f"{layer}post_attention_layernorm.weight": (HIDDEN,),
        f"{layer}self_attn.q_proj.weight": (heads, HIDDEN),
        f"{layer}self_attn.k_proj.weight": (keys, HIDDEN),
        f"{layer}self_attn.v_proj.weight": (keys, HIDDEN),
        f"{layer}self_attn.o_proj.weight": (HIDDEN, heads),
        f"{layer}self_attn.q_norm.weight": (8,),
        f"{layer}self_attn.k_norm.weight": (8,),
        f"{layer}mlp.gate.weight": (EXPERTS, HIDDEN),
    }
    for expert in range(EXPERTS):
        for name, shape in (("gate", (WIDTH, HIDDEN)), ("up", (WIDTH, HIDDEN)), ("down", (HIDDEN, WIDTH))):
            named[f"{layer}mlp.experts.{expert}.{name}_proj.weight"] = shape
    return named


def draw(shape: tuple[int, ...], seed: torch.Generator) -> Tensor:
    """Norms around one, not at one; matrices keep the size of what they read."""
    if len(shape) == 1:
        return 0.5 + torch.rand(shape, generator=seed)
    return torch.randn(shape, generator=seed) / shape[1] ** 0.5


def build(config: Qwen3MoeConfig, folder: Path) -> MTPDraftModel:
    """speculators' module with the weights of a published folder, read by speculators' own converter."""
    proposal = GreedyTokenProposalConfig(speculative_tokens=STEPS)
    verifier = VerifierConfig(name_or_path=None, architectures=["Qwen3MoeForCausalLM"])
    config._attn_implementation = "eager"
    facts = MTPSpeculatorConfig(
        transformer_layer_config=config,
        speculators_config=SpeculatorsConfig(
            algorithm="mtp", proposal_methods=[proposal], default_proposal_method="greedy", verifier=verifier
        ),
    )
    model = MTPDraftModel(facts).eval()
    missing, unexpected = model.load_state_dict(MTPConverter().convert_to_state_dict(folder), strict=False)
    tables = {"embed_tokens.weight", "lm_head.weight", "verifier_lm_head.weight"}
    if unexpected or set(missing) != tables:
        raise RuntimeError(f"unexpected {unexpected}, missing {sorted(set(missing) - tables)}")
    return model


@torch.no_grad()
def make(name: str) -> dict[str, Tensor]:
    """One case: weights, inputs and the logits of each training step."""
    seed = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    weights = {spelled: draw(shape, seed) for spelled, shape in sorted(shapes().items())}
    tables = {table: draw((VOCAB, HIDDEN), seed) for table in ("model.embed_tokens.weight", "lm_head.weight")}
    tokens = torch.randint(VOCAB, (BATCH, TOKENS), generator=seed)
    hidden = torch.randn(BATCH, TOKENS, HIDDEN, generator=seed)
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root)
        save_file(weights | tables, folder / "model.safetensors", {"format": "pt"})
        (folder / "config.json").write_text(json.dumps({"model_type": "qwen3_moe", **BODY, **CASES[name]}))
        model = build(Qwen3MoeConfig(**BODY, **CASES[name]), folder)
    model.embed_tokens.weight.copy_(tables["model.embed_tokens.weight"])
    model.lm_head.weight.copy_(tables["lm_head.weight"])
    logits, _, _ = model(tokens, hidden)
    golden = {"tokens": tokens, "hidden": hidden, "logits": torch.stack(logits), **weights, **tables}
    if not golden["logits"].isfinite().all():
        raise RuntimeError(f"{name}: logits are not finite")
    return {f"{name}/{spelled}": tensor for spelled, tensor in golden.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description="Write mtp.safetensors.")
    parser.add_argument("out", type=Path, help="the folder that holds the golden tensors")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    layer = _create_mtp_layer_class("Qwen3MoeMTPLayer", Qwen3MoeDecoderLayer, Qwen3MoeRMSNorm)
    parts = (layer, Qwen3MoeDecoderLayer, Qwen3MoeRMSNorm, Qwen3MoeRotaryEmbedding)
    mtp_model_classes["qwen3_moe"] = base_components.ModelComponents(*parts)
    tensors = {key: tensor.contiguous() for name in CASES for key, tensor in make(name).items()}
    header = {name: json.dumps({"model_type": "qwen3_moe", **BODY, **flags}) for name, flags in CASES.items()}
    versions = {package: version(package) for package in ("speculators", "torch", "transformers")}
    save_file(tensors, chosen.out / "mtp.safetensors", metadata=header | versions)


if __name__ == "__main__":
    main()
