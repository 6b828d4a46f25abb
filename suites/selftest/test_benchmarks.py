"""Claim: what a benchmark records is what happened, and a file that holds no prompts is refused by name.

Born of acceptance lengths quoted without their truncated steps, and of speeds that timed the reading of the prompt.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from tokenizers import Tokenizer, models, pre_tokenizers

from harness import timing
from harness.checkpoints import CheckpointError
from harness.pairs import Speculation
from harness.planting import Bug, planted
from harness.record import Recorder, RecordError, read
from reports.statistics import standard_errors
from suites.benchmarks import acceptance, races, separation
from suites.benchmarks.prompts import Encoded, Prompt, PromptError, encode, read_prompts
from suites.benchmarks.shipped import Located, shipped
from suites.draws import LLAMA, PINNED_DRAFT, PINNED_TARGET, folders, random_tokens

pytestmark = pytest.mark.correctness

SPEC_BENCH = {"question_id": 81, "category": "writing", "turns": ["First turn.", "Second turn."]}
TEXTS = random_tokens(LLAMA["vocab_size"], 3, 12, seed=5)
ASKED = Encoded("made up", tuple(Prompt(f"p{i}", "", "") for i in range(3)), tuple(TEXTS), 0)


@pytest.fixture(scope="module")
def pair() -> Iterator[Located]:
    """The pinned target and draft on disk."""
    with folders(PINNED_TARGET, PINNED_DRAFT) as (target, draft):
        yield Located(Speculation("made-up", "llama", "eagle3", "EAGLE3"), target.parent, target, draft)


def written(folder: Path, name: str, text: str | bytes) -> Path:
    file = folder / name
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return file


def test_spec_bench_and_plain_text_are_read(tmp_path: Path) -> None:
    bench = written(tmp_path, "a.jsonl", json.dumps(SPEC_BENCH) + "\n\n")
    plain = written(tmp_path, "a.txt", "one prompt\n\n  another \n")

    assert read_prompts(bench) == (Prompt("81", "writing", "First turn."),)
    assert read_prompts(plain) == (Prompt("1", "", "one prompt"), Prompt("3", "", "another"))


@pytest.mark.parametrize(
    ("name", "text", "word"),
    [
        ("a.jsonl", "", "holds no prompt"),
        ("a.txt", "\n \n", "holds no prompt"),
        ("a.txt", b"\xff\xfe", "UTF-8"),
        ("a.jsonl", "{", "a.jsonl:1: is no JSON"),
        ("a.jsonl", "[1]", '"turns"'),
        ("a.jsonl", '{"question_id": 1, "turns": []}', '"turns"'),
        ("a.jsonl", '{"question_id": 1, "turns": [7]}', '"turns"'),
        ("a.jsonl", '{"question_id": 1, "turns": "text"}', '"turns"'),
        ("a.jsonl", '{"turns": ["text"]}', '"question_id"'),
        ("a.jsonl", "\n".join([json.dumps(SPEC_BENCH)] * 2), "stands twice"),
    ],
)
def test_a_file_that_holds_no_prompts_is_refused_by_name(tmp_path: Path, name: str, text: str, word: str) -> None:
    with pytest.raises(PromptError, match=word) as error:
        read_prompts(written(tmp_path, name, text))

    assert str(tmp_path / name) in str(error.value)


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PromptError, match="cannot be read"):
        read_prompts(tmp_path)


def test_a_prompt_without_room_loses_its_beginning_and_is_counted(tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate("abcde")}, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))

    found = encode([Prompt("1", "", "a b c d e"), Prompt("2", "", "b c")], "made up", tmp_path, room=3)

    assert [row.tolist() for row in found.rows] == [[2, 3, 4], [1, 2]]
    assert found.num_cut == 1
    with pytest.raises(PromptError, match="prompt 3 has no tokens"):
        encode([Prompt("3", "", " ")], "made up", tmp_path, room=3)
    with pytest.raises(PromptError, match="no room"):
        encode([Prompt("1", "", "a")], "made up", tmp_path, room=0)


def test_a_target_without_its_tokenizer_and_an_empty_zoo_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        encode([Prompt("1", "", "a")], "made up", tmp_path, room=3)
    with pytest.raises(CheckpointError, match="zoo train"):
        shipped(tmp_path)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_every_prompt_is_one_record_of_what_the_loop_did(pair: Located, tmp_path: Path, temperature: float) -> None:
    speculation = pair.open(side="optimized")
    told: list[int] = []

    found = acceptance.answer(
        pair, speculation, ASKED, num_tokens=9, num_draft_tokens=2, temperature=temperature, advance=told.append
    )

    expected = speculation.generate(list(TEXTS), 9, 2, temperature)
    assert [list(a.accepted) for a in found.accepts] == expected.accepted
    assert [a.emitted for a in found.accepts] == [9, 9, 9]
    assert [a.truncated for a in found.accepts] == [1 + sum(a.accepted) + len(a.accepted) > 9 for a in found.accepts]
    assert sum(told) == 3
    assert found.case.capture_points == (2, 4, 6)
    with Recorder(tmp_path / "records.jsonl") as recorder:
        recorder.append(*found.accepts, found.repeated)
    assert len([o for o in read(tmp_path / "records.jsonl") if getattr(o, "prompt", "")]) == 3


def test_an_end_token_ends_the_answer_and_says_so(pair: Located) -> None:
    speculation = pair.open(side="optimized")
    text = speculation.generate([TEXTS[0]], 9, 2).tokens[0].tolist()
    speculation.target.checkpoint.config["eos_token_id"] = text[4]

    [first, *_] = acceptance.answer(pair, speculation, ASKED, num_tokens=9, num_draft_tokens=2).accepts

    assert (first.stop, first.emitted) == ("end", text.index(text[4]) + 1)


def test_a_forced_loss_is_the_cross_entropy_to_the_target_over_the_ids_of_the_draft(pair: Located) -> None:
    speculation = pair.open(side="reference")
    points, draft = speculation.draft.capture_points, speculation.draft
    out = speculation.target(TEXTS, capture=points)

    found = separation.losses(speculation, separation.Reading(points), TEXTS)

    ids = torch.arange(len(draft.module.d2t)) + draft.module.d2t
    said = draft.unroll(TEXTS, out, 3).log_softmax(-1)
    for k, row in np.ndindex(3, 3):
        terms = []
        for t in range(12 - k - 2):
            chance = out.logits[row, t + k + 1, ids].softmax(-1)
            terms.append(-float((chance * said[k, row, t]).sum()))
        assert float(found[k, row]) == pytest.approx(sum(terms) / len(terms), rel=1e-5)


def test_capture_points_stay_within_the_target(pair: Located) -> None:
    speculation = pair.open(side="reference")

    found = {name: reading.points for name, reading in separation.readings(speculation).items()}
    assert found == {"": (2, 4, 6), "capture points -1": (1, 3, 5), "capture points +1": (3, 5, 7)}


def test_standard_errors_are_those_of_a_paired_t_test() -> None:
    a, b = np.random.default_rng(0).normal(size=(2, 30))

    assert standard_errors(a - b) == pytest.approx(stats.ttest_rel(a, b).statistic)


def test_a_separation_rests_on_losses_recorded_by_sequence(pair: Located) -> None:
    samples, found = separation.separate(pair, TEXTS)

    stated, earlier = (np.mean([s.values for s in samples if s.case.variant == v], 0)
                       for v in ("", "capture points -1"))  # fmt: skip
    assert len(samples) == 9
    assert [one.reading for one in found] == ["capture points -1", "capture points +1"]
    assert found[0].loss == pytest.approx(float(np.mean(earlier - stated)), rel=1e-4)
    assert found[0].errors == pytest.approx(standard_errors(earlier - stated), rel=1e-4)


def race(pair: Located, **facts: Any) -> races.Race:
    return races.Race(pair, tuple(TEXTS[:2]), num_tokens=6, blocks=2, warm_up_s=0.0, **facts)


def test_three_arms_take_turns_over_the_same_text(pair: Located) -> None:
    turns: list[None] = []

    found = races.run(race(pair), lambda: turns.append(None))

    speeds = [s for s in found.samples if s.metric == "decode"]
    assert {(s.case.impl, s.case.num_draft_tokens) for s in speeds} == {
        ("transformers", 0), ("optimized", 0), ("optimized", 3)}  # fmt: skip
    assert len(speeds) == 3 * 2 * 2
    assert len(turns) == 3 * (3 + 2 * 2)
    assert found.same_text
    assert set(found.speeds) == {"transformers", "plain", "speculative"}
    assert set(found.ratios) == {"plain / transformers", "speculative / transformers", "speculative / plain"}
    assert {s.metric for s in found.samples} == {"decode", "cycle", "draft", "verify", "accept", "verify_cost"}
    assert found.verify_cost > 0
    assert {s.case.acceptance for s in found.samples} == {"real"}


def test_forced_acceptance_is_named_in_its_case_alone(pair: Located) -> None:
    samples = races.run(race(pair, is_forced=True)).samples

    drafting = {(s.case.acceptance, s.case.forced_rates) for s in samples if s.case.num_draft_tokens}
    assert drafting == {("forced", (0.730, 0.521, 0.355))}
    assert {s.case.acceptance for s in samples if not s.case.num_draft_tokens} == {"real"}


def test_a_timed_run_that_says_something_else_ends_the_race(pair: Located) -> None:
    def drifts(by_twin: Any) -> Any:
        calls: list[int] = []

        def drifting(*arguments: Any) -> races.Turn:
            calls.append(0)
            turn = by_twin(*arguments)
            return turn._replace(text=turn.text + len(calls))

        return drifting

    bug = Bug("drift", "made up", "suites.benchmarks.races._by_twin", drifts, "")
    with planted(bug), pytest.raises(races.ChangedText, match="while it was timed"):
        races.run(race(pair))


def test_reading_the_prompt_is_not_timed(pair: Located) -> None:
    speculation = pair.open(side="optimized")
    engine = races.Clocked(speculation.target.module)
    with timing.stopwatch() as whole:
        engine.generate([TEXTS[0]], 1, 0)

    assert 0 <= engine.seconds < 0.5 * whole()


def test_a_clock_can_be_told_what_counts() -> None:
    found = timing.interleave({"a": lambda: 2.0, "b": lambda: 3.0}, blocks=2, repeats=2, clock=timing.own_seconds)

    assert {v.seconds for v in found.visits["b"]} == {(3.0, 3.0)}


def test_no_case_of_a_red_gate_holds_a_number(pair: Located) -> None:
    case = pair.case(gate="failed", num_draft_tokens=2)

    with pytest.raises(RecordError, match="numbers only if the gate passed"):
        separation.Sample(case=case, metric="decode", unit="tokens/s", better="up", values=(1.0,))
