"""The planted bugs: every mistake that a claim must catch, where it was seen, and changes that must stay green.

`draftproof planted` puts each into the code that runs and expects its own claim to turn red at its pinned example.
"""

from harness.planting import Bug
from suites.bugs import (
    deepseek,
    deepseek_twin,
    drafts,
    eagle3_mla,
    gemma3,
    gemma3_twin,
    gemma4,
    gemma4_assistant,
    gemma4_mm,
    gemma4_unified,
    harmless,
    inputs,
    kimi_k25,
    loading,
    loop,
    qwen3_moe,
    ranks,
    scales,
    voice,
    ways,
)

BUGS: tuple[Bug, ...] = (
    *drafts.BUGS,
    *loading.BUGS,
    *ranks.BUGS,
    *scales.BUGS,
    *voice.BUGS,
    *loop.BUGS,
    *ways.BUGS,
    *harmless.BUGS,
    *inputs.BUGS,
    *qwen3_moe.BUGS,
    *gemma3.BUGS,
    *gemma3_twin.BUGS,
    *gemma4.BUGS,
    *gemma4_assistant.BUGS,
    *gemma4_unified.BUGS,
    *deepseek.BUGS,
    *deepseek_twin.BUGS,
    *eagle3_mla.BUGS,
    *kimi_k25.BUGS,
    *gemma4_mm.BUGS,
)
