"""A random Llama of 100 M parameters and an EAGLE-3 draft that fits it: the speed of a size that no repository ships.

Random weights accept nothing, so its speculative arm is timed with forced acceptance, and says so.
"""

import json
from pathlib import Path

import torch
from torch import Tensor

from harness.pairs import Speculation
from suites.benchmarks.shipped import Located
from suites.draws import Drawn, random_tokens, write_draft, write_target

VOCAB, SEED = 32000, 0
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
SIZES = {
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_parameters": ROPE,
    "hidden_act": "silu",
    "vocab_size": VOCAB,
    "model_type": "llama",
}
TARGET = {**SIZES, "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 12, "tie_word_embeddings": True}
DRAFT = {
    **SIZES,
    "architectures": ["LlamaForCausalLMEagle3"],
    "num_hidden_layers": 1,
    "draft_vocab_size": 8192,
    "tie_word_embeddings": False,
    "eagle_config": {"layer_ids": "after_layer", "eagle_aux_hidden_state_layer_ids": [1, 5, 8]},
}


def make(folder: Path) -> Located:
    """Write both checkpoints, the target's weights in bfloat16."""
    target = write_target(Drawn(json.dumps(TARGET), SEED), folder / "target", torch.bfloat16)
    draft = write_draft(Drawn(json.dumps(DRAFT), SEED + 1), folder / "draft", own_embedding=False)
    return Located(Speculation("llama-100m", "llama", "eagle3", "EAGLE3"), folder, target, draft)


def prompts(count: int, width: int = 64) -> tuple[Tensor, ...]:
    """Random token ids, one [T] a prompt."""
    return tuple(random_tokens(VOCAB, count, width, SEED))
