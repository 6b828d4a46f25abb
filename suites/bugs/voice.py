"""Bugs of what is never said."""

from typing import Any

from torch import Tensor

from harness.planting import Bug
from suites.voice import Voice

CLAIMS = "suites/correctness/test_voice.py"
NOBODY = f"{CLAIMS}::test_nobody_says_it_and_both_sides_say_the_same"
ITSELF = f"{CLAIMS}::test_a_draft_that_is_the_target_loses_no_proposal"
STATED = f"{CLAIMS}::test_what_a_checkpoint_suppresses_is_what_transformers_suppresses"


def of_target_alone(allow: Any) -> Any:
    """Drafts may propose what is then rejected."""
    return lambda self, logits, of_draft=False: logits if of_draft else allow(self, logits)


def by_own_ids(_: Any) -> Any:
    """The target's ids taken for the draft's."""

    def logits(self: Any, top: Tensor) -> Tensor:
        own = self.model.logits(top)
        return own.index_fill(-1, self.suppressed[self.suppressed < own.shape[-1]], float("-inf"))

    return logits


BUGS = (
    Bug(
        "voice-draft-free",
        "suppressed tokens masked where the target's logits are processed, and nowhere else",
        "reference.decoding.Chain.allow",
        of_target_alone,
        ITSELF,
    ),
    Bug(
        "voice-twin-draft-free",
        "the same behind a fused head, whose argmax takes no mask",
        "optimized.muted.MutedDraft.propose",
        lambda _: lambda self, top: self.model.propose(top),
        ITSELF,
    ),
    Bug(
        "voice-twin-verify-free",
        "verification by a fused argmax, sampling by masked logits",
        "optimized.muted.MutedHead.argmax",
        lambda _: lambda self, x: self.model.argmax(x),
        NOBODY,
    ),
    Bug(
        "voice-draft-ids",
        "ids of the target masked in a draft's smaller vocabulary",
        "optimized.muted.MutedDraft.logits",
        by_own_ids,
        NOBODY,
    ),
    Bug(
        "voice-config-alone",
        "generation_config.json left unread",
        "suites.catalog.read_voice",
        lambda _: lambda folder, keys, config: Voice(tuple(getattr(config, "suppressed", ()))),
        STATED,
    ),
)
