"""Bugs of P-EAGLE: what stands where the target has not been."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from harness.planting import Bug
from reference.drafting import Step

PAGE, WAY = "reference.drafts.peagle", "reference.drafting.Parallel.start"
CLAIM = "suites/correctness/test_peagle.py"
GOLDEN = f"{CLAIM}::test_the_reference_drafts_what_the_trainer_does"
SERVED = f"{CLAIM}::test_what_is_trained_is_a_text_that_goes_on_in_masks_and_what_is_served"
REJECTED = f"{CLAIM}::test_columns_that_did_not_stand_change_no_proposal"
NAMES = f"{CLAIM}::test_the_mask_token_has_three_names_and_one_meaning"
TWIN = f"{CLAIM}::test_the_twin_drafts_what_the_reference_does"
CHUNKS = f"{CLAIM}::test_prompts_are_read_in_chunks_of_any_size"


def not_fused(self: Any) -> Tensor:
    """The mask as one aux state of it, which is as wide as what `fuse` gives."""
    return self.mask_hidden.unflatten(2, (self.c.aux_states, -1))[:, :, 0]


def twin_bare(self: Any) -> Tensor:
    """The same in the twin."""
    return self.mask_hidden.weight.unflatten(2, (self.c.aux_states, -1))[:, :, 0]


def not_normed(self: Any) -> Tensor:
    """Through `fc` alone."""
    return self.fc(self.mask_hidden)


def pad_token(read: Any) -> Any:
    return lambda cls, config, norm_output=None: replace(read(cls, config, norm_output), mask_token=0)


def masks_later(forward: Any) -> Any:
    """Masks stand one position further than their slots."""

    def step(
        self: Any, tokens: Tensor, hidden: Tensor, positions: Tensor, cache: Any, slots: Any = None, *more: Any
    ) -> Any:
        slots = positions if slots is None else slots
        return forward(self, tokens, hidden, positions + (tokens == self.c.mask_token), cache, slots, *more)

    return step


def masked_root(start: Any) -> Any:
    """The root's slot reads the mask's state, not the target's."""

    def blank(self: Any, out: Any, tokens: Tensor, following: Tensor, positions: Tensor, last: Tensor) -> Any:
        mask = self.draft.mask_hidden.view(1, 1, *out.aux.shape[2:]).expand_as(out.aux)
        root = torch.arange(tokens.shape[1]) == last[:, None]
        out = out._replace(aux=torch.where(root[..., None, None], mask, out.aux))
        return start(self, out, tokens, following, positions, last)

    return blank


def rejected_stay(start: Any) -> Any:
    """Masks begin behind the columns that did not stand."""

    def stay(self: Any, out: Any, tokens: Tensor, following: Tensor, positions: Tensor, last: Tensor) -> Any:
        logits, feedback = start(self, out, tokens, following, positions, torch.full_like(last, tokens.shape[1] - 1))
        return Step(logits, feedback)

    return stay


def row_before(start: Any) -> Any:
    """Drafts are read one row early, the first of them twice."""

    def early(self: Any, *args: Any) -> Any:
        logits, feedback = start(self, *args)
        return Step(torch.cat([logits[:, :1], logits[:, :-1]], 1), feedback)

    return early


def root_left_out(prefill: Any) -> Any:
    """A chunk's last position is left out of every chunk, not of the last alone."""

    def short(self: Any, chunk: Any, num_slots: int | None) -> None:
        last = chunk.known.shape[1] - 1
        known = torch.where(torch.arange(last + 1) < last, chunk.known, -1)
        prefill(self, chunk._replace(known=known), num_slots)

    return short


def bug(name: str, origin: str, at: str, make: Callable[[Any], Any], claim: str = GOLDEN) -> Bug:
    """A bug of the draft's page, or of another place."""
    return Bug(name, origin, f"{PAGE}.{at}" if at.startswith("Peagle") else at, make, claim)


BUGS = (
    bug("mask_hidden not fused", "vLLM llm_base_proposer.py:1408", "PeagleDraft.fuse_mask", lambda _: not_fused),
    bug("mask_hidden without its norms", "vLLM list, 18", "PeagleDraft.fuse_mask", lambda _: not_normed),
    bug("P-EAGLE's masks are the pad token", "vLLM list", "PeagleConfig.from_hf", pad_token),
    bug("masks one position further", "vLLM v1/spec_decode/utils.py", "PeagleDraft.forward", masks_later),
    bug("the root reads the mask's state", "vLLM v1/spec_decode/utils.py", WAY, masked_root, SERVED),
    bug("masks behind rejected columns", "vLLM v1/spec_decode/utils.py", WAY, rejected_stay, REJECTED),
    bug("parallel drafts one row early", "vLLM v1/spec_decode/utils.py", WAY, row_before, SERVED),
    bug("ptd_token_id unread", "published drafts of gpt-oss", f"{PAGE}.MASK_KEYS", lambda keys: keys[:2], NAMES),
    bug(
        "the twin's mask not fused", "vLLM", "optimized.drafts.peagle.PeagleDraft.fuse_mask", lambda _: twin_bare, TWIN
    ),
    bug("the end of a chunk left out", "chunked prompts", "optimized.drafting.Parallel.prefill", root_left_out, CHUNKS),
)
