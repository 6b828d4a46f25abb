"""Claim: P-EAGLE is EAGLE-3 over a text that goes on in mask tokens, in training, in the reference and in its twin.

Born of vLLM's layout of parallel drafts, which has four ways to be wrong by one (the root's slot, the masks' positions,
the rows that are read, the columns that were rejected), and of `mask_hidden`, which is as wide as all aux states and
goes through `fuse` as they do. The golden tensors are speculators' own (suites/golden/make_golden_parallel.py).
"""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from harness.checkpoints import CheckpointError, read_json, save_checkpoint, state_of
from harness.compare import bit_equal, hold
from reference.config import ConfigError
from reference.drafting import Parallel
from reference.drafts.eagle3 import Eagle3Draft
from reference.drafts.peagle import MASK_KEYS, PeagleConfig
from reference.outputs import TargetOutput
from reference.targets.llama import LlamaConfig, LlamaTarget
from suites.catalog import OpenDraft, OpenTarget, open_draft, open_target
from suites.correctness.test_golden import GOLDEN, LARGEST_ERROR
from suites.correctness.test_loading import SPELLINGS, dormant, hold_state, influential, ours, spelled
from suites.correctness.test_twin import FORMS, truth
from suites.draws import LLAMA, PINNED_TARGET, Drawn, random_tokens
from suites.families.peagle import (
    ARCHITECTURES,
    EVERY_PEAGLE_FLAG,
    FOUR,
    PEAGLE,
    PEAGLE_LOOP,
    PINNED_PEAGLE,
    QWEN3_PEAGLE,
    THREE,
    TWO,
    peagle_drafts,
    speculators,
)
from suites.stand import stand, stand_as
from suites.teams import Team

pytestmark = [pytest.mark.correctness, pytest.mark.pair("peagle")]

VOCAB = PINNED_TARGET.keys["vocab_size"]
DRAFTS = peagle_drafts(PINNED_TARGET)
CASES = sorted(folder.name for folder in (GOLDEN / "parallel").iterdir() if "peagle" in folder.name)


def open_case(name: str, root: Path) -> tuple[OpenDraft, dict[str, Tensor]]:
    """A stored draft beside a target of no importance."""
    folder = GOLDEN / "parallel" / name
    facts = PeagleConfig.from_hf(read_json(folder / "config.json"))
    config = {**LLAMA, "vocab_size": facts.vocab, "hidden_size": facts.hidden, "num_attention_heads": 2, "head_dim": 8}
    state = state_of(LlamaTarget(LlamaConfig.from_hf(config)))
    save_checkpoint(root / "target", config, {name: torch.zeros_like(tensor) for name, tensor in state.items()})
    return open_draft(folder, open_target(root / "target")), load_file(folder / "golden.safetensors")


@pytest.mark.parametrize("name", CASES)
def test_the_reference_drafts_what_the_trainer_does(name: str, tmp_path: Path) -> None:
    draft, golden = open_case(name, tmp_path)
    want = golden["logits"].permute(2, 0, 1, 3)

    logits = draft.module.unroll(golden["tokens"], draft.fuse(golden["aux"]), want.shape[0])

    # the stored run of a root stands in the root's column, one further
    logits, want = logits[:, :, :-1], want[:, :, 1:]
    assert torch.equal(logits.isnan(), want.isnan())
    assert float((logits - want).nan_to_num().abs().max()) <= LARGEST_ERROR


def test_every_stored_case_is_here() -> None:
    assert len(CASES) == 3
    assert {read_json(GOLDEN / "parallel" / name / "config.json")["speculators_model_type"] for name in CASES} == {
        "peagle"
    }


def as_plain_text(draft: OpenDraft, tokens: Tensor, aux: Tensor, column: int, num_drafts: int) -> Tensor:
    """EAGLE-3's own page over a made-up text: what is real up to a column, then masks; nobody names what is visible.

    tokens  [B, T]
    aux     [B, T, A, X]
    ->      [B, K, Vd]
    """
    module, c = draft.module, draft.facts.config
    mask = module.mask_hidden.detach().view(1, 1, c.aux_states, -1).expand(len(tokens), num_drafts - 1, -1, -1)
    states = torch.cat([aux[:, : column + 1], mask], 1)
    said = torch.cat([tokens[:, 1 : column + 2], tokens.new_full((len(tokens), num_drafts - 1), c.mask_token)], 1)
    return Eagle3Draft.forward(module, said, module.fuse(states)).logits[:, column:]


@given(drawn=DRAFTS, width=st.integers(2, 8), num_drafts=st.integers(1, 5), seed=st.integers(0, 99))
@example(drawn=PINNED_PEAGLE, width=8, num_drafts=3, seed=0)
@example(drawn=EVERY_PEAGLE_FLAG, width=8, num_drafts=5, seed=1)
@example(drawn=QWEN3_PEAGLE, width=5, num_drafts=4, seed=2)
@torch.no_grad()
def test_what_is_trained_is_a_text_that_goes_on_in_masks_and_what_is_served(
    wide_target: OpenTarget, drawn: Drawn, width: int, num_drafts: int, seed: int
) -> None:
    draft, tokens = stand(drawn, wide_target), random_tokens(VOCAB, 2, width, seed)
    out, c = wide_target(tokens, capture=draft.capture_points), draft.facts.config
    places = torch.arange(width).expand_as(tokens)
    way = Parallel(draft.module, None, None, 2, width + num_drafts, num_drafts)
    following = torch.cat([tokens[:, 1:], tokens[:, :1]], 1)

    steps = draft.unroll(tokens, out, num_drafts)

    begin, size = 0, {"depth": c.layers * num_drafts, "width": 2 * c.hidden}
    for column in range(width - 1):
        known = min(num_drafts, width - 1 - column)
        want = steps[:known, :, column].transpose(0, 1)
        hold("plain text", as_plain_text(draft, tokens, out.aux, column, num_drafts)[:, :known], want, **size)
        assert steps[known:, :, column].isnan().all()
        if (column + seed) % 3 == 0:
            # a verify of the columns since the last one, and one column that did not stand
            span = slice(begin, column + 2)
            seen, last = TargetOutput(*(x[:, span] for x in out)), torch.full((2,), column - begin)
            served = way.start(seen, tokens[:, span], following[:, span], places[:, span], last).logits
            hold("served", served[:, :known], want, **size)
            begin = column + 1


@given(drawn=DRAFTS, seed=st.integers(0, 99))
@example(drawn=PINNED_PEAGLE, seed=0)
@example(drawn=EVERY_PEAGLE_FLAG, seed=1)
@torch.no_grad()
def test_columns_that_did_not_stand_change_no_proposal(wide_target: OpenTarget, drawn: Drawn, seed: int) -> None:
    draft, tokens, num_drafts = stand(drawn, wide_target), random_tokens(VOCAB, 2, 9, seed), 3
    out, noise = wide_target(tokens, capture=draft.capture_points), torch.Generator().manual_seed(seed)
    places, last, said = torch.arange(9).expand_as(tokens), torch.tensor([2, 5]), []
    stands, row = places <= last[:, None], torch.arange(2)[:, None]

    for _ in range(2):
        other = torch.randn(out.aux.shape, generator=noise).double()
        aux = torch.where(stands[..., None, None], out.aux, other)
        text = torch.where(stands, tokens, torch.randint(VOCAB, tokens.shape, generator=noise))
        way = Parallel(draft.module, None, None, 2, 9 + num_drafts, num_drafts)
        first = way.start(out._replace(aux=aux), tokens, text, places, last).logits
        # and in the next cycle, whose settled columns begin after the last that stood
        span = last[:, None] + 1 + torch.arange(2)
        second = TargetOutput(*(x[row, span] for x in out))
        again = way.start(second, tokens[row, span], tokens[row, span], span, torch.tensor([1, 1])).logits
        said.append((first, again))

    for one, changed in zip(*said, strict=True):
        bit_equal("logits", one, changed)


@given(drawn=DRAFTS, seed=st.integers(0, 99))
@example(drawn=PINNED_PEAGLE, seed=0)
def test_fewer_drafts_are_the_first_of_more(wide_target: OpenTarget, drawn: Drawn, seed: int) -> None:
    draft, tokens = stand(drawn, wide_target), random_tokens(VOCAB, 2, 7, seed)
    out, c = wide_target(tokens, capture=draft.capture_points), draft.facts.config

    few, many = (draft.unroll(tokens, out, k) for k in (2, 5))

    hold("logits", many[:2], few, nan_equal=True, depth=2 * c.layers, width=2 * c.hidden)


def hold_served(path: Path, drawn: Drawn, dtype: torch.dtype, device: str, num_drafts: int) -> None:
    """The twin's columns as its way lays them out: real ones, masks, and padding beyond."""
    width, side = 7, {"side": "optimized", "dtype": dtype, "device": device}
    tokens, target = random_tokens(VOCAB, 1, width, drawn.seed), open_target(path, dtype=dtype)
    reference, twin = truth(stand(drawn, target)), stand(drawn, open_target(path, **side), device=device).module
    known = truth(target)(tokens, capture=reference.capture_points)
    known = TargetOutput(*(x.to(dtype).double() for x in known))
    c, want, rows = reference.facts.config, reference.unroll(tokens, known, num_drafts), width - 1
    column = torch.arange(width + num_drafts, device=device).expand(rows, -1)
    last, pad = torch.arange(rows, device=device)[:, None], torch.nn.functional.pad
    with torch.no_grad():
        aux = known.aux.to(device, dtype)
        read = pad(twin.read(TargetOutput(aux, aux, aux)), (0, 0, 0, num_drafts)).expand(rows, -1, -1)
        read = torch.where((column <= last)[..., None], read, twin.fuse_mask())
        text = pad(tokens[0, 1:].to(device), (0, num_drafts + 1), value=c.mask_token)
        text = torch.where(column <= last, text, c.mask_token)
        places = torch.where(column < last + num_drafts, column, -1)
        step = twin(text, read.contiguous(), places, twin.new_cache(rows, width + num_drafts))

    size = {"dtype": dtype, "width": 2 * c.hidden}
    hold("mask", twin.fuse_mask(), reference.module.fuse_mask(), depth=1, dtype=dtype, width=c.aux_states * c.aux_width)
    for k in range(num_drafts):
        seen = range(rows - k)
        got = torch.stack([step.logits[t, t + k] for t in seen])
        hold(f"draft {k + 1}", got, want[k, 0, : len(seen)], depth=1 + num_drafts * c.layers, **size)


@given(drawn=DRAFTS, num_drafts=st.integers(1, 5), dtype=st.sampled_from([torch.float64, torch.float32]))
@example(drawn=PINNED_PEAGLE, num_drafts=3, dtype=torch.float64)
@example(drawn=EVERY_PEAGLE_FLAG, num_drafts=5, dtype=torch.float32)
def test_the_twin_drafts_what_the_reference_does(
    target_folder: Path, drawn: Drawn, num_drafts: int, dtype: torch.dtype
) -> None:
    hold_served(target_folder, drawn, dtype, "cpu", num_drafts)


@pytest.mark.gpu
@pytest.mark.parametrize("drawn", [PINNED_PEAGLE, EVERY_PEAGLE_FLAG], ids=["pinned", "every flag"])
def test_on_a_gpu_in_half_precision_too(target_folder: Path, drawn: Drawn) -> None:
    hold_served(target_folder, drawn, torch.bfloat16, "cuda", 7)


@pytest.mark.parametrize("team", [TWO, THREE, FOUR], ids=["2", "3", "4"])
def test_many_ranks_compute_and_say_what_one_does(team: Team) -> None:
    one, many = (team.open(size) for size in (1, team.ranks))

    said, joined = (speculation.generate(team.prompts, 7, 3) for speculation in (one, many))

    bit_equal("tokens", joined.tokens, said.tokens)
    assert joined.accepted == said.accepted
    state, whole = many.engines[0].session.state, one.engines[0].session.state
    bit_equal("drafted", state.drafted, whole.drafted)
    first, *others = (module.fuse_mask() for module in many.draft.modules)
    hold("mask", first, one.draft.module.fuse_mask(), depth=1, width=192)
    for other in others:
        bit_equal("mask", other, first)


@pytest.mark.parametrize("chunk_size", [1, 2, 4])
def test_prompts_are_read_in_chunks_of_any_size(chunk_size: int) -> None:
    prompts, said = PEAGLE_LOOP.prompts, []

    for size in (None, chunk_size):
        # buffers of its own: what another generation left must not stand in for what is not read
        speculation = PEAGLE_LOOP.open("optimized")
        tokens = speculation.generate(prompts, 12, 3, chunk_size=size).tokens
        said.append((tokens, [t.clone() for t in speculation.engines[0].session.state.draft_cache.tensors()]))

    (whole, kept), (parts, held) = said
    bit_equal("tokens", parts, whole)
    for one, other in zip(kept, held, strict=True):
        for row, prompt in enumerate(prompts):
            hold("keys of a prompt", other[row, : len(prompt)], one[row, : len(prompt)], depth=4, width=144)


def test_a_cycle_in_triton_is_the_cycle_in_aten() -> None:
    aten, triton = (PEAGLE_LOOP.open("optimized", torch.float32, form=form, device=device) for form, device in FORMS)

    want, got = (speculation.generate(PEAGLE_LOOP.prompts[1:], 2, 3) for speculation in (aten, triton))

    bit_equal("tokens", got.tokens, want.tokens)
    assert got.accepted == want.accepted
    mine, theirs = (speculation.engines[0].session.state for speculation in (aten, triton))
    bit_equal("drafted", theirs.drafted.cpu(), mine.drafted)
    for one, other in zip(theirs.draft_cache.tensors(), mine.draft_cache.tensors(), strict=True):
        for row, length in enumerate(mine.lengths.tolist()):
            hold("keys", one[row, : length + 1], other[row, : length + 1], depth=5, width=144)


@given(spelling=st.sampled_from(["midlayer", "layers", "model"]), drawn=DRAFTS)
@example(spelling="layers", drawn=PINNED_PEAGLE)
def test_spelling_changes_no_bit_and_the_ledger_is_whole(target: OpenTarget, spelling: str, drawn: Drawn) -> None:
    tensors = ours(drawn)
    published = spelled(tensors, SPELLINGS[spelling])

    draft = stand_as(drawn.keys, published, target)

    filled = {entry.parameter for entry in draft.ledger.entries if entry.status == "derived"}
    hold_state(draft.module, tensors | {name: state_of(draft.module)[name] for name in filled})
    assert sorted(entry.tensor for entry in draft.ledger.entries if entry.tensor) == sorted(published)
    parameters = sorted(entry.parameter for entry in draft.ledger.entries if entry.parameter)
    assert parameters == sorted(state_of(draft.module))


@pytest.mark.parametrize("drawn", [PINNED_PEAGLE, QWEN3_PEAGLE], ids=["pinned", "qwen3"])
def test_both_spellings_are_one_draft(target: OpenTarget, drawn: Drawn) -> None:
    tokens, tensors = random_tokens(VOCAB, 1, 5, 0), ours(drawn)

    one, other = (stand_as(config, tensors, target) for config in (drawn.keys, speculators(drawn)))

    assert one.facts.config == other.facts.config
    assert one.capture_points == other.capture_points == (2, 4, 6)
    bit_equal("logits", *(d.unroll(tokens, target(tokens, capture=d.capture_points), 2) for d in (one, other)))


@pytest.mark.parametrize("drawn", [PINNED_PEAGLE, EVERY_PEAGLE_FLAG], ids=["pinned", "every flag"])
def test_every_parameter_changes_the_logits(target: OpenTarget, drawn: Drawn) -> None:
    draft, tokens = stand(drawn, target), random_tokens(VOCAB, 1, 6, drawn.seed)
    out = target(tokens, capture=draft.capture_points)

    found = influential(draft.module, lambda: draft.unroll(tokens, out, 3).nan_to_num())

    assert found == {name for name, _ in draft.module.named_parameters()} - dormant(draft.facts.config)


@pytest.mark.parametrize("key", MASK_KEYS)
def test_the_mask_token_has_three_names_and_one_meaning(target: OpenTarget, key: str) -> None:
    unnamed = {name: value for name, value in PEAGLE.items() if name != "mask_token_id"}

    # an engine starts such a file under EAGLE-3's name too
    draft = stand_as({**unnamed, "architectures": ["LlamaForCausalLMEagle3"], key: 330}, ours(PINNED_PEAGLE), target)

    assert (draft.pair.name, draft.facts.config.mask_token) == ("peagle", 330)


REFUSED = {
    "no mask": ({"mask_token_id": None}, "one mask token"),
    "two masks": ({"pard_token": 3}, r"one mask token.*330.*3"),
    "a mask outside the vocabulary": ({"mask_token_id": 331}, r"331.*0\.\.330"),
    "a mask that is no number": ({"mask_token_id": "<mask>"}, "mask_token_id"),
    "the target's last state": ({"eagle_config": {"use_aux_hidden_state": False}}, "use_aux_hidden_state"),
    "another trainer's draft": ({"speculators_model_type": "dflash"}, "not a P-EAGLE draft"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_has_no_single_reading_is_refused_and_named(case: str) -> None:
    changes, named = REFUSED[case]

    with pytest.raises(ConfigError, match=named):
        PeagleConfig.from_hf(json.loads(json.dumps({**PEAGLE, **changes})))


def test_a_draft_without_its_mask_is_refused(target: OpenTarget) -> None:
    tensors = {name: tensor for name, tensor in ours(PINNED_PEAGLE).items() if name != "mask_hidden"}

    with pytest.raises(CheckpointError, match=r"mask_hidden.*missing"):
        stand_as(PEAGLE, tensors, target)
    for names in ARCHITECTURES.values():
        assert stand_as({**PEAGLE, "architectures": names}, ours(PINNED_PEAGLE), target).pair.name == "peagle"
