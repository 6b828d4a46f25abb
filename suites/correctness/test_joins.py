"""Claim: a draft that shares its target's table and head reads their raw rows, on any target and over any ranks.

Gemma multiplies its embeddings by sqrt(H) and caps its logits. EAGLE-3 is trained on the rows as they lie in the
checkpoint; an engine that hands over scaled ones changes nothing that a test of acceptance would see, because the
draft's first norm divides the scale out again, up to its eps. Born of SGLang #23976 (the table of every rank handed to
a draft as if it were whole) and of the Gemma wrappers that hand over a module whose call scales.
"""

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from harness.checkpoints import open_checkpoint, save_checkpoint
from harness.compare import bit_equal, hold
from suites.catalog import open_draft, open_target
from suites.draws import eagle3_weights, random_tokens, write_target
from suites.families.deepseek import tiny_deepseek
from suites.families.eagle3_mla import tiny_mla_draft
from suites.families.gemma3 import tiny_gemma3
from suites.families.gemma4 import tiny_gemma4
from suites.families.qwen3_moe import tiny_qwen3_moe
from suites.opened import OpenDraft, OpenTarget
from suites.scripted import tiny_draft, tiny_target

pytestmark = [pytest.mark.correctness, pytest.mark.pair("eagle3")]

VOCAB = 97
TARGETS = {
    "llama": tiny_target,
    "gemma3": tiny_gemma3,
    "gemma4": tiny_gemma4,
    "qwen3_moe": tiny_qwen3_moe,
    "deepseek": tiny_deepseek,
}
DRAFTS = {"eagle3": tiny_draft, "eagle3_mla": tiny_mla_draft}
ON = pytest.mark.parametrize("family", TARGETS)
WITH = pytest.mark.parametrize("draft", DRAFTS)


def joined(family: str, draft: str, seed: int = 7, eps: float = 1e-2, **side: Any) -> tuple[OpenTarget, OpenDraft]:
    """A target and a draft that has neither a table nor a head of its own."""
    drawn = DRAFTS[draft](seed + 1, VOCAB, rms_norm_eps=eps)
    tensors = {n: t for n, t in eagle3_weights(drawn, False).items() if n not in ("lm_head.weight", "d2t", "t2d")}
    with tempfile.TemporaryDirectory() as root:
        target = open_target(write_target(TARGETS[family](seed, VOCAB), Path(root, "t")), dtype=torch.float64, **side)
        save_checkpoint(Path(root, "d"), drawn.keys, tensors)
        return target, open_draft(Path(root, "d"), target, dtype=torch.float64, **side)


def rows(family: str, seed: int = 7) -> Tensor:
    """[V, H]  the target's table as it lies in the checkpoint."""
    with tempfile.TemporaryDirectory() as root:
        checkpoint = open_checkpoint(write_target(TARGETS[family](seed, VOCAB), Path(root)))
        name = next(name for name in checkpoint.headers if name.endswith("embed_tokens.weight"))
        return checkpoint.read(name).double()


def first_step(target: OpenTarget, draft: OpenDraft, seed: int) -> tuple[Tensor, Tensor]:
    """Logits of the first draft step and its feedback."""
    tokens = random_tokens(VOCAB, 2, 6, seed)
    out = target(tokens, capture=draft.capture_points)
    return draft(tokens.roll(-1, 1), draft.fuse(out.aux))


@WITH
@ON
def test_the_draft_reads_raw_rows(family: str, draft: str) -> None:
    _, opened = joined(family, draft)

    bit_equal("embedding", opened.module.embed_tokens(torch.arange(VOCAB)), rows(family))


@WITH
@ON
def test_the_twin_shares_what_the_reference_shares(family: str, draft: str) -> None:
    reference, twin = joined(family, draft), joined(family, draft, side="optimized")

    for name, got, want in zip(("logits", "feedback"), first_step(*twin, 0), first_step(*reference, 0), strict=True):
        hold(name, got, want, depth=5, width=192)
    assert [e.status for e in twin[1].ledger.entries] == [e.status for e in reference[1].ledger.entries]
    assert {e.parameter for e in twin[1].ledger.entries if e.status == "shared"} == {
        "embed_tokens.weight",
        "lm_head.weight",
    }


@WITH
@ON
def test_ranks_share_their_own_rows(family: str, draft: str) -> None:
    whole, shared = (joined(family, draft, side="optimized", tp_size=size) for size in (1, 2))

    for name, got, want in zip(("logits", "feedback"), first_step(*shared, 3), first_step(*whole, 3), strict=True):
        hold(name, got, want, depth=5, width=192)


class Scaled(nn.Module):
    """The target's own embedding, scale and all."""

    def __init__(self, inner: nn.Module, scale: float) -> None:
        super().__init__()
        self.inner, self.scale = inner, scale

    def forward(self, tokens: Tensor) -> Tensor:
        return self.inner(tokens) * self.scale


@pytest.mark.parametrize(("eps", "hidden"), [(1e-30, True), (1e-2, False)], ids=["without eps", "with eps"])
def test_a_norm_hides_the_scale_up_to_its_eps(eps: float, hidden: bool) -> None:
    target, draft = joined("gemma3", "eagle3", eps=eps)
    one, raw = first_step(target, draft, 0)[0], draft.module.embed_tokens

    draft.module.embed_tokens = Scaled(raw, target.config.hidden**0.5)
    try:
        other = first_step(target, draft, 0)[0]
    finally:
        draft.module.embed_tokens = raw

    if hidden:
        hold("logits", other, one, depth=5, width=192)
    else:
        assert float((other - one).abs().max()) > 1e-3 * float(one.std())
