"""Next-token modules beside their targets: tiny checkpoints with both in one folder, or the module in one of its own.

A drawn config is the target's, and the module's too: both are read from one file, as published.
"""

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from harness.checkpoints import CONFIG, SINGLE, save_checkpoint, state_of
from reference.drafts.deepseek_nextn import DeepseekNextnConfig, DeepseekNextnDraft
from reference.drafts.qwen3_moe_mtp import Qwen3MoeMtpConfig, Qwen3MoeMtpDraft
from suites.catalog import open_speculation
from suites.draws import Drawn, variant, write_target
from suites.families.deepseek import SIGMOID, THIRD, deepseek_targets, tiny_deepseek
from suites.families.qwen3_moe import NORMED, qwen3_moe_targets, tiny_qwen3_moe
from suites.opened import OpenSpeculation

TABLES = ("embed_tokens.weight", "lm_head.weight")


def module_of(drawn: Drawn) -> nn.Module:
    """The module of a drawn target, its parameters not yet drawn."""
    if drawn.keys["model_type"] == "qwen3_moe":
        return Qwen3MoeMtpDraft(Qwen3MoeMtpConfig.from_hf(drawn.keys))
    return DeepseekNextnDraft(DeepseekNextnConfig.from_hf(drawn.keys))


def published(drawn: Drawn) -> Callable[[str], str]:
    """How the checkpoint spells a parameter of the module."""
    if drawn.keys["model_type"] == "qwen3_moe":
        return lambda name: f"mtp.{name}"
    behind, tables = (
        drawn.keys["num_hidden_layers"],
        dict(zip(TABLES, ("embed_tokens", "shared_head.head"), strict=True)),
    )

    def spell(name: str) -> str:
        if name in tables:
            return f"model.layers.{behind}.{tables[name]}.weight"
        _, layer, rest = name.split(".", 2)
        return f"model.layers.{behind + int(layer)}.{rest}"

    return spell


def next_token_weights(drawn: Drawn) -> dict[str, Tensor]:
    """Random tensors of a module under its published names, without copies of the target's tables."""
    generator = torch.Generator().manual_seed(drawn.seed + 1)
    spell, tensors = published(drawn), {}
    for name, value in state_of(module_of(drawn)).items():
        noise = torch.randn(value.shape, generator=generator)
        if name in TABLES:
            continue
        if value.dim() > 1:
            tensors[spell(name)] = noise * value.shape[1] ** -0.5
        else:
            # norms off one, biases off zero
            tensors[spell(name)] = 0.2 * noise + float("norm" in name.rsplit(".", 2)[-2])
    return tensors


def write_whole(drawn: Drawn, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """The target as transformers writes it, the module beside it in the same file."""
    write_target(drawn, folder, dtype)
    extra = {name: tensor.to(dtype) for name, tensor in next_token_weights(drawn).items()}
    save_file({**load_file(folder / SINGLE), **extra}, folder / SINGLE, {"format": "pt"})
    # transformers spells some keys in its own way and leaves out those that it does not know
    (folder / CONFIG).write_text(json.dumps(drawn.keys), encoding="utf-8")
    return folder


def write_alone(drawn: Drawn, folder: Path) -> Path:
    """The module in a folder of its own."""
    save_checkpoint(folder, drawn.keys, next_token_weights(drawn))
    return folder


def open_whole(
    drawn: Drawn, side: str = "reference", dtype: torch.dtype = torch.float64, **how: Any
) -> OpenSpeculation:
    """Target and module, opened from one folder that is gone afterwards."""
    with tempfile.TemporaryDirectory() as root:
        path = write_whole(drawn, Path(root))
        return open_speculation(path, path, side=side, dtype=dtype, **how)


@st.composite
def next_token_pairs(draw: st.DrawFn, family: str, **facts: Any) -> Drawn:
    """A target and its module: one layer of Qwen3-MoE, one to three of DeepSeek V3."""
    if family == "qwen3_moe_mtp":
        return draw(qwen3_moe_targets(**facts))
    drawn = draw(deepseek_targets((THIRD,), **facts))
    behind = {"num_nextn_predict_layers": draw(st.integers(1, 3))}
    if draw(st.booleans()):
        behind["nextn_zero_first_embedding"] = True
    return Drawn(json.dumps({**drawn.keys, **behind}), drawn.seed)


QWEN3_MOE = variant(NORMED, 11, num_hidden_layers=3)
"""the pinned pair of Qwen3-MoE; a layer of the target is dense, the module's is not"""
DEEPSEEK = variant(SIGMOID, 12, num_hidden_layers=3)
"""the pinned pair of DeepSeek V3"""
DEEPSEEK_TWO = variant(SIGMOID, 13, num_hidden_layers=2, num_nextn_predict_layers=2)
"""two layers behind the last"""
DEEPSEEK_ZERO = variant(SIGMOID, 14, num_hidden_layers=2, nextn_zero_first_embedding=True)
"""the embedding at position 0 is zero"""


def tiny_next_token(family: str, seed: int, vocab: int = 13, **changes: Any) -> Drawn:
    """A target of three layers and its module, for loops."""
    return (tiny_qwen3_moe if family == "qwen3_moe_mtp" else tiny_deepseek)(seed, vocab, **changes)
