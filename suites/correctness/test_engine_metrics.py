"""Claim: a running engine's own numbers, read over HTTP, say the acceptance that its verify steps had, in our words.

Born of the words of the two engines: SGLang's `spec_accept_length` divides the tokens of an answer, the prompt's own
included, by its verify steps, vLLM's counters leave the target's token out; neither is the acceptance length that the
other's name promises. Counters speak of all requests together, and begin anew with their process.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from harness.acceptance import count
from harness.runner import Exit
from reports.statistics import Arm, acceptance_length, rates
from suites.benchmarks.prompts import Prompt, read_prompts
from suites.benchmarks.shipped import PROMPTS, ZOO, Located, shipped
from suites.cli import run
from suites.commands.desk import Desk, MissingCapability, UsageFault
from suites.commands.probe import ENGINES, Options, token_ids, told
from suites.probe import verdict
from suites.probe.counters import parse
from suites.probe.replayed import ABORT, CUT, DROP, GARBAGE, SLOW, Replayed, ReplayedSglang, ReplayedVllm, serve
from suites.probe.told import Asked, Crowded
from suites.probe.vllm import Vllm
from suites.probe.wire import BadAnswer, EngineGone, Wire

pytestmark = pytest.mark.correctness

KINDS = {"vllm": ReplayedVllm, "sglang": ReplayedSglang}
FOUR = {"one": (0, 3, 1), "two": (2, 2), "three": (), "four": (3, 0, 0, 1)}


def asked_of(engine: Replayed, kind: str, timeout: float = 5.0, retries: int = 2) -> tuple[Arm, int]:
    """What a probe reads off an engine that has answered every prompt."""
    prompts = [Prompt(name, "", name) for name in engine.steps]
    with serve(engine) as url:
        options = Options(url, kind)
        probed = ENGINES[kind](Wire(url, timeout, retries, pause=0.01), "")
        return told(Desk(is_json=True), probed, prompts, {}, options)


def counted(steps: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(sorted(accepted)) for name, accepted in steps.items()}


@st.composite
def answered(draw: st.DrawFn) -> tuple[int, dict[str, tuple[int, ...]]]:
    """(K, accepted drafts of each verify step of each prompt)"""
    depth = draw(st.integers(1, 5))
    rows = draw(st.lists(st.lists(st.integers(0, depth), max_size=6), min_size=1, max_size=3))
    return depth, {str(number): tuple(row) for number, row in enumerate(rows)}


@pytest.mark.parametrize("kind", KINDS)
@given(drawn=answered())
@example(drawn=(3, FOUR))
def test_an_engine_is_read_as_its_steps_are_counted(kind: str, drawn: tuple[int, dict[str, tuple[int, ...]]]) -> None:
    depth, steps = drawn
    expected = count(list(steps.values()), depth)

    arm, cut = asked_of(KINDS[kind](steps, depth), kind)

    assert (arm.num_draft_tokens, arm.steps, cut) == (depth, counted(steps), 0)
    if expected.length is not None:
        assert acceptance_length(arm).value == pytest.approx(expected.length)
        assert [rate.value for rate, _ in rates(arm)] == pytest.approx(list(expected.unconditional))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fault", [503, 429, CUT, DROP, SLOW])
def test_a_fault_that_passes_changes_no_number(kind: str, fault: str | int) -> None:
    engine = KINDS[kind](FOUR, 3, faults=["", fault])

    arm, cut = asked_of(engine, kind, timeout=0.3)

    assert (arm.steps, cut, engine.faults) == (counted(FOUR), 0, [])


@pytest.mark.parametrize("kind", KINDS)
def test_an_answer_that_broke_off_is_left_out(kind: str) -> None:
    arm, cut = asked_of(KINDS[kind](FOUR, 3, faults=["", ABORT]), kind)

    assert (arm.steps, cut) == ({name: row for name, row in counted(FOUR).items() if name != "two"}, 1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("faults", "error", "words"),
    [
        ([503] * 3, EngineGone, "503 no room; tried 3 times"),
        ([DROP] * 3, EngineGone, "tried 3 times"),
        ([400], BadAnswer, "400 no room"),
        ([GARBAGE], BadAnswer, "no JSON"),
    ],
    ids=["busy for good", "gone", "refused", "no JSON"],
)
def test_a_fault_that_stays_is_an_error_in_words(
    kind: str, faults: list[str | int], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        asked_of(KINDS[kind](FOUR, 3, faults=list(faults)), kind)


WRONG: tuple[tuple[str, Replayed, type[Exception], str], ...] = (
    ("vllm", ReplayedVllm(FOUR, 3, speculates=False), MissingCapability, "--speculative-config"),
    ("vllm", ReplayedVllm(FOUR, 3, restarts=True), EngineGone, "started again"),
    ("vllm", ReplayedVllm(FOUR, 3, foreign=5), Crowded, "generated"),
    ("vllm", ReplayedVllm(FOUR, 3, torn=True), BadAnswer, "contradict"),
    ("sglang", ReplayedSglang(FOUR, 3, speculates=False), MissingCapability, "--speculative-algorithm"),
    ("sglang", ReplayedSglang(FOUR, 3, is_old=True), BadAnswer, "0.5.23"),
    ("sglang", ReplayedSglang(FOUR, 2), BadAnswer, "contradict"),
)


@pytest.mark.parametrize(("kind", "engine", "error", "words"), WRONG, ids=lambda value: str(value)[:30])
def test_an_engine_that_cannot_be_read_is_an_error_in_words(
    kind: str, engine: Replayed, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        asked_of(engine, kind)


def test_a_busy_engine_is_read_by_its_answers_or_not_at_all() -> None:
    with serve(ReplayedVllm(FOUR, 3, detailed=True, busy=2)) as url:
        assert Vllm(Wire(url), "llama", 3, settle=0.1).ask("two", Asked()).steps == (2, 2)
    with serve(ReplayedVllm(FOUR, 3, busy=2)) as url, pytest.raises(Crowded, match="2 other requests"):
        Vllm(Wire(url), "llama", 3, settle=0.1).ask("two", Asked())


def test_counts_of_one_answer_stand_above_counters_of_all() -> None:
    arm, _ = asked_of(ReplayedVllm(FOUR, 3, detailed=True, foreign=5), "vllm")

    assert arm.steps == counted(FOUR)


def test_a_tree_is_read_by_its_depth() -> None:
    engine = ReplayedSglang(FOUR, 3, topk=4, num_nodes=16)

    with serve(engine) as url:
        probed = ENGINES["sglang"](Wire(url), "llama")

    assert (probed.num_draft_tokens, dict(probed.tree)) == (3, {"topk": 4, "num_steps": 3, "num_draft_tokens": 16})


def test_labels_are_read_with_their_escapes() -> None:
    (sample,) = parse('a:b_total{engine="0",model_name="x\\"y\\\\z, {}"} 1.2e+03', "here")["a:b_total"]

    assert (sample.labels, sample.value) == ({"engine": "0", "model_name": 'x"y\\z, {}'}, 1200.0)
    with pytest.raises(BadAnswer, match="line 2"):
        parse("# fine\nnot a metric at all", "here")


@pytest.mark.parametrize("url", ["ftp://localhost:1", "localhost:1", "file:///etc/passwd", ""])
def test_a_url_that_is_none(url: str) -> None:
    with pytest.raises(UsageFault, match="--url"):
        Wire(url)


def even(accepted: int, prompts: int = 10, steps: int = 40) -> Arm:
    """Prompts that differ a little, around one acceptance."""
    return Arm(3, {str(n): (accepted,) * steps + (accepted + (-1) ** n,) for n in range(prompts)})


@pytest.mark.parametrize(
    ("reference", "engine", "word"),
    [
        (even(1), even(1), verdict.Word.AGREE),
        (even(1), even(2), verdict.Word.DISAGREE),
        (even(2), even(1), verdict.Word.DISAGREE),
        (even(1, prompts=3), even(2, prompts=3), verdict.Word.TOO_FEW),
        (even(1), even(1, steps=5), verdict.Word.TOO_FEW),
    ],
)
def test_a_verdict_needs_an_interval_on_one_side_of_the_bound(reference: Arm, engine: Arm, word: verdict.Word) -> None:
    assert verdict.hold(reference, engine, within=0.05).word == word


@pytest.mark.parametrize(
    ("text", "kept"), [([5, 6, 7, 8, 9], (1, 1)), ([5, 9], (1,)), ([9], ()), ([5, 6, 7, 9, 8], (1, 1))]
)
def test_steps_end_with_the_one_that_said_the_end(text: list[int], kept: tuple[int, ...]) -> None:
    assert verdict.until_end((1, 1), text, ends={9}) == kept


@pytest.mark.parametrize(
    ("kind", "engine", "code"),
    [
        ("vllm", ReplayedVllm(FOUR, 3), Exit.INCONCLUSIVE),
        ("vllm", ReplayedVllm(FOUR, 3, foreign=5), Exit.INCONCLUSIVE),
        ("vllm", ReplayedVllm(FOUR, 3, faults=[DROP]), Exit.MACHINE_FAILED),
        ("vllm", ReplayedVllm(FOUR, 3, faults=[400]), Exit.USAGE),
        ("sglang", ReplayedSglang(FOUR, 3, speculates=False), Exit.CAPABILITY_MISSING),
        ("sglang", ReplayedSglang(dict.fromkeys("abcdefgh", (1, 2) * 40), 3), Exit.PASSED),
    ],
    ids=["too few", "crowded", "gone", "refused", "no drafts", "no reference"],
)
def test_how_a_probe_ends(
    kind: str, engine: Replayed, code: Exit, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(engine.steps))
    with serve(engine) as url:
        ended = run(["probe", "--url", url, "--engine", kind, "--prompts", str(prompts), "--retries", "0", "--json"])

    assert (ended, json.loads(capsys.readouterr().out)["exit"]) == (code, code)


NUM_TOKENS, NUM_PROMPTS = 56, 9


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    """The first held-out prompts, one a line."""
    lines = (ZOO / PROMPTS).read_text().splitlines()[:NUM_PROMPTS]
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(json.loads(line)["turns"][0].replace("\n", " ") for line in lines))
    return file


def twin_steps(pair: Located, rows: Sequence[Tensor]) -> list[list[int]]:
    return pair.open(side="optimized").generate(rows, NUM_TOKENS, 3).accepted


def hopeless_steps(pair: Located, rows: Sequence[Tensor]) -> list[list[int]]:
    return [[0] * (NUM_TOKENS - 1) for _ in rows]


@pytest.mark.parametrize(
    ("kind", "steps", "code"),
    [("vllm", twin_steps, Exit.PASSED), ("sglang", hopeless_steps, Exit.GATE_FAILED)],
    ids=["agrees", "disagrees"],
)
def test_a_probe_tells_the_twin_from_another_draft(
    kind: str,
    steps: Callable[[Located, Sequence[Tensor]], list[list[int]]],
    code: Exit,
    prompts: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (pair,) = shipped(names=("llama-eagle3",))
    engine = KINDS[kind]({}, 3)
    folders = ("--target", str(pair.target), "--draft", str(pair.draft), "--prompts", str(prompts))
    with serve(engine) as url:
        rows = token_ids(read_prompts(prompts), pair.target, Asked(NUM_TOKENS), ENGINES[kind](Wire(url), "")).values()
        said = [" ".join(map(str, row.tolist())) for row in rows]
        engine.steps = dict(zip(said, steps(pair, list(rows)), strict=True))
        ended = run(["probe", "--url", url, "--engine", kind, *folders, "--num-tokens", str(NUM_TOKENS), "--json"])

    facts = json.loads(capsys.readouterr().out)
    assert (ended, facts["exit"]) == (code, code), facts
    assert facts["definitions"]
