"""Bugs of the draft's mathematics, of its config and of its vocabulary."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from harness.planting import Bug
from reference.ops.rope import Rope

GOLDEN = "suites/correctness/test_golden.py::test_the_reference_equals_the_trainer_at_every_step"
UNROLL = "suites/correctness/test_unroll.py"
VOCAB = "suites/correctness/test_vocab_map.py"
CONFIGS = "suites/correctness/test_configs.py"
KEYS = f"{CONFIGS}::test_every_key_changes_the_facts_or_is_inert"
UNKNOWN = f"{CONFIGS}::test_an_unknown_key_is_refused_and_named"
AMBIGUOUS = f"{CONFIGS}::test_norm_output_without_a_word_is_refused_with_both_readings"
SERVING = f"{UNROLL}::test_unrolling_is_serving_one_step_at_a_time"
OFFSETS = f"{VOCAB}::test_offsets_lead_to_the_marked_ids_in_order"
SPREAD = f"{VOCAB}::test_spread_and_to_target_agree"
PARAMETERS = "suites/correctness/test_loading.py::test_every_parameter_of_a_draft_changes_its_logits"

PAGE = "reference.drafts.eagle3"
READ = "reference.drafts.eagle3_keys"


def told(**facts: Any) -> Callable[[Any], Any]:
    """A reader of configs that insists on some facts."""
    return lambda read: lambda config, norm_output=None: {**read(config, norm_output), **facts}


def layer(swap_halves: bool = False, swap_norms: bool = False, flip_residual: bool = False) -> Callable[[Any], Any]:
    """The layer of the page with one of its lines wrong."""

    def forward(self: Any, embed: Tensor, hidden: Tensor, *place: Any) -> Tensor:
        positions, visible, cache, slots = place
        norms = (self.input_layernorm, self.hidden_norm)
        first, second = reversed(norms) if swap_norms else norms
        halves = [first(embed), second(hidden)]
        u = torch.cat(halves[::-1] if swap_halves else halves, -1)
        residual = halves[1] if self.c.norm_before_residual != flip_residual else hidden
        s = residual + self.self_attn(u, positions, visible, self.index, cache, slots)
        return s + self.mlp(self.post_attention_layernorm(s))

    return lambda right: lambda self, *args: (forward if self.index == 0 else right)(self, *args)


def fuse_by_width(fuse: Any) -> Any:
    """`fc` only where the widths differ, as if a width could tell an aux state from feedback."""

    def fused(self: Any, aux: Tensor) -> Tensor:
        return aux.flatten(2) if aux.flatten(2).shape[-1] == self.c.hidden else fuse(self, aux)

    return fused


def fuse_with_reversed_norms(fuse: Any) -> Any:
    """The norms of the aux states in the wrong order."""

    def fused(self: Any, aux: Tensor) -> Tensor:
        if self.fc_norm is None:
            return fuse(self, aux)
        norms = reversed(list(self.fc_norm))
        return self.fc(torch.cat([norm(a) for norm, a in zip(norms, aux.unbind(2), strict=True)], -1))

    return fused


def one_position_back(forward: Any) -> Any:
    """Later teacher-forced steps, which name what is visible, sit where the step before sat."""

    def step(self: Any, tokens: Tensor, hidden: Tensor, positions: Any = None, *place: Any) -> Any:
        later = len(place) == 3 and bool(place[1].min())
        return forward(self, tokens, hidden, positions - 1 if later else positions, *place)

    return step


def backwards(rotate: Any) -> Any:
    """Features are paired from the other end, so each pair has another frequency."""
    return lambda x, positions, rope: rotate(x.flip(-1), positions, rope).flip(-1)


def interleaved(rotate: Any) -> Any:
    """Pairs (0, 1), (2, 3) turn in place of (0, D/2), (1, D/2 + 1)."""

    def turn(x: Tensor, positions: Tensor, rope: Any) -> Tensor:
        halves = x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)
        return rotate(halves, positions, rope).unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)

    return turn


def twice(to_target: Any) -> Any:
    return lambda self, ids: (to_target(self, ids) + self.d2t[ids]).clamp(max=self.c.vocab - 1)


def spread_in_place(spread: Any) -> Any:
    """Draft logits over the first ids of the target's vocabulary."""

    def wide(self: Any, logits: Tensor) -> Tensor:
        room = self.c.vocab - self.c.draft_vocab
        return torch.nn.functional.pad(logits, (0, room), value=float("-inf"))

    return wide


def guess_feedback(read: Any) -> Any:
    return lambda keys, eagle, meaning: read(keys, eagle, meaning or "feedback")


def bug(name: str, origin: str, at: str, make: Callable[[Any], Any], claim: str = GOLDEN) -> Bug:
    """A bug of the draft's page, or of another place under `reference`."""
    return Bug(name, origin, at if at.startswith("reference") else f"{PAGE}.{at}", make, claim)


BUGS = (
    bug("hidden before embedding", "SGLang list, M13", "Eagle3Layer.forward", layer(swap_halves=True)),
    bug("the two input norms swapped", "vLLM list, 18", "Eagle3Layer.forward", layer(swap_norms=True)),
    bug("norm_before_residual unread", "SGLang 0.5.23: no reader", "read_facts", told(norm_before_residual=False)),
    bug("residual form flipped", "vLLM list, 20", "Eagle3Layer.forward", layer(flip_residual=True)),
    bug("norm_output never fed back", "vLLM #42764", "read_facts", told(feedback_normed=False)),
    bug("norm_output always fed back", "SpecForge 3.1 read by engines", "read_facts", told(feedback_normed=True)),
    bug("final norm always before the head", "SpecForge norm_output: false", "read_facts", told(norm_before_head=True)),
    bug("fc_norm weights in reverse", "SGLang list, M17", "Eagle3Draft.fuse", fuse_with_reversed_norms),
    bug("fc skipped by a width test", "SGLang #21272", "Eagle3Draft.fuse", fuse_by_width, PARAMETERS),
    bug("eps of another model", "SGLang list, M21", "read_facts", told(eps=1e-6)),
    bug("later layers read hidden_norm", "SGLang llama_eagle3.py:105", "read_facts", told(later_norm="hidden_norm")),
    bug("rope of the target", "SGLang list, M22", "read_facts", told(rope=Rope(8, theta=500_000.0))),
    bug("logit_scale dropped", "vLLM list, 56", "read_facts", told(logit_scale=1.0), KEYS),
    bug("three aux states, always", "vLLM 1.1.3", f"{READ}._read_aux_states", lambda _: lambda *_: 3, KEYS),
    bug("nested norm_before_fc unread", "vLLM #36545", f"{READ}._agree", lambda _: lambda _, top, *__: bool(top), KEYS),
    bug("unknown keys pass", "vLLM list, 66", "reference.config.Keys.finish", lambda _: lambda self: None, UNKNOWN),
    bug("norm_output guessed", "SpecForge against engines", f"{READ}._read_norm_output", guess_feedback, AMBIGUOUS),
    bug("later step one position back", "vLLM list, 34", "Eagle3Draft.forward", one_position_back, SERVING),
    bug("rope pairs neighbours", "vLLM list, 31", "reference.ops.attention.rotate", interleaved),
    bug("heads turn backwards", "vLLM list, 35", "reference.ops.attention.rotate", backwards),
    bug(
        "d2t read as absolute ids",
        "verl-SpeCo 67",
        "Eagle3Draft.to_target",
        lambda _: lambda self, i: self.d2t[i],
        OFFSETS,
    ),
    bug("d2t applied twice", "SGLang list, M26", "Eagle3Draft.to_target", twice, OFFSETS),
    bug("d2t not applied", "Automodel 2447", "Eagle3Draft.to_target", lambda _: lambda self, ids: ids, OFFSETS),
    bug("d2t dropped by the spread", "vLLM list, 55", "Eagle3Draft.spread", spread_in_place, SPREAD),
)
