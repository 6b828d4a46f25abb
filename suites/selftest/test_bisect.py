"""Claim: a search names the commit that made something bad, though probes err, commits do not run and processes die.

Born of asv `find`, which looks once at each commit and so is right only where nothing is noisy, and of pybroker #287,
where an environment that could not be made was taken for a regression.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from harness.record import Accept, Bisection, Case, Probe, Recorder, RecordError, Run, read
from harness.runner import ROOT, Exit, Outcome, Result
from reports.bisection import believe, choose, graph, sharpened
from reports.gates import read_gates
from suites import cli
from suites.bisect import measuring, searching, worktrees
from suites.bisect.commits import History, git, history
from suites.bisect.probing import Claim, Site, meaning
from suites.commands import bisect
from suites.commands.bisect import Options, commits
from suites.commands.desk import Desk, UsageFault
from suites.commands.runs import RECORDS, begin

pytestmark = pytest.mark.correctness

RIGHT = "def area(w, h):\n    return w * h\n"
PLANTED = "def area(w, h):\n    return w + h\n"
TORN = "def area(w, h:\n"
ASK = f"""{sys.executable} -S -c '
try:
    import area
except SyntaxError:
    raise SystemExit(125)
raise SystemExit(area.area(3, 4) != 12)'"""

Parents = Sequence[Sequence[int]]


def line(num: int) -> Parents:
    """A history without merges; commit 0 is the good end."""
    return [[i - 1] if i else [] for i in range(num)]


def repository(folder: Path, parents: Parents, texts: Sequence[str]) -> list[str]:
    """A checkout of a history whose commit i holds area.py with texts[i]; the shas, the last one checked out."""
    git(folder, "init", "--quiet", "--initial-branch=main")
    stream = []
    for i, (above, text) in enumerate(zip(parents, texts, strict=True)):
        message, content = f"Change {i}\n", f"{text}# {i}\n"
        stream += ["commit refs/heads/main", f"mark :{i + 1}", f"committer a <a@example.org> {1_700_000_000 + i} +0000"]
        stream += [f"data {len(message)}", message.rstrip("\n"), *(f"from :{p + 1}" for p in above[:1])]
        stream += [*(f"merge :{p + 1}" for p in above[1:]), "M 100644 inline area.py", f"data {len(content)}", content]
    done = subprocess.run(
        ["git", "-C", str(folder), "fast-import", "--quiet", "--force", f"--export-marks={folder / '.git' / 'marks'}"],
        input="\n".join(stream) + "\n",
        text=True,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    git(folder, "checkout", "--quiet", "main")
    marks = dict(row.split() for row in (folder / ".git" / "marks").read_text().splitlines())
    return [marks[f":{i + 1}"] for i in range(len(parents))]


def descend(parents: Parents, culprit: int) -> set[int]:
    """The culprit and everything after it."""
    found = {culprit}
    for i, above in enumerate(parents):
        if found & set(above):
            found.add(i)
    return found


def planted_at(folder: Path, parents: Parents, culprit: int, torn: Sequence[int] = ()) -> list[str]:
    """A repository whose commit `culprit` brought a real bug; commits in `torn` do not even compile."""
    bad = descend(parents, culprit)
    return repository(
        folder, parents, [TORN if i in torn else PLANTED if i in bad else RIGHT for i in range(len(parents))]
    )


def look(folder: Path, sha: str) -> str:
    """The code of a commit, run."""
    there: dict[str, Callable[[int, int], int]] = {}
    try:
        exec(git(folder, "show", f"{sha}:area.py"), there)  # type: ignore[arg-type]
    except SyntaxError:
        return "untestable"
    return "good" if there["area"](3, 4) == 12 else "bad"


def sought(folder: Path, found: History, seed: int = 0, wrong: float = 0.0, **options: int) -> Bisection:
    """A search in this process; a share of the answers is the wrong way round."""
    chance = random.Random(f"wrong {seed}")

    def ask(sha: str) -> Probe:
        answer = look(folder, sha)
        if answer != "untestable" and chance.random() < wrong:
            answer = {"good": "bad", "bad": "good"}[answer]
        return Probe(candidate=sha, answer=answer, reason="looked")

    with Recorder(folder / ".git" / f"search-{seed}.jsonl") as recorder:
        return searching.search(searching.begin(found, "area"), [], ask, recorder, **options)


def test_sixty_four_commits_and_one_wrong_probe_in_twenty(tmp_path: Path, profile: str) -> None:
    endings, culprits = [], []
    for seed in range(100 if profile == "nightly" else 12):
        folder = tmp_path / str(seed)
        folder.mkdir()
        place = random.Random(seed).randrange(1, 65)
        shas = planted_at(folder, line(65), place)
        endings.append(sought(folder, history(folder, shas[0], shas[-1]), seed, wrong=0.05))
        culprits.append((shas[place],))

    right = sum(ending.culprits == culprit for ending, culprit in zip(endings, culprits, strict=True))
    assert right >= 0.95 * len(endings)
    assert np.mean([ending.num_probes for ending in endings]) < 12


# commit i + 1 comes from one or two of the commits before it
HISTORIES = st.integers(2, 12).flatmap(
    lambda n: st.tuples(*(st.sets(st.integers(0, i), min_size=1, max_size=2).map(sorted) for i in range(n)))
)


@example(history=([0], [0], [1, 2], [3]), culprit=0)
@given(history=HISTORIES, culprit=st.integers(0, 11))
def test_a_history_with_merges_is_asked_as_it_is(history: Parents, culprit: int) -> None:
    parents = [[], *history]
    # candidates are what the last commit comes from, the good end left out
    kept = [i for i in range(1, len(parents)) if len(parents) - 1 in descend(parents, i)]
    places = {commit: place for place, commit in enumerate(kept)}
    culprit = kept[culprit % len(kept)]
    found = graph([[places[p] for p in parents[i] if p in places] for i in kept])
    good, bad, n = np.zeros(len(kept) + 1), np.zeros(len(kept) + 1), len(kept)

    good[n] += 1
    bad[n - 1] += 1
    while (place := choose(belief := believe(found, good, bad), set())) is not None and belief.posterior.max() < 0.95:
        (bad if place < n and kept[place] in descend(parents, culprit) else good)[place] += 1

    assert kept[int(belief.posterior.argmax())] == culprit


def test_what_cannot_be_tested_is_never_the_culprit(tmp_path: Path) -> None:
    shas = planted_at(tmp_path, line(9), 5, torn=[2, 4])

    ending = sought(tmp_path, history(tmp_path, shas[0], shas[-1]))

    # whether commit 4 or 5 brought it cannot be told, and both are named
    assert (ending.status, set(ending.culprits)) == ("narrowed", {shas[4], shas[5]})
    assert sum(sorted(ending.posterior)[-2:]) > 0.9


@pytest.mark.parametrize(("code", "answer"), [(0, "good"), (1, "bad"), (124, "bad"), (125, "untestable"),
                                              (126, "untestable"), (127, "untestable"), (128, "untestable"),
                                              (-9, "untestable")])  # fmt: skip
def test_exit_codes_mean_what_git_says_they_mean(code: int, answer: str) -> None:
    assert meaning(code) == answer


def result(status: str, message: str = "") -> Outcome:
    exits = {"passed": Exit.PASSED, "failed": Exit.GATE_FAILED, "error": Exit.GATE_FAILED,
             "skipped": Exit.CAPABILITY_MISSING}  # fmt: skip
    return Outcome(exits[status], (Result("t", status, message, 0.1),), "", 0.1)


@pytest.mark.parametrize(
    ("status", "message", "is_todays", "answer"),
    [
        ("passed", "", False, "good"),
        ("failed", "AssertionError: 7 != 12", True, "bad"),
        ("failed", "ImportError: cannot import name 'x'", False, "bad"),
        # today's claim asks for what an older commit does not have
        ("failed", "ImportError: cannot import name 'x'", True, "untestable"),
        ("error", "no such file", False, "untestable"),
        ("skipped", "no GPU", False, "untestable"),
    ],
)
def test_a_claim_that_could_not_be_asked_is_no_answer(status: str, message: str, is_todays: bool, answer: str) -> None:
    assert Claim.judge(result(status, message), is_todays)[0] == answer


def test_a_regression_that_is_not_there_tonight_is_not_looked_for(tmp_path: Path) -> None:
    shas = repository(tmp_path, line(9), [RIGHT] * 9)

    ending = sought(tmp_path, history(tmp_path, shas[0], shas[-1]))

    assert (ending.status, ending.culprits) == ("not_reproduced", ())
    assert ending.num_probes < 6
    with pytest.raises(UsageFault, match="no ancestor"):
        history(tmp_path, shas[-1], shas[0])


def test_both_ends_are_measured_before_anything_else(tmp_path: Path) -> None:
    shas = planted_at(tmp_path, line(9), 3)

    sought(tmp_path, history(tmp_path, shas[0], shas[-1]))

    lines = read(tmp_path / ".git" / "search-0.jsonl")
    assert [line.candidate for line in lines if isinstance(line, Probe)][:2] == [shas[0], shas[-1]]
    last = lines[-1]
    assert isinstance(last, Bisection)
    assert np.argmax(sharpened(last, [line for line in lines if isinstance(line, Probe)])[-1]) == 2


def options(folder: Path, good: str, **more: object) -> Options:
    return Options(good=good, bad="HEAD", command=ASK, repository=folder, **more)  # type: ignore[arg-type]


def test_a_search_that_was_killed_goes_on_and_repeats_no_probe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shas = planted_at(tmp_path, line(17), 6)
    runs, asked = tmp_path / ".git" / "runs", []
    whole = bisect.look_at

    def dies(trees: object, sha: str, *rest: object) -> Probe:
        asked.append(sha)
        if len(asked) == 4:
            raise KeyboardInterrupt
        return whole(trees, sha, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(bisect, "look_at", dies)
    with pytest.raises(KeyboardInterrupt):
        commits(Desk(), partial(begin, runs), options(tmp_path, shas[0]), runs)
    (run,) = (folder.name for folder in runs.iterdir())

    found = commits(Desk(), partial(begin, runs), options(tmp_path, shas[0], resume=run), runs)

    assert (found.exit, found.facts["culprits"]) == (Exit.PASSED, (shas[6],))
    probes = [line for line in read(runs / run / RECORDS) if isinstance(line, Probe)]
    # the one that was under way when it died is asked again, and no other
    assert [probe.candidate for probe in probes] == [*asked[:3], *asked[4:]]
    assert len(probes) == found.facts["num_probes"]
    with pytest.raises(RecordError, match="asks something else"):
        commits(Desk(), partial(begin, runs), options(tmp_path, shas[1], resume=run), runs)


def started(folder: Path, *arguments: str, slow: float = 0.0) -> subprocess.Popen[str]:
    """The command line in a process of its own; every probe leaves the time it began in a file."""
    log = folder / ".git" / "asked"
    command = f"git rev-parse HEAD >> {log}; sleep {slow}; {ASK}"
    words = [sys.executable, "-m", "suites.cli", "bisect", "commits", "--command", command, "--repo", str(folder)]
    words += ["--runs", str(folder / ".git" / "runs"), *arguments]
    temporary = folder / ".git" / "tmp"
    temporary.mkdir(exist_ok=True)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(temporary)}
    return subprocess.Popen(words, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            start_new_session=True)  # fmt: skip


def test_after_kill_nine_nothing_is_left_and_nothing_is_lost(tmp_path: Path) -> None:
    shas = planted_at(tmp_path, line(17), 11)
    before = git(tmp_path, "status", "--porcelain"), git(tmp_path, "worktree", "list"), git(tmp_path, "show-ref")
    process = started(tmp_path, "--good", shas[0], slow=0.2)
    asked = tmp_path / ".git" / "asked"
    while not asked.is_file() or len(asked.read_text().split()) < 3:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    (run,) = (folder.name for folder in (tmp_path / ".git" / "runs").iterdir())
    assert list((tmp_path / ".git" / "tmp").glob(f"{worktrees.PREFIX}*"))

    process = started(tmp_path, "--good", shas[0], "--resume", run, "--json")
    # the command differs from the first by its pause, so it is another question
    assert process.wait() == Exit.USAGE
    process.communicate()
    process = started(tmp_path, "--good", shas[0], "--resume", run, "--json", slow=0.2)
    found = json.loads(process.communicate()[0])

    assert (process.returncode, found["culprits"]) == (Exit.PASSED, [shas[11]])
    assert len(asked.read_text().split()) == found["num_probes"] + 1
    assert not list((tmp_path / ".git" / "tmp").glob(f"{worktrees.PREFIX}*"))
    after = git(tmp_path, "status", "--porcelain"), git(tmp_path, "worktree", "list"), git(tmp_path, "show-ref")
    assert after == before


def test_git_bisect_run_is_answered_in_its_own_codes(tmp_path: Path) -> None:
    shas = planted_at(tmp_path, line(7), 4, torn=[2])
    script = tmp_path / ".git" / "ask.sh"
    script.write_text(f"PYTHONPATH={ROOT} {sys.executable} -m suites.cli bisect commits --as-git-run --repo {tmp_path} "
                      f"--command \"$(cat {tmp_path}/.git/question)\"\n")  # fmt: skip
    (tmp_path / ".git" / "question").write_text(ASK)

    git(tmp_path, "bisect", "start", shas[-1], shas[0])
    said = git(tmp_path, "bisect", "run", "sh", str(script))

    assert f"{shas[4]} is the first bad commit" in said


def test_a_question_that_cannot_be_asked_aborts_git(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    repository(tmp_path, line(2), [RIGHT] * 2)

    assert cli.run(["bisect", "commits", "--as-git-run", "--repo", str(tmp_path)]) == 128
    assert "ask one question" in capsys.readouterr().err


def test_todays_suite_is_laid_over_the_models_of_a_commit(tmp_path: Path) -> None:
    today, tree = tmp_path / "today", tmp_path / "tree"
    for root, word in ((today, "new"), (tree, "old")):
        for name in (*worktrees.INSTRUMENTS, "optimized"):
            place = root / name if "." in name else root / name / "page.py"
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_text(word)
    (tree / "suites" / "gone.py").write_text("old")

    worktrees.lay_over(tree, today)

    assert {file.read_text() for file in tree.rglob("*") if file.is_file() and "optimized" not in file.parts} == {"new"}
    assert (tree / "optimized" / "page.py").read_text() == "old"


CASE = Case(pair="p", gate="passed", num_draft_tokens=3)


@pytest.mark.parametrize(
    ("kept", "answer", "looks"),
    [
        ({"good": [2, 2, 1], "here": [2, 2, 1]}, "good", 1),
        ({"good": [2, 2, 1], "here": [1, 1, 0]}, "bad", 1),
        # two prompts can show neither a change nor its absence
        ({"good": [2, 0, 3], "here": [1, 3, 0], "prompts": 2}, "unclear", 3),
        ({"good": [2, 2, 1], "here": None}, "untestable", 1),
    ],
)
def test_a_metric_is_held_against_what_the_good_end_measured_tonight(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: dict[str, Any], answer: str, looks: int
) -> None:
    asked = []

    def measure(site: Site, *rest: object) -> str:
        asked.append(site.name)
        chance = random.Random(len(asked))
        steps = kept["good" if site.name == "good" else "here"]
        if steps is None:
            raise measuring.NotMeasured("no numbers from a red gate")
        with Recorder(tmp_path / str(len(asked)) / RECORDS) as recorder:
            recorder.append(Run(started=""))
            for prompt in range(kept.get("prompts", 40)):
                accepted = chance.sample(steps, 3)
                words = {"prompt": str(prompt), "dataset": "d", "num_draft_tokens": 3, "emitted": sum(accepted) + 4}
                recorder.append(Accept(case=CASE, accepted=accepted, **words))
        return str(recorder.path)

    monkeypatch.setattr(measuring, "measure", measure)
    question = measuring.Metric("acceptance_length", ["acceptance"], read_gates(), tmp_path)

    assert question.ask(Site("good", tmp_path, tmp_path)).answer == "good"
    assert question.ask(Site("here", tmp_path, tmp_path)).answer == answer
    assert asked == ["good"] + ["here"] * looks
