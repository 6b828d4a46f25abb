"""Claim: an audit says what the weights say, ends as its answer means, and measures nothing that it was not asked for.

The pair that is asked is a trained one, on a few texts: what is found of it is the business of
`suites/correctness/test_identify.py`.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from harness.checkpoints import open_checkpoint, save_checkpoint
from suites import cli
from suites.audit.respelled import moved
from suites.formats.rows import NESTED
from suites.selftest.test_cli import said

pytestmark = pytest.mark.correctness

TARGET, DRAFT = cli.ZOO / "llama", cli.ZOO / "llama-eagle3"
FEW = ("--num-sequences", "8", "--engine", "vllm-v1")


@pytest.fixture
def heard(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Callable[..., tuple[int, dict[str, Any]]]:
    """Exit code and result of an audit, whose record goes where the test's files are."""

    def audit(target: Path, draft: Path, *more: str) -> tuple[int, dict[str, Any]]:
        pair = ["audit", "--target", str(target), "--draft", str(draft)]
        return said(capsys, *pair, "--runs", str(tmp_path / "runs"), *more)

    return audit


def respelled(folder: Path, **tensors: torch.Tensor) -> Path:
    """A draft whose ids are one further than its weights mean, or with other tensors."""
    source = open_checkpoint(DRAFT)
    if not tensors:
        moved(NESTED, lambda ids: [i + 1 for i in ids])(source.config)
    save_checkpoint(folder, source.config, {**{name: source.read(name) for name in source.headers}, **tensors})
    return folder


Heard = Callable[..., tuple[int, dict[str, Any]]]


def test_a_lie_ends_an_audit_and_its_cost_is_told(heard: Heard, tmp_path: Path) -> None:
    spec, text = cli.ZOO / "prompts.jsonl", tmp_path / "prompts.txt"
    turns = [json.loads(line)["turns"][0] for line in spec.read_text().splitlines()]
    text.write_text("\n".join(" ".join(turn.split()) for turn in turns))

    code, found = heard(TARGET, respelled(tmp_path / "lie"), *FEW, "--prompts", str(spec))
    other, honest = heard(TARGET, DRAFT, *FEW, "--costs", "--prompts", str(text))

    lie, told = found["identification"], honest["identification"]
    assert (code, lie["contradicted"], found["faults"][-1]) == (1, ["capture points"], "identification")
    (claim,) = [claim for claim in lie["claims"] if claim["verdict"] == "contradicted"]
    assert (claim["claimed"], claim["found"], claim["nats"] > 0) == (["(3, 5, 6)"], "(2, 4, 5)", True)
    assert (lie["text"], lie["sequences"], lie["tokens"] <= 8 * 48) == ("prompts.jsonl", 8, True)
    assert (other, told["contradicted"], honest["faults"]) == (1, [], ["engines"])
    (verdict,) = honest["engines"]["verdicts"]
    cost, lengths = verdict["cost"], verdict["cost"]["acceptance_length"]
    assert (verdict["outcome"], cost["prompts"], cost["num_draft_tokens"]) == ("wrongly", 8, 3)
    assert cost["nats"] > 0
    assert lengths["read"] - lengths["meant"] == pytest.approx(cost["difference"])


def test_what_says_nothing_is_inconclusive_if_it_was_asked(heard: Heard, tmp_path: Path) -> None:
    silence = open_checkpoint(DRAFT).read("lm_head.weight").zero_()
    mute = respelled(tmp_path / "mute", **{"lm_head.weight": silence})
    few = ("--num-sequences", "3", "--engine", "sglang")

    asked, found = heard(TARGET, mute, *few, "--identify", "--own-continuations")
    unasked, _ = heard(TARGET, mute, *few)

    told = found["identification"]
    assert (asked, unasked, told["told"], told["contradicted"]) == (4, 0, False, [])
    # all words alike, but for those that it does not have
    assert told["blind"] < told["losses"][0]
    answers = {fact["fact"]: fact["answer"] for fact in told["facts"]}
    assert {answer for fact, answer in answers.items() if fact != "vocabulary map"} == {"no effect"}


def test_nothing_is_measured_where_nobody_could(heard: Heard, tmp_path: Path) -> None:
    speechless = Path(shutil.copytree(TARGET, tmp_path / "target", ignore=shutil.ignore_patterns("tokenizer*")))
    short = tmp_path / "short.txt"
    short.write_text("a\n")

    code, found = heard(speechless, DRAFT, "--engine", "sglang")
    asked, error = heard(speechless, DRAFT, "--engine", "sglang", "--identify")
    few, said_of = heard(TARGET, DRAFT, "--prompts", str(short))

    assert (code, "tokenizer.json" in found["identification"]["note"]) == (0, True)
    assert (asked, "tokenizer.json" in error["error"]) == (2, True)
    assert (few, "long enough" in said_of["error"]) == (2, True)
