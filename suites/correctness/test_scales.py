"""Claim: weights in eight bits are read as what they stand for, each block times its own scale.

Born of the hub's DeepSeek V3: float8 matrices whose `weight_scale_inv` multiplies in spite of its name. Its
`kv_a_proj_with_mqa` has 576 rows in five blocks of 128, of which the last is cut short; transformers 5.17 takes the
size of a block from the number of blocks, and refuses it. Where that number divides, such a reader is wrong in silence.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from harness import witness
from harness.checkpoints import SINGLE, CheckpointError, save_checkpoint, state_of
from harness.compare import bit_equal, hold
from harness.scales import BlockScales
from suites.catalog import open_target
from suites.draws import folders, random_tokens, variant
from suites.families.deepseek import SIGMOID

pytestmark = [pytest.mark.correctness, pytest.mark.pair("deepseek")]

FP8 = torch.float8_e4m3fn
SMALL = variant(SIGMOID, 3, num_hidden_layers=2, first_k_dense_replace=1)
# of the target's widths, 40 divides none but one and 32 some
SIZE = (32, 40)
LEFT_WHOLE = ("embed_tokens", "lm_head", "norm", "mlp.gate.", "bias")
SAID = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": list(SIZE)}


def packed(weight: Tensor, rows: int, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """One matrix block by block: eight bits, the scales, and what the two stand for."""
    q, scale = torch.empty_like(weight, dtype=FP8), torch.empty(-(-len(weight) // rows), -(-weight.shape[1] // columns))
    stands_for = torch.empty_like(weight)
    for down in range(len(scale)):
        for across in range(scale.shape[1]):
            here = (slice(down * rows, (down + 1) * rows), slice(across * columns, (across + 1) * columns))
            scale[down, across] = weight[here].abs().max() / 448
            q[here] = (weight[here] / scale[down, across]).to(FP8)
            stands_for[here] = q[here].float() * scale[down, across]
    return q, scale, stands_for


def pack(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A checkpoint's tensors in eight bits where the hub has them so, and what they stand for."""
    short: dict[str, Tensor] = {}
    whole = dict(tensors)
    for name, tensor in tensors.items():
        if any(part in name for part in LEFT_WHOLE):
            short[name] = tensor
            continue
        short[name], short[f"{name}_scale_inv"], whole[name] = packed(tensor, *SIZE)
    return short, whole


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor], dict[str, Tensor]]:
    """The folder of a target in eight bits, its tensors, and what they stand for."""
    with folders(SMALL) as (path, _):
        tensors = load_file(path / SINGLE)
    short, whole = pack(tensors)
    folder = tmp_path_factory.mktemp("packed")
    save_checkpoint(folder, {**SMALL.keys, "quantization_config": SAID}, short)
    return folder, short, whole


@given(rows=st.integers(1, 9), columns=st.integers(1, 9), height=st.integers(1, 20), width=st.integers(1, 20))
@example(rows=4, columns=3, height=10, width=8)
@example(rows=4, columns=4, height=6, width=8)
@example(rows=128, columns=128, height=3, width=5)
def test_each_number_is_multiplied_by_the_scale_of_its_block(rows: int, columns: int, height: int, width: int) -> None:
    blocks = BlockScales(rows, columns)
    down, across = blocks.grid((height, width))
    # block (a, b) is scaled by the number 100 a + b + 1, and every weight is one
    scale = torch.arange(down)[:, None] * 100.0 + torch.arange(across) + 1

    weight = blocks.expand(torch.ones(height, width).to(FP8), scale)

    want = [[100.0 * (i // rows) + j // columns + 1 for j in range(width)] for i in range(height)]
    bit_equal("weight", weight, torch.tensor(want))


@given(rows=st.integers(1, 9), columns=st.integers(1, 9), down=st.integers(1, 4), across=st.integers(1, 4))
@example(rows=3, columns=4, down=2, across=3)
def test_whole_blocks_stand_for_what_transformers_makes_of_them(
    rows: int, columns: int, down: int, across: int
) -> None:
    weight = torch.randn(rows * down, columns * across, generator=torch.Generator().manual_seed(rows))
    q, scale, _ = packed(weight, rows, columns)

    bit_equal("weight", BlockScales(rows, columns).expand(q, scale), witness.dequantize(q, scale))


@pytest.mark.parametrize("side", ["reference", "optimized"])
def test_the_ledger_has_every_tensor_once_and_every_parameter(side: str, stored: Any) -> None:
    folder, short, whole = stored

    target = open_target(folder, side=side)

    entries = target.ledger.entries
    assert sorted(entry.tensor for entry in entries) == sorted(short)
    assert sorted(entry.parameter for entry in entries if entry.parameter) == sorted(
        state_of(open_target(folder).module)
    )
    applied = {entry.tensor: entry.reason for entry in entries if entry.status == "applied"}
    assert applied == {name: f"scales {name.removesuffix('_scale_inv')}" for name in set(short) - set(whole)}
    assert f"{len(applied)} applied" in str(target.ledger)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_target_in_eight_bits_holds_what_they_stand_for(dtype: torch.dtype, stored: Any) -> None:
    folder, _, whole = stored

    state = state_of(open_target(folder, dtype=dtype).module)

    for name, tensor in whole.items():
        ours = name.removeprefix("model.")
        bit_equal(name, state[ours], tensor.to(state[ours].dtype))


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_twin_reads_the_same_weights(ranks: int, stored: Any) -> None:
    folder, tokens = stored[0], random_tokens(331, 2, 7, 0)
    want = open_target(folder, dtype=torch.float64)(tokens)

    twin = open_target(folder, side="optimized", dtype=torch.float64, tp_size=ranks)

    hold("logits", twin(tokens).logits, want.logits, depth=twin.num_layers, width=twin.config.hidden)


def test_scales_of_what_is_not_read_are_not_read(stored: Any, tmp_path: Path) -> None:
    _, short, _ = stored
    # the module for the next token that V3 keeps behind its last layer
    last = {name: tensor for name, tensor in short.items() if name.startswith("model.layers.1.")}
    extra = {name.replace(".1.", ".2.", 1): tensor.clone() for name, tensor in last.items()}
    keys = {**SMALL.keys, "quantization_config": SAID, "num_nextn_predict_layers": 1}
    save_checkpoint(tmp_path, keys, {**short, **extra})

    entries = open_target(tmp_path).ledger.entries

    scales = {entry.tensor: entry.status for entry in entries if entry.tensor.endswith("_scale_inv")}
    assert {scales[name] for name in last if name in scales} == {"applied"}
    assert {scales[name] for name in extra if name in scales} == {"ignored"}


KEY = "quantization_config"
PROJ = "model.layers.0.self_attn.o_proj.weight"
WRONG_CONFIGS = {
    "packed by another tool": ({KEY: {"quant_method": "compressed-tensors", "format": "pack-quantized"}}, "bfloat16"),
    "packed by another tool, in its text": (
        {"text_config": {KEY: {"quant_method": "compressed-tensors"}}},
        "text_config",
    ),
    "no size of blocks": ({KEY: {"quant_method": "fp8"}}, "weight_block_size"),
    "scaled activations": ({KEY: {**SAID, "activation_scheme": "static"}}, "activation_scheme"),
    "a key that nobody knows": ({KEY: {**SAID, "weight_scale_2": True}}, "weight_scale_2"),
    "two answers": ({KEY: SAID, "text_config": {KEY: {**SAID, "weight_block_size": [8, 8]}}}, "differ"),
}


@pytest.mark.parametrize("case", WRONG_CONFIGS)
def test_what_is_packed_otherwise_is_refused_and_named(case: str, stored: Any, tmp_path: Path) -> None:
    changes, named = WRONG_CONFIGS[case]
    save_checkpoint(tmp_path, {**SMALL.keys, **changes}, stored[1])

    with pytest.raises(CheckpointError, match=rf"config\.json: config key.*{named}"):
        open_target(tmp_path)


WRONG_TENSORS = {
    "a scale is missing": lambda t: {name: tensor for name, tensor in t.items() if name != f"{PROJ}_scale_inv"},
    "a scale of another shape": lambda t: {**t, f"{PROJ}_scale_inv": t[f"{PROJ}_scale_inv"].T.contiguous()},
    "a scale of what is whole": lambda t: {**t, PROJ: t[PROJ].float()},
}


@pytest.mark.parametrize("case", WRONG_TENSORS)
def test_a_scale_that_does_not_fit_is_refused_and_named(case: str, stored: Any, tmp_path: Path) -> None:
    save_checkpoint(tmp_path, {**SMALL.keys, KEY: SAID}, WRONG_TENSORS[case](stored[1]))

    with pytest.raises(CheckpointError, match=rf"{SINGLE}: tensor '{PROJ}'.*"):
        open_target(tmp_path)


def test_eight_bits_that_nothing_scales_are_refused(stored: Any, tmp_path: Path) -> None:
    save_checkpoint(tmp_path, SMALL.keys, stored[1])

    with pytest.raises(CheckpointError, match=rf"nothing scales it.*{KEY}"):
        open_target(tmp_path)
