"""Claim: the D-Flash reference fills in a block as two trainers, transformers and the engines' own words have it.

Born of vLLM #40727 (`target_layer_ids` without the + 1 that they need), #42704 (a context of another width than `fc`
reads) and of three readings of one word: which layers are causal inside a block. The golden tensors were made by
SpecForge and speculators themselves (suites/golden/make_golden_parallel.py); transformers' generator is run beside the
reference's loop, block by block; what neither of them can be asked is written out here by queries and heads.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from harness import witness
from harness.checkpoints import read_json, save_checkpoint, state_of
from harness.compare import bit_equal, hold
from reference.drafting import Block
from reference.drafts.dflash import DflashConfig
from reference.outputs import TargetOutput
from reference.targets.llama import LlamaConfig, LlamaTarget
from suites.catalog import OpenDraft, OpenTarget, open_draft, open_speculation, open_target
from suites.correctness.test_golden import GOLDEN, LARGEST_ERROR
from suites.correctness.test_loading import influential, ours
from suites.draws import LLAMA, PINNED_TARGET, Drawn, random_tokens, variant, write_target
from suites.families.dflash import (
    BOTH_WAYS,
    CAUSAL,
    EVERY_DFLASH_FLAG,
    FULL,
    PINNED_DFLASH,
    SLIDING,
    dflash_drafts,
    tiny_dflash,
)
from suites.scripted import tiny_target
from suites.stand import stand, stand_as

pytestmark = [pytest.mark.correctness, pytest.mark.pair("dflash")]

VOCAB = PINNED_TARGET.keys["vocab_size"]
DRAFTS = dflash_drafts(PINNED_TARGET)
PLAIN_ROPES = dflash_drafts(PINNED_TARGET, ("default", "linear"))
CASES = sorted(folder.name for folder in (GOLDEN / "parallel").iterdir() if "dflash" in folder.name)
STEPS = 3


def open_case(name: str, root: Path) -> tuple[OpenDraft, dict[str, Tensor]]:
    """A stored draft, joined to a target that has the tables it was made with."""
    folder = GOLDEN / "parallel" / name
    golden, facts = load_file(folder / "golden.safetensors"), DflashConfig.from_hf(read_json(folder / "config.json"))
    sizes = {"vocab_size": facts.vocab, "hidden_size": facts.hidden, "num_attention_heads": 2, "head_dim": 8}
    config = {**LLAMA, **sizes}
    weights = {
        key: torch.zeros_like(value) for key, value in state_of(LlamaTarget(LlamaConfig.from_hf(config))).items()
    }
    weights |= {name: tensor for name, tensor in golden.items() if name.endswith(".weight")}
    save_checkpoint(root / "target", config, weights)
    return open_draft(folder, open_target(root / "target")), golden


@pytest.mark.parametrize("name", CASES)
def test_the_reference_fills_in_what_the_trainer_does(name: str, tmp_path: Path) -> None:
    draft, golden = open_case(name, tmp_path)
    tokens, want = golden["tokens"], golden["logits"]
    anchors = torch.arange(tokens.shape[1]).expand_as(tokens)

    logits = draft.module.blocks(tokens, draft.fuse(golden["aux"]), anchors, want.shape[2])

    known = ~want.isnan()
    assert known[:, :4].all()
    assert float((logits - want)[known].abs().max()) <= LARGEST_ERROR
    assert draft.capture_points == (2, 5)


def test_every_stored_case_is_here() -> None:
    assert {name.split("_")[0] for name in CASES} == {"specforge", "speculators"}
    read = [DflashConfig.from_hf(read_json(GOLDEN / "parallel" / name / "config.json")) for name in CASES]
    assert {c.causal for c in read} == {(False,), (False, True), (False, False)}


class Blocks:
    """One draft written out: a list of what each query sees, one head at a time. It shares no line with the page."""

    def __init__(self, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        self.config, self.block = config, config["dflash_config"]
        self.tensors = {n: t.double() for n, t in tensors.items() if t.is_floating_point()}

    def norm(self, x: Tensor, name: str) -> Tensor:
        """x [M, X] -> [M, X]"""
        mean = (x * x).sum(-1, keepdim=True) / x.shape[-1]
        return x / (mean + self.config["rms_norm_eps"]).sqrt() * self.tensors[name + ".weight"]

    def heads(self, x: Tensor, name: str, places: Tensor | None, norm: str = "") -> Tensor:
        """x [M, H], places [M] -> [M, N, D]  projected, and with places normed and turned as complex numbers"""
        bias = self.tensors.get(name + ".bias", torch.zeros(()))
        y = (x @ self.tensors[name + ".weight"].T + bias).unflatten(-1, (-1, self.config["head_dim"]))
        if places is None:
            return y
        y, rope, half = self.norm(y, norm), self.config["rope_parameters"], y.shape[-1] // 2
        # angles are float32 in every implementation, whatever the model computes in
        turn = 1 / rope["rope_theta"] ** (torch.arange(0, 2 * half, 2) / (2 * half)) / rope.get("factor", 1.0)
        turn = places[:, None] * turn
        z = (
            torch.complex(y[..., :half], y[..., half:])
            * torch.complex(turn.cos().double(), turn.sin().double())[:, None]
        )
        return torch.cat([z.real, z.imag], -1)

    def fill(self, aux: Tensor, root: int, num_drafts: int) -> Tensor:
        """aux [T, A, X] of the positions before the root -> [K, Vd]"""
        known, c, t = len(aux), self.config, self.tensors
        context = self.norm(aux.double().flatten(1) @ t["fc.weight"].T, "hidden_norm")
        y = t["embed_tokens.weight"][[root] + [self.block["mask_token_id"]] * num_drafts]
        places = torch.arange(known + num_drafts + 1)
        kinds = c.get("layer_types") or [FULL] * c["num_hidden_layers"]
        for i, kind in enumerate(kinds):
            name = f"layers.{i}.self_attn."
            u = self.norm(y, f"layers.{i}.input_layernorm")
            rows = torch.cat([context, u])
            q = self.heads(u, name + "q_proj", places[known:], name + "q_norm")
            k = self.heads(rows, name + "k_proj", places, name + "k_norm")
            v = self.heads(rows, name + "v_proj", None)
            stated = c.get("is_causal", self.block.get("causal"))
            causal = kind == SLIDING if stated is None else stated
            mixed = torch.stack([self.read(q[j], k, v, known + j, causal, kind) for j in range(len(y))])
            y = y + mixed @ t[name + "o_proj.weight"].T + t.get(name + "o_proj.bias", torch.zeros(()))
            x = self.norm(y, f"layers.{i}.post_attention_layernorm")
            gate, up = (x @ t[f"layers.{i}.mlp.{part}_proj.weight"].T for part in ("gate", "up"))
            y = y + (gate / (1 + (-gate).exp()) * up) @ t[f"layers.{i}.mlp.down_proj.weight"].T
        return self.norm(y, "norm")[1:] @ t["lm_head.weight"].T * c.get("logit_scale", 1.0)

    def read(self, q: Tensor, k: Tensor, v: Tensor, at: int, causal: bool, kind: str) -> Tensor:
        """q [N, D], k, v [S, G, D] -> [N*D]"""
        seen = [s for s in range(len(k)) if s <= at or not causal]
        if kind == SLIDING:
            seen = [s for s in seen if abs(s - at) < self.config["sliding_window"]]
        group, said = len(q) // k.shape[1], []
        for n, query in enumerate(q):
            weight = (k[seen, n // group] @ query / len(query) ** 0.5).exp()
            said.append(weight @ v[seen, n // group] / weight.sum())
        return torch.cat(said)


@given(drawn=PLAIN_ROPES, width=st.integers(2, 9), num_drafts=st.integers(1, 5), seed=st.integers(0, 99))
@example(drawn=PINNED_DFLASH, width=8, num_drafts=3, seed=0)
@example(drawn=EVERY_DFLASH_FLAG, width=9, num_drafts=5, seed=1)
@example(drawn=BOTH_WAYS, width=7, num_drafts=6, seed=2)
@example(drawn=CAUSAL, width=6, num_drafts=2, seed=3)
@torch.no_grad()
def test_a_block_is_what_each_query_sees_written_out(
    wide_target: OpenTarget, drawn: Drawn, width: int, num_drafts: int, seed: int
) -> None:
    draft, tokens = stand(drawn, wide_target), random_tokens(VOCAB, 1, width, seed)
    out, apart = wide_target(tokens, capture=draft.capture_points), Blocks(drawn.keys, ours(drawn))

    steps = draft.unroll(tokens, out, num_drafts)

    c = draft.facts.config
    for column in {0, (width - 1) // 2, width - 2}:
        want = apart.fill(out.aux[0, : column + 1], int(tokens[0, column + 1]), num_drafts)
        known = min(num_drafts, width - 1 - column)
        hold("logits", steps[:known, 0, column], want[:known], depth=1 + 2 * c.layers, width=c.hidden)


LEARNED = {"fc.weight": "encoder.fc.weight", "hidden_norm.weight": "encoder.output_norm_enc.weight"}


def beside_transformers(seed: int, size: int, folder: Path, **changes: Any) -> tuple[Any, Any, list[Tensor]]:
    """One target and one draft, here and in transformers, and what its draft gives in each call."""
    target = tiny_target(seed, 5, num_hidden_layers=4, eos_token_id=None)
    drawn = tiny_dflash(seed + 1, 5, dflash_config={"causal": False}, **changes)
    path, tensors = write_target(target, folder / "target"), ours(drawn)
    kept = {name: t for name, t in tensors.items() if name not in ("embed_tokens.weight", "lm_head.weight")}
    save_checkpoint(folder / "draft", drawn.keys, kept)
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    names += ("head_dim", "rms_norm_eps", "rope_parameters", "layer_types", "max_position_embeddings")
    body = {name: drawn.keys[name] for name in names} | drawn.keys["dflash_config"]
    # its window has the distance inside, the engines' has it outside
    body |= {
        "model_type": "muse_glimmer_assistant",
        "block_size": size,
        "sliding_window": drawn.keys["sliding_window"] - 1,
    }
    del body["causal"]
    model, said = witness.build(body), []
    model.load_state_dict({LEARNED.get(name, name): tensor for name, tensor in kept.items()})
    model.register_forward_hook(lambda module, args, out: said.append(out.last_hidden_state))
    return open_speculation(path, folder / "draft"), (witness.load(path), model), said


@pytest.mark.parametrize(("seed", "size", "changes"), [(3, 4, {}), (7, 4, {}), (3, 6, {"sliding_window": 3})])
def test_transformers_asks_the_same_blocks_and_fills_them_in_alike(
    seed: int, size: int, changes: dict[str, Any], tmp_path: Path
) -> None:
    speculation, (theirs, model), outside = beside_transformers(seed, size, tmp_path, **changes)
    here: list[Tensor] = []
    speculation.draft.module.norm.register_forward_hook(lambda module, args, out: here.append(out))
    prompt = random_tokens(5, 1, 6, seed)

    text = theirs.generate(prompt, 16, inputs={"assistant_model": model, "speculation_type": "dflash"})
    said = speculation.generate(prompt, 16, size - 1)

    bit_equal("tokens", said.tokens, text)
    # transformers drafts no more where few tokens are left
    blocks = list(zip(here, outside, strict=False))
    assert len(blocks) > 3
    for mine, want in blocks:
        hold("block", mine, want, depth=4 + 2 * 2, width=48)
    assert len(set(said.accepted[0])) > 1


@given(drawn=DRAFTS, width=st.integers(2, 9), num_drafts=st.integers(1, 4), seed=st.integers(0, 99))
@example(drawn=PINNED_DFLASH, width=8, num_drafts=3, seed=0)
@example(drawn=EVERY_DFLASH_FLAG, width=9, num_drafts=4, seed=1)
@example(drawn=BOTH_WAYS, width=7, num_drafts=4, seed=2)
@torch.no_grad()
def test_what_is_trained_is_what_is_served(
    wide_target: OpenTarget, drawn: Drawn, width: int, num_drafts: int, seed: int
) -> None:
    draft, tokens = stand(drawn, wide_target), random_tokens(VOCAB, 2, width, seed)
    out, c = wide_target(tokens, capture=draft.capture_points), draft.facts.config
    places = torch.arange(width).expand_as(tokens)
    way = Block(draft.module, None, None, 2, width + num_drafts, num_drafts)
    following = torch.cat([tokens[:, 1:], tokens[:, :1]], 1)

    steps = draft.unroll(tokens, out, num_drafts)

    begin = 0
    for column in range(width - 1):
        if (column + seed) % 3 == 0:
            # a verify of the columns since the last one, and one column that did not stand
            span = slice(begin, column + 2)
            seen = TargetOutput(*(x[:, span] for x in out))
            last = torch.full((2,), column - begin)
            served = way.start(seen, tokens[:, span], following[:, span], places[:, span], last).logits
            known, begin = min(num_drafts, width - 1 - column), column + 1
            want = steps[:known, :, column].transpose(0, 1)
            hold("logits", served[:, :known], want, depth=1 + 2 * c.layers, width=c.hidden)
            assert steps[known:, :, column].isnan().all()


@given(drawn=DRAFTS, seed=st.integers(0, 99))
@example(drawn=PINNED_DFLASH, seed=0)
@example(drawn=EVERY_DFLASH_FLAG, seed=1)
@torch.no_grad()
def test_columns_that_did_not_stand_change_no_proposal(wide_target: OpenTarget, drawn: Drawn, seed: int) -> None:
    draft, tokens, num_drafts = stand(drawn, wide_target), random_tokens(VOCAB, 2, 9, seed), 3
    out, noise = wide_target(tokens, capture=draft.capture_points), torch.Generator().manual_seed(seed)
    places, last, said = torch.arange(9).expand_as(tokens), torch.tensor([2, 5]), []
    stands = places <= last[:, None]

    for _ in range(2):
        aux = torch.where(stands[..., None, None], out.aux, torch.randn(out.aux.shape, generator=noise).double())
        way = Block(draft.module, None, None, 2, 9 + num_drafts, num_drafts)
        first = way.start(out._replace(aux=aux), tokens, tokens, places, last).logits
        # and in the next cycle, whose settled columns begin after the last that stood
        span = last[:, None] + 1 + torch.arange(2)
        row = torch.arange(2)[:, None]
        second = TargetOutput(*(x[row, span] for x in out))
        again = way.start(second, tokens[row, span], tokens[row, span], span, torch.tensor([1, 1])).logits
        said.append((first, again))

    for one, other in zip(*said, strict=True):
        bit_equal("logits", one, other)


@given(drawn=DRAFTS, seed=st.integers(0, 99))
@example(drawn=CAUSAL, seed=0)
def test_fewer_drafts_are_the_first_of_more_where_every_layer_is_causal(
    wide_target: OpenTarget, drawn: Drawn, seed: int
) -> None:
    causal = variant(
        drawn.keys, drawn.seed, is_causal=True, dflash_config={**drawn.keys["dflash_config"], "causal": True}
    )
    draft, tokens = stand(causal, wide_target), random_tokens(VOCAB, 2, 8, seed)
    out, c = wide_target(tokens, capture=draft.capture_points), draft.facts.config

    few, many = (draft.unroll(tokens, out, k) for k in (2, 5))

    hold("logits", many[:2], few, nan_equal=True, depth=1 + 2 * c.layers, width=c.hidden)


def test_a_block_that_is_not_causal_knows_its_length(wide_target: OpenTarget) -> None:
    draft, tokens = stand(PINNED_DFLASH, wide_target), random_tokens(VOCAB, 1, 8, 0)
    out = wide_target(tokens, capture=draft.capture_points)

    few, many = (draft.unroll(tokens, out, k)[0, 0, 0] for k in (1, 5))

    assert not torch.allclose(few, many, atol=1e-3)


@given(drawn=DRAFTS, own_embedding=st.booleans())
@example(drawn=PINNED_DFLASH, own_embedding=False)
@example(drawn=EVERY_DFLASH_FLAG, own_embedding=True)
def test_the_ledger_has_every_tensor_and_every_parameter_once(
    target: OpenTarget, drawn: Drawn, own_embedding: bool
) -> None:
    tensors = ours(drawn)
    # as published: the tables of a draft that says every token are its target's
    kept = {n: t for n, t in tensors.items() if own_embedding or n != "embed_tokens.weight"}
    whole = "d2t" not in kept
    kept = {n: t for n, t in kept.items() if n != "lm_head.weight" or not whole or own_embedding}

    draft = stand_as(drawn.keys, kept, target)

    entries, state = draft.ledger.entries, state_of(draft.module)
    assert sorted(entry.tensor for entry in entries if entry.tensor) == sorted(kept)
    assert sorted(entry.parameter for entry in entries if entry.parameter) == sorted(state)
    for name, tensor in kept.items():
        bit_equal(name, state[name], tensor)
    if not own_embedding:
        assert draft.module.embed_tokens is target.module.embed_tokens


@pytest.mark.parametrize("drawn", [PINNED_DFLASH, EVERY_DFLASH_FLAG], ids=["pinned", "every flag"])
def test_every_parameter_changes_the_logits(target: OpenTarget, drawn: Drawn) -> None:
    draft, tokens = stand(drawn, target), random_tokens(VOCAB, 1, 6, drawn.seed)
    out = target(tokens, capture=draft.capture_points)

    found = influential(draft.module, lambda: draft.unroll(tokens, out, 3).nan_to_num())

    assert found == {name for name, _ in draft.module.named_parameters()}
