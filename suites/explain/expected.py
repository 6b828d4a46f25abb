"""What `explain` must say of planted bugs: the edit, where one fact of a config or of the table of edits is the bug,
and else the first wrong place. Written by hand from what each bug does, not from what `explain` said.

A stage is a pair on which the bug shows: most pinned models are too plain for most facts.
"""

from collections.abc import Mapping
from typing import NamedTuple

from suites.couples import COUPLES, Couple
from suites.draws import EVERY_FLAG, PINNED_DRAFT, PINNED_TARGET
from suites.families.deepseek import PINNED_LIMITED, PINNED_SIGMOID, tiny_deepseek
from suites.families.eagle3_mla import tiny_mla_draft
from suites.families.gemma3 import PINNED_TEXT, tiny_gemma3
from suites.families.gemma4 import PINNED as GEMMA4
from suites.families.qwen3_moe import PINNED_NORMED, PINNED_RAW
from suites.scripted import tiny_draft, tiny_target

STAGES: Mapping[str, Couple] = {
    "llama-eagle3": COUPLES["llama-eagle3"],
    "few draft ids": Couple(PINNED_TARGET, PINNED_DRAFT),
    "every flag": Couple(PINNED_TARGET, EVERY_FLAG),
    "head without a norm": Couple(tiny_target(7), tiny_draft(8, eagle_config={"norm_before_head": False})),
    "ids to the last layer": Couple(
        tiny_target(7),
        tiny_draft(8, eagle_config={"layer_ids": "before_layer", "eagle_aux_hidden_state_layer_ids": [1, 2, 3]}),
    ),
    "gemma3 and lower ids": Couple(
        tiny_gemma3(7), tiny_draft(8, eagle_config={"eagle_aux_hidden_state_layer_ids": [1, 0]})
    ),
    "postnorm": COUPLES["llama-eagle3-postnorm"],
    "dflash": COUPLES["llama-dflash"],
    "peagle": COUPLES["llama-peagle"],
    "qwen3_moe-mtp": COUPLES["qwen3_moe-mtp"],
    "deepseek-nextn": COUPLES["deepseek-nextn"],
    "deepseek-eagle3-mla": COUPLES["deepseek-eagle3-mla"],
    "latents turned by halves": Couple(tiny_deepseek(7), tiny_mla_draft(8, rope_interleave=False)),
    "gemma3-eagle3": COUPLES["gemma3-eagle3"],
    "gemma4-assistant": COUPLES["gemma4-assistant"],
    "gemma3": Couple(PINNED_TEXT),
    "gemma4 dense": Couple(GEMMA4["dense"]),
    "gemma4 experts": Couple(GEMMA4["experts"]),
    "gemma4 edge": Couple(GEMMA4["edge"]),
    "qwen3_moe normed": Couple(PINNED_NORMED),
    "qwen3_moe raw": Couple(PINNED_RAW),
    "deepseek limited": Couple(PINNED_LIMITED),
    "deepseek sigmoid": Couple(PINNED_SIGMOID),
}


class Expected(NamedTuple):
    """A planted bug, a stage that shows it, and what must be said."""

    bug: str
    stage: str
    says: str
    """the beginning of an edit's name, or a place of the ladder"""


def _rows(stage: str, **said: str) -> tuple[Expected, ...]:
    return tuple(Expected(bug, stage, says) for bug, says in said.items())


EDITS: tuple[Expected, ...] = (
    *_rows("llama-eagle3", **{
        "hidden before embedding": "draft's input halves: swapped",
        "the two input norms swapped": "draft's input norms: swapped",
        "residual form flipped": "draft's norm_before_residual: on",
        "norm_output always fed back": "draft's feedback_normed: on",
        "eps of another model": "draft's eps: 1e-06",
        "rope of the target": "draft's rope theta: 500000",
        "rope pairs neighbours": "both's rope pairs: neighbours",
        "after_layer ids not shifted": "draft's capture shift: -1",
        "layer ids sorted": "draft's capture order",
        "captures sorted": "draft's capture order",
        "norm weight is one plus w": "both's norms: 1 + w for w",
        "llama3 rope read as default": "target's rope.kind: default",
        "attention scaled by the hidden width": "both's attention scale: the heads' width",
    }),
    *_rows("few draft ids", **{
        "d2t read as absolute ids": "draft's vocabulary map: absolute",
        "d2t not applied": "draft's vocabulary map: none",
        "captures one layer late": "draft's capture shift: 1",
        "rope theta of another model": "target's rope.theta: 10000",
    }),
    *_rows("every flag", **{
        "norm_before_residual unread": "draft's norm_before_residual: off",
        "norm_output never fed back": "draft's feedback_normed: off",
        "logit_scale dropped": "draft's logit_scale: 1",
    }),
    *_rows("head without a norm", **{"final norm always before the head": "draft's norm_before_head: on"}),
    *_rows("postnorm", **{"fc_norm weights in reverse": "draft's norms of aux states: reversed"}),
    *_rows("dflash", **{
        "D-Flash ids read as before_layer": "draft's capture shift: -1",
        "hidden_norm left out": "draft's norm behind fc: off",
        "aux states of D-Flash reversed": "draft's aux states: fused in reverse",
        "every layer causal in a block": "draft's causal",
        "no layer causal in a block": "draft's causal",
        "one slot more in a window": "draft's windows",
        "masks are the pad token": "draft's mask_token: 0",
    }),
    *_rows("peagle", **{"P-EAGLE's masks are the pad token": "draft's mask_token: 0"}),
    *_rows("qwen3_moe-mtp", **{
        "mtp-hidden-before-embedding": "draft's input order",
        "mtp-feedback-unnormed": "draft's feedback: before the final norm",
        "mtp-weights-of-experts-as-they-are": "both's norm_topk_prob",
    }),
    *_rows("qwen3_moe normed", **{
        "qwen3moe-renormalisation-dropped": "target's norm_topk_prob: off",
        "qwen3moe-one-expert-more": "target's experts_per_token",
        "qwen3moe-gate-and-up-swapped": "target's gate and up: swapped",
        "qwen3moe-heads-not-normed": "target's norms of heads: off",
        "qwen3moe-twin-renormalisation-dropped": "target's norm_topk_prob: off",
        "qwen3moe-twin-heads-not-normed": "target's norms of heads: off",
    }),
    *_rows("gemma3", **{
        "gemma3-one-rope": "target's local_rope: ",
        "gemma3-linear-factor-ignored": "target's rope.kind: default",
        "gemma3-scale-from-head-dim": "target's query_scale",
        "gemma3-window-one-longer": "target's windows",
        "gemma3-norm-times-w": "target's norms: w for 1 + w",
        "gemma3-embedding-unscaled": "target's embedding: the other scale",
        "gemma3-exact-gelu": "target's activation: gelu",
        "gemma3 twin: window one longer": "target's windows",
        "gemma3 twin: local rope on full layers": "target's rope: ",
        "gemma3 twin: scale from the head's width": "target's query_scale",
    }),
    *_rows("gemma3 and lower ids", **{"gemma3-capture-one-late": "draft's capture shift: 1"}),
    *_rows("gemma4 dense", **{
        "gemma4-scalar-dropped": "target's layer scale: off",
        "gemma4-scores-scaled": "target's attention scale: a head's width",
        "gemma4-window-one-longer": "target's sliding.window",
        "gemma4-proportional-rope-as-partial": "target's full.rope: default",
        "gemma4-softcap-missing": "target's softcap: none",
        "gemma4-twin-scalar-not-fused": "target's layer scale: off",
        "gemma4-twin-sampling-without-softcap": "target's softcap: none",
    }),
    *_rows("gemma4 experts", **{
        "gemma4-per-expert-scale-dropped": "target's scale of experts: off",
        "gemma4-router-not-renormalised": "target's norm_topk_prob",
    }),
    *_rows("gemma4-assistant", **{
        "gemma4-assistant-hidden-before-embedding": "draft's input",
        "gemma4-assistant-fed-before-the-norm": "draft's target state: before the final norm",
        "gemma4-assistant-feedback-before-the-norm": "draft's feedback: before the final norm",
        "gemma4-assistant-position-of-the-root": "draft's query position",
        "gemma4-assistant-window-of-one-more": "draft's sliding.window",
        "gemma4-assistant-without-layer-scalar": "draft's layer scale: off",
    }),
    *_rows("deepseek limited", **{
        "deepseek-mscale-none": "target's attention scale: without yarn",
            "deepseek-mscale-once": "target's attention scale: yarn once",
        "deepseek-rope-halves": "target's rope_interleaved: off",
        "deepseek-latent-eps-of-the-stream": "target's latent_norm_eps",
        "deepseek-weights-unscaled": "target's routed_scaling: 1",
        "deepseek-groups-ignored": "target's groups_kept",
        "deepseek-twin-mscale-none": "target's attention scale: without yarn",
    }),
    *_rows("deepseek sigmoid", **{
        "deepseek-weights-not-renormalised": "target's norm_topk_prob: off",
        "deepseek-router-of-the-other-version": "target's sigmoid_router",
    }),
    *_rows("deepseek-eagle3-mla", **{
        "mla-draft-hidden-first": "draft's input halves: swapped",
        "mla-draft-rope-of-the-target": "draft's rope",
        "mla-draft-rope-from-base-10000": "draft's rope theta: 10000",
        "mla-draft-eps-of-the-target": "draft's eps of every norm: 1e-05",
        "mla-draft-latent-eps-fixed": "draft's latent_norm_eps",
    }),
    *_rows("latents turned by halves", **{"mla-draft-interleave-unread": "draft's rope pairs: interleaved"}),
)  # fmt: skip
"""bugs that one edit can express"""

PLACES: tuple[Expected, ...] = (
    *_rows("llama-eagle3", **{
        "later step one position back": "logits.2",
        "key heads repeated the wrong way": "hidden.1",
        "queries see one slot ahead": "hidden.1",
        "heads turn backwards": "hidden.1",
    }),
    *_rows("few draft ids", **{"d2t applied twice": "map"}),
    *_rows("ids to the last layer", **{"the last capture after the final norm": "aux"}),
    *_rows("dflash", **{
        "context keys not normed": "logits.1",
        "context keys not turned": "logits.1",
        "a block one position further": "logits.1",
    }),
    *_rows("peagle", **{"mask_hidden not fused": "logits.2", "masks one position further": "logits.1"}),
    *_rows("gemma3", **{
        "gemma3-post-attention-norm-after-add": "hidden.1",
        "gemma3-post-feedforward-norm-after-add": "hidden.1",
    }),
    *_rows("gemma4 edge", **{"gemma4-per-layer-input-dropped": "hidden.1"}),
    *_rows("gemma4 dense", **{"gemma4-v-norm-dropped": "hidden.1"}),
    *_rows("deepseek limited", **{"deepseek-values-before-keys": "hidden.1"}),
)  # fmt: skip
"""bugs that no single edit expresses"""
