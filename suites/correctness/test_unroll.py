"""Claim: what a draft is trained on is what it meets when it serves, at draft steps 1, 2 and 3.

Born of SafeAILab/EAGLE, which trains with positions and masks of its own and serves with a cache: the fed-back state
(vLLM #42764), the step's position and the keys a step may see show from the second step on; a first-step test is green.
"""

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from harness.compare import bit_equal, hold
from suites.catalog import OpenDraft, OpenTarget
from suites.draws import EVERY_FLAG, PINNED_DRAFT, PINNED_TARGET, Drawn, eagle3_drafts, random_tokens, variant
from suites.stand import stand

pytestmark = [pytest.mark.correctness, pytest.mark.pair("eagle3")]

DRAFTS = eagle3_drafts(PINNED_TARGET)
VOCAB = PINNED_TARGET.keys["vocab_size"]
STEPS = 3
NARROW = variant(sliding_window=3, layer_types=["sliding_attention"])
TWO_LAYERS = variant(num_hidden_layers=2, norm_before_residual=True, eagle_config={"later_norm": "hidden_norm"})
NO_AUX = variant(eagle_config={"use_aux_hidden_state": False, "eagle_aux_hidden_state_layer_ids": None})


def serve(draft: OpenDraft, tokens: Tensor, hidden: Tensor, column: int) -> Tensor:
    """The draft steps that serving takes once the target has read 0..column and the rest turns out as forced.

    tokens  [B, T]
    hidden  [B, T, H]
    ->      [K, B, Vd]  as many steps as there are tokens for, STEPS at most
    """
    batch, width = tokens.shape
    module = draft.module
    cache = module.new_cache(batch, width + STEPS)
    positions = torch.arange(column + 1).expand(batch, -1)
    logits, feedback = module(tokens[:, 1 : column + 2], hidden[:, : column + 1], positions, cache)
    steps = [logits[:, -1]]
    for k in range(1, min(STEPS, width - 1 - column)):
        at = column + k
        logits, feedback = module(tokens[:, at + 1 : at + 2], feedback[:, -1:], torch.full((batch, 1), at), cache)
        steps.append(logits[:, -1])
    return torch.stack(steps)


@given(drawn=DRAFTS, width=st.integers(2, 10), seed=st.integers(0, 99))
@example(drawn=PINNED_DRAFT, width=8, seed=0)
@example(drawn=EVERY_FLAG, width=10, seed=1)
@example(drawn=NARROW, width=9, seed=2)
@example(drawn=TWO_LAYERS, width=6, seed=3)
@example(drawn=NO_AUX, width=6, seed=4)
@torch.no_grad()
def test_unrolling_is_serving_one_step_at_a_time(wide_target: OpenTarget, drawn: Drawn, width: int, seed: int) -> None:
    draft, tokens = stand(drawn, wide_target), random_tokens(VOCAB, 2, width, seed)
    out = wide_target(tokens, capture=draft.capture_points)

    steps = draft.unroll(tokens, out, STEPS)

    size = {"depth": STEPS * drawn.keys["num_hidden_layers"], "width": drawn.keys["hidden_size"]}
    for column in range(width - 1):
        served = serve(draft, tokens, draft.module.read(out), column)
        for k, logits in enumerate(served):
            hold(f"step {k + 1}", steps[k, :, column], logits, **size)


@given(drawn=DRAFTS, width=st.integers(1, 8), num_steps=st.integers(1, 5), seed=st.integers(0, 99))
@example(drawn=PINNED_DRAFT, width=6, num_steps=3, seed=0)
@example(drawn=PINNED_DRAFT, width=2, num_steps=5, seed=0)
def test_logits_are_nan_exactly_where_no_next_token_is_known(
    target: OpenTarget, drawn: Drawn, width: int, num_steps: int, seed: int
) -> None:
    draft, tokens = stand(drawn, target), random_tokens(VOCAB, 2, width, seed)

    steps = draft.unroll(tokens, target(tokens, capture=draft.capture_points), num_steps)

    assert steps.shape == (num_steps, 2, width, drawn.keys["draft_vocab_size"])
    for k in range(num_steps):
        known = max(width - 1 - k, 0)
        assert not steps[k, :, :known].isnan().any()
        assert bool(steps[k, :, known:].isnan().all())


@given(drawn=DRAFTS, cut=st.integers(1, 8), seed=st.integers(0, 99))
@example(drawn=PINNED_DRAFT, cut=5, seed=0)
@example(drawn=EVERY_FLAG, cut=6, seed=1)
def test_later_tokens_never_reach_earlier_columns(target: OpenTarget, drawn: Drawn, cut: int, seed: int) -> None:
    draft, tokens = stand(drawn, target), random_tokens(VOCAB, 2, 9, seed)
    other = torch.cat([tokens[:, :cut], random_tokens(VOCAB, 2, 9 - cut, seed + 1)], 1)

    here, there = (draft.unroll(t, target(t, capture=draft.capture_points), STEPS) for t in (tokens, other))

    for k in range(STEPS):
        # column t of step k has read the tokens up to t + k + 1
        untouched = max(cut - 1 - k, 0)
        bit_equal(f"step {k + 1}", here[k, :, :untouched], there[k, :, :untouched])


@given(drawn=DRAFTS, seed=st.integers(0, 99))
@example(drawn=PINNED_DRAFT, seed=0)
def test_the_first_steps_do_not_depend_on_how_many_follow(target: OpenTarget, drawn: Drawn, seed: int) -> None:
    draft, tokens = stand(drawn, target), random_tokens(VOCAB, 2, 7, seed)
    out = target(tokens, capture=draft.capture_points)

    few, many = draft.unroll(tokens, out, 2), draft.unroll(tokens, out, 5)

    size = {"depth": 2 * drawn.keys["num_hidden_layers"], "width": drawn.keys["hidden_size"]}
    hold("logits", many[:2], few, nan_equal=True, **size)
