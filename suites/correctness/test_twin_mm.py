"""Claim: a twin that sees and hears is its reference, whatever stands among its tokens, however its prompt is cut.

Born of SGLang #27846 (of a batch of prompts with images, a draft had only the batch's last token read anew), of
backends that leave images causal without a word, of prompts cut through an image, of features scaled like embeddings,
and of inputs of the layers for a placeholder's id. Towers are the reference's own: what is held here is where their
features stand, who sees them, and what a draft reads of them.
"""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from harness.checkpoints import SINGLE, CheckpointError, rename, save_checkpoint, state_of
from harness.compare import bit_equal, hold
from optimized.graphs import GuardMode
from reference.outputs import TargetOutput
from suites.catalog import OpenTarget, open_target
from suites.correctness.test_replay import PausedEngine, begin, run
from suites.correctness.test_twin import FORMS, truth
from suites.correctness.test_witness_gemma3 import SPELLINGS
from suites.couples import COUPLES
from suites.draws import folders, write_target
from suites.families.gemma3 import PINNED_MULTIMODAL
from suites.media import FAMILIES, LOOPS, OTHERS, PINNED, SMALL, TINY, VOCAB, Case, cases
from suites.scripted import SIDES, WatchedDraft, seat, tiny_target

pytestmark = pytest.mark.correctness

RANKS = (("reference", {}), ("optimized", {}), ("optimized", {"tp_size": 2}))
of_every_pair = pytest.mark.parametrize("pair", FAMILIES)


def hold_all(out: TargetOutput, want: TargetOutput, target: OpenTarget) -> None:
    """Every capture point, the final hidden state and the logits."""
    towers = (getattr(target.config, sense, None) for sense in ("vision", "audio"))
    # features have run through a tower before layer 0, and scores of its patches through wide sums
    depth = target.num_layers + sum(getattr(tower, "layers", 1) for tower in towers if tower is not None)
    size = {"dtype": target.side.dtype, "depth": depth, "width": 2 * target.config.hidden}
    for c in range(target.num_layers + 1):
        hold(f"capture point {c}", out.aux[:, :, c], want.aux[:, :, c], **size)
    hold("hidden", out.hidden, want.hidden, **size)
    hold("logits", out.logits, want.logits, **size)


def opened(case: Case, dtype: torch.dtype = torch.float64, **how: Any) -> tuple[OpenTarget, OpenTarget]:
    """The reference in float64, with weights as the twin's dtype rounds them, and the twin."""
    with folders(case.drawn) as (path, _):
        return truth(open_target(path, dtype=dtype)), open_target(path, side="optimized", dtype=dtype, **how)


@of_every_pair
@given(cases=cases(), dtype=st.just(torch.float64))
@example(cases=PINNED, dtype=torch.float64)
@example(cases=OTHERS, dtype=torch.float64)
@example(cases=PINNED, dtype=torch.float32)
def test_the_target_is_the_reference(pair: str, cases: Mapping[str, Case], dtype: torch.dtype) -> None:
    case = cases[pair]
    (reference, twin), prompt = opened(case, dtype), case.prompt
    capture = range(twin.num_layers + 1)

    out = twin(prompt.tokens, capture=capture, **prompt.inputs())

    hold_all(out, reference(prompt.tokens, capture=capture, **prompt.inputs()), twin)


@of_every_pair
@given(cases=cases(), cut=st.integers(0, 40))
@example(cases=PINNED, cut=3)
def test_in_two_passes_the_target_is_the_reference_in_one(pair: str, cases: Mapping[str, Case], cut: int) -> None:
    case = cases[pair]
    (reference, twin), prompt = opened(case), case.prompt
    tokens, width, capture = prompt.tokens, prompt.width, range(twin.num_layers + 1)
    columns, cache = torch.arange(width).expand_as(tokens), twin.module.new_cache(len(tokens), width)
    cut = prompt.cuts[cut % len(prompt.cuts)] if prompt.cuts else width

    with torch.no_grad():
        parts = [
            twin.module(tokens[:, a:b], columns[:, a:b], capture, cache, **prompt.inputs(a, b))
            for a, b in ((0, cut), (cut, width))
            if a < b
        ]

    whole = TargetOutput(*(torch.cat(both, 1) for both in zip(*parts, strict=True)))
    hold_all(whole, reference(tokens, capture=capture, **prompt.inputs()), twin)


@of_every_pair
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_placeholders_tell_what_types_would(pair: str, dtype: torch.dtype) -> None:
    (reference, twin), prompt = opened(PINNED[pair], dtype), PINNED[pair].prompt
    inputs = {name: value for name, value in prompt.inputs().items() if "token_type_ids" not in name}
    capture = range(twin.num_layers + 1)

    out = twin(prompt.tokens, capture=capture, **inputs)

    hold_all(out, reference(prompt.tokens, capture=capture, **inputs), twin)
    bit_equal("what layer 0 reads", twin.module.embed_inputs(prompt.tokens, **inputs), out.aux[:, :, 0])


@of_every_pair
def test_two_ranks_compute_what_one_computes(pair: str) -> None:
    case, prompt = TINY[pair], TINY[pair].prompt
    with folders(case.drawn) as (path, _):
        one, two = (open_target(path, side="optimized", dtype=torch.float64, tp_size=ranks) for ranks in (1, 2))
    capture = range(one.num_layers + 1)

    with torch.no_grad():
        first, second = two.ranks.run(
            lambda rank: two.modules[rank](prompt.tokens, None, capture, **two.place(prompt.inputs()))
        )

    hold_all(first, one(prompt.tokens, capture=capture, **prompt.inputs()), one)
    for name, got, want in zip(first._fields, second, first, strict=True):
        bit_equal(name, got, want)


@of_every_pair
def test_a_rank_holds_the_towers_whole_and_its_share_of_the_text(pair: str) -> None:
    with folders(TINY[pair].drawn) as (path, _):
        whole, one, two = (
            open_target(path),
            *(open_target(path, side="optimized", tp_size=ranks) for ranks in (1, 2)),
        )
    full, held = state_of(whole.module), [module.unpack() for module in (*one.modules, *two.modules)]

    assert all(shards.keys() == full.keys() for shards in held)
    assert any("language_model" not in name for name in full)
    for name, tensor in full.items():
        is_text = name.startswith("language_model.")
        for shards in held[:1] if is_text else held:
            bit_equal(name, shards[name][: len(tensor)] if tensor.dim() else shards[name], tensor)


@pytest.mark.pair("gemma3_mm")
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_of_a_checkpoint_is_the_same_twin(spelling: str, tmp_path: Any) -> None:
    path = write_target(PINNED_MULTIMODAL, tmp_path / "saved")
    tensors = {rename(name, SPELLINGS[spelling]): t for name, t in load_file(path / SINGLE).items()}
    save_checkpoint(tmp_path / "spelled", PINNED_MULTIMODAL.keys, tensors)
    tower = next(name for name in tensors if "post_layernorm" in name)

    saved, spelled = (open_target(p, side="optimized").module.unpack() for p in (path, tmp_path / "spelled"))

    for name, want in saved.items():
        bit_equal(name, spelled[name], want)
    del tensors[tower]
    save_checkpoint(tmp_path / "spelled", PINNED_MULTIMODAL.keys, tensors)
    with pytest.raises(CheckpointError, match="missing"):
        open_target(tmp_path / "spelled", side="optimized")


@of_every_pair
def test_the_twin_says_what_the_reference_says_after_a_prompt_with_images(pair: str) -> None:
    loop, inputs = LOOPS[pair], LOOPS[pair].case.prompt.inputs()
    reference, twin, ranks = (loop.open(side, dtype=torch.float64, **how) for side, how in RANKS)

    want = [reference.generate(loop.prompts, 10, drafts, **inputs) for drafts in (0, 3)]

    bit_equal("speculated", want[1].tokens, want[0].tokens)
    # chunks end where no image does, a bucket has a row more than there are prompts
    for speculation, how in (
        (twin, {}),
        (twin, {"chunk_size": 1}),
        (twin, {"chunk_size": 5, "bucket": 4}),
        (ranks, {}),
    ):
        for drafts, known in zip((0, 3), want, strict=True):
            said = speculation.generate(loop.prompts, 10, drafts, **inputs, **how)
            bit_equal(f"tokens {how}", said.tokens, known.tokens)
            assert said.accepted == known.accepted


# couples whose drafts read other things of an image than its features, and one that grows trees
WAYS = {
    "gemma3_mm-eagle3": {"num_draft_tokens": 4, "topk": 2, "num_steps": 2},
    "gemma4_mm-assistant": {},
    "gemma4_unified-assistant": {},
    "kimi_k25-eagle3-mla": {},
}


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.pair(name.split("-")[0])) for name in WAYS])
def test_after_an_image_no_way_of_drafting_changes_the_text(name: str) -> None:
    prompt, couple, how = TINY[name.split("-")[0]].prompt, COUPLES[name], WAYS[name]
    inputs = prompt.inputs()

    reference, twin = (couple.open(side).generate(prompt.tokens, 8, **how, **inputs) for side in SIDES)

    bit_equal("tokens", twin.tokens, reference.tokens)
    assert twin.accepted == reference.accepted
    bit_equal("text", twin.tokens, couple.open("reference").generate(prompt.tokens, 8, 0, **inputs).tokens)


class Reader(WatchedDraft):
    """A draft whose input embeddings are noted where they are not its table's alone."""

    def __init__(self, inner: Any) -> None:
        super().__init__(inner)
        self.embeds: list[Tensor] = []

    def __call__(self, *given: Any, **media: Tensor) -> Any:
        self.embeds += media.values()
        return super().__call__(*given, **media)

    def states(self, *given: Any, **media: Tensor) -> Any:
        self.embeds += media.values()
        return super().states(*given, **media)


@of_every_pair
@pytest.mark.parametrize("side", SIDES)
def test_a_draft_reads_an_image_as_its_target_saw_it(pair: str, side: str) -> None:
    loop, inputs = LOOPS[pair], LOOPS[pair].case.prompt.inputs()
    speculation, draft = seat(loop.open(side, dtype=torch.float64), Reader)
    c = speculation.target.config
    placeholders = {getattr(c, f"{sense}_token", None) for sense in ("image", "video", "audio")}

    speculation.generate(loop.prompts, 4, 2, **inputs)

    with torch.no_grad():
        seen = speculation.target.module.embed_inputs(loop.case.prompt.tokens, **inputs)
        own = draft.inner.embed_tokens(torch.arange(VOCAB))
    (read,) = draft.embeds  # later readings are of text alone
    for row, ids in enumerate(loop.prompts):
        for column, following in enumerate(ids[1:].tolist()):
            want = seen[row, column + 1] if following in placeholders else own[following]
            bit_equal(f"row {row}, beside position {column}", read[row, column], want)


@of_every_pair
@pytest.mark.parametrize("side", SIDES)
def test_a_draft_reads_the_token_after_the_prompt_from_the_table(pair: str, side: str) -> None:
    loop, inputs = LOOPS[pair], LOOPS[pair].case.prompt.inputs()
    speculation, draft = seat(loop.open(side, dtype=torch.float64), Reader)

    said = speculation.generate(loop.prompts, 4, 2, **inputs)

    own, (read,) = draft.inner.embed_tokens(torch.arange(VOCAB)), draft.embeds
    for row, ids in enumerate(loop.prompts):
        last, root = len(ids) - 1, int(said.tokens[row, 0])
        reading = next(r for r in draft.readings if last in r.positions[row].tolist())
        at = reading.positions[row].tolist().index(last)
        assert int(reading.tokens[row, at]) == root
        if reading is draft.readings[0]:
            bit_equal(f"root of row {row}", read[row, at], own[root])


@of_every_pair
def test_with_an_image_the_kernels_compute_what_aten_computes(pair: str) -> None:
    case = SMALL[pair]
    with folders(case.drawn) as (path, _):
        aten, triton = (open_target(path, side="optimized", form=form, device=device) for form, device in FORMS)
    capture, prompt = range(aten.num_layers + 1), case.prompt

    hold_all(*(t(prompt.tokens, capture=capture, **prompt.inputs()) for t in (triton, aten)), aten)


@of_every_pair
def test_a_cycle_after_an_image_asks_the_host_nothing_and_moves_no_buffer(pair: str) -> None:
    loop = LOOPS[pair]
    speculation = loop.open("optimized")
    engine = PausedEngine(speculation.target.module, speculation.draft.module, speculation.draft.capture_points)
    session = begin(engine, loop.prompts, (2, 0.0), inputs=loop.case.prompt.inputs())

    with GuardMode(session.state.buffers) as guard:
        run(session.run)

    assert guard.num_calls > 0


@pytest.mark.pair("gemma3_mm")
@pytest.mark.parametrize("side", SIDES)
def test_prompts_and_inputs_that_do_not_fit_are_refused(side: str) -> None:
    loop, inputs = LOOPS["gemma3_mm"], LOOPS["gemma3_mm"].case.prompt.inputs()
    speculation = loop.open(side)

    with pytest.raises(ValueError, match=r"12 placeholders of images .* features fill 8"):
        speculation.generate(loop.prompts, 2, 0, **{**inputs, "pixel_values": inputs["pixel_values"][:2]})
    with pytest.raises(TypeError, match="pixel_valeus"):
        speculation.generate(loop.prompts, 2, 0, pixel_valeus=inputs["pixel_values"])


@pytest.mark.pair("llama")
@pytest.mark.parametrize("side", SIDES)
def test_a_target_that_reads_text_alone_refuses_images(side: str) -> None:
    with folders(tiny_target(1)) as (path, _):
        target = open_target(path, side=side)

    with pytest.raises(ValueError, match="llama reads text alone, and was given pixel_values"):
        target(torch.zeros(1, 3, dtype=torch.long), pixel_values=torch.zeros(1))
