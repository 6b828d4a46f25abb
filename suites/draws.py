"""Random tiny checkpoints of every pair: small, not simplified.

Configs are drawn field by field, so that hypothesis can shrink them; weights come from one seed. Both sides read them
from a folder on disk, written by transformers (targets) or by us in the published format (drafts).
"""

import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from harness import witness
from harness.checkpoints import save_checkpoint, state_of
from suites.algorithms import DRAFT_ARCHITECTURES
from suites.catalog import PAIRS

VOCABS = (97, 130, 331, 512, 1000)
SEEDS = st.integers(0, 2**20)


@dataclass(frozen=True)
class Drawn:
    """A checkpoint still to be written."""

    config: str
    """config.json as text: hashable, and printed whole when a claim fails"""
    seed: int

    @property
    def keys(self) -> dict[str, Any]:
        return json.loads(self.config)


def _drawn(config: Mapping[str, Any], seed: int) -> Drawn:
    return Drawn(json.dumps(config), seed)


ROPES = (
    {"rope_type": "default"},
    {"rope_type": "linear", "factor": 3.0},
    {"rope_type": "dynamic", "factor": 2.0},
    {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 16,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
    },
)

ALL_ROPES = tuple(rope["rope_type"] for rope in ROPES)
FIXED_ROPES = ("default", "linear", "llama3", "yarn")
"""ropes whose angles do not depend on how much has been seen"""


@st.composite
def ropes(draw: st.DrawFn, kinds: tuple[str, ...] = ALL_ROPES) -> dict[str, Any]:
    """`rope_parameters` of a config."""
    rope = draw(st.sampled_from([r for r in ROPES if r["rope_type"] in kinds]))
    return {**rope, "rope_theta": draw(st.sampled_from([100.0, 10_000.0, 500_000.0]))}


@st.composite
def llama_targets(
    draw: st.DrawFn,
    min_layers: int = 1,
    max_layers: int = 8,
    kinds: tuple[str, ...] = ALL_ROPES,
    kv_heads: tuple[int, ...] = (1, 2, 4),
    vocabs: tuple[int, ...] = VOCABS,
) -> Drawn:
    """A Llama target; query heads are one to three a key/value head."""
    groups, head_dim = draw(st.sampled_from(kv_heads)), draw(st.sampled_from([8, 16]))
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": draw(st.sampled_from(vocabs)),
        "hidden_size": draw(st.sampled_from([48, 96])),
        "intermediate_size": draw(st.sampled_from([48, 64, 96])),
        "num_hidden_layers": draw(st.integers(min_layers, max_layers)),
        "num_attention_heads": groups * draw(st.integers(1, 3)),
        "num_key_value_heads": groups,
        "head_dim": head_dim,
        "max_position_embeddings": 32,
        "rms_norm_eps": draw(st.sampled_from([1e-6, 1e-5, 1e-2])),
        "rope_parameters": draw(ropes(kinds)),
        "attention_bias": draw(st.booleans()),
        "mlp_bias": draw(st.booleans()),
        "tie_word_embeddings": draw(st.booleans()),
        "hidden_act": "silu",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    return _drawn(config, draw(SEEDS))


LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 331,
    "hidden_size": 96,
    "intermediate_size": 96,
    "num_hidden_layers": 8,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_theta": 500000.0, **ROPES[3], "original_max_position_embeddings": 64},
    "attention_bias": True,
    "mlp_bias": True,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
}
"""the pinned target: every bias, grouped heads, scaled rope, a vocabulary that nothing divides"""

EAGLE3 = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLMEagle3"],
    "vocab_size": 331,
    "draft_vocab_size": 97,
    "hidden_size": 96,
    "intermediate_size": 80,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "eagle_config": {"layer_ids": "after_layer", "eagle_aux_hidden_state_layer_ids": [1, 3, 5]},
}
"""the pinned draft: plain EAGLE-3 beside `LLAMA`"""

PINNED_TARGET, PINNED_DRAFT = _drawn(LLAMA, 1), _drawn(EAGLE3, 2)


def variant(config: Mapping[str, Any] = EAGLE3, seed: int = 2, **changes: Any) -> Drawn:
    """A pinned config with changes; `eagle_config` entries are merged."""
    merged = {**config, **changes}
    if "eagle_config" in changes:
        merged["eagle_config"] = {**config.get("eagle_config", {}), **changes["eagle_config"]}
    return _drawn(merged, seed)


EVERY_FLAG = variant(
    num_hidden_layers=2,
    fc_norm=True,
    norm_before_fc=True,
    norm_before_residual=True,
    attention_bias=True,
    mlp_bias=True,
    bias=True,
    logit_scale=0.5,
    layer_types=["full_attention", "sliding_attention"],
    sliding_window=6,
    eagle_config={"feedback_normed": True, "norm_before_head": True, "eagle_aux_hidden_state_layer_ids": [0, 3, 5, 7]},
)
"""a draft with all flags at once"""


@st.composite
def eagle3_drafts(draw: st.DrawFn, target: Drawn, kinds: tuple[str, ...] = FIXED_ROPES) -> Drawn:
    """An EAGLE-3 draft that fits a target: any flags, one to four aux states, own or shared tables."""
    t, flag = target.keys, st.booleans()
    layers, num_layers = draw(st.integers(1, 2)), t["num_hidden_layers"]
    ids = draw(st.lists(st.integers(0, num_layers - 1), min_size=1, max_size=4, unique=True))
    groups = draw(st.sampled_from([1, 2, 4]))
    qwen3, sliding = draw(flag), draw(flag)
    small = draw(flag)
    config = {
        "model_type": "qwen3" if qwen3 else "llama",
        "architectures": ["Qwen3ForCausalLMEagle3" if qwen3 else "LlamaForCausalLMEagle3"],
        "vocab_size": t["vocab_size"],
        "draft_vocab_size": draw(st.sampled_from([33, 64, 97])) if small else t["vocab_size"],
        "hidden_size": t["hidden_size"],
        "intermediate_size": draw(st.sampled_from([48, 80])),
        "num_hidden_layers": layers,
        "num_attention_heads": groups * draw(st.integers(1, 2)),
        "num_key_value_heads": groups,
        "head_dim": draw(st.sampled_from([8, 16])),
        "max_position_embeddings": 64,
        "rms_norm_eps": draw(st.sampled_from([1e-6, 1e-5])),
        "rope_parameters": draw(ropes(kinds)),
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "attention_bias": draw(flag),
        "mlp_bias": draw(flag),
        "bias": draw(flag),
        "fc_norm": draw(flag),
        "norm_before_fc": draw(flag),
        "norm_before_residual": draw(flag),
        "logit_scale": draw(st.sampled_from([1.0, 0.25])),
        "eagle_config": {
            "layer_ids": "after_layer",
            "eagle_aux_hidden_state_layer_ids": ids,
            "norm_before_head": draw(flag),
            "feedback_normed": draw(flag),
            "later_norm": draw(st.sampled_from(["input_layernorm", "hidden_norm"])),
        },
    }
    if sliding:
        config |= {"sliding_window": draw(st.integers(3, 9)), "layer_types": ["sliding_attention"] * layers}
    return _drawn(config, draw(SEEDS))


def eagle3_weights(drawn: Drawn, own_embedding: bool = True) -> dict[str, Tensor]:
    """Random tensors of an EAGLE-3 draft as published: norms off one, biases off zero, a sorted vocabulary map."""
    pair = PAIRS[DRAFT_ARCHITECTURES[drawn.keys["architectures"][0]]]
    config = pair.read_config(drawn.keys)
    generator = torch.Generator().manual_seed(drawn.seed)
    module = pair.reference(config)
    tensors: dict[str, Tensor] = {}
    for name, value in state_of(module).items():
        noise = torch.randn(value.shape, generator=generator)
        if name in ("d2t", "t2d"):
            continue
        tensors[name] = 1 + 0.2 * noise if name.endswith("norm.weight") or "fc_norm" in name else noise
        if value.dim() == 2:
            tensors[name] = noise * value.shape[1] ** -0.5
        elif name.endswith("bias"):
            tensors[name] = 0.2 * noise
    if config.draft_vocab < config.vocab:
        ids = torch.randperm(config.vocab, generator=generator)[: config.draft_vocab].sort().values
        tensors["d2t"] = ids - torch.arange(config.draft_vocab)
        tensors["t2d"] = torch.zeros(config.vocab, dtype=torch.bool).index_fill_(0, ids, True)
    if not own_embedding:
        del tensors["embed_tokens.weight"]
    return {name.replace("layers.0.", "midlayer."): tensor for name, tensor in tensors.items()}


def write_target(drawn: Drawn, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """Have transformers write the checkpoint."""
    return witness.create(drawn.keys, folder, seed=drawn.seed, dtype=dtype)


def write_draft(drawn: Drawn, folder: Path, own_embedding: bool = True) -> Path:
    """Write the checkpoint as trainers do."""
    save_checkpoint(folder, drawn.keys, eagle3_weights(drawn, own_embedding))
    return folder


@contextmanager
def folders(target: Drawn, draft: Drawn | None = None, own_embedding: bool = True) -> Iterator[tuple[Path, Path]]:
    """Both checkpoints on disk for the time of one example: (target, draft)."""
    with tempfile.TemporaryDirectory() as root:
        paths = Path(root, "target"), Path(root, "draft")
        write_target(target, paths[0])
        if draft is not None:
            write_draft(draft, paths[1], own_embedding)
        yield paths


def random_tokens(vocab: int, batch: int, width: int, seed: int) -> Tensor:
    """[B, T]"""
    return torch.randint(0, vocab, (batch, width), generator=torch.Generator().manual_seed(seed))
