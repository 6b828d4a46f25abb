"""A tiny target and a tiny draft of every speculation in the catalog: real shapes, few words.

A draft of random weights is right now and then in a vocabulary of thirteen words, so every count of accepted drafts
occurs by itself.
"""

import json
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from suites.catalog import open_speculation
from suites.draws import Drawn, write_draft, write_target
from suites.families.deepseek import tiny_deepseek
from suites.families.dflash import tiny_dflash
from suites.families.eagle3_mla import tiny_mla_draft
from suites.families.gemma3 import tiny_gemma3
from suites.families.gemma4 import tiny_gemma4
from suites.families.gemma4_assistant import beside, write_assistant
from suites.families.next_token import tiny_next_token, write_whole
from suites.families.peagle import tiny_peagle
from suites.families.qwen3_moe import tiny_qwen3_moe
from suites.media import TINY
from suites.opened import OpenSpeculation
from suites.scripted import tiny_draft, tiny_target

WORDS = 9
"""of a vocabulary of thirteen: the last ones may stand for images"""
Writer = Callable[[Drawn, Path], Path]


class Couple(NamedTuple):
    """Checkpoints still to be written; a next-token module has none of its own."""

    target: Drawn
    draft: Drawn | None = None
    write_target: Writer = write_target
    write_draft: Writer = write_draft

    def open(self, side: str, dtype: torch.dtype = torch.float64, **how: Any) -> OpenSpeculation:
        """Opened from folders that are gone afterwards."""
        with tempfile.TemporaryDirectory() as root:
            target = self.write_target(self.target, Path(root, "target"))
            draft = target if self.draft is None else self.write_draft(self.draft, Path(root, "draft"))
            return open_speculation(target, draft, side=side, dtype=dtype, **how)

    def prompts(self, lengths: tuple[int, ...] = (4, 1, 7)) -> list[Tensor]:
        """Ragged prompts."""
        generator = torch.Generator().manual_seed(self.target.seed)
        return [torch.randint(0, WORDS, (n,), generator=generator) for n in lengths]


def beside_shell(name: str, **facts: Any) -> tuple[Drawn, Drawn]:
    """A target with towers and an assistant that fits the text model in it."""
    shell = TINY[name].drawn
    text = Drawn(json.dumps(shell.keys["text_config"]), shell.seed)
    return shell, beside(text, **facts).draft


COUPLES: Mapping[str, Couple] = {
    "llama-eagle3": Couple(tiny_target(7), tiny_draft(8)),
    "llama-eagle3-postnorm": Couple(
        tiny_target(7), tiny_draft(8, fc_norm=True, eagle_config={"norm_before_head": True, "feedback_normed": True})
    ),
    "llama-standalone": Couple(
        tiny_target(7),
        tiny_target(9, hidden_size=32, num_hidden_layers=1, num_attention_heads=2),
        write_draft=write_target,
    ),
    "llama-dflash": Couple(tiny_target(7), tiny_dflash(8)),
    "llama-peagle": Couple(tiny_target(7), tiny_peagle(8)),
    "gemma3-eagle3": Couple(tiny_gemma3(7), tiny_draft(8)),
    "gemma4-eagle3": Couple(tiny_gemma4(7), tiny_draft(8)),
    "gemma4-assistant": Couple(*beside(tiny_gemma4(7)), write_draft=write_assistant),
    "gemma3_mm-eagle3": Couple(TINY["gemma3_mm"].drawn, tiny_draft(8)),
    "gemma4_mm-eagle3": Couple(TINY["gemma4_mm"].drawn, tiny_draft(8)),
    "gemma4_mm-assistant": Couple(*beside_shell("gemma4_mm"), write_draft=write_assistant),
    "gemma4_unified-eagle3": Couple(TINY["gemma4_unified"].drawn, tiny_draft(8)),
    "gemma4_unified-assistant": Couple(
        *beside_shell("gemma4_unified", model_type="gemma4_unified_assistant"), write_draft=write_assistant
    ),
    "kimi_k25-eagle3-mla": Couple(TINY["kimi_k25"].drawn, tiny_mla_draft(8)),
    "qwen3_moe-eagle3": Couple(tiny_qwen3_moe(7), tiny_draft(8)),
    "qwen3_moe-mtp": Couple(tiny_next_token("qwen3_moe_mtp", 7), write_target=write_whole),
    "deepseek-eagle3": Couple(tiny_deepseek(7), tiny_draft(8)),
    "deepseek-eagle3-mla": Couple(tiny_deepseek(7), tiny_mla_draft(8)),
    "deepseek-nextn": Couple(tiny_next_token("deepseek_nextn", 7), write_target=write_whole),
}
