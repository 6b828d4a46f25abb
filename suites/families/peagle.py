"""P-EAGLE: EAGLE-3's drafts with a mask token, beside any target."""

import json
from collections.abc import Mapping
from typing import Any

from hypothesis import strategies as st

from suites.draws import EAGLE3, EVERY_FLAG, FIXED_ROPES, Drawn, eagle3_drafts, variant
from suites.scripted import Loop, tiny_draft, tiny_target
from suites.teams import Team, team

ARCHITECTURES = {"llama": ["PeagleLlamaForCausalLM"], "qwen3": ["PeagleQwen3ForCausalLM"]}


def masked(config: Mapping[str, Any], mask: int, **changes: Any) -> dict[str, Any]:
    """An EAGLE-3 config as P-EAGLE."""
    return {**config, "architectures": ARCHITECTURES[config["model_type"]], "mask_token_id": mask, **changes}


@st.composite
def peagle_drafts(draw: st.DrawFn, target: Drawn, kinds: tuple[str, ...] = FIXED_ROPES) -> Drawn:
    """A draft that fits a target: EAGLE-3's flags and any mask token."""
    drawn, mask = draw(eagle3_drafts(target, kinds)), draw(st.integers(0, target.keys["vocab_size"] - 1))
    return Drawn(json.dumps(masked(drawn.keys, mask)), drawn.seed)


PEAGLE = masked(EAGLE3, 330)
"""the pinned draft beside `draws.LLAMA`"""
PINNED_PEAGLE = variant(PEAGLE)
EVERY_PEAGLE_FLAG = variant(masked(EVERY_FLAG.keys, 7), 3)
QWEN3_PEAGLE = variant(masked({**EAGLE3, "model_type": "qwen3"}, 5, num_hidden_layers=2), 4)


def tiny_peagle(seed: int, vocab: int = 13, **changes: Any) -> Drawn:
    """A draft beside `tiny_target` that says any token; its layer ids are in no order."""
    drawn = tiny_draft(seed, vocab, **changes)
    return Drawn(json.dumps(masked(drawn.keys, vocab - 1)), seed)


# few words: a draft of random weights is right often enough for every count to occur
PEAGLE_LOOP = Loop(tiny_target(6, vocab=5), tiny_peagle(12, vocab=5), (5, 1, 3))


def peagle_team(like: Team) -> Team:
    """The draft of a team as P-EAGLE."""
    drawn = like.draft
    return like._replace(draft=Drawn(json.dumps(masked(drawn.keys, drawn.keys["vocab_size"] - 1)), drawn.seed))


TWO = peagle_team(team(2, 2, 1, 331, 1))
THREE = peagle_team(team(3, 3, 3, 331, 3, own_embedding=False, num_hidden_layers=1, layer_types=None))
FOUR = peagle_team(team(4, 2, 2, 130, 5))


def speculators(drawn: Drawn) -> dict[str, Any]:
    """The same facts as speculators spells them: a body of its own, ids of what enters a layer."""
    config, outer = dict(drawn.keys), {}
    eagle = config.pop("eagle_config")
    for name in ("architectures", "mask_token_id", "draft_vocab_size", "norm_before_residual", "norm_before_fc"):
        if name in config:
            outer[name] = config.pop(name)
    ids = eagle["eagle_aux_hidden_state_layer_ids"]
    return {
        **outer,
        "architectures": ["PEagleDraftModel"],
        "speculators_model_type": "peagle",
        "speculators_version": "0.9.0",
        "norm_output": False,
        "embed_requires_grad": True,
        "eagle_aux_hidden_state_layer_ids": [i + 1 for i in ids],
        "speculators_config": {"algorithm": "peagle", "default_proposal_method": "greedy"},
        "transformer_layer_config": config,
    }
