"""Claim: the twin of Gemma 3 text is its reference on one rank and on many, and speculates without changing a text.

Born of SGLang #32383 (norms fused into the next one, and captured states that moved with them), of SGLang #28343
(captures taken before the all-reduce are partial sums; behind a norm they cannot even be added up later), of a shared
embedding that was scaled for the target and read scaled by the draft, and of windows counted from the chunk's start.
The windows here are shorter than the texts, so that verify and decode look back from different columns.
"""

import pytest
import torch

from harness.compare import bit_equal, hold
from suites.catalog import open_speculation
from suites.correctness.test_twins import hold_to_reference
from suites.draws import folders
from suites.families.gemma3 import PINNED_TEXT, tiny_gemma3
from suites.scripted import tiny_draft
from suites.teams import Team

pytestmark = [pytest.mark.correctness, pytest.mark.pair("gemma3")]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_in_half_precision_the_target_is_the_reference(device: str) -> None:
    hold_to_reference(PINNED_TEXT, torch.bfloat16, 2, 20, device)


# the draft has no embedding of its own; a tied head would say one word for ever
SHARED = Team(4, tiny_gemma3(3, 331, tie_word_embeddings=False), tiny_draft(4, 331), own_embedding=False)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_a_draft_reads_the_shared_table_unscaled_on_any_number_of_ranks(ranks: int) -> None:
    with folders(SHARED.target, SHARED.draft, SHARED.own_embedding) as paths:
        reference = open_speculation(*paths, dtype=torch.float64)
    twin, tokens = SHARED.open(ranks), SHARED.text(4)
    known = reference.target(tokens, capture=reference.draft.capture_points)
    hidden, following = reference.draft.fuse(known.aux), tokens.roll(-1, 1)

    want, got = (speculation.draft(following, hidden) for speculation in (reference, twin))
    for name, a, b in zip(got._fields, got, want, strict=True):
        hold(name, a, b, depth=1, width=2 * twin.target.config.hidden)

    said, truth_said = (speculation.generate(SHARED.prompts, 7, 3) for speculation in (twin, reference))
    bit_equal("tokens", said.tokens, truth_said.tokens)
    assert said.accepted == truth_said.accepted
