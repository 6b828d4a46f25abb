"""What an engine did with a checkpoint, held to the reference and to what the audit said it would do."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch

from harness.checkpoints import Checkpoint, CheckpointError, Ledger, open_checkpoint
from harness.conventions import LayerIds
from suites.algorithms import find_pair
from suites.audit.accounting import account, config_of, open_headers
from suites.audit.engines import INTENDED, WRONGLY, judge, meaning
from suites.catalog import open_draft, open_target
from suites.draws import random_tokens
from suites.engine.cases import Recipe
from suites.engine.protocol import Case, note
from suites.explain.dump import Dump
from suites.explain.ladder import Ladder, climb
from suites.formats.effect import realise
from suites.formats.reading import DRAFTS, Reading, Refusal, read_as
from suites.formats.rows import NOISE, TARGETS
from suites.formats.writing import convert
from suites.opened import DraftFacts, OpenDraft, OpenTarget, Ranks, Side

WIDE = torch.float64
"""of the reference: its own rounding takes nothing of an engine's budget"""
FORETOLD = ("points", "left", "dropped")
IDLE = ("t2d", "layers.[1-9]*.hidden_norm.weight")
OF_DRAFT = ("aux", "fused", "map", "logits.", "feedback.")
ENGINE_NAMES = (("model.", ""), ("draft_id_to_target_id", "d2t"))
"""prefixes of vLLM's names of a draft's parameters, and ours"""


@dataclass(frozen=True)
class Posed:
    """A recipe on disk."""

    recipe: Recipe
    target: Path
    stated: Path | None
    """the draft that states what is meant"""
    draft: Path | None
    """the draft that the engine reads"""

    @property
    def dialect(self) -> str:
        return f"vllm-{self.recipe.runner}"

    def case(self, batch: int = 2, width: int = 10) -> Case:
        """The question to the engine: two short texts, every capture point, three draft steps."""
        config = config_of(open_headers(self.target)[0], "target")
        tokens = random_tokens(config.vocab, batch, width, 7).tolist()
        draft = None if self.draft is None else str(self.draft)
        capture = tuple(range(config.layers + 1))
        return Case(self.recipe.name, str(self.target), draft, tokens, capture, runner=self.recipe.runner)


def pose(recipe: Recipe, root: Path, shared: Path) -> Posed:
    """Write a recipe; its draft in the words of its dialect, its target beside those of others."""
    target, draft = recipe.folders(root, shared)
    if draft is None or not recipe.dialect:
        return Posed(recipe, target, draft, draft)
    made, where = open_checkpoint(draft), standing(target)
    meant = meaning(made, *where)
    assert isinstance(meant, Reading), meant
    convert(made, root / "written", recipe.dialect, meant, *where)
    if recipe.after is not None:
        recipe.after(root / "written")
    return Posed(recipe, target, draft, root / "written")


def standing(target: Path) -> tuple[int, str]:
    """(number of layers, pair) of a target: beside what a draft is read."""
    checkpoint = open_headers(target)[0]
    return config_of(checkpoint, "target").layers, find_pair(checkpoint, "target")


def foretold(one: Posed) -> dict[str, Any]:
    """What the audit says of a recipe, as plain values; nothing where it has no table for the draft."""
    if one.draft is None:
        gaps = [f for f in account(one.target, "target").faults if f.kind == "gap" and f.text.startswith("vllm ")]
        refused = [fault.text for fault in gaps if "refuses" in fault.text]
        left = {fault.name: NOISE for fault in gaps if NOISE in fault.text}
        return {"refused": refused[0], "faults": ["gap"]} if refused else {"left": left, "faults": ["gap"]}
    checkpoint = open_headers(one.draft)[0]
    if find_pair(checkpoint, "draft") not in DRAFTS:
        return {}
    where = standing(one.target)
    verdict = judge(checkpoint, meaning(checkpoint, *where, one.recipe.dialect or None), one.dialect, *where)
    reading = verdict.reading
    facts = {
        "outcome": verdict.outcome,
        "differences": [difference.fact for difference in verdict.differences],
        "faults": sorted({fault.kind for fault in account(one.draft, "draft").faults}),
    }
    if isinstance(reading, Refusal):
        return {**facts, "refused": f"{reading.fact}: {reading.reason}"}
    dropped = sorted(reading.dropped)
    return {**facts, "points": list(reading.points), "left": dict(reading.filled), "dropped": dropped}


def happened(dump: Dump, runner: str) -> dict[str, Any]:
    """What the engine did, in the words of `foretold`."""
    if "refused" in dump.notes:
        refused = note(dump, "refused")
        return {"refused": f"{refused['stage']}: {refused['reason']}"}
    of_target = {_ours(name): what for name, what in note(dump, "unwritten_target", {}).items()}
    if "unwritten" not in dump.notes:
        return {"left": of_target}
    shared = [f"{name}.weight" for name in note(dump, "shared", [])]
    left = {_ours(name): what for name, what in note(dump, "unwritten").items()}
    left |= {name: TARGETS for name in shared if name in left}
    return {
        "points": note(dump, "points", {}).get(runner, []),
        "left": {name: what for name, what in left.items() if not _is_idle(name)},
        "dropped": [name for name in note(dump, "unread") if not _is_idle(name)],
        **({"left in the target": of_target} if of_target else {}),
    }


def _ours(name: str) -> str:
    for theirs, mine in ENGINE_NAMES:
        name = mine + name[len(theirs) :] if name.startswith(theirs) else name
    return name


def _is_idle(name: str) -> bool:
    """A parameter that vLLM has and no forward pass of it reads, or a tensor that follows from another."""
    return any(fnmatchcase(name, pattern) for pattern in IDLE)


def came_true(said: Mapping[str, Any], did: Mapping[str, Any]) -> bool:
    """Whether an engine did what the audit said: refused it, or loaded it with exactly these facts."""
    if ("refused" in said) != ("refused" in did):
        return False
    return "refused" in said or all(did.get(name) == said[name] for name in FORETOLD if name in said)


@torch.no_grad()
def held(one: Posed, dump: Dump) -> tuple[Ladder | None, Ladder | None]:
    """(the dump against what the engine is said to run, against what was meant); None where there is nothing to hold.

    A sound draft has one answer, the reference's. Of others the audit foretells a model, which `realise` builds.
    """
    if "refused" in dump.notes or one.recipe.kind == "target":
        return None, None
    target = open_target(one.target, dtype=WIDE)
    if one.draft is None or one.stated is None:
        return climb(dump, target), None
    try:
        meant = climb(dump, target, open_draft(one.stated, target, dtype=WIDE))
    except CheckpointError:
        if one.recipe.kind == "agreement":
            raise
        meant = None
    if one.recipe.kind == "agreement":
        return meant, None
    checkpoint = open_checkpoint(one.draft)
    reading = read_as(checkpoint, one.dialect, target.num_layers, target.pair.name)
    if isinstance(reading, Refusal):
        return None, meant
    if NOISE in reading.filled.values():
        # nobody can say what uninitialised memory computes
        kept = {name: value for name, value in dump.tensors.items() if not name.startswith(OF_DRAFT)}
        return climb(replace(dump, tensors=kept), target), meant
    return climb(dump, target, as_read(reading, checkpoint, target)), meant


def as_read(reading: Reading, checkpoint: Checkpoint, target: OpenTarget) -> OpenDraft:
    """The model of a reading as an opened draft."""
    module = realise(reading, checkpoint, target.module).to(WIDE)
    points = LayerIds((), reading.points, "", reading.dialect, "") if reading.points else None
    own = ("embed_tokens.weight" in reading.source, "lm_head.weight" in reading.source)
    facts = DraftFacts(reading.config, points, *own)
    return OpenDraft(reading.pair, checkpoint, facts, Side(dtype=WIDE), (module,), Ranks(1), Ledger(checkpoint.path))


def finding(one: Posed, dump: Dump) -> dict[str, Any]:
    """All of one case as plain values."""
    said, did = foretold(one), happened(dump, one.recipe.runner)
    ladder, meant = held(one, dump)
    agrees = came_true(said, did) and (ladder is None or ladder.used <= 1)
    if one.recipe.kind == "agreement":
        agrees = agrees and ladder is not None
    elif meant is not None and said.get("outcome") in (INTENDED, WRONGLY):
        # a verdict is right where the engine computes something else, and only there
        agrees = agrees and (said["outcome"] == WRONGLY) == (meant.first is not None)
    facts: dict[str, Any] = {"name": one.recipe.name, "kind": one.recipe.kind, "agrees": agrees}
    facts |= {"audit": said, "engine": did}
    if ladder is not None:
        facts["rungs"] = {rung.name: [_short(rung.error), _short(rung.used)] for rung in ladder.rungs}
    if meant is not None:
        facts["beyond what was meant"] = meant.first.name if meant.first is not None else None
    return facts


def _short(number: float) -> float:
    return float(f"{number:.3g}")
