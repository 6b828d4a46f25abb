"""Published EAGLE-3 drafts: their configs as their makers write them, without weights.

Provenance: trainers' own templates (SpecForge `configs/*.json`, the EAGLE repository's `traineagle3/config.json`,
speculators' saved configs) and the hub's model cards. The ids are literal; which convention the drafts without a word
use is inferred on the hub from the target's default triple, and no file says it.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple


class Published(NamedTuple):
    """One draft and what its config can be read as."""

    keys: Mapping[str, Any]
    layers: int
    """of its target"""
    after: tuple[int, ...] | None
    """capture points if its ids are after_layer; None where that is illegal"""
    before: tuple[int, ...] | None
    """the same for before_layer"""
    stated: bool = False
    """whether the file itself settles the reading: then `after` and `before` are one"""
    norm_output: bool = False
    """whether `norm_output` has two meanings here and the file says neither"""


def _llama(hidden: int, heads: tuple[int, int], **keys: Any) -> dict[str, Any]:
    """What every trainer writes for a Llama body."""
    return {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_size": hidden,
        "initializer_range": 0.02,
        "max_position_embeddings": 2048,
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        "num_hidden_layers": 1,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        **keys,
    }


def _ids(*ids: int) -> dict[str, Any]:
    return {"eagle_config": {"eagle_aux_hidden_state_layer_ids": [*ids], "use_aux_hidden_state": True}}


PUBLISHED: Mapping[str, Published] = {
    "yuhuili/EAGLE3-LLaMA3.1-Instruct-8B": Published(
        _llama(4096, (32, 8), intermediate_size=14336, vocab_size=128256, draft_vocab_size=32000),
        32,
        (2, 16, 29),
        (2, 16, 29),
        stated=True,
    ),
    "AQ-MedAI/Kimi-K25-eagle3": Published(
        _llama(
            7168,
            (64, 64),
            head_dim=128,
            intermediate_size=18432,
            vocab_size=163840,
            draft_vocab_size=32000,
            rope_theta=1e6,
            **_ids(2, 30, 58),
        ),
        61,
        (3, 31, 59),
        (2, 30, 58),
    ),
    "SpecForge deepseek-v3-671b": Published(
        _llama(7168, (56, 8), intermediate_size=40960, vocab_size=129280, draft_vocab_size=32000, **_ids(1, 29, 57)),
        61,
        (2, 30, 58),
        (1, 29, 57),
    ),
    "SpecForge gpt-oss-120B": Published(
        _llama(
            2880,
            (64, 8),
            head_dim=64,
            intermediate_size=17280,
            vocab_size=201088,
            draft_vocab_size=32000,
            **_ids(1, 17, 33),
        ),
        36,
        (2, 18, 34),
        (1, 17, 33),
    ),
    "gpt-oss-like with the last layer": Published(
        _llama(
            2880,
            (64, 8),
            head_dim=64,
            intermediate_size=17280,
            vocab_size=201088,
            draft_vocab_size=201088,
            norm_before_fc=True,
            **_ids(1, 18, 36),
        ),
        36,
        None,
        (1, 18, 36),
    ),
    "lmsys Qwen3-235B-A22B": Published(
        _llama(
            4096,
            (64, 4),
            head_dim=128,
            intermediate_size=24576,
            vocab_size=151936,
            draft_vocab_size=32000,
            **_ids(1, 46, 90),
        ),
        94,
        (2, 47, 91),
        (1, 46, 90),
    ),
    "SpecForge qwen3-30B-A3B-eagle3.1": Published(
        _llama(
            2048,
            (32, 4),
            head_dim=128,
            intermediate_size=12288,
            vocab_size=151936,
            draft_vocab_size=32000,
            rope_theta=1e6,
            fc_norm=True,
            norm_output=True,
        ),
        48,
        (2, 24, 45),
        (2, 24, 45),
        stated=True,
        norm_output=True,
    ),
    "RedHatAI/Llama-3.1-8B-Instruct-speculator.eagle3": Published(
        {
            "architectures": ["Eagle3Speculator"],
            "speculators_model_type": "eagle3",
            "speculators_version": "0.9.0",
            "draft_vocab_size": 32000,
            "norm_before_residual": True,
            "eagle_aux_hidden_state_layer_ids": [2, 16, 29],
            "speculators_config": {
                "algorithm": "eagle3",
                "default_proposal_method": "greedy",
                "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": 3}],
                "verifier": {"architectures": ["LlamaForCausalLM"], "name_or_path": "meta-llama/Llama-3.1-8B-Instruct"},
            },
            "transformer_layer_config": {
                key: value
                for key, value in _llama(
                    4096, (32, 8), head_dim=128, intermediate_size=14336, vocab_size=128256, rope_theta=500000.0
                ).items()
                if key not in ("architectures", "torch_dtype")
            },
            "torch_dtype": "bfloat16",
        },
        32,
        (2, 16, 29),
        (2, 16, 29),
        stated=True,
    ),
}
