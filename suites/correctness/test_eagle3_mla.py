"""Claim: the reference of EAGLE-3 with latent attention asks transformers' latent attention about 2H features.

Born of SGLang #24826, which doubles the input of one fused projection and splits it by rows; of loaders that drop a
q_a_proj whose kv_a_proj they have not seen; of the trainer of these drafts, which stretches rope from base 10000 while
its config says 50000; and of three readings of one epsilon. The witness is put together here from transformers'
modules: the attention of a DeepSeek that is 2H wide, norms and MLP of one that is H wide. It keeps no cache: a later
draft step asks the attention once more about everything that it may see.
"""

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from harness import witness
from harness.checkpoints import CheckpointError, state_of
from harness.compare import bit_equal, hold
from harness.conventions import AmbiguousLayerIds, resolve
from reference.config import INERT, ConfigError
from reference.drafts.eagle3_mla import COPIED, Eagle3MlaConfig, Eagle3MlaDraft
from reference.outputs import DraftOutput
from suites.catalog import OpenTarget
from suites.correctness.test_configs import OTHER
from suites.correctness.test_loading import SPELLINGS, dormant, hold_state, influential, ours, spelled
from suites.correctness.test_unroll import STEPS, serve
from suites.draws import PINNED_TARGET, Drawn, random_tokens
from suites.families.eagle3_mla import (
    EAGLE3_MLA,
    EVERY_MLA_FLAG,
    PINNED_MLA,
    PUBLISHED_DRAFTS,
    RICH_MLA,
    TWO_LAYERS,
    eagle3_mla_drafts,
)
from suites.shells import count_parameters, without_memory
from suites.stand import stand, stand_as

pytestmark = [pytest.mark.correctness, pytest.mark.pair("eagle3_mla")]

DRAFTS = eagle3_mla_drafts(PINNED_TARGET)
VOCAB = PINNED_TARGET.keys["vocab_size"]


def fill(module: nn.Module, tensors: Mapping[str, Tensor], prefix: str) -> None:
    """Give a module every tensor under a prefix, also those that its class has no place for (biases)."""
    for name, tensor in tensors.items():
        if name.startswith(prefix):
            owner, _, leaf = name.removeprefix(prefix).rpartition(".")
            setattr(module.get_submodule(owner), leaf, nn.Parameter(tensor.double()))


class Outside:
    """A draft of transformers' modules; its facts are read from the config's keys."""

    def __init__(self, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        self.config, self.eagle = config, config.get("eagle_config", {})
        self.tensors = {name: tensor.double() for name, tensor in tensors.items() if tensor.is_floating_point()}
        hidden, layers = config["hidden_size"], config["num_hidden_layers"]
        names = ("num_attention_heads", "num_key_value_heads", "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim")
        names += ("qk_rope_head_dim", "v_head_dim", "intermediate_size", "rope_parameters", "max_position_embeddings")
        shared = {name: config[name] for name in names} | {"first_k_dense_replace": 9, "n_routed_experts": 8}
        shared |= {"model_type": "deepseek_v3", "num_hidden_layers": layers, "vocab_size": 8, "n_group": 1}
        shared |= {"topk_group": 1, "rope_interleave": config.get("rope_interleave", True)}
        narrow, wide = (witness.build({**shared, "hidden_size": width}).model for width in (hidden, 2 * hidden))
        self.layers, self.rope, self.norm_class = narrow.layers, narrow.rotary_emb, type(narrow.norm)
        first = wide.layers[0].self_attn
        first.o_proj, self.layers[0].self_attn = narrow.layers[0].self_attn.o_proj, first
        eps = config["rms_norm_eps"]
        for i, layer in enumerate(self.layers):
            fill(layer.self_attn, self.tensors, f"layers.{i}.self_attn.")
            fill(layer.mlp, self.tensors, f"layers.{i}.mlp.")
            for norm in (layer.self_attn.q_a_layernorm, layer.self_attn.kv_a_layernorm):
                if norm is not None:
                    norm.variance_epsilon = config.get("latent_norm_eps", eps)

    def norm(self, name: str, x: Tensor) -> Tensor:
        """The RMS norm of a name."""
        module = self.norm_class(x.shape[-1], self.config["rms_norm_eps"])
        fill(module, self.tensors, name + ".")
        with witness.StayWide():
            return module(x)

    def read(self, out: Any) -> Tensor:
        """out.aux [B, T, A, X] -> [B, T, H]"""
        aux = out.aux.flatten(2)
        if self.eagle.get("norm_before_fc") or self.config.get("norm_before_fc"):
            aux = self.norm("input_norm", aux)
        if self.config.get("fc_norm"):
            chunks = aux.chunk(out.aux.shape[2], -1)
            aux = torch.cat([self.norm(f"fc_norm.{i}", chunk) for i, chunk in enumerate(chunks)], -1)
        return F.linear(aux, self.tensors["fc.weight"], self.tensors.get("fc.bias"))

    def new_cache(self, batch: int, num_slots: int) -> dict[int, Tensor]:
        """What each layer's attention was asked with so far."""
        return {}

    def __call__(self, tokens: Tensor, hidden: Tensor, positions: Tensor, cache: dict[int, Tensor]) -> DraftOutput:
        """tokens [B, T], hidden [B, T, H], positions [B, T], which go on where the last call ended"""
        with torch.no_grad(), witness.StayWide():
            y = hidden
            for i in range(len(self.layers)):
                y = self.layer(i, tokens, y, int(positions[0, 0]), cache)
            z, c = self.norm("norm", y), self.eagle
            logits = F.linear(z if c.get("norm_before_head", True) else y, self.tensors["lm_head.weight"])
            return DraftOutput(logits * self.config.get("logit_scale", 1.0), z if c.get("feedback_normed") else y)

    def layer(self, i: int, tokens: Tensor, y: Tensor, begin: int, cache: dict[int, Tensor]) -> Tensor:
        """y [B, T, H] -> [B, T, H]"""
        name, residual, layer = f"layers.{i}.", y, self.layers[i]
        if i == 0:
            normed = self.norm(name + "hidden_norm", y)
            embedded = self.norm(name + "input_layernorm", self.tensors["embed_tokens.weight"][tokens])
            x, residual = torch.cat([embedded, normed], -1), normed if self.config.get("norm_before_residual") else y
        else:
            x = self.norm(name + self.eagle.get("later_norm", "input_layernorm"), y)
        cache[i] = torch.cat([cache[i][:, :begin], x], 1) if begin else x
        width = cache[i].shape[1]
        angles = self.rope(cache[i], torch.arange(width).expand(len(x), -1))
        mask = torch.full((width, width), -math.inf, dtype=x.dtype).triu(1)[None, None]
        mixed = layer.self_attn(cache[i], angles, mask)[0][:, begin:]
        s = residual + mixed
        return s + layer.mlp(self.norm(name + "post_attention_layernorm", s))


@given(drawn=DRAFTS, width=st.integers(2, 9), seed=st.integers(0, 99))
@example(drawn=PINNED_MLA, width=9, seed=0)
@example(drawn=EVERY_MLA_FLAG, width=6, seed=1)
@example(drawn=TWO_LAYERS, width=5, seed=2)
@torch.no_grad()
def test_every_draft_step_is_what_transformers_attention_says(
    wide_target: OpenTarget, drawn: Drawn, width: int, seed: int
) -> None:
    draft, tokens = stand(drawn, wide_target), random_tokens(VOCAB, 2, width, seed)
    out = wide_target(tokens, capture=draft.capture_points)
    outside = Outside(drawn.keys, ours(drawn))

    steps = draft.unroll(tokens, out, STEPS)

    size = {"depth": STEPS * drawn.keys["num_hidden_layers"], "width": 2 * drawn.keys["hidden_size"]}
    for column in {0, (width - 1) // 2, width - 2}:
        served = serve(SimpleNamespace(module=outside), tokens, outside.read(out), column)
        for k, logits in enumerate(served):
            hold(f"step {k + 1}", steps[k, :, column], logits, **size)


@given(drawn=DRAFTS, width=st.integers(2, 10), seed=st.integers(0, 99))
@example(drawn=PINNED_MLA, width=8, seed=0)
@example(drawn=EVERY_MLA_FLAG, width=7, seed=1)
@torch.no_grad()
def test_unrolling_is_serving_one_step_at_a_time(wide_target: OpenTarget, drawn: Drawn, width: int, seed: int) -> None:
    draft, tokens = stand(drawn, wide_target), random_tokens(VOCAB, 2, width, seed)
    out = wide_target(tokens, capture=draft.capture_points)

    steps = draft.unroll(tokens, out, STEPS)

    size = {"depth": STEPS * drawn.keys["num_hidden_layers"], "width": drawn.keys["hidden_size"]}
    for column in range(width - 1):
        for k, logits in enumerate(serve(draft, tokens, draft.module.read(out), column)):
            hold(f"step {k + 1}", steps[k, :, column], logits, **size)


def test_a_cache_holds_one_latent_a_token_and_no_heads(target: OpenTarget) -> None:
    module = stand(PINNED_MLA, target).module
    cache = module.new_cache(2, 7)

    module(random_tokens(VOCAB, 2, 5, 0), torch.zeros(2, 5, module.c.hidden), cache=cache)

    held = [tuple(t.shape) for t in (cache.keys[0], cache.values[0])]
    assert held == [(2, 7, 1, module.c.kv_rank), (2, 7, 1, module.c.rope_dim)]


# the latents' own names, in every spelling of what stands before them
@given(spelling=st.sampled_from(["midlayer", "layers", "model", "model and midlayer"]), seed=st.integers(0, 99))
@example(spelling="midlayer", seed=0)
@example(spelling="layers", seed=1)
@example(spelling="model", seed=2)
@example(spelling="model and midlayer", seed=3)
def test_spelling_and_order_change_no_bit_and_the_ledger_is_whole(target: OpenTarget, spelling: str, seed: int) -> None:
    tensors = ours(PINNED_MLA)
    names, order = list(tensors), torch.randperm(len(tensors), generator=torch.Generator().manual_seed(seed)).tolist()
    published = spelled({names[i]: tensors[names[i]] for i in order}, SPELLINGS[spelling])

    draft = stand_as(EAGLE3_MLA, published, target)

    hold_state(draft.module, tensors)
    entries = draft.ledger.entries
    assert sorted(entry.tensor for entry in entries if entry.tensor) == sorted(published)
    assert sorted(entry.parameter for entry in entries if entry.parameter) == sorted(tensors)


LATENTS = ("q_a_proj", "q_a_layernorm", "q_b_proj", "kv_a_proj_with_mqa", "kv_a_layernorm", "kv_b_proj")


@pytest.mark.parametrize("name", LATENTS)
def test_one_half_of_a_latent_alone_is_refused(name: str, target: OpenTarget) -> None:
    tensors = ours(PINNED_MLA)
    del tensors[f"layers.0.self_attn.{name}.weight"]

    with pytest.raises(CheckpointError, match=f"{name}.*is missing"):
        stand_as(EAGLE3_MLA, tensors, target)


FOREIGN = (
    # an engine's own memory, whose halves only the engine knows how to part
    "layers.0.self_attn.fused_qkv_a_proj_with_mqa.weight",
    "layers.0.self_attn.fused_qkv_a_proj.weight",
    # a draft with experts has this architecture too
    "layers.0.mlp.experts.0.gate_proj.weight",
    "layers.0.mlp.gate.weight",
)


@pytest.mark.parametrize("name", FOREIGN)
def test_tensors_of_another_form_are_refused_by_name(name: str, target: OpenTarget) -> None:
    with pytest.raises(CheckpointError, match=re.escape(name)):
        stand_as(EAGLE3_MLA, {**ours(PINNED_MLA), name: torch.zeros(64, 192)}, target)


@pytest.mark.parametrize("drawn", [PINNED_MLA, EVERY_MLA_FLAG], ids=["pinned", "every flag"])
def test_every_parameter_changes_the_logits(target: OpenTarget, drawn: Drawn) -> None:
    draft = stand(drawn, target)
    tokens = random_tokens(VOCAB, 1, 6, drawn.seed)
    out = target(tokens, capture=draft.capture_points)

    found = influential(draft.module, lambda: draft.unroll(tokens, out, 3).nan_to_num())

    assert found == {name for name, _ in draft.module.named_parameters()} - dormant(draft.facts.config)


OTHERS: dict[str, Any] = {
    **OTHER,
    "num_key_value_heads": 2,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "latent_norm_eps": 1e-3,
}
ALL_KEYS = {
    **RICH_MLA,
    "target_hidden_size": 96,
    "num_aux_hidden_states": 4,
    "use_moe": False,
    "mla_use_nope": False,
    # yarn stretches from max_position_embeddings where nothing else is said
    "rope_parameters": {"rope_type": "yarn", "rope_theta": 50_000.0, "factor": 4.0, "mscale_all_dim": 0.7},
    "eagle_config": {**RICH_MLA["eagle_config"], "later_norm": "hidden_norm", "use_aux_hidden_state": True},
}


def facts_of(config: Mapping[str, Any]) -> Any:
    """What a reader learns, or why it refuses."""
    try:
        return Eagle3MlaConfig.from_hf(dict(config))
    except ConfigError as error:
        return str(error)


@pytest.mark.parametrize("key", sorted(ALL_KEYS))
def test_every_key_changes_the_facts_or_is_inert(key: str) -> None:
    value = ALL_KEYS[key]
    other = {**ALL_KEYS, key: (not value) if isinstance(value, bool) else OTHERS.get(key, "other")}

    assert not isinstance(facts_of(ALL_KEYS), str), facts_of(ALL_KEYS)
    assert facts_of(other) != facts_of(ALL_KEYS) or key in INERT


def test_every_fact_can_be_written() -> None:
    thin = {**ALL_KEYS, "rms_norm_eps": 1e-5, "eagle_config": {"use_aux_hidden_state": False}}
    thin |= {"draft_vocab_size": VOCAB, "tie_word_embeddings": True}
    read = [Eagle3MlaConfig.from_hf(config) for config in (EAGLE3_MLA, RICH_MLA, ALL_KEYS, thin, TWO_LAYERS.keys)]

    constant = {f.name for f in dataclasses.fields(Eagle3MlaConfig) if len({getattr(c, f.name) for c in read}) == 1}

    assert constant == {"vocab", "hidden", "intermediate", "kv_rank", "nope_dim", "rope_dim", "value_dim"}


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "experts": ({"use_moe": True}, "use_moe"),
    "no rope at all": ({"mla_use_nope": True}, "mla_use_nope"),
    "no word about the query": ({"q_lora_rank": "absent"}, "q_lora_rank"),
    "heads with keys of their own": ({"num_key_value_heads": 2}, "num_key_value_heads"),
    "a window": ({"sliding_window": 4}, "sliding_window"),
    "no last norm": ({"eagle_config": {"use_last_layernorm": False}}, "use_last_layernorm"),
    "two readings of one word": ({"norm_output": True}, "two readings"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_has_no_single_reading_is_refused_and_named(case: str) -> None:
    changes, named = REFUSED[case]
    config = {key: value for key, value in {**EAGLE3_MLA, **changes}.items() if value != "absent"}

    with pytest.raises(ConfigError, match=named):
        Eagle3MlaConfig.from_hf(config)


def test_keys_of_the_targets_experts_say_nothing() -> None:
    copied = dict.fromkeys(COPIED, 1)

    assert Eagle3MlaConfig.from_hf({**EAGLE3_MLA, **copied}) == Eagle3MlaConfig.from_hf(EAGLE3_MLA)


def test_the_epsilon_of_the_latents_is_the_drafts_own(wide_target: OpenTarget) -> None:
    tokens = random_tokens(VOCAB, 1, 6, 0)
    tensors, said = ours(PINNED_MLA), []

    for stated in ({}, {"latent_norm_eps": 1e-2}, {"latent_norm_eps": 1e-6}):
        draft = stand_as({**EAGLE3_MLA, **stated}, tensors, wide_target)
        out = wide_target(tokens, capture=draft.capture_points)
        said.append((draft.facts.config.latent_norm_eps, draft.unroll(tokens, out, 1).nan_to_num()))

    assert [eps for eps, _ in said] == [1e-2, 1e-2, 1e-6]
    assert wide_target.config.eps == 1e-5
    bit_equal("logits", said[0][1], said[1][1])
    assert not torch.allclose(said[0][1], said[2][1])


def count(config: Mapping[str, Any]) -> int:
    """Parameters of a draft of one layer, written out."""
    hidden, heads, read = config["hidden_size"], config["num_attention_heads"], 2 * config["hidden_size"]
    nope, rope, value = (config[f"{name}_head_dim"] for name in ("qk_nope", "qk_rope", "v"))
    query, latent_, inner = config["q_lora_rank"], config["kv_lora_rank"], config["intermediate_size"]
    attention = read * query + query + query * heads * (nope + rope)
    attention += read * (latent_ + rope) + latent_ + latent_ * heads * (nope + value) + heads * value * hidden
    tables = config["vocab_size"] * hidden + config["draft_vocab_size"] * hidden
    return tables + 3 * hidden * hidden + attention + 3 * hidden * inner + 4 * hidden


@pytest.mark.parametrize("name", PUBLISHED_DRAFTS)
def test_published_drafts_are_read_in_full(name: str) -> None:
    config, meant = PUBLISHED_DRAFTS[name]
    facts = Eagle3MlaConfig.from_hf(config)
    with without_memory():
        module = Eagle3MlaDraft(facts)

    assert count_parameters(module) == count(config)
    assert tuple(state_of(module)["layers.0.self_attn.q_a_proj.weight"].shape) == (1536, 2 * 7168)
    # yarn's factor of 64 enters twice, once for queries and once for keys
    assert facts.latent.scale == pytest.approx(192**-0.5 * (0.1 * math.log(64) + 1) ** 2)
    assert (facts.latent_norm_eps, facts.rope.theta, facts.rope.scale) == (1e-5, 50_000.0, 1.0)
    with pytest.raises(AmbiguousLayerIds):
        resolve(config, 61)
    assert resolve(config, 61, layer_ids=meant).points == (2, 30, 58)


def test_a_config_survives_json() -> None:
    config = PUBLISHED_DRAFTS["lightseekorg/kimi-k2.5-eagle3-mla"][0]

    assert Eagle3MlaConfig.from_hf(json.loads(json.dumps(config))) == Eagle3MlaConfig.from_hf(config)
