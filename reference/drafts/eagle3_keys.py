"""How published EAGLE-3 configs spell the facts of `reference/drafts/eagle3.py`.

Five trainers write these files and four engines read them; the same key has two meanings in two of them, and the
same fact stands under several keys. Every key is read, known to be inert, or refused (ConfigError): nothing is dropped.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from reference.config import ConfigError, Keys
from reference.ops.rope import Rope

QWEN3 = {"Qwen3ForCausalLMEagle3", "Eagle3Qwen3ForCausalLM"}
"""architectures whose body is Qwen3's: one norm over each head of q and k"""

SWITCHES = {
    "use_input_layernorm_in_first_layer": True,
    "use_last_layernorm": True,
    "use_mtp_layernorm": False,
    "next_layer_regular": True,
    "parallel_draft_step": 1,
    "parallel_draft_heads_num_layers": 0,
}
"""Model-Optimizer's switches of its own draft, as they stand where the draft is EAGLE-3"""


def read_facts(config: dict[str, Any], norm_output: str | None = None) -> dict[str, Any]:
    """The fields of `Eagle3Config` from a `config.json`; arguments: `read_draft`."""
    return read_draft(config, norm_output, _read_heads)


def read_draft(
    config: dict[str, Any], norm_output: str | None, read_attention: Callable[[Keys], dict[str, Any]]
) -> dict[str, Any]:
    """The fields of an EAGLE-3 draft's config, whatever its attention is.

    norm_output     what this key of the file means: "head" (SpecForge: the final norm stands before the head) or
                    "feedback" (the engines and speculators: the next draft step reads the normed state)
    read_attention  the facts of equation (5), rope among them
    """
    if "speculators_model_type" in config:
        config, norm_output = _flatten_speculators(config), "feedback"
    keys = Keys(config)
    keys.expect("hidden_act", "silu")
    eagle = keys.below("eagle_config")
    facts = {**_read_body(keys), **read_attention(keys), **_read_norms(keys, eagle, norm_output)}
    facts["aux_states"] = _read_aux_states(keys, eagle)
    facts["use_aux_hidden_state"] = eagle.flag("use_aux_hidden_state", True)
    for switch, value in SWITCHES.items():
        eagle.expect(switch, value)
    eagle.finish()
    keys.finish()
    return facts


def _read_body(keys: Keys) -> dict[str, Any]:
    """What a draft shares with any decoder."""
    vocab = keys.count("vocab_size")
    draft_vocab = keys.count("draft_vocab_size", vocab)
    if draft_vocab > vocab:
        raise ConfigError(f"config key 'draft_vocab_size' is {draft_vocab}, more than 'vocab_size', {vocab}")
    return {
        "vocab": vocab,
        "draft_vocab": draft_vocab,
        "hidden": keys.count("hidden_size"),
        "intermediate": keys.count("intermediate_size"),
        "layers": keys.count("num_hidden_layers", 1),
        "target_hidden": keys.count("target_hidden_size", 0, least=0),
        "eps": keys.number("rms_norm_eps", 1e-6),
        "mlp_bias": keys.flag("mlp_bias"),
        "fc_bias": keys.flag("bias"),
        "logit_scale": keys.number("logit_scale", 1.0),
        "tied_head": keys.flag("tie_word_embeddings"),
    }


def _read_heads(keys: Keys) -> dict[str, Any]:
    """Attention by heads, grouped or not."""
    heads, kv_heads, head_dim = keys.heads()
    bias = keys.flag("attention_bias")
    return {
        "heads": heads,
        "kv_heads": kv_heads,
        "head_dim": head_dim,
        "rope": Rope.from_hf(keys.rope(), head_dim),
        "qk_norm": keys.get("model_type") == "qwen3" or not QWEN3.isdisjoint(keys.names("architectures")),
        "qkv_bias": bias,
        "o_bias": bias,
        "windows": _read_windows(keys, keys.count("num_hidden_layers", 1)),
    }


def _read_norms(keys: Keys, eagle: Keys, norm_output: str | None) -> dict[str, Any]:
    """Which norms stand where."""
    fc_norms = keys.flag("fc_norm", None), keys.flag("use_aux_norm", None)
    whole_norms = keys.flag("norm_before_fc", None), eagle.flag("norm_before_fc", None)
    head, feedback = _read_norm_output(keys, eagle, norm_output)
    return {
        "fc_norm": _agree("fc_norm", *fc_norms),
        "norm_before_fc": _agree("norm_before_fc", *whole_norms),
        "norm_before_residual": keys.flag("norm_before_residual"),
        "norm_before_head": head,
        "feedback_normed": feedback,
        "later_norm": eagle.get("later_norm", "input_layernorm"),
    }


def _flatten_speculators(config: dict[str, Any]) -> dict[str, Any]:
    """speculators nests the body's config; its own keys stand beside it and win."""
    inner = dict(Keys(config).below("transformer_layer_config").config)
    outer = {k: v for k, v in config.items() if k not in ("transformer_layer_config", "speculators_config")}
    kind = outer.pop("speculators_model_type")
    if kind != "eagle3":
        raise ConfigError(f"speculators_model_type {kind!r} is not an EAGLE-3 draft")
    # the outer value repeats the inner model's type or names the speculator; the body is what has equations
    body = {k: outer.pop(k, None) for k in ("model_type", "architectures")}
    merged = {**body, **inner, **{k: v for k, v in outer.items() if v is not None}}
    return merged


def _agree(name: str, *values: bool | None) -> bool:
    """One fact that files spell in several places."""
    given = {v for v in values if v is not None}
    if len(given) > 1:
        raise ConfigError(f"config states {name!r} in two places with different values")
    return given.pop() if given else False


def _read_aux_states(keys: Keys, eagle: Keys) -> int:
    """How many states are fused; wherever the file says it, it must say the same."""
    ids = (keys.get("eagle_aux_hidden_state_layer_ids"), eagle.get("eagle_aux_hidden_state_layer_ids"))
    eagle.get("layer_ids")  # a convention, read by harness.conventions
    counts = [keys.count(name, 0, least=0) for name in ("num_aux_hidden_states", "num_aux_layers")]
    # what is no list of ids is refused there, with both readings
    given = {c for c in [*counts, *(len(i) for i in ids if isinstance(i, list | tuple))] if c}
    if len(given) > 1:
        raise ConfigError(f"config disagrees with itself about the number of aux states: {sorted(given)}")
    return given.pop() if given else 3


def _read_norm_output(keys: Keys, eagle: Keys, meaning: str | None) -> tuple[bool, bool]:
    """The two facts behind one word: (final norm before the head, normed feedback)."""
    head, feedback = eagle.flag("norm_before_head", None), eagle.flag("feedback_normed", None)
    flag = keys.flag("norm_output", None)
    stated = head is not None and feedback is not None
    if flag is not None and not stated and meaning not in ("head", "feedback"):
        raise ConfigError(
            f"config key 'norm_output': {flag} has two readings: SpecForge's (final norm before the head: {flag}, "
            f"feedback not normed) and that of speculators, vLLM and SGLang (normed feedback: {flag}). Pass "
            "norm_output='head' or norm_output='feedback', or state eagle_config.norm_before_head and "
            "eagle_config.feedback_normed"
        )
    if head is None:
        head = flag if flag is not None and meaning == "head" else True
    if feedback is None:
        feedback = flag if flag is not None and meaning == "feedback" else False
    return head, feedback


def _read_windows(keys: Keys, layers: int) -> tuple[int | None, ...]:
    """Sliding layers as `layer_types` lists them, the draft's own layers counted from 0."""
    size, kinds = keys.count("sliding_window", 0, least=0), keys.names("layer_types")
    use, counted = keys.flag("use_sliding_window", True), keys.get("max_window_layers")
    if size and use and counted is not None and not kinds:
        raise ConfigError("config key 'max_window_layers' counts sliding layers; list them as 'layer_types'")
    if not kinds or not use:
        return ()
    if len(kinds) != layers:
        raise ConfigError(f"config key 'layer_types' lists {len(kinds)} layers, num_hidden_layers is {layers}")
    unknown = sorted(set(kinds) - {"full_attention", "sliding_attention"})
    if unknown:
        raise ConfigError(f"config key 'layer_types' has {unknown}; full_attention and sliding_attention are known")
    if "sliding_attention" in kinds and not size:
        raise ConfigError("config key 'layer_types' has sliding layers, 'sliding_window' is missing")
    return tuple(size if kind == "sliding_attention" else None for kind in kinds)


def check_vocab_map(d2t: Tensor, t2d: Tensor | None, vocab: int) -> Sequence[str]:
    """What is wrong with a vocabulary map, in words; empty when it is sound.

    d2t  [Vd]
    t2d  [V]
    """
    ids = torch.arange(d2t.shape[0], device=d2t.device) + d2t
    faults = []
    if ids.numel() and (ids.min() < 0 or ids.max() >= vocab):
        worst = int(ids.max()) if ids.max() >= vocab else int(ids.min())
        faults.append(
            f"d2t leads to target id {worst}, outside 0..{vocab - 1} (offsets are expected: target id = i + d2t[i])"
        )
    elif (ids[1:] <= ids[:-1]).any():
        faults.append(
            "d2t is not strictly increasing as i + d2t[i]: two draft ids share a target id or their order is lost"
        )
    elif t2d is not None and not torch.equal(t2d.nonzero()[:, 0], ids):
        faults.append("t2d does not mark exactly the target ids that d2t leads to")
    return faults
