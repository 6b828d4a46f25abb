"""Published shapes with random weights: what a benchmark builds on its own device, since nothing large travels.

A shape is a target and a draft as published; where no draft of a size is published, one in the published layout at the
target's width. `small` is the same shape with few features, for a machine without a GPU. Every tensor is drawn whole,
from a seed of its own name, and loaded as a checkpoint's would be: ranks hold shards of one model.
Letters: reference/README.md.
"""

import gc
import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import Any, NamedTuple

import torch
from torch import Tensor

from harness.conventions import default_points
from harness.pairs import Pair
from optimized.cycle import Speculation
from optimized.decoding import Engine
from optimized.drafts.gemma4_assistant import OrderedHead
from optimized.ops.table import choose
from optimized.parallel import Group, PackedModel, SingleRank
from optimized.shell import Shell
from suites.catalog import PAIRS, SPECULATIONS
from suites.families import deepseek, eagle3, gemma3, gemma4, gemma4_assistant, gemma4_unified, llama, qwen3_moe
from suites.shells import towers_of

LENGTH = 2048
"""tokens that stand before the first timed cycle"""
SPREAD = 0.02
"""standard deviation of every matrix, as models are initialised"""
SMALL = {
    "vocab_size": 512,
    "vocab_size_per_layer_input": 512,
    "draft_vocab_size": 128,
    "hidden_size": 64,
    "backbone_hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 24,
    "num_attention_heads": 4,
    "head_dim": 16,
    "global_head_dim": 32,
    "num_global_key_value_heads": 1,
    "sliding_window": 16,
    "num_experts": 8,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "num_centroids": 32,
    "centroid_intermediate_top_k": 4,
    "mm_embed_dim": 64,
    "mm_posemb_size": 16,
    "output_proj_dims": 64,
}
"""what a key is in a small config, where a config has it"""
SMALL_LAYERS, SMALL_LENGTH = 8, 48


@dataclass(frozen=True)
class Shape:
    """A speculation at a published size."""

    name: str
    speculation: str
    """of the catalog"""
    target: str
    """config.json"""
    draft: str
    batches: tuple[int, ...] = (1, 8, 64)
    length: int = LENGTH
    is_small: bool = False

    @property
    def pairs(self) -> tuple[Pair, Pair]:
        """Target and draft of the catalog."""
        speculation = SPECULATIONS[self.speculation]
        return PAIRS[speculation.target], PAIRS[speculation.draft]

    @property
    def configs(self) -> tuple[Any, Any]:
        """The frozen configs of both."""
        target, draft = self.pairs
        return target.read_config(json.loads(self.target)), draft.read_config(json.loads(self.draft))

    @property
    def points(self) -> tuple[int, ...]:
        """Capture points: the default triple, for a draft that reads states of layers."""
        target, draft = self.configs
        return default_points(target.layers) if draft.reads == "aux" else ()

    @property
    def digest(self) -> str:
        """Of both configs."""
        return sha256((self.target + self.draft).encode()).hexdigest()


class Built(NamedTuple):
    """A shape in the memory of a device."""

    shape: Shape
    target: Any
    draft: Any

    @property
    def text(self) -> Any:
        """The target without towers."""
        return getattr(self.target, "language_model", self.target)

    @property
    def engine(self) -> Engine:
        """A new engine: its sessions are its own."""
        return Engine(self.target, self.draft, self.shape.points)

    @property
    def models(self) -> Speculation:
        return Speculation(self.target, self.draft, self.shape.points)


def build(
    shape: Shape,
    device: torch.device | str,
    dtype: torch.dtype = torch.bfloat16,
    group: Group | None = None,
    num_rows: int = 16,
    form: str | None = None,
) -> Built:
    """Both twins of a shape, filled; on the meta device they stay shapes.

    num_rows   the most rows of a step
    """
    ops, group = choose(device, form, num_rows=num_rows), group or SingleRank()
    (target_pair, draft_pair), (target_config, draft_config) = shape.pairs, shape.configs
    target = target_pair.optimized(target_config, ops, group, dtype, device)
    if isinstance(target, Shell):
        target.take(towers_of(target_pair, target_config).to(dtype).to_empty(device=device).requires_grad_(False))
    draft = draft_pair.optimized(draft_config, ops, group, dtype, device)
    # drafts are published without the tables that they share
    if hasattr(draft, "share_embedding"):
        draft.share_embedding(getattr(target, "language_model", target))
    if draft_pair.name == "qwen3_moe_mtp":
        draft.share_head(target)
    if torch.device(device).type != "meta":
        fill(target, "target.")
        fill(draft, "draft.")
    elif isinstance(getattr(draft, "lm_head", None), OrderedHead):
        # the one tensor whose numbers decide whether a draft fits
        draft.lm_head.ordering = torch.arange(draft_config.vocab)
    if draft_pair.name == "gemma4_assistant":
        draft.join(target)
    return Built(shape, target, draft)


def fill(model: PackedModel, owner: str) -> None:
    """Draw every tensor that the model would read from a checkpoint."""
    for part in model.parts:
        for name, piece in part.pieces.items():
            part.load(name, drawn(owner + part.prefix + name, piece.shape, piece.into.dtype, piece.into.device))


def drawn(name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Matrices around zero, vectors around one, maps of a vocabulary as maps: the same for every rank."""
    if dtype == torch.bool:
        return torch.ones(shape, dtype=dtype, device=device)
    if name.endswith("token_ordering"):
        return torch.arange(shape[0], device=device).flip(0)
    if not dtype.is_floating_point:
        # d2t: draft ids stand for the first ids of the target
        return torch.zeros(shape, dtype=dtype, device=device)
    generator = torch.Generator(device).manual_seed(zlib.crc32(name.encode()))
    tensor = torch.empty(shape, dtype=dtype, device=device).normal_(0.0, SPREAD, generator=generator)
    return tensor if len(shape) > 1 else tensor.add_(1.0)


def free() -> None:
    """Give back what nobody holds any more: the next shape needs the room."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def small(shape: Shape) -> Shape:
    """The same shape with few features; its name stays, and records say that it is one."""
    batches = tuple(sorted({min(batch, 2) for batch in shape.batches}))
    few = _resized(shape, SMALL, SMALL_LAYERS)
    return replace(few, batches=batches, length=SMALL_LENGTH, is_small=True)


def shallow(shape: Shape, num_layers: int) -> Shape:
    """The same shape with few layers, each as wide as it is."""
    return _resized(shape, {}, num_layers)


def _resized(shape: Shape, sizes: Mapping[str, int], num_layers: int) -> Shape:
    configs = (json.dumps(_cut(json.loads(text), sizes, num_layers)) for text in (shape.target, shape.draft))
    target, draft = configs
    return replace(shape, target=target, draft=draft)


def _cut(config: Mapping[str, Any], sizes: Mapping[str, int], num_layers: int) -> dict[str, Any]:
    # what a config has none of, it still has none of
    made = {key: sizes.get(key, value) if value else value for key, value in config.items()}
    # sounds come in at their own width
    for key in ("text_config", "vision_config"):
        if isinstance(config.get(key), dict):
            made[key] = _cut(config[key], sizes, num_layers)
    if config.get("num_hidden_layers", 0) > num_layers:
        made["num_hidden_layers"] = num_layers
    if isinstance(config.get("layer_types"), list):
        # the last ones: a Gemma ends in a layer that sees everything
        made["layer_types"] = config["layer_types"][-made["num_hidden_layers"] :]
    if sizes and "num_key_value_heads" in config:
        same = config["num_key_value_heads"] == config.get("num_attention_heads")
        made["num_key_value_heads"] = sizes["num_attention_heads"] if same else 2
    return made


def _llama_draft(target: Mapping[str, Any], **facts: Any) -> str:
    """EAGLE-3 as its authors lay it out beside Llama-3.1-8B, at the width of another target."""
    text = target.get("text_config", target)
    like = eagle3.PUBLISHED["yuhuili/EAGLE3-LLaMA3.1-Instruct-8B"].keys
    same = ("hidden_size", "intermediate_size")
    return json.dumps({**like, **{key: text[key] for key in same}, **facts})


def _latent_draft(target: Mapping[str, Any]) -> str:
    """EAGLE-3 with latent attention as it is published beside Kimi K2.5, at the width of another target."""
    same = (
        *("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "q_lora_rank"),
        *("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "vocab_size", "rms_norm_eps"),
        *("rope_theta", "rope_scaling"),
    )
    facts = {"architectures": ["Eagle3DeepseekV2ForCausalLM"], "model_type": "kimi_k2", "num_hidden_layers": 1}
    facts |= {"hidden_act": "silu", "torch_dtype": "bfloat16", "draft_vocab_size": target["vocab_size"]}
    return json.dumps({**{key: target[key] for key in same if key in target}, **facts})


def _gemma3(size: str, heads: int, kv_heads: int) -> Shape:
    same = {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": 256, "vocab_size": 262_208}
    config = {**gemma3.PUBLISHED[size]["text_config"], **same}
    return Shape(f"{size}-eagle3", "gemma3-eagle3", json.dumps(config), _llama_draft(config, **same))


LLAMA, QWEN = llama.PUBLISHED["Llama-3.1-8B"], qwen3_moe.PUBLISHED["Qwen3-30B-A3B"]
LITE, ASSISTANTS = deepseek.PUBLISHED["DeepSeek-V2-Lite"], gemma4_assistant.PUBLISHED
SHAPES = {
    shape.name: shape
    for shape in (
        Shape("Llama-3.1-8B-eagle3", "llama-eagle3", json.dumps(LLAMA), _llama_draft(LLAMA)),
        Shape(
            "gemma-4-12B-assistant",
            "gemma4_unified-assistant",
            json.dumps(gemma4_unified.PUBLISHED["gemma-4-12B"]),
            json.dumps(ASSISTANTS["gemma-4-12B-assistant"]),
        ),
        Shape(
            "Qwen3-30B-A3B-mtp",
            "qwen3_moe-mtp",
            json.dumps(QWEN),
            json.dumps({**QWEN, "architectures": ["Qwen3MoeForCausalLMMTP"], "num_nextn_predict_layers": 1}),
        ),
        Shape("DeepSeek-V2-Lite-eagle3-mla", "deepseek-eagle3-mla", json.dumps(LITE), _latent_draft(LITE)),
        _gemma3("gemma-3-4b", 8, 4),
        _gemma3("gemma-3-12b", 16, 8),
        Shape(
            "gemma-4-31B-assistant",
            "gemma4-assistant",
            json.dumps(gemma4.PUBLISHED["gemma-4-31B"]),
            json.dumps(ASSISTANTS["gemma-4-31B-assistant"]),
            batches=(1, 8),
        ),
    )
}
"""in the order in which a GPU is asked"""
