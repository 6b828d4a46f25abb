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
from suites.catalog import OpenDraft, OpenTarget, open_draft, open_target
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
DEVICES = ("cuda", "cpu")[not torch.cuda.is_available() :]
"""the first of them runs the Triton form: compiled where there is a GPU, interpreted elsewhere"""

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
def test_the_target_is_the_reference(
    device: str, dtype: torch.dtype, drawn: Drawn, batch: int, width: int
) -> None:
    tokens, capture = random_tokens(drawn.keys["vocab_size"], batch, width, drawn.seed), _points(drawn)
    with folders(drawn) as (path, _):
        reference = truth(open_target(path, dtype=dtype))
        twin = open_target(path, side="optimized", dtype=dtype, device=device)

    out, want = twin(tokens, capture=capture), reference(tokens, capture=capture)

    size = {"dtype": dtype, "depth": twin.num_layers, "width": twin.config.hidden}
    for c in capture:
        hold(f"capture point {c}", out.aux[:, :, c], want.aux[:, :, c], **size)
    hold("hidden", out.hidden, want.hidden, **size)
    hold("logits", out.logits, want.logits, **size)


def _points(drawn: Drawn) -> range:
    return range(drawn.keys["num_hidden_layers"] + 1)


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
    with folders(couple.target, couple.draft, couple.own_embedding) as paths:
        target = open_target(paths[0], dtype=dtype)
        reference = open_draft(paths[1], target, dtype=dtype)
        side = {"side": "optimized", "dtype": dtype, "device": device}
        twin = open_draft(paths[1], open_target(paths[0], **side), **side)
    truth(target), truth(reference)
    # rounded to the dtype, so that the draft alone is judged
    known = target(tokens, capture=reference.capture_points)
    return Drafts(reference, twin, tokens, known._replace(**{n: _rounded(known, n, dtype) for n in ("aux", "hidden")}))


def _rounded(out: TargetOutput, name: str, dtype: torch.dtype) -> Tensor:
    return getattr(out, name).to(dtype).double()


def unrolled(drafts: Drafts) -> tuple[Tensor, list[Tensor]]:
    """The reference's steps: logits [K, 1, T, Vd], and the feedback [1, T, H] of each."""
    feedback: list[Tensor] = []
    hook = drafts.reference.module.register_forward_hook(lambda module, args, step: feedback.append(step.feedback))
    logits = drafts.reference.unroll(drafts.tokens, drafts.known, STEPS)
    hook.remove()
    return logits, feedback


@torch.no_grad()
def served(drafts: Drafts, width: int) -> list[tuple[Tensor, Tensor]]:
    """The twin's steps as an engine takes them, logits [T, Vd] and feedback [T, H] of each.

    Every position of the text is a sequence of its own, which has read up to there and goes on from its own feedback.
    """
    module, tokens = drafts.twin.module, drafts.tokens[0].to(drafts.twin.side.device)
    known = drafts.known._replace(**{n: _placed(drafts, n, width) for n in ("aux", "hidden")})
    column = torch.arange(width, device=tokens.device)
    positions = torch.where(column <= column[:, None], column, -1)  # [T, T]
    cache = module.new_cache(width, width + STEPS)
    step = module(tokens[1 : width + 1].expand(width, -1), module.read(known), positions, cache)
    logits, feedback = step.logits[column, column], step.feedback[column, column]
    steps = [(logits, feedback)]
    for k in range(1, STEPS):
        step = module((tokens[k + 1 :][:width])[:, None], feedback[:, None], (column + k)[:, None], cache)
        logits, feedback = step.logits[:, 0], step.feedback[:, 0]
        steps.append((logits, feedback))
    return steps


def _placed(drafts: Drafts, name: str, width: int) -> Tensor:
    """One of the target's states for every sequence of `served`."""
    x, side = getattr(drafts.known, name), drafts.twin.side
    return x[:, :width].to(side.device, side.dtype).expand(width, *x.shape[2:-1], -1, -1).contiguous() if (
        x.dim() == 3
    ) else x[:, :width].to(side.device, side.dtype).expand(width, -1, -1, -1).contiguous()
