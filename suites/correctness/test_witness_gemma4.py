"""Claim: the Gemma 4 page computes what transformers computes, layer by layer, whatever the size of the model.

Born of SGLang #28005: captures of Gemma 4 were views of a stream that the next layer went on to change, so deep layers
had a cosine of 0.51 to transformers. The page is held to it at every capture point: after the layer's scalar, with
the layer's own input, before any norm.
"""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from harness import checkpoints, witness
from harness.checkpoints import CheckpointError, open_checkpoint, read_json, rename, save_checkpoint, state_of
from harness.compare import bit_equal, hold
from reference.config import ConfigError
from reference.targets.gemma4 import CHECKPOINT_NAMES, Gemma4Config, Gemma4Target
from suites.catalog import open_target
from suites.draws import Drawn, folders, random_tokens, write_target
from suites.families.gemma4 import DENSE, EDGE, EXPERTS, PINNED, PUBLISHED, SIZES, TOTALS, drawn_of, gemma4_targets
from suites.opened import OpenTarget

pytestmark = [pytest.mark.correctness, pytest.mark.pair("gemma4")]

any_size = st.sampled_from(SIZES).flatmap(gemma4_targets)


def both(drawn: Drawn, dtype: torch.dtype = torch.float64) -> tuple[OpenTarget, witness.Witness]:
    """The page and the witness, from one folder."""
    with folders(drawn) as (path, _):
        return open_target(path, dtype=dtype), witness.load(path, dtype=dtype)


def scale_of(target: OpenTarget) -> dict[str, int]:
    return {"depth": target.num_layers, "width": target.config.hidden}


def hold_all(drawn: Drawn, batch: int, width: int) -> None:
    """Logits, final hidden and every capture point."""
    target, outside = both(drawn)
    tokens = random_tokens(target.config.vocab, batch, width, drawn.seed)

    out, want = target(tokens, capture=range(target.num_layers + 1)), outside.run(tokens)

    for c in range(target.num_layers + 1):
        hold(f"capture point {c}", out.aux[:, :, c], want.aux[:, :, c], **scale_of(target))
    hold("hidden", out.hidden, want.hidden, **scale_of(target))
    hold("logits", out.logits, want.logits, **scale_of(target))


@given(drawn=gemma4_targets("dense"), batch=st.integers(1, 3), width=st.integers(1, 24))
@example(drawn=PINNED["dense"], batch=2, width=14)
@example(
    drawn=drawn_of(DENSE, attention_k_eq_v=False, attention_bias=True, tie_word_embeddings=False), batch=1, width=9
)
def test_dense_equals_transformers_at_every_capture_point(drawn: Drawn, batch: int, width: int) -> None:
    hold_all(drawn, batch, width)


@given(drawn=gemma4_targets("experts"), batch=st.integers(1, 3), width=st.integers(1, 24))
@example(drawn=PINNED["experts"], batch=2, width=14)
def test_experts_equal_transformers_at_every_capture_point(drawn: Drawn, batch: int, width: int) -> None:
    hold_all(drawn, batch, width)


@given(drawn=gemma4_targets("edge"), batch=st.integers(1, 3), width=st.integers(1, 24))
@example(drawn=PINNED["edge"], batch=2, width=14)
def test_edge_equals_transformers_at_every_capture_point(drawn: Drawn, batch: int, width: int) -> None:
    hold_all(drawn, batch, width)


@given(drawn=any_size, batch=st.integers(1, 3), width=st.integers(1, 12))
@example(drawn=PINNED["edge"], batch=2, width=9)
def test_positions_need_not_start_at_zero(drawn: Drawn, batch: int, width: int) -> None:
    target, outside = both(drawn)
    tokens = random_tokens(target.config.vocab, batch, width, drawn.seed)
    positions = torch.arange(width).expand(batch, width) + 5

    hold("logits", target(tokens, positions).logits, outside.run(tokens, positions).logits, **scale_of(target))


@given(drawn=any_size, batch=st.integers(1, 3), width=st.integers(2, 16), cut=st.integers(1, 15))
@example(drawn=PINNED["edge"], batch=2, width=14, cut=9)
@example(drawn=PINNED["dense"], batch=2, width=14, cut=9)
@torch.no_grad()
def test_two_chunks_with_a_cache_equal_one_pass(drawn: Drawn, batch: int, width: int, cut: int) -> None:
    target, outside = both(drawn)
    tokens = random_tokens(target.config.vocab, batch, width, drawn.seed)
    points, cut = range(target.num_layers + 1), min(cut, width - 1)
    positions = torch.arange(width).expand(batch, width)
    # more slots than tokens: empty ones must stay out of sight
    cache = target.module.new_cache(batch, width + 3)

    chunks = [
        target.module(tokens[:, part], positions[:, part], points, cache) for part in (slice(cut), slice(cut, None))
    ]

    want = outside.run(tokens)
    hold("logits", torch.cat([c.logits for c in chunks], 1), want.logits, **scale_of(target))
    hold("aux", torch.cat([c.aux for c in chunks], 1), want.aux, **scale_of(target))


@given(drawn=any_size, batch=st.integers(1, 3), width=st.integers(1, 12))
@example(drawn=PINNED["edge"], batch=2, width=9)
@example(drawn=PINNED["dense"], batch=2, width=9)
@torch.no_grad()
def test_the_keys_and_values_for_an_assistant_are_those_of_transformers(drawn: Drawn, batch: int, width: int) -> None:
    target, outside = both(drawn)
    tokens = random_tokens(target.config.vocab, batch, width, drawn.seed)
    cache = target.module.new_cache(batch, width)
    with witness.StayWide():
        want = outside.model(input_ids=tokens, use_cache=False, return_shared_kv_states=True).shared_kv_states

    target.module(tokens, cache=cache)

    shared = target.module.shared_kv(cache)
    assert shared.keys() == want.keys()
    for layer_type, (k, v) in shared.items():
        theirs = [tensor.transpose(1, 2) for tensor in want[layer_type]]
        hold(f"{layer_type} keys", k, theirs[0], **scale_of(target))
        hold(f"{layer_type} values", v, theirs[1], **scale_of(target))


@given(drawn=gemma4_targets("edge"), batch=st.integers(1, 2), width=st.integers(1, 10))
@example(drawn=PINNED["edge"], batch=2, width=9)
@torch.no_grad()
def test_given_embeddings_stand_in_for_the_table(drawn: Drawn, batch: int, width: int) -> None:
    target, outside = both(drawn)
    tokens, others = (random_tokens(target.config.vocab, batch, width, seed) for seed in (drawn.seed, drawn.seed + 1))
    generator = torch.Generator().manual_seed(drawn.seed)
    features = torch.randn(batch, width, target.config.hidden, generator=generator, dtype=torch.float64)
    embeds = torch.where(torch.arange(width)[:, None] % 2 == 0, features, target.module.embed(tokens))
    with witness.StayWide():
        own = outside.decoder.get_per_layer_inputs(others, None)
        want = outside.model(inputs_embeds=embeds, per_layer_inputs=own, use_cache=False)

    out = target.module(tokens, embeds=embeds, per_layer_tokens=others)

    hold("logits", out.logits, want.logits, **scale_of(target))


def in_a_shell(text: Drawn, folder: Path) -> witness.Witness:
    """The text model as transformers has it inside its multimodal model, which knows which tokens are of an image."""
    ids = dict(zip(("boi", "eoi", "image", "video", "boa", "audio"), range(90, 96), strict=True))
    config = {
        "model_type": "gemma4",
        "architectures": ["Gemma4ForConditionalGeneration"],
        "text_config": text.keys,
        "tie_word_embeddings": text.keys["tie_word_embeddings"],
        "eoa_token_index": 96,
        **{f"{name}_token_id": number for name, number in ids.items()},
    }
    return witness.load(witness.create(config, folder, seed=text.seed), dtype=torch.float64)


@given(drawn=any_size, batch=st.integers(1, 2), kinds=st.lists(st.integers(0, 1), min_size=2, max_size=16))
@example(drawn=PINNED["dense"], batch=2, kinds=[0, 1, 1, 1, 1, 1, 1, 1, 0, 0, 1, 1, 0])
@example(drawn=drawn_of(DENSE, use_bidirectional_attention=None), batch=1, kinds=[0, 1, 1, 1, 0])
@torch.no_grad()
def test_an_image_is_seen_both_ways_where_its_kind_of_layer_does(
    tmp_path_factory: pytest.TempPathFactory, drawn: Drawn, batch: int, kinds: list[int]
) -> None:
    outside = in_a_shell(drawn, tmp_path_factory.mktemp("shell"))
    module = Gemma4Target(Gemma4Config.from_hf(drawn.keys)).double()
    state = {rename(name, (("model.language_model.", ""),)): t for name, t in outside.model.state_dict().items()}
    module.load_state_dict(state)
    tokens = random_tokens(80, batch, len(kinds), drawn.seed)
    of_image = torch.tensor(kinds).expand(batch, -1)
    starts = of_image.diff(dim=1, prepend=torch.zeros_like(of_image[:, :1])).clamp(min=0)
    blocks = torch.where(of_image == 1, starts.cumsum(1) - 1, -1)

    out = module(tokens, capture=range(module.c.layers + 1), blocks=blocks)

    want = outside.run(tokens, inputs={"mm_token_type_ids": of_image})
    size = {"depth": module.c.layers, "width": module.c.hidden}
    hold("aux", out.aux, want.aux, **size)
    hold("logits", out.logits, want.logits, **size)


@given(drawn=any_size, width=st.integers(1, 8))
@example(drawn=PINNED["edge"], width=8)
@torch.no_grad()
def test_embeddings_and_norms_round_where_transformers_rounds(drawn: Drawn, width: int) -> None:
    target, outside = both(drawn, torch.bfloat16)
    tokens = random_tokens(target.config.vocab, 2, width, drawn.seed)

    out = target(tokens, capture=(0, target.num_layers))

    # sqrt(H) in bfloat16, and one rounding after the weight: moves, so to the bit
    bit_equal("capture point 0", out.aux[:, :, 0], outside.decoder.embed_tokens(tokens))
    bit_equal("hidden", out.hidden, outside.decoder.norm(out.aux[:, :, 1]))


@given(drawn=any_size)
@example(drawn=PINNED["dense"])
@example(drawn=PINNED["edge"])
@example(drawn=drawn_of(DENSE, global_head_dim=8, num_global_key_value_heads=None))
@example(drawn=drawn_of(EDGE, num_global_key_value_heads=1))
@example(drawn=drawn_of(EXPERTS, layer_types=["full_attention"] + ["sliding_attention"] * 12, num_hidden_layers=13))
def test_the_hubs_spelling_and_the_saved_one_read_alike(drawn: Drawn) -> None:
    with folders(drawn) as (path, _):
        saved = read_json(path / checkpoints.CONFIG)

    assert "global_head_dim" not in saved
    assert Gemma4Config.from_hf(saved) == Gemma4Config.from_hf(drawn.keys)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"per_layer_config": {"2": {"head_dim": 32}}}, "per_layer_config"),
        ({"per_layer_config": {"0": {"head_dim": 32}}, "global_head_dim": None}, "per_layer_config"),
        ({"per_layer_config": {"99": {"head_dim": 16}}}, "per_layer_config"),
        ({"layer_types": ["full_attention"]}, "layer_types"),
        ({"layer_types": ["chunked_attention"] * 8}, "chunked_attention"),
        ({"num_kv_shared_layers": 8}, "num_kv_shared_layers"),
        ({"num_kv_shared_layers": 6}, "num_kv_shared_layers"),
        ({"use_bidirectional_attention": "all"}, "use_bidirectional_attention"),
        ({"num_global_key_value_heads": 3, "attention_k_eq_v": True}, "num_attention_heads"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "sliding_attention"),
        ({"rope_parameters": {"sliding_attention": {"rope_type": "dynamic"}}}, "dynamic"),
        ({"rope_parameters": {"sliding_attention": {"partial_rotary_factor": 0.5}}}, "partial_rotary_factor"),
        ({"enable_moe_block": True, "num_experts": 2, "top_k_experts": 3, "moe_intermediate_size": 8}, "top_k_experts"),
        ({"hidden_activation": "silu"}, "hidden_activation"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        ({"model_type": "gemma3n_text"}, "model_type"),
    ],
)
def test_a_config_that_cannot_be_read_in_one_way_is_refused(changes: dict[str, object], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        Gemma4Config.from_hf({**EDGE, **changes})


def test_a_shared_layer_may_carry_keys_that_nothing_reads(tmp_path: Path) -> None:
    saved = open_checkpoint(write_target(PINNED["edge"], tmp_path / "saved"))
    tensors = {name: saved.read(name) for name in saved.headers}
    spare = {f"model.layers.7.self_attn.{name}_proj.weight": torch.ones(32, 48) for name in "kv"}
    save_checkpoint(tmp_path / "spare", saved.config, tensors | spare)

    ledger = open_target(tmp_path / "spare").ledger

    ignored = {entry.tensor: entry.reason for entry in ledger.entries if entry.status == "ignored"}
    assert ignored.keys() == spare.keys()
    assert all("donor" in reason for reason in ignored.values())


def test_values_beside_shared_projections_are_refused(tmp_path: Path) -> None:
    saved = open_checkpoint(write_target(PINNED["dense"], tmp_path / "saved"))
    tensors = {name: saved.read(name) for name in saved.headers}
    tensors["model.layers.2.self_attn.v_proj.weight"] = torch.ones(16, 48)
    save_checkpoint(tmp_path / "spare", saved.config, tensors)

    with pytest.raises(CheckpointError, match=r"layers\.2\.self_attn\.v_proj\.weight"):
        open_target(tmp_path / "spare")


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes_have_the_parameters_of_transformers(name: str) -> None:
    def shapes(state: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
        return {rename(n, CHECKPOINT_NAMES): tuple(t.shape) for n, t in state.items()}

    config = json.loads(json.dumps(PUBLISHED[name]))
    with torch.device("meta"):
        ours = Gemma4Target(Gemma4Config.from_hf(config))
        theirs = witness.build(config)

    stored = {n: t for n, t in theirs.state_dict().items() if n != "lm_head.weight"}
    assert shapes(state_of(ours)) == shapes(stored)
    total = sum(p.numel() for p in ours.parameters())
    assert total == sum(p.numel() for p in theirs.parameters())
    assert round(total / 1e9, 2) == TOTALS[name]
