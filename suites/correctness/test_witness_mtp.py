"""Claim: a next-token module computes what its trainers and transformers compute, at every draft step.

Born of SGLang #26468 and #34906: names of the module were changed in their middle, so that tensors were dropped in
silence, and layer 61 stood in the code. The module of DeepSeek V3 is judged by transformers' own, whose pattern of
names says 61 too and is set right here; that of Qwen3-MoE by speculators', run once (suites/golden/make_mtp.py).
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import transformers
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers.cache_utils import MtpCache
from transformers.modeling_layers import MtpModel

from harness import witness
from harness.checkpoints import CONFIG, SINGLE
from harness.compare import bit_equal, hold
from suites.catalog import OpenSpeculation, open_speculation
from suites.draws import FIXED_ROPES, Drawn, random_tokens, variant
from suites.families.next_token import DEEPSEEK, DEEPSEEK_TWO, next_token_pairs, tiny_next_token, write_whole

pytestmark = pytest.mark.correctness

GOLDEN = Path(__file__).parent.parent / "golden" / "mtp.safetensors"
LARGEST_ERROR = 1e-5
"""float32, absolute, as the other golden tensors are held"""


def golden(case: str, folder: Path) -> tuple[OpenSpeculation, dict[str, Tensor]]:
    """A stored module in a folder of its own, beside a target that has nothing of it but tables; inputs and logits."""
    with safe_open(GOLDEN, framework="pt") as file:
        names = [name for name in file.keys() if name.startswith(f"{case}/")]  # noqa: SIM118
        tensors = {name.removeprefix(f"{case}/"): file.get_tensor(name) for name in names}
        config = json.loads(file.metadata()[case])
    stored = {name: tensors.pop(name) for name in ("tokens", "hidden", "logits")}
    target = witness.create(config, folder / "target")
    (folder / "draft").mkdir()
    (folder / "draft" / CONFIG).write_text(json.dumps({**config, "architectures": ["Qwen3MoeForCausalLMMTP"]}))
    own = {f"mtp.{name.removeprefix('model.').removeprefix('mtp.')}": tensor for name, tensor in tensors.items()}
    save_file(own, folder / "draft" / SINGLE)
    return open_speculation(target, folder / "draft"), stored


@pytest.mark.pair("qwen3_moe_mtp")
@pytest.mark.parametrize("case", ["normed", "raw"])
def test_the_module_of_qwen3_moe_is_that_of_speculators(case: str, tmp_path: Path) -> None:
    speculation, stored = golden(case, tmp_path)
    module, tokens, hidden = speculation.draft.module, stored["tokens"], stored["hidden"]
    first, width = module.unroll(tokens, hidden, 1)[0], stored["logits"].shape[2]

    # its training steps are passes of their own, over the columns that all steps know
    for k, want in enumerate(stored["logits"]):
        logits, hidden = module(tokens[:, k + 1 : k + 1 + width], hidden[:, :width])
        assert (logits - want).abs().max() <= LARGEST_ERROR, f"draft step {k + 1}"

    assert (first[:, :width] - stored["logits"][0]).abs().max() <= LARGEST_ERROR


@contextmanager
def names_beyond(drawn: Drawn) -> Iterator[None]:
    """transformers finds the module's tensors by a pattern on the model's class, which says 61 for every size."""
    model, behind = transformers.DeepseekV3ForCausalLM, drawn.keys["num_hidden_layers"]
    layers = range(behind, behind + drawn.keys["num_nextn_predict_layers"])
    stands = model._keys_to_ignore_on_load_unexpected
    model._keys_to_ignore_on_load_unexpected = [rf"model\.layers\.{i}\." for i in layers]
    try:
        yield
    finally:
        model._keys_to_ignore_on_load_unexpected = stands


def outside(model: MtpModel, tokens: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """One token of each of transformers' layers, after what the target has read.

    tokens  [B, T]     x_1 .. x_n
    hidden  [B, T, H]  of x_0 .. x_{n-1}
    ->      [B, K], [B, K, V]
    """
    positions = torch.arange(1, tokens.shape[1] + 1)[None]
    with torch.no_grad(), witness.StayWide():
        drafted, logits, _ = model(tokens, hidden, torch.ones_like(tokens), positions, MtpCache(config=model.config))
    return drafted, logits


@pytest.mark.pair("deepseek_nextn")
@given(drawn=next_token_pairs("deepseek_nextn", max_layers=2, kinds=FIXED_ROPES), width=st.integers(2, 12))
@example(drawn=DEEPSEEK, width=10)
@example(drawn=DEEPSEEK_TWO, width=10)
def test_the_module_of_deepseek_is_that_of_transformers(
    drawn: Drawn, width: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    # both of these read the token at position 0
    drawn, path = variant(drawn.keys, drawn.seed, nextn_zero_first_embedding=False), tmp_path_factory.mktemp("whole")
    layers = drawn.keys["num_nextn_predict_layers"]
    tokens = random_tokens(drawn.keys["vocab_size"], 1, width, drawn.seed)
    with names_beyond(drawn):
        speculation = open_speculation(write_whole(drawn, path), path, dtype=torch.float64)
        theirs = witness.load(path, dtype=torch.float64)
        model = MtpModel.from_pretrained(theirs.model).eval()
    hidden = theirs.run(tokens).hidden

    drafted, want = outside(model, tokens[:, 1:], hidden[:, :-1])
    text = torch.cat([tokens, drafted], 1)
    got = speculation.draft.module.unroll(text, torch.nn.functional.pad(hidden, (0, 0, 0, layers)), layers)

    # it counts positions from one, where angles, which are float32, round otherwise
    size = {"dtype": torch.float32, "width": drawn.keys["hidden_size"]}
    for k in range(layers):
        hold(f"step {k + 1}", got[k, :, width - 2], want[:, k], depth=k + 3, **size)


@pytest.mark.pair("deepseek_nextn")
@pytest.mark.parametrize("layers", [1, 2])
def test_transformers_speculates_to_the_same_text(layers: int, tmp_path: Path) -> None:
    drawn = tiny_next_token("deepseek_nextn", 5, 13, num_nextn_predict_layers=layers)
    prompt, loop = random_tokens(13, 1, 5, 3), {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    with names_beyond(drawn):
        speculation = open_speculation(write_whole(drawn, tmp_path), tmp_path)
        model = witness.load(tmp_path).model
        theirs = model.generate(prompt, attention_mask=torch.ones_like(prompt), use_mtp=True, **loop)

    said = speculation.generate(prompt, 12, layers)

    bit_equal("text", said.tokens, theirs[:, 5:])
