"""Bugs of reading and writing other people's checkpoints, and of accounts that say less than there is."""

from collections.abc import Callable
from typing import Any

from harness.conventions import AFTER, BEFORE
from harness.planting import Bug
from suites.formats.rows import FIXED, NESTED, READ, REFUSED, Dialect, Row

DIALECTS = "suites/correctness/test_dialects.py"
CONVERT = "suites/correctness/test_convert.py"
ACCOUNT = "suites/correctness/test_accounting.py"
IDS = f"{DIALECTS}::test_ids_land_where_each_convention_puts_them"
READ_WRONG = f"{DIALECTS}::test_what_is_read_otherwise_shows_from_its_step_on"
ONES = f"{DIALECTS}::test_a_flag_without_its_tensors_runs_on_ones"
EDITS = f"{DIALECTS}::test_the_edits_that_are_named_make_it_right"
ROUND = f"{CONVERT}::test_there_and_back_is_bit_equal"
MARKS = f"{CONVERT}::test_marks_are_derived_where_they_are_stored"
UNSAYABLE = f"{CONVERT}::test_what_a_dialect_cannot_say_is_refused"
FAULTS = f"{ACCOUNT}::test_every_fault_is_told_and_none_stops_the_account"
HOSTILE = f"{ACCOUNT}::test_what_cannot_be_read_is_a_typed_error"


def rows(change: Callable[[Row], Row | None]) -> Callable[[Dialect], Dialect]:
    """A dialect whose rows are changed one by one; None takes a row away."""
    return lambda right: right._replace(rows=tuple(row for row in map(change, right.rows) if row is not None))


def unshifted(row: Row) -> Row:
    return row._replace(means=BEFORE) if row.fact == "layer ids" and row.means == AFTER else row


def meant_of_feedback(row: Row) -> Row:
    """SpecForge's key in the meaning of the engines."""
    if row.fact == "norm_before_head":
        return row._replace(key="", means=FIXED)
    return row._replace(key="norm_output", means=READ) if row.fact == "feedback_normed" else row


def narrower_unseen(right: Any) -> Any:
    """Rows of every place alike: the first that was written down wins."""
    return lambda self, fact, places=(): tuple(sorted(right(self, fact, places), key=lambda row: bool(row.where)))


def strict(row: Row) -> Row:
    return row._replace(means=REFUSED) if row.fact == "missing" else row


def nested_too(right: Dialect) -> Dialect:
    """Runner V2 with what runner V1 does."""
    extra = Row("layer ids", NESTED, "", BEFORE, "silent", "as V1")
    return right._replace(rows=(extra, *right.rows))


def unmarked(tensors: Any) -> Any:
    """t2d left behind where it could be derived."""
    return lambda *arguments: (tensors(*arguments)[0], {})


def stops(match: Any) -> Any:
    """The first fault ends the account."""

    def first(*arguments: Any) -> Any:
        todo, misfits = match(*arguments)
        return todo, misfits[:1]

    return first


def bug(name: str, origin: str, at: str, make: Any, claim: str) -> Bug:
    return Bug(f"dialects-{name}", origin, at, make, claim)


BUGS = (
    bug("ids-unshifted", "SGLang #25454", "suites.formats.reading.DIALECTS['sglang']", rows(unshifted), IDS),
    bug("one-runner-for-two", "vLLM 2.4", "suites.formats.reading.DIALECTS['vllm-v2']", nested_too, IDS),
    bug("places-forgotten", "deepseek_v2.py:3470", "suites.formats.rows.Dialect.about", narrower_unseen, IDS),
    bug(
        "norm-output-in-one-meaning",
        "vLLM #42764",
        "suites.formats.reading.DIALECTS['specforge']",
        rows(meant_of_feedback),
        f"{READ_WRONG}[SpecForge 3.1 in V1]",
    ),
    bug(
        "default-of-speculators",
        "vLLM algos.py:33",
        "suites.formats.reading.DIALECTS['vllm-v1']",
        rows(lambda row: None if row.absent is True and row.fact == "norm_before_residual" else row),
        f"{READ_WRONG}[speculators, residual unsaid]",
    ),
    bug(
        "silence-taken-for-refusal",
        "vLLM 1.1.5: load_weights returns None",
        "suites.formats.reading.DIALECTS['vllm-v1']",
        rows(strict),
        f"{ONES}[vllm-v1]",
    ),
    bug(
        "base-of-rope-believed",
        "traineagle3/cnets.py:208",
        "suites.formats.reading.DIALECTS['safeailab-training']",
        rows(lambda row: None if row.fact == "rope theta" else row),
        f"{READ_WRONG}[base of rope, trained and served]",
    ),
    bug(
        "nothing-differs",
        "converters that load with strict=False",
        "suites.formats.writing.differences",
        lambda _: lambda *_: [],
        f"{UNSAYABLE}[sglang: norm_before_residual]",
    ),
    bug(
        "ids-copied",
        "TorchSpec export_for_vllm",
        "suites.formats.writing.spell",
        lambda right: lambda points, word, layers: right(points, AFTER, layers),
        ROUND,
    ),
    bug("marks-left-behind", "speculators' converter", "suites.formats.writing._tensors", unmarked, MARKS),
    bug(
        "no-edit-is-enough",
        "a remedy that was never tried",
        "suites.audit.engines._suffice",
        lambda _: lambda *_: False,
        f"{EDITS}[SpecForge's ids in V1]",
    ),
    bug(
        "the-first-fault-alone",
        "loaders that stop",
        "suites.audit.accounting.match",
        stops,
        f"{FAULTS}[all at once]",
    ),
    bug(
        "absolute-ids-unseen",
        "verl-SpeCo 67",
        "suites.audit.accounting.map_faults",
        lambda _: lambda *_: [],
        f"{FAULTS}[absolute map]",
    ),
    bug(
        "paths-followed",
        "an index that names files outside",
        "harness.headers._inside",
        lambda _: lambda folder, name, index: folder / name,
        f"{HOSTILE}[an absolute path]",
    ),
    bug(
        "keys-twice",
        "two readers, two tensors of one name",
        "harness.headers._each_once",
        lambda _: dict,
        f"{HOSTILE}[a tensor twice in a header]",
    ),
)
