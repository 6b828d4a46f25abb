"""The `config.json` of every draft of the zoo, in the form that trainers publish for its way of drafting."""

from typing import Any

from transformers import PreTrainedConfig

from harness.conventions import default_points, spell

CONVENTION = "after_layer"
"""what the layer ids of the zoo's EAGLE drafts mean; they state it, so no engine has to guess"""


def draft_config(target: PreTrainedConfig, way: str, architecture: dict[str, Any]) -> dict[str, Any]:
    """A draft's config: what its way shares with its target, then the recipe's own keys."""
    return {**WAYS[way](target), **architecture}


def _shared(t: PreTrainedConfig) -> dict[str, Any]:
    return {
        "hidden_size": t.hidden_size,
        "hidden_act": "silu",
        "vocab_size": t.vocab_size,
        "max_position_embeddings": t.max_position_embeddings,
        "rms_norm_eps": t.rms_norm_eps,
        "rope_theta": 10000.0,
        "attention_bias": False,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "torch_dtype": "bfloat16",
    }


def _eagle3(t: PreTrainedConfig) -> dict[str, Any]:
    ids = spell(default_points(t.num_hidden_layers), CONVENTION, t.num_hidden_layers)
    return {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        **_shared(t),
        "num_hidden_layers": 1,
        "eagle_config": {
            "layer_ids": CONVENTION,
            "eagle_aux_hidden_state_layer_ids": list(ids),
            "use_aux_hidden_state": True,
        },
    }


def _eagle3_postnorm(t: PreTrainedConfig) -> dict[str, Any]:
    # `norm_output` alone has two readings; eagle_config states the one that is meant
    given = _eagle3(t)
    stated = {**given["eagle_config"], "norm_before_head": True, "feedback_normed": True}
    return {**given, "fc_norm": True, "norm_output": True, "eagle_config": stated}


def _standalone(t: PreTrainedConfig) -> dict[str, Any]:
    return {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **_shared(t)}


WAYS = {"eagle3": _eagle3, "eagle3_postnorm": _eagle3_postnorm, "standalone": _standalone}
