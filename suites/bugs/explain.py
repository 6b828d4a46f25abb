"""Bugs of explanations, of ladders, of dumps and of counterexamples."""

from typing import Any

from harness.planting import Bug

EXPLAIN, CASES = "suites/correctness/test_explain.py", "suites/correctness/test_counterexamples.py"
NAMED = f"{EXPLAIN}::test_bugs_that_one_edit_can_express_are_named"
LAYER = f"{EXPLAIN}::test_a_wrong_layer_is_the_only_place_beyond_its_budget"
FIRST = f"{EXPLAIN}::test_of_two_wrong_layers_the_first_is_named_however_small"
NUMBERS = f"{EXPLAIN}::test_numbers_that_are_not_there_are_no_agreement"
AGAIN = f"{CASES}::test_a_blob_fails_again_and_no_longer_once_it_is_repaired"
BUILT = f"{CASES}::test_a_property_that_is_built_when_it_runs_takes_the_blob_too"
ELSEWHERE = f"{CASES}::test_passing_elsewhere_is_no_proof"
ENDS = f"{CASES}::test_the_exit_code_says_whether_it_still_fails"

LADDER = "suites.explain.ladder"


def worst(right: Any) -> property:
    """The place that uses most of its budget, taken for the first one beyond it."""

    def most(self: Any) -> Any:
        rung = max(self.rungs, key=lambda rung: rung.used)
        return rung if rung.used > 1 else None

    return property(most)


def silent(right: Any) -> Any:
    """A tensor without a number in it, taken for one that agrees."""

    def rung(dump: Any, name: str, *rest: Any) -> Any:
        found = right(dump, name, *rest)
        nothing = dump.tensors[name].is_floating_point() and bool(dump.tensors[name].isnan().all())
        return found._replace(used=0.0, error=0.0) if nothing else found

    return rung


def outermost(right: Any) -> Any:
    """What the first function of the file was called with, whoever called it."""

    def given(error: Any, file: Any) -> dict[str, Any]:
        return {} if "hypothesis" in str(error.__traceback__.tb_frame.f_code) else right(error, type(file)("elsewhere"))

    return given


def bug(name: str, origin: str, at: str, make: Any, claim: str) -> Bug:
    return Bug(f"explain-{name}", origin, at, make, claim)


BUGS = (
    bug(
        "the-edit-is-not-made",
        "a catalogue that runs one model again and again",
        "suites.explain.search._left",
        lambda right: lambda edit, *given: right(type(edit)(edit.name), *given),
        NAMED,
    ),
    bug(
        "windows-unknown",
        "a fact that nobody thought of",
        "suites.explain.edits.OTHERS['windows']",
        lambda _: lambda now, c: (),
        NAMED,
    ),
    bug(
        "states-not-handed-over",
        "SGLang's comparator: one pass, where the first wrong layer spoils all later ones",
        "suites.explain.telling.walk",
        lambda right: lambda target, tokens, positions, given, capture: right(target, tokens, positions, None, capture),
        LAYER,
    ),
    bug("the-worst-for-the-first", "heat maps that show the loudest layer", f"{LADDER}.Ladder.first", worst, FIRST),
    bug("nothing-agrees", "vLLM #34385: a head that was never loaded says NaN", f"{LADDER}._rung", silent, NUMBERS),
    bug(
        "blob-lost",
        "a failure that was told without what reproduces it",
        "suites.replay.blob_of",
        lambda _: lambda error: ("", ""),
        AGAIN,
    ),
    bug("given-of-another-frame", "a report of the wrapper's arguments", "suites.replay.given", outermost, BUILT),
    bug(
        "green-anywhere",
        "Liger-Kernel #1313: it passes here, so it was flaky",
        "suites.commands.replay.changed",
        lambda _: lambda found: {},
        ELSEWHERE,
    ),
    bug(
        "other-draws-taken-for-a-pass",
        "a claim whose strategy was changed replays nothing",
        "suites.commands.replay.CHANGED",
        lambda _: (),
        f"{ENDS}[other draws]",
    ),
)
