"""Bugs of the Gemma 4 assistant: where it stands, which keys it sees, what it is fed, and the order of its words."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from harness.planting import Bug

CLAIMS = "suites/correctness/test_gemma4_assistant.py"
STEPS = f"{CLAIMS}::test_two_draft_steps_are_those_of_transformers_shown_the_same_keys"
REJECTED = f"{CLAIMS}::test_rejected_tokens_change_no_proposal"
ORDERING = f"{CLAIMS}::test_a_checkpoint_that_is_not_whole_is_refused[changes0-token_ordering]"
OTHERS = f"{CLAIMS}::test_an_assistant_of_another_target_is_refused[changes0-sliding_attention]"
TWINS = "suites/correctness/test_twin_gemma4_assistant.py"
TWIN_STEPS = f"{TWINS}::test_three_draft_steps_are_those_of_the_reference"
RANKS = f"{TWINS}::test_many_ranks_propose_what_one_proposes"
LOOP = f"{TWINS}::test_every_proposal_is_that_of_a_fresh_target_which_read_the_accepted_prefix"
SHARED = "suites/correctness/test_witness_gemma4.py"
SHARED += "::test_the_keys_and_values_for_an_assistant_are_those_of_transformers"

PAGE, TWIN = "reference.drafts.gemma4_assistant", "optimized.drafts.gemma4_assistant"
DRAFT, TWIN_DRAFT = f"{PAGE}.Gemma4AssistantDraft", f"{TWIN}.Gemma4AssistantDraft"


def built(change: Callable[[Any], None]) -> Callable[[Any], Any]:
    """A module that is changed once it is built."""

    def plant(build: Any) -> Any:
        def init(self: Any, *facts: Any) -> None:
            build(self, *facts)
            change(self)

        return init

    return plant


def one_step_on(right: Any) -> Any:
    """Draft step k at position n + k - 2, as drafts with keys of their own take it."""

    def advance(self: Any, token: Tensor, feedback: Tensor, lengths: Tensor, k: int) -> Any:
        return right(self, token, feedback, lengths + k - 1, k)

    return advance


def one_step_on_the_twin(right: Any) -> Any:
    """The same over buffers."""

    def advance(self: Any, token: Tensor, feedback: Tensor, k: int, num_slots: int | None) -> Any:
        state = self.state
        self.state = SimpleNamespace(lengths=state.lengths + k - 1, target_cache=state.target_cache)
        try:
            return right(self, token, feedback, k, num_slots)
        finally:
            self.state = state

    return advance


def fed_before_the_norm(join: Any) -> Any:
    """A target that hands over what stands before its final norm."""

    def joined(self: Any, target: Any) -> Any:
        shared = join(self, target)
        self.target.norm.register_forward_pre_hook(lambda norm, args: setattr(norm, "given", args[0]))
        self.read = lambda out: self.target.norm.given
        return shared

    return joined


def halves_swapped(draft: Any) -> None:
    """The target's state before the embedding."""
    draft.pre_projection.register_forward_pre_hook(lambda m, args: (torch.cat(args[0].chunk(2, -1)[::-1], -1),))


def feedback_before_the_norm(draft: Any) -> None:
    """What the head reads is normed, what goes back is not."""
    draft.norm.register_forward_pre_hook(lambda norm, args: setattr(norm, "given", args[0]))
    draft.post_projection.register_forward_pre_hook(lambda m, args: (draft.norm.given,))


def unscaled(join: Any) -> Any:
    """The target's table without the factor that its own layers read it with."""

    def joined(self: Any, target: Any) -> Any:
        shared, text = join(self, target), self.target
        plain = SimpleNamespace(embed=text.embed_tokens, shared_kv=text.shared_kv, c=text.c)
        object.__setattr__(self, "target", plain)
        return shared

    return joined


def ordered_at_load(join: Any) -> Any:
    """Rows of the head put in order when they are loaded, and gathered by the order once more."""

    def joined(self: Any, target: Any) -> Any:
        if self.c.clusters:
            self.lm_head.weight.data = self.lm_head.weight.data[self.token_ordering]
        return join(self, target)

    return joined


def first_of_its_kind(shared_kv: Any) -> Any:
    """Keys of the first layer of each kind in place of the last."""

    def shared(self: Any, cache: Any) -> dict[str, Any]:
        first = {layer_type: self.c.layer_types.index(layer_type) for layer_type in shared_kv(self, cache)}
        return {layer_type: (cache.keys[i], cache.values[i]) for layer_type, i in first.items()}

    return shared


def without_scalar(forward: Any) -> Any:
    return lambda self, *inputs: forward(self, *inputs) / self.layer_scalar


def of_the_own_shard_alone(score: Any) -> Any:
    """A rank's own logits taken for everybody's."""

    def scored(self: Any, x: Tensor, members: Tensor) -> Tensor:
        group, self.group = self.group, SimpleNamespace(size=self.group.size, all_reduce=lambda tensor: tensor)
        try:
            return score(self, x, members)
        finally:
            self.group = group

    return scored


BUGS = (
    Bug(
        "gemma4-assistant-position-of-every-step",
        "draft steps moved on as those of drafts with keys of their own",
        "reference.drafting.FrozenKeys.next",
        one_step_on,
        f"{LOOP}[reference-dense]",
    ),
    Bug(
        "gemma4-assistant-twin-position-of-every-step",
        "the same over static buffers; SGLang takes positions of this draft from a place of their own",
        "optimized.drafting.FrozenKeys.next",
        one_step_on_the_twin,
        f"{LOOP}[optimized-dense]",
    ),
    Bug(
        "gemma4-assistant-position-of-the-root",
        "transformers 5.17 generation/candidate_generator.py: queries turned for the position of the root",
        f"{PAGE}.rotate",
        lambda rotate: lambda x, positions, rope: rotate(x, positions + 1, rope),
        STEPS,
    ),
    Bug(
        "gemma4-assistant-key-of-a-rejected-token",
        "transformers 5.17 and vLLM #47920: keys counted with the rejected token's",
        f"{PAGE}.causal",
        lambda causal: lambda positions, held, window: causal(positions + 1, held, window),
        REJECTED,
    ),
    Bug(
        "gemma4-assistant-twin-slot-that-nobody-wrote",
        "SGLang's CUDA graphs: metadata of another draft adds one to the length",
        f"{TWIN_DRAFT}.states",
        lambda states: (
            lambda self, tokens, hidden, positions, *rest: states(self, tokens, hidden, positions + 1, *rest)
        ),
        f"{LOOP}[optimized-edge]",
    ),
    Bug(
        "gemma4-assistant-window-of-one-more",
        "transformers 5.17 masking_utils.py: a window with both its ends",
        f"{PAGE}.causal",
        lambda causal: lambda positions, held, window: causal(positions, held, window and window + 1),
        STEPS,
    ),
    Bug(
        "gemma4-assistant-keys-of-the-first-layer",
        "keys of another layer of the same kind",
        "reference.targets.gemma4.Gemma4Target.shared_kv",
        first_of_its_kind,
        SHARED,
    ),
    Bug(
        "gemma4-assistant-twin-keys-of-the-first-layer",
        "the same, by number",
        f"{PAGE}.Gemma4AssistantConfig.donor_in",
        lambda right: lambda self, layer, target: target.layer_types.index(self.layer_types[layer]),
        TWIN_STEPS,
    ),
    Bug(
        "gemma4-assistant-heads-of-another-target",
        "a draft opened beside a target whose heads it cannot read",
        f"{PAGE}.Gemma4AssistantConfig.check_target",
        lambda check: lambda self, target: None,
        OTHERS,
    ),
    Bug(
        "gemma4-assistant-ordered-twice",
        "SGLang: the head is permuted in place while loading, and read through the order again",
        f"{DRAFT}.join",
        ordered_at_load,
        STEPS,
    ),
    Bug(
        "gemma4-assistant-twin-not-ordered",
        "places in the order taken for token ids",
        f"{TWIN}.OrderedHead.members",
        lambda members: lambda self, x: self.ordering.argsort()[members(self, x)],
        TWIN_STEPS,
    ),
    Bug(
        "gemma4-assistant-any-ordering",
        "an order that leaves tokens out: transformers starts it at zeros and loads what it finds",
        f"{PAGE}.Gemma4AssistantConfig.check_ordering",
        lambda check: lambda self, ordering: None,
        ORDERING,
    ),
    Bug(
        "gemma4-assistant-embedding-unscaled",
        "the target's table read as an EAGLE-3 draft shares it",
        f"{DRAFT}.join",
        unscaled,
        STEPS,
    ),
    Bug(
        "gemma4-assistant-hidden-before-embedding",
        "the halves of what is projected in the other order",
        f"{DRAFT}.__init__",
        built(halves_swapped),
        STEPS,
    ),
    Bug(
        "gemma4-assistant-fed-before-the-norm",
        "the target's last capture point in place of its final hidden state",
        f"{DRAFT}.join",
        fed_before_the_norm,
        f"{LOOP}[reference-dense]",
    ),
    Bug(
        "gemma4-assistant-feedback-before-the-norm",
        "EAGLE-3's feedback, of a state that no norm has seen",
        f"{DRAFT}.__init__",
        built(feedback_before_the_norm),
        STEPS,
    ),
    Bug(
        "gemma4-assistant-without-layer-scalar",
        "`layer_scalar` is a buffer, and a reader of parameters passes over it",
        f"{PAGE}.Gemma4AssistantLayer.forward",
        without_scalar,
        STEPS,
    ),
    Bug(
        "gemma4-assistant-own-shard-alone",
        "logits of a rank's own rows proposed without asking the others",
        f"{TWIN}.OrderedHead.score",
        of_the_own_shard_alone,
        RANKS,
    ),
)
