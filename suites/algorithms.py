"""What a config asks for: which pair opens it, and which way of drafting a name means.

Engines are told an algorithm's name beside the checkpoints and trust it. A name that does not fit is not always
refused there: an EAGLE-3 draft started as EAGLE runs without its `fc` and accepts nothing, so every step says one
token. Here a name and a draft resolve to one way of drafting, or to a refusal that says why.
"""

from harness.checkpoints import CONFIG, Checkpoint, CheckpointError
from reference.drafts.peagle import MASK_KEYS

TARGET_TYPES = {
    "llama": "llama",
    "deepseek_v2": "deepseek",
    "deepseek_v3": "deepseek",
    "kimi_k2": "deepseek",
    "kimi_k25": "kimi_k25",
    "gemma3_text": "gemma3",
    "gemma3": "gemma3_mm",
    "gemma4_text": "gemma4",
    "gemma4": "gemma4_mm",
    "gemma4_unified_text": "gemma4",
    "gemma4_unified": "gemma4_unified",
    "qwen3_moe": "qwen3_moe",
}
"""`model_type` of a target's config -> pair"""

DRAFT_ARCHITECTURES = {
    "LlamaForCausalLMEagle3": "eagle3",
    "Qwen3ForCausalLMEagle3": "eagle3",
    "Eagle3LlamaForCausalLM": "eagle3",
    "Eagle3Qwen3ForCausalLM": "eagle3",
    "Eagle3Speculator": "eagle3",
    "Eagle3DraftModel": "eagle3",
    "Eagle3DeepseekV2ForCausalLM": "eagle3_mla",
    "Eagle3DeepseekV3ForCausalLM": "eagle3_mla",
    "PeagleLlamaForCausalLM": "peagle",
    "PeagleQwen3ForCausalLM": "peagle",
    "PEagleDraftModel": "peagle",
    "DFlashDraftModel": "dflash",
    "Qwen3MoeForCausalLMMTP": "qwen3_moe_mtp",
    "DeepseekV3ForCausalLMNextN": "deepseek_nextn",
    "DeepSeekMTPModel": "deepseek_nextn",
    "Gemma4AssistantForCausalLM": "gemma4_assistant",
    "Gemma4UnifiedAssistantForCausalLM": "gemma4_assistant",
}
"""`architectures` of a draft's config -> pair"""

SPECULATORS_TYPES = {"eagle3": "eagle3", "peagle": "peagle", "dflash": "dflash", "mtp": "qwen3_moe_mtp"}
"""`speculators_model_type` -> pair"""

NEXT_TOKEN = {"qwen3_moe": ("qwen3_moe_mtp", "mtp."), "deepseek_v3": ("deepseek_nextn", "eh_proj")}
"""`model_type` of a target that may carry a next-token module -> its pair, what a name of the module has in it"""

ALGORITHMS = {
    "eagle3": "EAGLE3",
    "eagle3_mla": "EAGLE3",
    "peagle": "PEAGLE",
    "dflash": "DFLASH",
    "qwen3_moe_mtp": "MTP",
    "deepseek_nextn": "MTP",
    "gemma4_assistant": "FROZEN_KV_MTP",
    "standalone": "STANDALONE",
}
"""pair of a draft -> what its way of drafting is called here"""

ALIASES = {"MTP": ("NEXTN", "EAGLE"), "FROZEN_KV_MTP": ("NEXTN", "EAGLE", "MTP"), "PEAGLE": ("EAGLE3", "P_EAGLE")}
"""other names that engines take for the same: SGLang starts next-token modules as EAGLE and aliases NEXTN to it"""

REASONS = {
    "EAGLE3": "an EAGLE-3 draft reads states of its target through `fc`, which any other way of drafting leaves out",
    "PEAGLE": "a P-EAGLE draft proposes all tokens in one pass from mask tokens",
    "DFLASH": "a D-Flash draft proposes a block of mask tokens and reads its target through context keys",
    "MTP": "a next-token module reads its target's final hidden state and one token",
    "FROZEN_KV_MTP": "a Gemma 4 assistant has no keys of its own: it reads its target's",
    "STANDALONE": "a model that drafts alone reads tokens and nothing of the target; its hidden width may differ",
}

NAMES = ("EAGLE", "EAGLE3", "NEXTN", "MTP", "FROZEN_KV_MTP", "STANDALONE", "DFLASH", "PEAGLE", "P_EAGLE")


class AlgorithmError(ValueError):
    """The name of an algorithm that is unknown or does not fit a draft."""


def resolve(algorithm: str | None, pair: str) -> str:
    """What a name means for a draft; errors: AlgorithmError with the reason and the name to use."""
    own = ALGORITHMS[pair]
    if algorithm is None or algorithm.upper().replace("-", "_") in (own, *ALIASES.get(own, ())):
        return own
    if algorithm.upper().replace("-", "_") not in NAMES:
        raise AlgorithmError(f"algorithm {algorithm!r} is unknown; known are {', '.join(NAMES)}")
    raise AlgorithmError(f"algorithm {algorithm!r} does not fit this draft ({pair}): {REASONS[own]}; use {own!r}")


def find_pair(checkpoint: Checkpoint, kind: str, algorithm: str | None = None) -> str:
    """The pair that a config asks for, as a "target" or as a "draft"; errors: CheckpointError naming what is known.

    A target's folder is a draft too: of its next-token module where it carries one, else a model that drafts alone.
    """
    config = checkpoint.config
    model_type, names = str(config.get("model_type")), config.get("architectures") or []
    names = names if isinstance(names, list) else [names]
    draft = _draft_of(checkpoint, [str(name) for name in names])
    if kind == "target" and draft is None and model_type in TARGET_TYPES:
        return TARGET_TYPES[model_type]
    if kind == "draft" and draft is not None:
        return draft
    if kind == "draft" and model_type in TARGET_TYPES:
        module, mark = NEXT_TOKEN.get(model_type, ("", ""))
        carries = bool(module) and any(mark in name for name in checkpoint.headers)
        alone = algorithm is not None and algorithm.upper() == "STANDALONE"
        return module if carries and not alone else "standalone"
    what = f"model_type {model_type!r}, architectures {', '.join(map(str, names)) or 'absent'}"
    if draft is not None:
        hint = "this is a draft: open it with open_draft"
    elif kind == "draft":
        hint = f"known drafts are {', '.join(DRAFT_ARCHITECTURES)}, those with 'speculators_model_type', and any target"
    else:
        hint = f"known targets are {', '.join(sorted(TARGET_TYPES))}"
    raise CheckpointError(f"{checkpoint.path / CONFIG}: {what} is no {kind} of the catalog; {hint}")


def _draft_of(checkpoint: Checkpoint, architectures: list[str]) -> str | None:
    """The pair of a config that is a draft's and nothing else."""
    config = checkpoint.config
    if "speculators_model_type" in config:
        kind = str(config["speculators_model_type"])
        if kind not in SPECULATORS_TYPES:
            raise CheckpointError(
                f"{checkpoint.path / CONFIG}: speculators_model_type {kind!r} is not known; "
                f"known are {', '.join(SPECULATORS_TYPES)}"
            )
        return SPECULATORS_TYPES[kind]
    known = [DRAFT_ARCHITECTURES[name] for name in architectures if name in DRAFT_ARCHITECTURES]
    if known:
        # a P-EAGLE draft may bear EAGLE-3's name: the token that stands for what is not known yet is its alone
        masked = known[0] == "eagle3" and any(config.get(key) is not None for key in MASK_KEYS)
        return "peagle" if masked else known[0]
    # the trainer of EAGLE-3's authors writes its target's architecture; this key is a draft's alone
    return "eagle3" if "draft_vocab_size" in config else None
