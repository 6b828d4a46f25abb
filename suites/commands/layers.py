"""`draftproof bisect layers`: each layer reads the state that it should have read, and the first wrong one is named.

A dump brings its own states: the reference goes on from each of them, and what it makes is held to the next one. Of the
twin, as it is or with a planted bug, each layer is handed the reference's state instead.
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harness.planting import Bug, PlantingError
from harness.runner import Exit
from suites.commands.desk import Answer, Desk, UsageFault
from suites.commands.explain import Options, ladder, pair_of
from suites.couples import COUPLES, Couple
from suites.draws import random_tokens
from suites.explain.cases import Folders
from suites.explain.dump import read_dump
from suites.explain.failures import injected, write_pair
from suites.explain.ladder import Ladder, climb
from suites.explain.search import rungs

BATCH, WIDTH, SEED = 2, 24, 0


def layers(desk: Desk, asked: Options, bug: str = "") -> Answer:
    """GATE_FAILED where a place is beyond its budget; the first one is the answer."""
    if asked.ours is not None and bug:
        raise UsageFault("--ours and --bug: one of them")
    if asked.ours is not None:
        dump = read_dump(asked.ours)
        climbed, of = climb(dump, *pair_of(asked).open(dump.dtype)), f"the dump {asked.ours}"
    elif bug:
        climbed, of = of_bug(named(bug), asked)
    else:
        climbed, of = own(pair_of(asked)), "the twin"
    ladder(desk, climbed)
    first = climbed.first
    where = f"first beyond its budget: {first.place}" if first else f"nothing is beyond its budget ({climbed.used:.2g})"
    desk.say(f"{of}: {where}")
    facts: dict[str, Any] = {"of": of, "first_wrong": first.name if first else "", "ladder": rungs(climbed)}
    return Answer(Exit.GATE_FAILED if first else Exit.PASSED, facts)


def named(name: str) -> Bug:
    """A planted bug of this name; errors: UsageFault."""
    # imported here: every page of bugs is read, and a dump needs none
    from suites.planted import BUGS

    found = next((bug for bug in BUGS if bug.name == name), None)
    if found is None:
        raise UsageFault(f"no planted bug is named {name!r}; `draftproof list bugs` names them")
    return found


def side_of(bug: Bug) -> str:
    """The side whose code a bug is planted in; readers of checkpoints serve both."""
    return "optimized" if bug.at.startswith("optimized") else "reference"


def own(pair: Folders, bug: Bug | None = None) -> Ladder:
    """A pair's own ladder over random tokens."""
    vocab = pair.open()[0].config.vocab
    side = "optimized" if bug is None else side_of(bug)
    return injected(pair, random_tokens(vocab, BATCH, WIDTH, SEED), side, bug)


def of_bug(bug: Bug, asked: Options) -> tuple[Ladder, str]:
    """The ladder of a planted bug, over the given pair or the first pinned couple that shows it."""
    if asked.target is not None or asked.case is not None:
        try:
            return own(pair_of(asked), bug), f"{bug.name} in {asked.case or asked.target}"
        except PlantingError as error:
            raise UsageFault(str(error)) from error
    seen: list[tuple[Ladder, str]] = []
    for name in likely(bug):
        with tempfile.TemporaryDirectory() as folder:
            try:
                seen.append((own(write_pair(COUPLES[name], Path(folder)), bug), f"{bug.name} in {name}"))
            except PlantingError:
                continue
        if seen[-1][0].first is not None:
            return seen[-1]
    if not seen:
        raise UsageFault(f"{bug.name}: no pinned couple reaches {bug.at}; name one with --target and --draft")
    return seen[0]


def likely(bug: Bug) -> Sequence[str]:
    """Couples in the order in which they are tried: those whose page the bug stands in come first."""

    def meets(name: str) -> bool:
        couple: Couple = COUPLES[name]
        kinds = [str(couple.target.keys.get("model_type"))]
        kinds += [str(couple.draft.keys.get("architectures"))] if couple.draft else []
        page = bug.at.split(".")[2:3]
        return any(page[0].replace("_", "") in kind.lower().replace("_", "") for kind in kinds) if page else False

    return sorted(COUPLES, key=lambda name: not meets(name))
