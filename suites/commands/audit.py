"""`draftproof audit`: a checkpoint on the stand. `draftproof convert`: the same checkpoint in another dialect."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from harness.checkpoints import Checkpoint, CheckpointError, Entry, read_json
from harness.conventions import CONVENTIONS, STATED_KEY
from harness.headers import CONFIG
from harness.runner import Exit
from suites.algorithms import find_pair
from suites.audit.accounting import Account, Fault, account, config_of, join_faults, open_headers
from suites.audit.costs import Costs
from suites.audit.engines import INTENDED, REFUSES, WRONGLY, judge_all, meaning
from suites.audit.texts import Sample
from suites.commands.desk import Answer, Desk, UsageFault
from suites.commands.identify import Asked, charge, measure, open_sample, show
from suites.dialects import DIALECTS, DRAFTPROOF, ENGINES
from suites.formats.reading import DRAFTS, Refusal
from suites.formats.writing import convert as write
from suites.formats.writing import put
from suites.opened import OpenTarget

MIB = 2**20


@dataclass(frozen=True)
class Options(Asked):
    """What was asked for."""

    headers_only: bool = False
    written_by: str | None = None
    layer_ids: str | None = None
    norm_output: str | None = None
    engines: tuple[str, ...] = ()

    @cached_property
    def opened(self) -> tuple[OpenTarget, Checkpoint, Sample] | str:
        """What is measured on, opened once; or why not."""
        return open_sample(self)

    @property
    def words(self) -> dict[str, str | None]:
        """What the caller says about the draft."""
        return {"layer_ids": self.layer_ids, "norm_output": self.norm_output, "written_by": self.written_by}


@dataclass(frozen=True)
class Section:
    """One part of the answer: plain values, and whether it holds a fault."""

    name: str
    facts: Any
    is_fault: bool
    is_open: bool = False
    """whether something was asked for and nothing could be told"""


def audit(desk: Desk, asked: Options) -> Answer:
    """Every section in turn; GATE_FAILED where one found a fault, INCONCLUSIVE where one could tell nothing."""
    _check_words(asked)
    sections = [section(desk, asked) for section in SECTIONS]
    wrong = [section.name for section in sections if section.is_fault]
    desk.say("no fault was found" if not wrong else f"faults: {', '.join(wrong)}")
    facts = {section.name: section.facts for section in sections}
    unknown = Exit.INCONCLUSIVE if any(section.is_open for section in sections) else Exit.PASSED
    return Answer(Exit.GATE_FAILED if wrong else unknown, {**facts, "faults": wrong})


def accounting(desk: Desk, asked: Options) -> Section:
    """Every tensor of both checkpoints."""
    accounts = [
        account(asked.target, "target", asked.headers_only),
        account(asked.draft, "draft", shared_by=str(asked.target)),
    ]
    joined = _joins(asked)
    for one in accounts:
        _show(desk, one)
    faults = [fault for one in accounts for fault in one.faults] + joined
    if faults:
        desk.table("Faults", ("kind", "what"), [(fault.kind, fault.text) for fault in faults])
    told: dict[str, Any] = {name: _told(one) for name, one in zip(("target", "draft"), accounts, strict=True)}
    told["join"] = [fault.text for fault in joined]
    return Section("accounting", told, bool(faults))


def engines(desk: Desk, asked: Options) -> Section:
    """What each engine would make of the draft."""
    draft, _ = open_headers(asked.draft)
    pair = find_pair(draft, "draft")
    if pair not in DRAFTS:
        desk.say(f"the table of dialects speaks of EAGLE-3 drafts, this one is {pair}")
        return Section("engines", {"note": f"no dialects of {pair}"}, False)
    target = Checkpoint(asked.target, read_json(asked.target / CONFIG), {})
    layers, kind = config_of(target, "target").layers, find_pair(target, "target")
    meant = meaning(_stated(draft, asked), layers, kind, asked.written_by)
    verdicts = judge_all(draft, meant, layers, kind, _same_tables(draft, asked))
    verdicts = [verdict for verdict in verdicts if not asked.engines or verdict.dialect in asked.engines]
    if asked.costs and not isinstance(meant, Refusal) and not isinstance(asked.opened, str):
        opened, checkpoint, sample = asked.opened
        verdicts = charge(desk, Costs(checkpoint, opened, meant, sample.texts, sample.rows), verdicts)
    if isinstance(meant, Refusal):
        desk.say(f"what the draft means is not settled: {meant.reason}")
    else:
        desk.say(f"meant, as {meant.dialect} reads it: capture points {meant.points}")
    rows = [(v.dialect, v.version, v.outcome, _why(v), v.cost or "", v.remedy) for v in verdicts]
    desk.table("Engines", ("engine", "version", "loads", "what it would do", "cost", "what makes it right"), rows)
    bad = {WRONGLY, REFUSES} if asked.engines else {WRONGLY}
    is_fault = isinstance(meant, Refusal) or any(v.outcome in bad for v in verdicts)
    settled = {"refused": meant.reason} if isinstance(meant, Refusal) else {"capture_points": list(meant.points)}
    return Section("engines", {"meant": settled, "verdicts": [v.facts() for v in verdicts]}, is_fault)


def identification(desk: Desk, asked: Options) -> Section:
    """Which facts the draft was trained with, and whether its config says the same."""
    name, wanted = "identification", asked.is_asked and asked.identify is not False
    if asked.headers_only or asked.identify is False:
        return Section(name, {"note": "not asked for"}, False)
    if isinstance(asked.opened, str):
        desk.say(f"not measured: {asked.opened}")
        return Section(name, {"note": asked.opened}, False)
    target, draft, sample = asked.opened
    try:
        measured = measure(desk, target, draft, sample, asked.words)
    except CheckpointError as error:
        desk.say(f"not measured: {error}")
        return Section(name, {"note": str(error)}, False, is_open=wanted)
    show(desk, measured)
    return Section(name, measured.facts(), bool(measured.contradicted), is_open=wanted and not measured.is_told)


SECTIONS: list[Callable[[Desk, Options], Section]] = [accounting, engines, identification]
"""in this order; what is measured from weights and text comes after what is read from headers"""


def convert(
    desk: Desk, source: Path, out: Path, dialect: str, written_by: str | None, target: Path | None, layers: int | None
) -> Answer:
    """Write a draft in a dialect; errors: DialectError where the dialect has no words for it."""
    for name in (dialect, written_by or DRAFTPROOF):
        _check_dialect(name, tuple(DIALECTS))
    if (target is None) == (layers is None):
        raise UsageFault("layer ids are counted in the target: give --target or --layers, one of them")
    kind = "llama"
    if target is not None:
        theirs = Checkpoint(target, read_json(target / CONFIG), {})
        layers, kind = config_of(theirs, "target").layers, find_pair(theirs, "target")
    assert layers is not None
    draft, faults = open_headers(source)
    if faults:
        raise CheckpointError(faults[0].text)
    meant = meaning(draft, layers, kind, written_by)
    if isinstance(meant, Refusal):
        said = f"{meant.reason} (or name who wrote it: --written-by {'|'.join(n for n in DIALECTS if n != DRAFTPROOF)})"
        raise CheckpointError(f"{source}: what it means is not settled: {said}")
    written = write(draft, out, dialect, meant, layers, kind)
    desk.say(f"{out}: {len(written.tensors) + len(written.derived)} tensors as {dialect}")
    renamed = {name: tensor for name, tensor in written.tensors.items() if name != tensor}
    return Answer(Exit.PASSED, {"out": str(out), "dialect": dialect, "config": written.config, "renamed": renamed})


def _check_words(asked: Options) -> None:
    if asked.written_by is not None:
        _check_dialect(asked.written_by, tuple(DIALECTS))
    for engine in asked.engines:
        _check_dialect(engine, ENGINES)
    if asked.layer_ids not in (None, *CONVENTIONS):
        raise UsageFault(f"--layer-ids is {asked.layer_ids!r}; known are {', '.join(CONVENTIONS)}")
    if asked.norm_output not in (None, "head", "feedback"):
        raise UsageFault(f"--norm-output is {asked.norm_output!r}; known are head, feedback")


def _check_dialect(name: str, known: Sequence[str]) -> None:
    if name not in known:
        raise UsageFault(f"no dialect is named {name!r}; known are {', '.join(known)}")


def _stated(draft: Checkpoint, asked: Options) -> Checkpoint:
    """The draft with what the caller says about it written into its config, in memory."""
    config: dict[str, Any] = {**draft.config, "eagle_config": {**(draft.config.get("eagle_config") or {})}}
    if asked.layer_ids is not None:
        put(config, STATED_KEY, asked.layer_ids)
    if asked.norm_output is not None:
        flag = bool(config.get("norm_output"))
        put(config, "eagle_config.norm_before_head", flag if asked.norm_output == "head" else True)
        put(config, "eagle_config.feedback_normed", flag if asked.norm_output == "feedback" else False)
    return replace(draft, config=config) if config["eagle_config"] else draft


def _joins(asked: Options) -> list[Fault]:
    """Whether the two fit; nothing where a config cannot be read, which their accounts say."""
    target, draft = (Checkpoint(path, read_json(path / CONFIG), {}) for path in (asked.target, asked.draft))
    headers = open_headers(asked.draft)[0].headers
    try:
        configs = config_of(target, "target"), config_of(replace(draft, headers=headers), "draft")
    except CheckpointError:
        return []
    return join_faults(*configs, (asked.target, asked.draft))


def _same_tables(draft: Checkpoint, asked: Options) -> bool | None:
    """Whether the draft's own embedding is a copy of its target's; None where there is nothing to compare."""
    mine = next((name for name in draft.headers if name.endswith("embed_tokens.weight")), None)
    if mine is None or asked.headers_only:
        return None
    target, _ = open_headers(asked.target)
    theirs = next((name for name in target.headers if name.endswith("embed_tokens.weight")), None)
    if theirs is None:
        return None
    if target.headers[theirs].shape != draft.headers[mine].shape:
        return False
    return torch.equal(draft.read(mine).float(), target.read(theirs).float())


def _why(verdict: Any) -> str:
    reading = verdict.reading
    if isinstance(reading, Refusal):
        return f"{reading.fact}: {reading.reason}"
    if verdict.outcome == INTENDED:
        return ""
    if verdict.outcome == WRONGLY:
        manner = ", in silence" if verdict.is_silent else ""
        return "; ".join(map(str, verdict.differences)) + manner
    return f"capture points {reading.points}"


def _show(desk: Desk, one: Account) -> None:
    words = ("loaded", "named", "applied", "shared", "derived", "ignored", "missing", "unknown", "double", "shape")
    counts = ", ".join(f"{one.count(word)} {word}" for word in words if one.count(word))
    desk.say(f"{one.kind} {one.path} ({one.pair}): {counts or 'nothing was read'}; {one.num_bytes / MIB:.1f} MiB")
    for note in one.notes:
        desk.say(note)
    odd = [entry for entry in one.entries if entry.status not in ("loaded", "applied", "named")]
    if odd:
        head = ("tensor", "parameter", "what became of it", "why", "shape", "dtype")
        desk.table(f"Not loaded as itself, {one.kind}", head, [_row(entry) for entry in odd[:60]])
    splits = [(ranks, _size(found)) for ranks, found in one.splits.items()]
    if splits:
        desk.table(f"Ranks, {one.kind}", ("ranks", "a rank holds"), splits)


def _size(found: int | str) -> str:
    return found if isinstance(found, str) else f"{found / MIB:.1f} MiB"


def _row(entry: Entry) -> tuple[Any, ...]:
    return entry.tensor, entry.parameter, entry.status, entry.reason, list(entry.shape), entry.dtype


def _told(one: Account) -> Mapping[str, Any]:
    return {
        "path": str(one.path),
        "pair": one.pair,
        "bytes": one.num_bytes,
        "tensors": [dict(zip(("tensor", "parameter", "status", "reason", "shape", "dtype"), _row(e), strict=True))
                    for e in one.entries],
        "faults": [{"kind": f.kind, "name": f.name, "text": f.text} for f in one.faults],
        "splits": {str(ranks): found for ranks, found in one.splits.items()},
        "shards": [{"parameter": s.parameter, "count": s.count, "split": s.split,
                    "shapes": {str(ranks): shape for ranks, shape in s.shapes.items()}} for s in one.shards],
        "notes": list(one.notes),
    }  # fmt: skip
