"""Targets that see and hear, with prompts for them: what one claim asks of all of them alike."""

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from hypothesis import strategies as st
from torch import Tensor

from suites.catalog import open_speculation
from suites.draws import SEEDS, Drawn, folders
from suites.families import gemma3, gemma4_mm, gemma4_unified, kimi_k25
from suites.families.deepseek import tiny_deepseek
from suites.families.gemma4 import DENSE, drawn_of, tiny_gemma4
from suites.opened import OpenSpeculation
from suites.scripted import tiny_draft

FAMILIES = {"gemma3_mm": gemma3, "gemma4_mm": gemma4_mm, "gemma4_unified": gemma4_unified, "kimi_k25": kimi_k25}
VOCAB = 13


class Case(NamedTuple):
    """A checkpoint, and a prompt with images among its tokens."""

    pair: str
    drawn: Drawn
    layout: Any
    seed: int = 0

    @property
    def prompt(self) -> Any:
        return FAMILIES[self.pair].Prompt(self.drawn.config, self.layout, self.seed)


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Case]:
    """One of every pair."""
    drawn = {
        "gemma3_mm": (gemma3.gemma3_multimodals(), gemma3.layouts()),
        "gemma4_mm": (gemma4_mm.gemma4_multimodals(), gemma4_mm.layouts()),
        "gemma4_unified": (gemma4_unified.gemma4_unifieds(), gemma4_unified.layouts()),
        # angles of a dynamic rope would depend on how a text was cut into passes
        "kimi_k25": (kimi_k25.kimi_targets(kinds=("default", "linear", "llama3", "yarn")), kimi_k25.rows(3)),
    }
    return {pair: Case(pair, draw(target), draw(layout), draw(SEEDS)) for pair, (target, layout) in drawn.items()}


PINNED = {
    "gemma3_mm": Case("gemma3_mm", gemma3.PINNED_MULTIMODAL, gemma3.PINNED_LAYOUT),
    "gemma4_mm": Case("gemma4_mm", gemma4_mm.PINNED, gemma4_mm.PINNED_LAYOUT),
    "gemma4_unified": Case("gemma4_unified", gemma4_unified.PINNED_UNIFIED, gemma4_unified.PINNED_LAYOUT),
    "kimi_k25": Case("kimi_k25", kimi_k25.PINNED_KIMI, kimi_k25.MOVING),
}
OTHERS = {
    # two images without a token between them: one run
    "gemma3_mm": PINNED["gemma3_mm"]._replace(layout=gemma3.Layout((1, 0, 2), ((True, True),), marked=False)),
    # an input of its own for every layer, images causal, placeholders beyond the vocabulary
    "gemma4_mm": PINNED["gemma4_mm"]._replace(drawn=gemma4_mm.PINNED_EDGE),
    "gemma4_unified": PINNED["gemma4_unified"]._replace(layout=gemma4_unified.TOUCHING),
    "kimi_k25": PINNED["kimi_k25"]._replace(layout=kimi_k25.STILL),
}


def _tiny(shell: Mapping[str, Any], text: Drawn, **changes: Any) -> Drawn:
    """A config around another text model."""
    inner = {**shell["text_config"], **text.keys}
    for key in ("model_type", "architectures", "pad_token_id"):
        inner |= {key: shell["text_config"][key]} if key in shell["text_config"] else {}
    config = {**shell, "text_config": inner, "tie_word_embeddings": inner["tie_word_embeddings"], **changes}
    return Drawn(json.dumps(config), text.seed)


# experts of the PyTorch form ask the host; those of a twin are its text twin's claim
SIGHTED = {"final_logit_softcapping": 1.0, "use_bidirectional_attention": "vision", "enable_moe_block": False}
# a tied head says one word for ever
UNTIED = {"tie_word_embeddings": False}
FOUR_SQUARES = {**gemma3.MULTIMODAL["vision_config"], "image_size": 8}
_unified = drawn_of(
    {**DENSE, "layer_types": DENSE["layer_types"][1:4], "num_hidden_layers": 3, "vocab_size": VOCAB}, 6, **UNTIED
)
TINY = {
    # an image of four tokens beside a window of three
    "gemma3_mm": Case(
        "gemma3_mm",
        _tiny(
            gemma3.MULTIMODAL,
            gemma3.tiny_gemma3(5, VOCAB, **UNTIED),
            **{"vision_config": FOUR_SQUARES, "mm_tokens_per_image": 4},
            **{"boi_token_index": 10, "eoi_token_index": 11, "image_token_index": 12},
        ),
        gemma3.Layout((1, 2, 4), ((True, True), (False, True))),
    ),
    "gemma4_mm": Case(
        "gemma4_mm",
        _tiny(
            {**gemma4_mm.MULTIMODAL, "text_config": {"pad_token_id": 1}},
            tiny_gemma4(6, VOCAB, **SIGHTED, **UNTIED),
            **{"image_token_id": 10, "video_token_id": 11, "audio_token_id": 12},
        ),
        gemma4_mm.Layout(
            (gemma4_mm.Item("image", (3, 2)), gemma4_mm.Item("audio", (9,)), gemma4_mm.Item("video", (1, 2))),
            (1, 1, 2, 4),
            ((True, True, True), (False, True, True)),
        ),
    ),
    "gemma4_unified": Case(
        "gemma4_unified",
        Drawn(
            json.dumps(
                gemma4_unified.shell(
                    _unified.keys,
                    *(gemma4_unified.UNIFIED[f"{sense}_config"] for sense in ("vision", "audio")),
                    far=True,
                )
            ),
            6,
        ),
        gemma4_unified.PINNED_LAYOUT,
    ),
    "kimi_k25": Case(
        "kimi_k25",
        _tiny(kimi_k25.KIMI, tiny_deepseek(3, VOCAB, first_k_dense_replace=3), image_token_id=12, video_token_id=11),
        ((2, kimi_k25.Picture("clip", 2, 2, 1), 1, kimi_k25.Picture("image", 1, 2, 2), 4), (3,)),
    ),
}
"""few layers and words, beside `suites.scripted.tiny_draft`"""


class SeenLoop(NamedTuple):
    """A tiny pair that speaks after prompts of unequal length with images among them."""

    case: Case
    draft: Drawn

    @property
    def prompts(self) -> list[Tensor]:
        first, *others = self.case.prompt.tokens
        return [first[:-2], *others]

    def open(self, side: str, **how: Any) -> OpenSpeculation:
        """Opened from a folder that is gone afterwards."""
        with folders(self.case.drawn, self.draft) as paths:
            return open_speculation(*paths, side=side, **how)


LOOPS = {pair: SeenLoop(case, tiny_draft(case.drawn.seed + 1, VOCAB)) for pair, case in TINY.items()}


# one image and little text: kernels run in an interpreter where there is no GPU
SMALL = {
    "gemma3_mm": TINY["gemma3_mm"]._replace(layout=gemma3.Layout((1, 1), ((True,),))),
    "gemma4_mm": TINY["gemma4_mm"]._replace(
        layout=gemma4_mm.Layout((gemma4_mm.Item("image", (3, 2)),), (1, 2), ((True,),))
    ),
    "gemma4_unified": TINY["gemma4_unified"]._replace(
        layout=gemma4_unified.Layout((gemma4_unified.Piece("image", 1, 3, 2),), 1, ((True,),))
    ),
    "kimi_k25": TINY["kimi_k25"]._replace(layout=((1, kimi_k25.Picture("image", 1, 2, 2), 1),)),
}
