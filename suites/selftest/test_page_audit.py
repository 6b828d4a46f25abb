"""The section of audited checkpoints: verdict, what to change, evidence, all of it from the record alone."""

import json
from pathlib import Path
from typing import Any

import pytest

from harness.record import Audit, Recorder, Run, read
from reports.page import html
from reports.sections import audit
from reports.store import gather
from suites.cli import run
from suites.draws import PINNED_DRAFT, PINNED_TARGET, write_draft, write_target

START = Run(started="2026-01-01T00:00:00+00:00", environment={})


def other(value: str, nats: float, width: float = 0.01) -> dict[str, Any]:
    return {"value": value, "nats": nats, "low": nats - width, "high": nats + width}


TENSOR = {"tensor": "fc.<weight>", "parameter": "fc.weight", "status": "loaded", "reason": "", "shape": [96, 288],
          "dtype": "torch.bfloat16"}  # fmt: skip
SHARD = {"parameter": "lm_head.weight", "count": 1, "split": "vocab",
         "shapes": {"1": [96, 96], "2": [48, 96], "4": [24, 96], "8": "3 heads by 8 ranks"}}  # fmt: skip
SPLITS = {"1": 2**21, "2": 2**20, "4": 2**19, "8": "3 heads by 8 ranks"}
VERDICT = {"engine": "e", "version": "1", "outcome": "wrongly", "silent": True, "remedy": "set ids to [2, 4, 5]",
           "differences": [{"fact": "points", "read": "(1, 3, 4)", "meant": "(2, 4, 5)"}], "cost": None}  # fmt: skip
COST = {"nats": 0.08, "interval": [0.05, 0.11], "difference": -0.1, "difference_interval": [-0.2, -0.05]}


def facts(**changes: Any) -> dict[str, Any]:
    """What an audit prints, in small."""
    side = {"path": "/here", "pair": "eagle3", "bytes": 2**21, "faults": [], "splits": SPLITS, "notes": []}
    answers = [
        {"fact": "fc_norm", "value": "off", "answer": "identified", "why": "", "closest": other("on", 0.4)},
        {"fact": "embedding", "value": "raw", "answer": "no effect", "why": "a norm", "closest": other("scaled", 0.0)},
    ]
    claim = {"verdict": "contradicted", "text": "config.json claims fc_norm on, the weights say off"}
    told = {
        "accounting": {"target": {**side, "tensors": []}, "draft": {**side, "tensors": [TENSOR], "shards": [SHARD]},
                       "join": []},
        "engines": {"meant": {"capture_points": [2, 4, 5]}, "verdicts": [VERDICT, {**VERDICT, "cost": COST}]},
        "identification": {"text": "a text", "sequences": 64, "facts": answers, "claims": [claim], "notes": []},
        "faults": ["engines", "identification"],
    }  # fmt: skip
    return told | changes


def page_of(folder: Path, *audits: Audit) -> str:
    """The page of a record that holds nothing else."""
    with Recorder(folder / "records.jsonl") as recorder:
        recorder.append(START, *audits)
    return html(gather(folder))


def failed(**changes: Any) -> Audit:
    return Audit(target="t", draft="d", pair="eagle3", outcome="failed", facts=facts(**changes))


def test_verdict_then_changes_then_evidence(tmp_path: Path) -> None:
    text = page_of(tmp_path, failed())
    order = ["d for t", "Faulty", "Faults in: engines, identification", "What to change", "the weights say off",
             "For e 1: set ids to [2, 4, 5]", "(1, 3, 4) in the place of (2, 4, 5), in silence",
             "Forest plot of paired differences", "Every fact", "Key map", "Shard map"]  # fmt: skip
    places = [text.find(words) for words in order]

    assert min(places) >= 0
    assert places == sorted(places)


def test_a_sound_draft_that_an_engine_misreads_is_called_so(tmp_path: Path) -> None:
    text = page_of(tmp_path, failed(faults=["engines"]))

    assert "Sound, but misread" in text
    assert "Its tensors and facts are sound; read wrongly by e" in text


def test_every_table_says_what_the_record_says(tmp_path: Path) -> None:
    text = page_of(tmp_path, failed()).replace("\N{NO-BREAK SPACE}", " ")

    for words in ("fc.&lt;weight&gt;", "96 x 288", "24 x 96", "does not divide: 3 heads by 8 ranks", "0.5 MiB",
                  "+0.080 nats (+0.050 to +0.110); -0.10 tokens (-0.20 to -0.05)", "not measured (audit --costs)",
                  "no effect: a norm", "+0.3900 to +0.4100"):  # fmt: skip
        assert words in text
    assert "<weight>" not in text


def test_the_same_record_gives_the_same_bytes(tmp_path: Path) -> None:
    assert page_of(tmp_path, failed()) == html(gather(tmp_path))


def test_a_later_audit_replaces_an_earlier_one(tmp_path: Path) -> None:
    sound = Audit(target="t", draft="d", outcome="passed", facts=facts(faults=[], engines={"note": "no dialects"}))
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    page_of(tmp_path / "a", failed())
    page_of(tmp_path / "b", sound)
    text = html(gather(tmp_path))

    assert "Sound" in text
    assert "Faulty" not in text


def test_nothing_audited_leaves_no_section(tmp_path: Path) -> None:
    assert 'id="audit"' not in page_of(tmp_path)


@pytest.mark.parametrize("note", ["the tokenizer is missing", "not asked for"])
def test_what_was_not_measured_is_said(note: str, tmp_path: Path) -> None:
    text = page_of(tmp_path, failed(identification={"note": note}, faults=["engines"]))

    assert f"not measured, {note}" in text
    assert "Forest plot" not in text


def test_gravest_first(tmp_path: Path) -> None:
    sound = [Audit(target="t", draft=name, outcome="passed", facts=facts(faults=[])) for name in "ab"]
    page_of(tmp_path, *sound, failed())

    section = audit.build(gather(tmp_path), gather(tmp_path))

    assert section is not None
    assert [one.title for one in section.facts["stands"]] == ["d for t", "a for t", "b for t"]


def test_an_audit_leaves_its_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target, draft = write_target(PINNED_TARGET, tmp_path / "t"), write_draft(PINNED_DRAFT, tmp_path / "d")
    folders = ("--target", str(target), "--draft", str(draft))
    code = run(["audit", *folders, "--no-identify", "--runs", str(tmp_path / "runs"), "--json"])
    told = json.loads(capsys.readouterr().out)

    (left,) = (line for line in read(told["records"]) if isinstance(line, Audit))
    assert (code, left.outcome, left.draft, left.target) == (1, "failed", "d", "t")
    assert left.facts["accounting"]["draft"] == told["accounting"]["draft"]
    assert 'id="audit"' in html(gather(tmp_path / "runs"))


def test_what_cannot_be_opened_leaves_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = run(["audit", "--target", str(tmp_path), "--draft", str(tmp_path), "--runs", str(tmp_path / "runs")])

    assert code == 2
    assert not (tmp_path / "runs").exists()
