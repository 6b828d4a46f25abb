"""Checkpoints that an engine is asked about, as recipes: config, seed and what is broken.

`AGREEMENTS` are sound drafts with one feature each, written in the engine's own words by `convert`: it must compute
what the reference computes. `LOADS` are drafts as somebody might ship them, `TARGETS` targets with tensors missing: the
audit says what the engine will make of each, and must be right.
"""

import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from suites.damage import Damage, both, config, tensors
from suites.draws import EAGLE3, EVERY_FLAG, PINNED_TARGET, ROPES, Drawn, variant, write_draft, write_target
from suites.families import gemma4_assistant
from suites.families.eagle3_mla import EAGLE3_MLA, RICH_MLA
from suites.families.gemma4_assistant import write_assistant

ZOO = Path(__file__).parent.parent / "zoo"
V1, V2, SPECULATORS = "vllm-v1", "vllm-v2", "speculators"


@dataclass(frozen=True)
class Recipe:
    """One question; two folders can be written from it at any time."""

    name: str
    draft: Drawn | str | None = None
    """a name of the zoo, or None where the target alone is asked about"""
    target: Drawn | str = PINNED_TARGET
    dialect: str = ""
    """what the draft is written as before the engine reads it; "" leaves it as it is"""
    damage: Damage | None = None
    """of the draft before it is written in a dialect, or of the target where there is no draft"""
    after: Damage | None = None
    """of the draft as it was written"""
    own_embedding: bool = False
    write: Callable[..., Path] | None = None
    """of drafts other than EAGLE-3"""
    runner: str = "v1"
    kind: str = "agreement"
    """agreement: the engine must compute what the draft means; load, target: what the audit says of it"""

    def folders(self, root: Path, shared: Path) -> tuple[Path, Path | None]:
        """(target, draft) as they were made, before any dialect; a sound target is written once to `shared`."""
        target, draft = self.write_target(root if self.kind == "target" else shared), None
        if isinstance(self.draft, str):
            draft = ZOO / self.draft
        elif self.draft is not None:
            draft = self.write_draft(root / "draft")
        if self.damage is not None:
            self.damage(target if draft is None else draft)
        return target, draft

    def write_target(self, root: Path) -> Path:
        if isinstance(self.target, str):
            return ZOO / self.target
        folder = root / f"target-{zlib.crc32(repr(self.target).encode()):08x}"
        return folder if folder.exists() else write_target(self.target, folder)

    def write_draft(self, folder: Path) -> Path:
        assert isinstance(self.draft, Drawn)
        if self.write is not None:
            return self.write(self.draft, folder)
        return write_draft(self.draft, folder, self.own_embedding)


def without(*names: str) -> Damage:
    """Tensors that somebody forgot."""
    return tensors(lambda held: [held.pop(name) for name in names])


def plus(name: str, *shape: int) -> Damage:
    """A tensor that nobody asked for."""
    return tensors(lambda held: held.__setitem__(name, torch.full(shape, 0.5)))


def renamed(change: Callable[[str], str]) -> Damage:
    """Other names for the same tensors."""

    def rename(held: dict[str, Tensor]) -> None:
        for name in list(held):
            held[change(name)] = held.pop(name)

    return tensors(rename)


def _narrow_map(held: dict[str, Tensor]) -> None:
    held["d2t"] = held["d2t"].int()


def _doubled(held: dict[str, Tensor]) -> None:
    """Every tensor of the layer twice, under both of its names, with the same data."""
    for name in [name for name in held if name.startswith("midlayer.")]:
        held["layers.0." + name.removeprefix("midlayer.")] = held[name].clone()


UNSAID = {key: value for key, value in EAGLE3.items() if key != "eagle_config"}
"""no ids at all: the default triple, which every reader takes"""
PLAIN = variant(UNSAID)
FOUR = {"eagle_aux_hidden_state_layer_ids": [0, 2, 4, 6]}
WHOLE = {"draft_vocab_size": EAGLE3["vocab_size"]}
NARROW = {"hidden_size": 64, "target_hidden_size": EAGLE3["hidden_size"]}
QWEN3 = {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLMEagle3"]}
SLIDING = {"layer_types": ["sliding_attention"], "sliding_window": 4}
SAYABLE = variant(EVERY_FLAG.keys, bias=False)
FC_NORMS = tuple(f"fc_norm.{i}.weight" for i in range(3))


def _stretched(kind: str) -> dict[str, object]:
    rope = next(rope for rope in ROPES if rope["rope_type"] == kind)
    return {"rope_parameters": {**rope, "rope_theta": 500_000.0}}


AGREEMENTS = (
    Recipe("llama-eagle3 of the zoo", "llama-eagle3", "llama", V1),
    Recipe("llama-eagle3-postnorm of the zoo", "llama-eagle3-postnorm", "llama", V1),
    Recipe("plain", variant(), dialect=V1),
    Recipe("plain, runner V2", variant(), dialect=V2, runner="v2"),
    Recipe("own embedding", variant(), dialect=V1, own_embedding=True),
    Recipe("whole vocabulary", variant(**WHOLE), dialect=V1),
    Recipe("whole vocabulary, the target's head", variant(**WHOLE), dialect=V1, damage=without("lm_head.weight")),
    Recipe("norm_before_residual", variant(norm_before_residual=True), dialect=V1),
    Recipe("norm_before_fc", variant(norm_before_fc=True), dialect=V1),
    Recipe("fc_norm", variant(fc_norm=True), dialect=V1),
    Recipe("fc_norm behind norm_before_fc", variant(fc_norm=True, norm_before_fc=True), dialect=V1),
    Recipe("norm_output", variant(eagle_config={"feedback_normed": True}), dialect=V1),
    Recipe("norm_output and fc_norm, runner V2", variant(fc_norm=True, eagle_config={"feedback_normed": True}),
           dialect=V2, runner="v2"),
    Recipe("two layers", variant(num_hidden_layers=2), dialect=V1),
    Recipe("biases of attention and MLP", variant(attention_bias=True, mlp_bias=True), dialect=V1),
    Recipe("logit_scale", variant(logit_scale=0.5), dialect=V1),
    Recipe("four states", variant(eagle_config=FOUR), dialect=V1),
    Recipe("one state", variant(eagle_config={"eagle_aux_hidden_state_layer_ids": [4]}), dialect=V1),
    Recipe("a narrower draft", variant(**NARROW), dialect=V1, own_embedding=True),
    Recipe("rope llama3", variant(**_stretched("llama3")), dialect=V1),
    Recipe("rope linear", variant(**_stretched("linear")), dialect=V1),
    Recipe("rope yarn", variant(**_stretched("yarn")), dialect=V1),
    Recipe("sliding window", variant(**SLIDING), dialect=V1),
    Recipe("qwen3 body", variant(**QWEN3), dialect=V1),
    Recipe("every flag that has a word", SAYABLE, dialect=V1),
    Recipe("latent attention", variant(EAGLE3_MLA), dialect=V1),
    Recipe("latent attention, every flag that has a word", variant(RICH_MLA, 3, q_lora_rank=24, norm_before_fc=False,
           bias=False, attention_bias=False, mlp_bias=False, rope_interleave=True, latent_norm_eps=1e-2), dialect=V1),
    Recipe("speculators' layout", variant(norm_before_residual=True), dialect=SPECULATORS),
    Recipe("speculators' layout, all flags", variant(fc_norm=True, norm_before_fc=True,
           eagle_config={"feedback_normed": True}), dialect=SPECULATORS),
    Recipe("gemma4-assistant of the zoo", "gemma4-assistant", "gemma4"),
    *(
        Recipe(f"gemma4 assistant, {name}", gemma4_assistant.PINNED[name].draft, gemma4_assistant.PINNED[name].target,
               write=write_assistant)
        for name in ("dense", "ordered")
    ),
)  # fmt: skip

_LOADS = (
    Recipe("sound", PLAIN),
    Recipe("fc_norm without its tensors", variant(UNSAID, fc_norm=True), damage=without(*FC_NORMS)),
    Recipe("one fc_norm missing", variant(UNSAID, fc_norm=True), damage=without(FC_NORMS[1])),
    Recipe("input_norm missing", variant(UNSAID, norm_before_fc=True), damage=without("input_norm.weight")),
    Recipe("hidden_norm missing", PLAIN, damage=without("midlayer.hidden_norm.weight")),
    Recipe("final norm missing", PLAIN, damage=without("norm.weight")),
    Recipe("fc missing", PLAIN, damage=without("fc.weight")),
    Recipe("q_proj missing", PLAIN, damage=without("midlayer.self_attn.q_proj.weight")),
    Recipe("up_proj missing", PLAIN, damage=without("midlayer.mlp.up_proj.weight")),
    Recipe("map missing", PLAIN, damage=without("d2t", "t2d")),
    Recipe("head missing", PLAIN, damage=without("lm_head.weight")),
    Recipe("bias of fc", variant(UNSAID, bias=True)),
    Recipe("biases without attention_bias", variant(UNSAID, attention_bias=True),
           damage=config(attention_bias=None)),
    Recipe("input_norm without its flag", variant(UNSAID, norm_before_fc=True), damage=config(norm_before_fc=None)),
    Recipe("fc beside use_aux_hidden_state false", PLAIN, damage=config(eagle_config={"use_aux_hidden_state": False})),
    Recipe("fc_norm without its flag", variant(UNSAID, fc_norm=True), damage=config(fc_norm=None)),
    Recipe("old names of fc_norm", variant(UNSAID, fc_norm=True),
           damage=renamed(lambda name: name.replace("fc_norm.0.", "aux_norm_low."))),
    Recipe("names under model.", PLAIN, damage=renamed(lambda name: "model." + name)),
    Recipe("a tensor of nobody", PLAIN, damage=plus("surprise.weight", 4)),
    Recipe("the layer under both names", PLAIN, damage=tensors(_doubled)),
    Recipe("map of int32", PLAIN, damage=tensors(_narrow_map)),
    Recipe("ids of outputs, nested", variant()),
    Recipe("ids of outputs, nested, runner V2", variant(eagle_config={"eagle_aux_hidden_state_layer_ids": [2, 3, 6]}),
           runner="v2"),
    Recipe("ids of inputs, out of order", variant(UNSAID, eagle_aux_hidden_state_layer_ids=[5, 2, 4],
           eagle_config={"layer_ids": "before_layer"})),
    Recipe("four ids at the top", variant(UNSAID, eagle_aux_hidden_state_layer_ids=[1, 3, 5, 7],
           eagle_config={"layer_ids": "before_layer"})),
    Recipe("four nested ids, runner V2", variant(eagle_config=FOUR), runner="v2"),
    Recipe("a head without a norm", variant(UNSAID, eagle_config={"norm_before_head": False})),
    Recipe("a head tied to its embedding", variant(UNSAID, **WHOLE, tie_word_embeddings=True), own_embedding=True),
    Recipe("a narrower draft without an embedding", variant({**UNSAID, **NARROW}), own_embedding=True,
           damage=without("embed_tokens.weight")),
    Recipe("a narrower draft without an embedding, runner V2", variant({**UNSAID, **NARROW}), own_embedding=True,
           damage=without("embed_tokens.weight"), runner="v2"),
    Recipe("rope of old trainers", PLAIN, damage=both(
        plus("midlayer.self_attn.rotary_emb.inv_freq", 8), plus("midlayer.self_attn.rotary_emb.cos_cached", 4, 8))),
    Recipe("speculators' layout, residual unsaid", variant(), dialect=SPECULATORS,
           after=config(norm_before_residual=None)),
    Recipe("speculators' layout without its own key", variant(), dialect=SPECULATORS,
           after=config(speculators_config=None)),
    Recipe("speculators' layout, four states", variant(eagle_config=FOUR), dialect=SPECULATORS),
    Recipe("hidden_norm in the second layer", variant(UNSAID, num_hidden_layers=2,
           eagle_config={"later_norm": "hidden_norm"})),
    Recipe("latent attention, norm_before_fc", variant({**EAGLE3_MLA, "eagle_config": {}}, norm_before_fc=True)),
    Recipe("latent attention without q-LoRA", variant({**EAGLE3_MLA, "eagle_config": {}}, q_lora_rank=None)),
    Recipe("latent attention, biases", variant({**EAGLE3_MLA, "eagle_config": {}}, attention_bias=True, mlp_bias=True)),
    Recipe("latent attention, fc_norm missing", variant({**EAGLE3_MLA, "eagle_config": {}}, fc_norm=True),
           damage=without(*FC_NORMS)),
    Recipe("qwen3 body under SpecForge's name", variant(UNSAID, **QWEN3)),
    Recipe("qwen3 body, k_norm missing", variant(UNSAID, **QWEN3),
           damage=both(without("midlayer.self_attn.k_norm.weight"), config(architectures=["Eagle3Qwen3ForCausalLM"]))),
    Recipe("qwen3 body, biases", variant(UNSAID, **QWEN3, attention_bias=True, mlp_bias=True),
           damage=config(architectures=["Eagle3Qwen3ForCausalLM"])),
)  # fmt: skip

LOADS = tuple(replace(recipe, kind="load") for recipe in _LOADS)

LAYER = "model.layers.3."
TARGETS = tuple(
    Recipe(f"target without {name}", damage=without(name), kind="target")
    for name in (
        *(LAYER + part for part in ("self_attn.q_proj.weight", "mlp.down_proj.weight", "input_layernorm.weight")),
        *("model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"),
    )
)

EVERY = AGREEMENTS + LOADS + TARGETS
