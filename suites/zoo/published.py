"""Every way of drafting in the zoo as its trainers publish it: the config, which tensors, under which names."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig

import reference.drafts.dflash
import reference.drafts.eagle3
import reference.drafts.eagle3_mla
import reference.drafts.gemma4_assistant
import reference.drafts.peagle
import reference.drafts.qwen3_moe_mtp
import reference.drafts.standalone
import reference.targets.llama
from harness.conventions import default_points, spell

CONVENTION = "after_layer"
"""what the layer ids of the zoo's EAGLE drafts mean; they state it, so no engine has to guess"""


@dataclass(frozen=True)
class Way:
    """How a draft of one kind is built, configured and written."""

    read_config: Callable[[dict[str, Any]], Any]
    build: Callable[[Any], Any]
    published: Callable[[PreTrainedConfig], dict[str, Any]]
    """what the config of such a draft has in common with its target's"""
    spell: Callable[[str], str]
    """our name of a parameter -> that of published files"""
    masks: bool = False
    """later draft steps read mask tokens"""


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


def _ids(t: PreTrainedConfig) -> list[int]:
    return list(spell(default_points(t.num_hidden_layers), CONVENTION, t.num_hidden_layers))


def _eagle3(t: PreTrainedConfig) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        **_shared(t),
        "num_hidden_layers": 1,
        "eagle_config": {
            "layer_ids": CONVENTION,
            "eagle_aux_hidden_state_layer_ids": _ids(t),
            "use_aux_hidden_state": True,
        },
    }


def _eagle3_postnorm(t: PreTrainedConfig) -> dict[str, Any]:
    # `norm_output` alone has two readings; eagle_config states the one that is meant
    given = _eagle3(t)
    stated = {**given["eagle_config"], "norm_before_head": True, "feedback_normed": True}
    return {**given, "fc_norm": True, "norm_output": True, "eagle_config": stated}


def _eagle3_mla(t: PreTrainedConfig) -> dict[str, Any]:
    return {**_eagle3(t), "architectures": ["Eagle3DeepseekV2ForCausalLM"], "model_type": "kimi_k2"}


def _peagle(t: PreTrainedConfig) -> dict[str, Any]:
    return {**_eagle3(t), "architectures": ["PeagleLlamaForCausalLM"], "parallel_drafting": True}


def _dflash(t: PreTrainedConfig) -> dict[str, Any]:
    return {
        "architectures": ["DFlashDraftModel"],
        "model_type": "qwen3",
        **_shared(t),
        "num_target_layers": t.num_hidden_layers,
        "dflash_config": {"target_layer_ids": _ids(t)},
    }


def _standalone(t: PreTrainedConfig) -> dict[str, Any]:
    return {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **_shared(t)}


def _qwen3_moe_mtp(t: PreTrainedConfig) -> dict[str, Any]:
    same = ("intermediate_size", "moe_intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim")
    routed = ("num_experts_per_tok", "norm_topk_prob")
    return {
        "architectures": ["Qwen3MoeForCausalLMMTP"],
        "model_type": "qwen3_moe",
        **_shared(t),
        "num_hidden_layers": 1,
        "num_nextn_predict_layers": 1,
        "num_experts": t.num_experts,
        **{key: getattr(t, key) for key in (*same, *routed)},
    }


def _gemma4_assistant(t: PreTrainedConfig) -> dict[str, Any]:
    return {
        "architectures": ["Gemma4AssistantForCausalLM"],
        "model_type": "gemma4_assistant",
        "backbone_hidden_size": t.hidden_size,
        "tie_word_embeddings": True,
        "use_ordered_embeddings": False,
        "dtype": "bfloat16",
    }


def _midlayer(name: str) -> str:
    return "midlayer." + name.removeprefix("layers.0.") if name.startswith("layers.0.") else name


def _of_llama(name: str) -> str:
    name = name.removeprefix("model.")
    return name if name.startswith("lm_head.") else f"model.{name}"


def _of_assistant(name: str) -> str:
    return name if "_projection." in name else f"model.{name}"


def _alone(c: Any) -> Any:
    return reference.drafts.standalone.StandaloneDraft(reference.targets.llama.LlamaTarget(c))


_EAGLE3 = (reference.drafts.eagle3.Eagle3Config.from_hf, reference.drafts.eagle3.Eagle3Draft)
_MLA = (reference.drafts.eagle3_mla.Eagle3MlaConfig.from_hf, reference.drafts.eagle3_mla.Eagle3MlaDraft)
_PEAGLE = (reference.drafts.peagle.PeagleConfig.from_hf, reference.drafts.peagle.PeagleDraft)
_DFLASH = (reference.drafts.dflash.DflashConfig.from_hf, reference.drafts.dflash.DflashDraft)
_MTP = (reference.drafts.qwen3_moe_mtp.Qwen3MoeMtpConfig.from_hf, reference.drafts.qwen3_moe_mtp.Qwen3MoeMtpDraft)
_ASSISTANT = (
    reference.drafts.gemma4_assistant.Gemma4AssistantConfig.from_hf,
    reference.drafts.gemma4_assistant.Gemma4AssistantDraft,
)

WAYS = {
    "eagle3": Way(*_EAGLE3, _eagle3, _midlayer),
    "eagle3-postnorm": Way(*_EAGLE3, _eagle3_postnorm, _midlayer),
    "eagle3-mla": Way(*_MLA, _eagle3_mla, _midlayer),
    "peagle": Way(*_PEAGLE, _peagle, _midlayer, masks=True),
    "dflash": Way(*_DFLASH, _dflash, str, masks=True),
    "mtp": Way(*_MTP, _qwen3_moe_mtp, "mtp.{}".format),
    "assistant": Way(*_ASSISTANT, _gemma4_assistant, _of_assistant),
    "standalone": Way(reference.targets.llama.LlamaConfig.from_hf, _alone, _standalone, _of_llama),
}


def draft_config(way: str, target: PreTrainedConfig, architecture: dict[str, Any], mask: int) -> dict[str, Any]:
    """A draft's config: what its way shares with its target, then the recipe's own keys.

    mask   a token that no text has, for ways that read one
    """
    config = {**WAYS[way].published(target), **architecture}
    if "dflash_config" in config:
        config["dflash_config"] = {**config["dflash_config"], "mask_token_id": mask}
    elif WAYS[way].masks:
        config["ptd_token_id"] = mask
    return config
