"""From a counterexample to a pair of checkpoints, and from the pair to an explanation.

A claim that failed names what it drew; configs and seeds make the same checkpoints again. Where it drew none, the
pinned couple of the pair that it speaks about stands in. The twin is then held to the reference: if the two differ,
the edit that makes them meet, or the first place where they part, is what the failure is about.
"""

import json
import tempfile
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from harness.planting import Bug, PlantingError, planted
from suites.algorithms import DRAFT_ARCHITECTURES, NEXT_TOKEN
from suites.catalog import open_draft, open_target
from suites.couples import COUPLES, Couple
from suites.draws import Drawn, random_tokens, write_draft
from suites.explain.cases import DRAFT, TARGET, Folders
from suites.explain.dump import Dump
from suites.explain.ladder import Ladder, climb
from suites.explain.search import Explanation, explain
from suites.explain.states import walk
from suites.explain.telling import tell
from suites.families.gemma4_assistant import write_assistant
from suites.families.next_token import write_whole
from suites.replay import Counterexample, CounterexampleError, drawn

BATCH, WIDTH = 2, 14
WIDEST = 64
"""columns of a text that is explained"""


def couple_of(found: Counterexample) -> Couple:
    """The checkpoints that a counterexample is about; errors: CounterexampleError where it names none."""
    seen = [Drawn(json.dumps(config), seed) for config, seed in drawn(found.given)]
    targets = [one for one in seen if _draft_pair(one) is None]
    drafts = [one for one in seen if _draft_pair(one) is not None]
    if targets:
        return _couple(targets[0], drafts[0] if drafts else None)
    names = [name for name in COUPLES if found.pair in (name, name.split("-", 1)[0], *_pairs(COUPLES[name]))]
    if not names:
        raise CounterexampleError(
            f"{found.claim}: was given no checkpoint ({found.line or 'nothing drawn'}) and speaks of no pair: "
            "run it again with `draftproof replay`"
        )
    return COUPLES[names[0]]


def write_pair(couple: Couple, folder: Path) -> Folders:
    """The checkpoints of a couple in a folder of their own each."""
    target = couple.write_target(couple.target, folder / TARGET)
    if couple.draft is not None:
        return Folders(target, couple.write_draft(couple.draft, folder / DRAFT))
    carries = couple.target.keys.get("model_type") in NEXT_TOKEN and couple.write_target is write_whole
    return Folders(target, target if carries else None)


def text_of(found: Counterexample, couple: Couple) -> Tensor:
    """A text as wide as the one that failed: [B, T]"""
    sizes = [found.given.get(name, other) for name, other in (("batch", BATCH), ("width", WIDTH))]
    batch, width = (int(size) if isinstance(size, int) and size > 0 else 1 for size in sizes)
    config = couple.target.keys
    vocab = config.get("vocab_size") or config["text_config"]["vocab_size"]
    # the last words of a small vocabulary may stand for images
    return random_tokens(
        min(vocab, 9) if "text_config" in config else vocab, batch, min(width, WIDEST), couple.target.seed
    )


def explain_pair(pair: Folders, tokens: Tensor, side: str = "optimized", bug: Bug | None = None) -> Explanation:
    """Hold one side, in float32 and with a bug in it if one is given, to the reference.

    tokens  [B, T]
    """
    reference, draft = pair.open()
    return explain(spoken(pair, tokens, side, bug), reference, draft)


def injected(pair: Folders, tokens: Tensor, side: str = "optimized", bug: Bug | None = None) -> Ladder:
    """The same with every layer handed the reference's state: its own error, whatever the layers before it did.

    tokens  [B, T]
    """
    reference, draft = pair.open()
    made = walk(reference, tokens)
    given = {c: made[f"hidden.{c}"] for c in range(reference.num_layers + 1)}
    return climb(spoken(pair, tokens, side, bug, given), reference, draft, made)


def spoken(
    pair: Folders, tokens: Tensor, side: str, bug: Bug | None = None, given: Mapping[int, Tensor] | None = None
) -> Dump:
    """What a side says of a text; errors: PlantingError where the bug has not been reached.

    tokens  [B, T]
    given   capture point -> [B, T, H], read there whatever arrived
    """
    how: dict[str, Any] = {"side": side, "dtype": torch.float32}
    with nullcontext() if bug is None else planted(bug) as bed:
        target = open_target(pair.target, **how)
        words: dict[str, Any] = {"layer_ids": pair.layer_ids, "norm_output": pair.norm_output}
        draft = None if pair.draft is None else open_draft(pair.draft, target, **words, **how)
        said = tell(target, draft, tokens, given=given)
    if bug is not None and bed is not None and not bed.reached:
        raise PlantingError(f"{bug.name}: opening and running {pair.target} never reaches {bug.at}")
    return said


def explained(found: Counterexample) -> Mapping[str, Any]:
    """What a failed claim's record says of its cause; empty where twin and reference agree, or there is no pair."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            couple = couple_of(found)
            explanation = explain_pair(write_pair(couple, Path(folder)), text_of(found, couple))
        except CounterexampleError:
            return {}
        # the code that failed is run again and may fail in any way: the claim's own failure must still be told
        except Exception as error:
            return {"explanation": f"the pair cannot be run: {type(error).__name__}: {error}"[:500]}
    return explanation.facts() if explanation.before.first is not None else {}


def _draft_pair(one: Drawn) -> str | None:
    names = one.keys.get("architectures") or []
    return next((DRAFT_ARCHITECTURES[name] for name in names if name in DRAFT_ARCHITECTURES), None)


def _couple(target: Drawn, draft: Drawn | None) -> Couple:
    if draft is None:
        return Couple(target)
    write = write_assistant if _draft_pair(draft) == "gemma4_assistant" else write_draft
    return Couple(target, draft, write_draft=write)


def _pairs(couple: Couple) -> tuple[str, ...]:
    """Pairs of the couple's draft."""
    return () if couple.draft is None else (str(_draft_pair(couple.draft)),)
