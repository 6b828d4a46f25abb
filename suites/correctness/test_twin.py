"""Claim: the optimized twin computes what the reference computes, from the same folder, tensor by tensor.

Born of SGLang #28005 (a residual that aliased the live hidden state, seen only in deep layers) and #27540: a fast path
that was compared with itself. The truth is the reference in float64, with weights rounded to the twin's dtype, so the
budget is the twin's rounding alone. A draft is held where it serves: behind its own cache, at draft steps 1, 2 and 3,
on its own feedback, against the reference's teacher-forced unroll.
"""

from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from harness.compare import bit_equal, hold
from reference.outputs import TargetOutput
from suites.catalog import OpenDraft, open_draft, open_target
from suites.draws import (
    EVERY_FLAG,
    PINNED_DRAFT,
    PINNED_TARGET,
    Drawn,
    eagle3_drafts,
    folders,
    llama_targets,
    random_tokens,
    variant,
)
from suites.scripted import Loop, tiny_draft, tiny_target

pytestmark = pytest.mark.correctness

STEPS = 3
# compiled where there is a GPU, interpreted elsewhere
FORMS = (("aten", "cpu"), ("triton", "cuda" if torch.cuda.is_available() else "cpu"))

every_form = pytest.mark.parametrize(
    ("device", "dtype"),
    [
        ("cpu", torch.float64),
        ("cpu", torch.float32),
        pytest.param("cuda", torch.bfloat16, marks=pytest.mark.gpu),
    ],
    ids=lambda value: str(value).removeprefix("torch."),
)


class Couple(NamedTuple):
    """A target and a draft beside it."""

    target: Drawn
    draft: Drawn
    own_embedding: bool


@st.composite
def couples(draw: st.DrawFn) -> Couple:
    """Any draft beside a small target."""
    target = draw(llama_targets(min_layers=7, max_layers=7, kinds=("default", "llama3")))
    return Couple(target, draw(eagle3_drafts(target)), draw(st.booleans()))


PLAIN = Couple(PINNED_TARGET, PINNED_DRAFT, False)
ALL = Couple(PINNED_TARGET, EVERY_FLAG, True)
QWEN3 = PLAIN._replace(draft=variant(model_type="qwen3", architectures=["Qwen3ForCausalLMEagle3"]))
NO_AUX = PLAIN._replace(
    draft=variant(eagle_config={"use_aux_hidden_state": False, "eagle_aux_hidden_state_layer_ids": None})
)
TWO_LAYERS = PLAIN._replace(
    draft=variant(num_hidden_layers=2, eagle_config={"later_norm": "hidden_norm", "norm_before_head": False})
)


def truth(opened: Any) -> Any:
    """The reference with the weights as its dtype rounds them, computing in float64."""
    opened.module.double()
    return opened


@every_form
@pytest.mark.pair("llama")
@given(drawn=llama_targets(), batch=st.integers(1, 3), width=st.integers(1, 40))
@example(drawn=PINNED_TARGET, batch=2, width=70)
@example(drawn=variant(PINNED_TARGET.keys, 3, tie_word_embeddings=True, vocab_size=130), batch=1, width=1)
def test_the_target_is_the_reference(device: str, dtype: torch.dtype, drawn: Drawn, batch: int, width: int) -> None:
    tokens = random_tokens(drawn.keys["vocab_size"], batch, width, drawn.seed)
    capture = range(drawn.keys["num_hidden_layers"] + 1)
    with folders(drawn) as (path, _):
        reference = truth(open_target(path, dtype=dtype))
        twin = open_target(path, side="optimized", dtype=dtype, device=device)

    out, want = twin(tokens, capture=capture), reference(tokens, capture=capture)

    size = {"dtype": dtype, "depth": twin.num_layers, "width": twin.config.hidden}
    for c in capture:
        hold(f"capture point {c}", out.aux[:, :, c], want.aux[:, :, c], **size)
    hold("hidden", out.hidden, want.hidden, **size)
    hold("logits", out.logits, want.logits, **size)


class Drafts(NamedTuple):
    """One draft on both sides, and what the target knew."""

    reference: OpenDraft
    twin: OpenDraft
    tokens: Tensor
    """[1, T+K]"""
    known: TargetOutput


def both_drafts(couple: Couple, dtype: torch.dtype, device: str, width: int) -> Drafts:
    """Open a couple on both sides and let the reference's target read a text."""
    tokens = random_tokens(couple.target.keys["vocab_size"], 1, width + STEPS, couple.draft.seed)
    side = {"side": "optimized", "dtype": dtype, "device": device}
    with folders(couple.target, couple.draft, couple.own_embedding) as (path, draft_path):
        target = open_target(path, dtype=dtype)
        reference = open_draft(draft_path, target, dtype=dtype)
        twin = open_draft(draft_path, open_target(path, **side), **side)
    known = truth(target)(tokens, capture=reference.capture_points)
    # rounded to the dtype: both drafts read the same numbers, and the draft alone is judged
    rounded = TargetOutput(*(x.to(dtype).double() for x in known))
    return Drafts(truth(reference), twin, tokens, rounded)


def unrolled(drafts: Drafts) -> tuple[Tensor, list[Tensor]]:
    """The reference's steps: logits [K, 1, T, Vd], and the feedback [1, T, H] of each."""
    feedback: list[Tensor] = []
    hook = drafts.reference.module.register_forward_hook(lambda module, args, step: feedback.append(step.feedback))
    logits = drafts.reference.unroll(drafts.tokens, drafts.known, STEPS)
    hook.remove()
    return logits, feedback


@torch.no_grad()
def served(drafts: Drafts, width: int) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """What the twin's first step reads, and its steps as an engine takes them.

    Every position of the text is a sequence of its own, which has read up to there and goes on from its own feedback.

    ->  [T, T, H]; logits [T, Vd] and feedback [T, H] of each step
    """
    module, side = drafts.twin.module, drafts.twin.side
    # one copy of the text for every sequence
    copies = [x[:, :width].to(side.device, side.dtype).repeat(width, *[1] * (x.dim() - 1)) for x in drafts.known]
    hidden, tokens = module.read(TargetOutput(*copies)), drafts.tokens[0].to(side.device)
    column = torch.arange(width, device=side.device)
    positions = torch.where(column <= column[:, None], column, -1)  # [T, T]
    cache = module.new_cache(width, width + STEPS)
    step = module(tokens[1 : width + 1].expand(width, -1), hidden, positions, cache)
    steps = [(step.logits[column, column], step.feedback[column, column])]
    for k in range(1, STEPS):
        following, feedback = tokens[k + 1 :][:width, None], steps[-1][1][:, None]
        step = module(following, feedback, (column + k)[:, None], cache)
        steps.append((step.logits[:, 0], step.feedback[:, 0]))
    return hidden, steps


@every_form
@pytest.mark.pair("eagle3")
@given(couple=couples(), width=st.integers(1, 8))
@example(couple=PLAIN, width=6)
@example(couple=ALL, width=9)
@example(couple=QWEN3, width=3)
@example(couple=NO_AUX, width=3)
@example(couple=TWO_LAYERS, width=3)
def test_the_draft_serves_what_the_reference_unrolls(
    device: str, dtype: torch.dtype, couple: Couple, width: int
) -> None:
    drafts = both_drafts(couple, dtype, device, width)
    c = drafts.twin.facts.config

    read, steps = served(drafts, width)

    want = drafts.reference.module.read(drafts.known)[:, :width]
    hold("fuse", read[-1:], want, dtype=dtype, depth=1, width=c.aux_states * c.aux_width)
    want_logits, want_feedback = unrolled(drafts)
    for k, (logits, feedback) in enumerate(steps):
        size = {"dtype": dtype, "depth": 1 + (k + 1) * c.layers, "width": 2 * c.hidden}
        hold(f"logits of step {k + 1}", logits, want_logits[k, 0, :width], **size)
        hold(f"feedback of step {k + 1}", feedback, want_feedback[k][0, :width], **size)


@pytest.mark.pair("llama-eagle3")
def test_a_whole_cycle_in_triton_is_the_cycle_in_aten() -> None:
    ids = {"eagle_aux_hidden_state_layer_ids": [1, 0]}
    # few words: one sequence accepts both drafts, the other rejects the first
    loop = Loop(tiny_target(9, vocab=5, num_hidden_layers=2), tiny_draft(10, vocab=5, eagle_config=ids), (3, 1))
    aten, triton = (loop.open("optimized", torch.float32, form=form, device=device) for form, device in FORMS)

    want, got = (speculation.generate(loop.prompts, 3, 2) for speculation in (aten, triton))

    assert got.accepted == want.accepted == [[2], [0, 1]]
    bit_equal("tokens", got.tokens, want.tokens)
    size = {"depth": aten.target.num_layers, "width": 2 * aten.target.config.hidden}
    a, b = (speculation.engines[0].session.state for speculation in (aten, triton))
    bit_equal("drafted", b.drafted.cpu(), a.drafted)
    for name in ("hidden", "aux"):
        hold(name, getattr(b, name), getattr(a, name), **size)
