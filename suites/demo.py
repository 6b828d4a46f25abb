"""`draftproof demo`: the main job on the first shipped pair, in minutes, without a network or a GPU.

1  claims          the twin is held to the reference, the reference to transformers
2  acceptance      greedy and at temperature 1, on held-out prompts; what other readings would cost
3  tokens/s        against transformers' `generate`, in the same run
4  audit           every tensor of the draft, how each engine would read it, and what its weights say of its facts
5  planted bugs    a sample: does the harness notice?
6  page            everything above as one HTML file
"""

from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path

from harness.environment import ROOT
from harness.record import Recorder
from harness.runner import Exit
from suites.commands import audit, planted
from suites.commands.audited import audited
from suites.commands.bench import Options, bench, chosen
from suites.commands.desk import Answer, Desk
from suites.commands.runs import report

PAGE = ROOT / "reports" / "out" / "index.html"
PROFILE = "quick"
SHORT = Options(
    pairs=("llama-eagle3",),
    num_prompts=40,
    num_sequences=64,
    blocks=6,
    timed_prompts=3,
    timed_tokens=32,
    dtypes=("float32",),
    big=False,
)
NUM_BUGS = 6
AUDITED = 64
"""sequences; enough to tell every fact of the first pair"""
# the gravest first: a proven fault, then what left the question open, then what was never asked
SEVERITY = (
    Exit.GATE_FAILED,
    Exit.MACHINE_FAILED,
    Exit.INCONCLUSIVE,
    Exit.NOTHING_SELECTED,
    Exit.CAPABILITY_MISSING,
    Exit.PASSED,
)


def demo(desk: Desk, begin: Callable[[], Recorder], out: Path = PAGE, options: Options = SHORT) -> Answer:
    """All of it; the exit code is that of the worst gate, and the page is written whatever it is."""
    begin = cache(begin)  # one run for all parts
    measured = bench(desk, begin, ("acceptance", "decode"), options, PROFILE)
    judged = stand(desk, begin, options)
    caught = planted.score(desk, begin, sample())
    page = report(desk, [str(begin().path)], out)
    facts = {**measured.facts, "audit": dict(judged.facts), "planted": dict(caught.facts), **page.facts}
    return Answer(worst((measured.exit, caught.exit)), facts)


def stand(desk: Desk, begin: Callable[[], Recorder], options: Options) -> Answer:
    """The first pair's draft audited; what an engine would read wrongly is for the page, and no fault of this pair."""
    pair = chosen(options)[0]
    return audited(desk, begin, audit.Options(pair.target, pair.draft, num_sequences=AUDITED))


def sample() -> list[planted.Bug]:
    """A handful of the planted bugs, spread over the list."""
    bugs = [bug for bug in planted.select() if not bug.harmless]
    return bugs[:: max(1, len(bugs) // NUM_BUGS)][:NUM_BUGS]


def worst(codes: Iterable[Exit]) -> Exit:
    """The gravest of several exit codes."""
    return min(codes, key=SEVERITY.index)
