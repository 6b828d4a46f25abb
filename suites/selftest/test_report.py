"""Claim: the page asks no network in a browser, and a pull request and a CI server are told the same facts as it.

All numbers below are made up for these tests. The browser is one that is installed, or DRAFTPROOF_CHROMIUM.
"""

import json
import os
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest

from harness.record import Check, Observation, Recorder, Run, Verdict
from reports import junit, markdown, store
from reports.page import write
from suites import cli
from suites.selftest.made_up import RUN_ID, START, checks, everything, page, records
from suites.selftest.made_up_nights import explained, judged

pytestmark = pytest.mark.correctness

BROWSERS = ("chromium", "chromium-browser", "chromium-headless-shell", "google-chrome", "chrome")
OFFLINE = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run",
           "--dump-dom")  # fmt: skip


def browser() -> str | None:
    """A browser of this machine."""
    return next(filter(None, (os.environ.get("DRAFTPROOF_CHROMIUM"), *map(shutil.which, BROWSERS))), None)


def asked(file: Path, folder: Path) -> set[str]:
    """Every address that the browser asked for while it showed a file."""
    log = folder / "net.json"
    command = [str(browser()), *OFFLINE, f"--user-data-dir={folder / 'profile'}", f"--log-net-log={log}", file.as_uri()]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    return set(re.findall(r'"url":"([^"]*)"', log.read_text(errors="replace")))


@pytest.mark.skipif(browser() is None, reason="no chromium on this machine; DRAFTPROOF_CHROMIUM names one")
def test_a_browser_asks_no_network_for_the_page(tmp_path: Path) -> None:
    text = page(tmp_path, everything())
    loud = tmp_path / "loud.html"
    loud.write_text(text.replace("</main>", '<img src="http://example.invalid/x.png" alt=""></main>'))

    assert asked(tmp_path / "page.html", tmp_path / "a") == set()
    assert asked(loud, tmp_path / "b") == {"http://example.invalid/x.png"}


def some() -> list[Observation]:
    """Checks of every outcome, verdicts of every kind."""
    broken = Check(
        claim="suites/test_x.py::test_y[a|b]", pair="p", status="error", reason="worker\ndied \x00 @all #1 <b>"
    )
    return [START, *checks(), explained(), broken, *judged()]


def test_every_check_is_one_case_with_its_outcome_and_reason(tmp_path: Path) -> None:
    root = ElementTree.fromstring(junit.xml(found := records(tmp_path, some())))

    suite, verdicts = root.findall("testsuite")
    outcome = {"failed": "failure", "error": "error", "skipped": "skipped"}
    cases = suite.findall("testcase")
    told = [next((e.tag for e in case), "passed") for case in cases]
    assert told == [outcome.get(check.status, "passed") for check in found.checks]
    for tag, count in (("failure", "failures"), ("error", "errors"), ("skipped", "skipped")):
        assert int(suite.get(count) or 0) == told.count(tag) > 0
    assert int(suite.get("tests") or 0) == len(cases) == len(found.checks)
    assert [case[0].get("message") for case in cases if len(case)][-1] == "worker\ndied ? @all #1 <b>"
    assert "draftproof replay counterexamples/01K.json" in "".join(case[0].text or "" for case in cases if len(case))
    kinds = {str(case.get("name")): next((e.tag for e in case), "passed") for case in verdicts}
    assert {name.split()[1]: tag for name, tag in kinds.items()} == {
        "kernel_worse": "failure", "kernel_unclear": "skipped", "kernel_better": "passed", "kernel_same": "passed",
        "acceptance_length": "failure", "peak_memory": "skipped",
    }  # fmt: skip


def test_junit_has_the_attributes_that_readers_require(tmp_path: Path) -> None:
    text = junit.xml(records(tmp_path, some()))

    assert text.startswith('<?xml version="1.0" encoding="utf-8"?>\n<testsuites')
    for suite in ElementTree.fromstring(text):
        assert {"name", "tests", "failures", "errors", "skipped", "time", "timestamp"} <= set(suite.keys())
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d", suite.get("timestamp") or "")
        assert all({"name", "classname", "time"} <= set(case.keys()) for case in suite)


def test_a_pull_request_is_told_verdict_regressions_and_what_did_not_run(tmp_path: Path) -> None:
    text = markdown.summary(records(tmp_path, some()))

    assert text.startswith("## :x: 2 of 20 checks failed, in 2 claims.")
    assert "| WORSE | eagle3-llama kernel\\_worse | -5.00% | -7.00% to -3.00% | why |" in text
    assert "1 of 6 comparisons ended SAME." in text
    assert "| kernel\\_same" not in text
    assert "draftproof replay counterexamples/01K.json" in text
    assert "| claim CUDA graph replays the eager step | 4 | no GPU |" in text
    # nobody is called, nothing is linked, no tag gets through, and a bar ends no cell
    assert not re.search(r"@all|[^\\]#1|<b>|<script>", text)
    assert "y \\[a\\|b\\]" in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {4, 6}


def test_a_green_summary_is_short(tmp_path: Path) -> None:
    same = Verdict(metric="m", verdict="SAME", pair="p", effect=1.0)
    green = [START, *(c for c in checks(failing=False) if c.status == "passed"), same]

    text = markdown.summary(records(tmp_path, green))

    assert text.startswith("## :white_check_mark: All 18 checks that ran pass.")
    assert "1 of 1 comparison ended SAME." in text
    assert "| verdict |" not in text


def test_other_conditions_stand_first(tmp_path: Path) -> None:
    for number, driver in enumerate(("550", "560")):
        with Recorder(tmp_path / f"{number}.jsonl", RUN_ID[:-1] + str(number)) as recorder:
            environment = {"source": {"dirty": False}, "gpu": {"driver": driver}}
            recorder.append(Run(started="", environment=environment), Check(claim="c", pair="p", status="passed"))

    text = markdown.summary(store.gather(tmp_path))

    assert text.startswith("> [!WARNING]")
    assert text.index("> - driver: 550 in 1 run; 560 in 1 run") < text.index("## ")


def test_report_writes_all_three_and_says_where(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    page(tmp_path / "runs" / "one", [START, *checks()], "ignored.html")
    out = [str(tmp_path / name) for name in ("p.html", "sub/p.md", "sub/p.xml")]
    names = ["report", "one", "--runs", str(tmp_path / "runs"), "--json"]

    assert cli.run([*names, "-o", out[0], "--md", out[1], "--junit", out[2]]) == 0

    found = json.loads(capsys.readouterr().out)
    assert [found[kind] for kind in ("page", "md", "junit")] == out
    starts = [Path(path).read_text()[:5] for path in out]
    assert starts == ["<!doc", "## :x", "<?xml"]


def test_a_page_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = write("before", tmp_path / "p.html")

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", lambda *names: (_ for _ in ()).throw(OSError("disk full")))
        with pytest.raises(OSError, match="disk full"):
            write("after", out)

    assert out.read_text() == "before"


def test_a_verdict_with_no_number_still_makes_every_document(tmp_path: Path) -> None:
    bare = replace(judged()[0], effect=None, low=None, high=None, p=None, visible=None)  # type: ignore[call-arg]
    found = records(tmp_path, [bare])

    assert "not known" in markdown.summary(found)
    assert "WORSE: not known" in junit.xml(found)
