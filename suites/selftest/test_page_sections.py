"""Claim: each section says what its records say: the worst in front, every number with its own interval and unit.

All numbers below are made up for these tests.
"""

import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from harness.record import Accept, Audit, Case, Check, Debt, Observation, Recorder, Run, Sample, Step
from reports import page, store
from reports.newest import newest
from reports.sections import (
    acceptance,
    bisect,
    claims,
    clocks,
    compared,
    cost,
    failures,
    history,
    ledger,
    prompts,
    provenance,
    rig,
    shards,
    speed,
)
from reports.sections.comparable import warnings
from reports.sparks import spark
from suites.selftest.made_up import START, Elements, accepts, records, samples
from suites.selftest.made_up_nights import GPU, RUNS, costs, explained, judged, nights, search

pytestmark = pytest.mark.correctness

NIGHTS, SLOWER = 14, 8


@pytest.fixture(scope="module")
def past(tmp_path_factory: pytest.TempPathFactory) -> store.Records:
    """Fourteen nights, the last six slower and on another driver; the last one has everything else."""
    last = (explained(), *costs(), *search(), *judged())
    return store.gather(nights(tmp_path_factory.mktemp("nights"), NIGHTS, SLOWER, last))


@pytest.fixture(scope="module")
def whole(past: store.Records) -> str:
    return page.html(past)


def runs(folder: Path, *parts: list[Observation]) -> store.Records:
    """Records of several runs, oldest first."""
    for name, part in zip(RUNS, parts, strict=False):
        with Recorder(folder / f"{name}.jsonl", name) as recorder:
            recorder.append(*part)
    return store.gather(folder)


def test_a_page_of_many_nights_is_well_formed_and_names_every_section(whole: str, past: store.Records) -> None:
    elements = Elements(whole)
    ids = [attributes["id"] for _, attributes in elements.found if "id" in attributes]

    assert (elements.open, len(ids)) == ([], len(set(ids)))
    assert {"history", "prompts", "compared", "cost", "clocks", "bisect"} <= set(ids)
    assert page.html(past) == whole
    drawn = [a for tag, a in elements.found if tag == "svg"]
    assert all(a["role"] == "img" and a["aria-label"] for a in drawn)
    assert "$" not in "".join(re.findall(r"<svg.*?</svg>", whole, flags=re.DOTALL))


def test_headings_go_down_one_step_at_a_time(whole: str) -> None:
    levels = [int(tag[1]) for tag, _ in Elements(whole).found if re.fullmatch("h[1-6]", tag)]

    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))


def test_what_scrolls_or_opens_is_reached_by_keyboard(whole: str) -> None:
    elements = Elements(whole).found

    scrolls = [a for _, a in elements if "scroll" in (a.get("class") or "").split()]
    assert scrolls
    assert all(a["tabindex"] == "0" and a["role"] == "region" and a["aria-label"] for a in scrolls)
    assert sum(tag == "details" for tag, _ in elements) == sum(tag == "summary" for tag, _ in elements)


def test_a_later_run_replaces_the_same_question_on_the_same_machine_alone(tmp_path: Path) -> None:
    red = Check(claim="c", pair="p", status="failed", replay="again")
    green, other = replace(red, status="passed"), replace(red, claim="d")
    machine = {"cpu": {"name": "a"}}

    same = newest(runs(tmp_path / "1", [Run(started="", environment=machine), red, other],
                       [Run(started="", environment=machine), green]))  # fmt: skip
    apart = newest(runs(tmp_path / "2", [Run(started="", environment=machine), red],
                        [Run(started="", environment={"cpu": {"name": "b"}}), green]))  # fmt: skip

    assert [(c.claim, c.status) for c in same.checks] == [("d", "failed"), ("c", "passed")]
    assert [c.status for c in apart.checks] == ["failed", "passed"]


@pytest.mark.parametrize(
    ("commit", "started", "kept"),
    [("a", "2026-01-02T03:00:00Z", ["failed", "passed"]), ("b", "2026-01-02T03:00:00Z", ["passed"]),
     ("a", "2026-01-03T03:00:00Z", ["passed"])],
)  # fmt: skip
def test_the_same_files_asked_twice_on_one_evening_stand_side_by_side(
    tmp_path: Path, commit: str, started: str, kept: list[str]
) -> None:
    red = Check(claim="c", pair="p", status="failed", replay="again")
    first = Run(started="2026-01-02T02:00:00Z", environment={"source": {"commit": "a"}})
    again = Run(started=started, environment={"source": {"commit": commit}})

    found = newest(runs(tmp_path, [first, red], [again, replace(red, status="passed")]))

    assert [c.status for c in found.checks] == kept


def test_newest_keeps_all_lines_of_the_last_run(past: store.Records) -> None:
    now = newest(past)

    assert [c.run for c in now.checks if c.claim == "twin agrees with reference"] == [RUNS[NIGHTS - 1]]
    assert {s.run for s in now.samples} == {RUNS[NIGHTS - 1]}
    assert len([s for s in now.samples if s.metric == "decode" and s.case.pair == "eagle3-llama"]) == 8
    assert {a.run for a in now.accepts} == {RUNS[NIGHTS - 1]}


def test_a_heat_is_the_largest_share_and_a_skip_is_no_pass(tmp_path: Path) -> None:
    found = [Check(claim="c", pair="p", status="passed", used=used) for used in (0.1, 0.8, 0.3)]
    found += [Check(claim="s", pair="p", status="skipped", reason="no GPU")]
    found += [Check(claim="f", pair="p", status=s, used=2.0, replay="r") for s in ("passed", "failed")]

    rows = dict(claims.table(records(tmp_path, found)).rows)

    assert [(cell.status, cell.text, cell.heat) for name in "cfs" if (cell := rows[name][0])] == [
        ("passed", "80 %", 0.8), ("failed", "failed, 200 %", 1.0), ("skipped", "skipped", 0.0),
    ]  # fmt: skip
    heats = [cell.heat for (cell,) in rows.values() if cell]
    assert sorted(heats) == [0.0, 0.8, 1.0]


def test_a_sparkline_holds_the_last_thirty_nights(past: store.Records) -> None:
    drawn = spark([float(i) for i in range(40)], "x", " %")

    assert "30 nights: 10 to 39 %, last 39 %" in drawn
    points = re.findall(r"[\d.]+,([\d.]+)", re.findall(r'points="([^"]+)"', drawn)[0])
    assert [float(p) for p in points] == sorted(map(float, points), reverse=True)
    assert spark([1.0, 2.0], "x") == ""
    cells = dict(claims.with_nights(claims.table(newest(past)), past).rows)["twin agrees with reference"]
    assert [f"{NIGHTS} nights" in cell.nights for cell in cells if cell] == [True]


def test_a_failure_card_holds_example_explanation_ladder_and_replay(past: store.Records) -> None:
    (card,) = failures.failures(newest(past))

    assert (card.given, card.replay) == ("batch=2, width=70, <b>", "draftproof replay counterexamples/01K.json")
    assert card.explanation.startswith("explained by: draft's capture shift: 1")
    assert card.ladder is not None
    assert "The first one beyond it: hidden.6." in card.ladder.note
    assert "hidden.6 240x" in card.ladder.svg
    assert "logits.1 not finite" in card.ladder.svg
    bare = replace(explained(), extra={})
    assert (failures.replay(bare), failures.ladder("x", ())) == (bare.replay, None)


def test_history_puts_what_moved_first_and_says_what_changed_in_the_machine(past: store.Records) -> None:
    section = history.build(newest(past), past)

    assert section is not None
    table, machine = section.facts["panels"]
    assert table.rows[0][:3] == ("eagle3-llama: decode", "tokens/s", str(NIGHTS))
    assert machine.rows == ((f"2026-01-{SLOWER + 1:02}T02:00:00Z", "driver 550.1 -> 560.2"),)
    assert "1 change of the machine" in table.plots[0].svg
    assert history.build(newest(past), past._replace(runs=past.runs[-1:], samples=[], accepts=[])) is None


def test_history_ranks_losses_in_units_of_the_nights_own_spread(tmp_path: Path) -> None:
    case = Case(pair="p", gate="passed")
    levels = {"quiet": [100, 101, 100, 99, 96], "loud": [100, 120, 80, 110, 90], "gain": [100, 101, 100, 99, 120]}
    one = Sample(case=case, metric="m", unit="t", better="up", values=(1.0,))
    parts = [[Run(started=""), *(replace(one, metric=m, values=(v[i],)) for m, v in levels.items())] for i in range(5)]

    section = history.build(every := runs(tmp_path, *parts), every)

    assert section is not None
    assert [row[0] for row in section.facts["panels"][0].rows] == ["p: quiet", "p: loud", "p: gain"]


def test_conditions_are_compared_where_runs_asked_the_same(past: store.Records, tmp_path: Path) -> None:
    assert warnings(past) == [
        f"driver: 550.1 in {SLOWER} runs; 560.2 in {NIGHTS - SLOWER} runs",
        f"{NIGHTS} runs of {NIGHTS} had uncommitted changes, or did not say",
    ]
    clean = {"source": {"commit": "c", "dirty": False}, "gpu": GPU, "versions": {"torch": "2.1"}}
    other = clean | {"versions": {"torch": "2.2"}}
    check = Check(claim="c", pair="p", status="passed")
    asked, elsewhere = (
        [Run(started="", environment=clean), check],
        [Run(started="", environment=other), replace(check, pair="q")],
    )
    assert warnings(runs(tmp_path / "1", asked, elsewhere)) == []
    again = [Run(started="", environment=other, profile="ci"), check]
    assert warnings(runs(tmp_path / "2", asked, again)) == [
        "torch: 2.1 in 1 run; 2.2 in 1 run", "profile: none in 1 run; ci in 1 run",
    ]  # fmt: skip


def test_other_prompts_and_other_clocks_are_told(tmp_path: Path) -> None:
    clean = Run(started="", environment={"source": {"dirty": False}})
    parts = []
    for name, mhz in (("a", 1700.0), ("b", 1400.0)):
        case = Case(pair="p", gate="passed", num_draft_tokens=1, prompts_sha256=name)
        answer = Accept(case=case, prompt="1", dataset="d", num_draft_tokens=1, accepted=(1, 0), emitted=4)
        timed = Sample(
            case=case, metric="m", unit="ms", better="down", values=(1.0,), telemetry={"sm_mhz": {"median": mhz}}
        )
        parts.append([clean, answer, timed])

    assert warnings(runs(tmp_path, *parts)) == [
        "clocks: the middle SM clock of a run lies between 1400 and 1700 MHz",
        "prompts: p answered 2 different sets of prompts named d",
    ]


def test_warnings_stand_before_the_verdict(whole: str) -> None:
    assert 0 < whole.index("different conditions") < whole.index('id="verdict"')


def test_verdicts_come_gravest_first_with_their_own_intervals(past: store.Records) -> None:
    section = compared.build(newest(past), past)

    assert section is not None
    assert [row[1] for row in section.facts["rows"]] == ["WORSE", "WORSE", "INVALID", "UNCLEAR", "BETTER", "SAME"]
    rows = {row[0]: row[2:5] for row in section.facts["rows"]}
    assert rows["eagle3-llama kernel_worse"] == ("-5.00%", "-7.00% to -3.00%", "2.00%")
    assert rows["eagle3-llama acceptance_length d"] == ("-0.100", "-0.130 to -0.070", "0.050")
    assert rows["eagle3-llama peak_memory"] == ("not known",) * 3
    assert [p.title for p in section.facts["plots"]] == ["Effects on their bands"] * 2
    assert "kernel_worse WORSE: -5.00%, -7.00% to -3.00%" in section.facts["plots"][0].svg


def test_prompts_are_compared_with_the_run_before(past: store.Records) -> None:
    section = prompts.build(newest(past), past)

    assert section is not None
    (panel,) = section.facts["panels"]
    ((label, changed, interval, p, units, _),) = panel.rows
    assert (label, units) == ("eagle3-llama, greedy, made-up", "24")
    low, high = (float(x) for x in interval.split(" to "))
    assert low <= float(changed) <= high < 0
    assert float(p) < 0.05
    assert len(panel.plots) == 2


def test_kinds_of_prompts_have_their_own_length(tmp_path: Path) -> None:
    answers = accepts("p", 0.7, prompts=6)
    kinds = [replace(a, extra={"category": "code" if i % 2 else "chat"}) for i, a in enumerate(answers)]

    panel = acceptance.categories(records(tmp_path, kinds))

    assert panel.head == ("", "chat", "code")
    for column, kind in enumerate(panel.head[1:], 1):
        mine = acceptance.acceptance(records(tmp_path, [a for a in kinds if a.extra["category"] == kind]))
        assert panel.rows[0][column] == f"{mine.rows[0][1]} ({mine.rows[0][2]})"
    assert acceptance.categories(records(tmp_path, answers)).rows == ()


def test_costs_multiply_to_the_speed_up_and_invalid_visits_are_left_out(past: store.Records, tmp_path: Path) -> None:
    section = cost.build(newest(past), past)

    assert section is not None
    falls, grid, roof, ops = section.facts["panels"]
    assert falls.rows[0] == ("Made-up-8B, B=1", "2.61", "0.95", "0.82", "0.99", "1", "2.01", "1.29", "1", "3.1")
    assert "together 2.01 times plain decoding" in falls.plots[0].svg
    assert len(grid.plots) == 1
    assert "B=64 K=5" in grid.plots[0].svg
    assert roof.rows[0][:4] == ("Made-up-8B, B=1", "4.1", "6.125", "67%")
    assert ops.rows == (("linear, 4096 -> 6144, 1 row, triton", "15", "83%"),)
    good = Sample(case=Case(pair="p", gate="passed"), metric="m", unit="ms", better="down", values=(1.0,))
    bad = replace(good, values=(9.0,), telemetry={"valid": False})
    (middle,) = cost.middles(records(tmp_path, [good, bad]).samples).values()
    assert middle == {"m": 1.0}


def test_runs_of_one_evening_are_processes_of_one_measurement(tmp_path: Path) -> None:
    start = Run(started="2026-01-02T02:00:00Z", environment={"source": {"commit": "a"}, "cpu": {"name": "c"}})
    slow = [replace(s, values=tuple(v / 2 for v in s.values)) for s in samples()]

    every = runs(tmp_path, [start, *samples()], [start, *slow])
    (panel,) = speed.speeds(newest(every))

    assert [row[4] for row in panel.rows] == ["40", "40", "40"]
    # each block is held against the baseline of its own run
    assert float(panel.rows[2][2].split()[0]) == pytest.approx(128 / 21, rel=0.02)
    other = {**start.environment, "cpu": {"name": "d"}}
    apart = runs(tmp_path / "apart", [start, *samples()], [replace(start, environment=other), *slow])
    assert len(speed.speeds(newest(apart))[0].rows) == 6


def test_clocks_show_every_visit_and_count_the_slow_ones(past: store.Records) -> None:
    section = clocks.build(newest(past), past)

    assert section is not None
    (panel,) = section.facts["panels"]
    assert panel.note == "48 timed visits; slowed down in 6 (software power cap in 6 visits)."
    assert "slowed down in 6" in panel.plots[0].svg
    assert clocks.build(newest(past)._replace(samples=samples()), past) is None


def test_the_rig_has_a_badge_for_each_thing_a_speed_rests_on(past: store.Records, tmp_path: Path) -> None:
    badges = {name: (tone, words) for tone, name, words in rig.badges(newest(past))}

    assert badges["source"] == ("bad", "uncommitted changes")
    assert badges["clocks"] == ("bad", "throttled in up to 20 % of readings")
    assert badges["certificate of speed"] == ("good", "8 units a side; changes from 0.021 on are seen")
    alone = {name: tone for tone, name, _ in rig.badges(records(tmp_path, [START]))}
    assert alone == {"source": "bad", "clocks": "unsure", "certificate": "unsure"}


def test_a_search_shows_its_culprit_its_posterior_and_every_look(past: store.Records) -> None:
    section = bisect.build(newest(past), past)

    assert section is not None
    (panel,) = section.facts["panels"]
    assert panel.title == "1111111111 Change number 17: the culprit"
    assert [row[1] for row in panel.rows] == ["good", "bad", "good", "bad", "untestable", "good"]
    assert "1111111111 62.9%, 1 looks" in panel.plots[0].svg
    open_search = [search()[0]]
    assert "not finished" in bisect.search("x", open_search[0], []).note


@pytest.mark.parametrize("status", ["found", "narrowed", "not_reproduced", "out_of_budget"])
def test_every_end_of_a_search_has_its_sentence(status: str) -> None:
    done: Any = search()[-1]

    panel = bisect.search("x", replace(done, kind="deps", posterior=(), status=status), [])

    assert panel.plots == ()
    assert panel.note.startswith("llama-eagle3 decode. ")


def test_a_night_tells_its_steps_and_since_when_a_claim_is_owed(tmp_path: Path) -> None:
    skipped = Check(claim="suites/test_x.py::test_y[1]", pair="p", status="skipped", reason="Skipped: no GPU")
    owed = Debt(what="suites/test_x.py::test_y", pair="p", reason="no GPU", last="2026-01-01", nights=12)
    steps = [Step(name="speed", status="skipped", reason="certificate failed"), Step(name="lock", status="passed")]

    found = ledger.debts(records(tmp_path, [START, skipped, owed, *steps]))

    assert found[0][:3] == ("step speed of the night", 0, "skipped: certificate failed")
    assert found[1] == ("claim x: y", 1, "no GPU", "2026-01-01, 12 nights without")
    assert not any("lock" in line.what for line in found)


def test_provenance_of_a_thousand_runs_is_short(tmp_path: Path) -> None:
    case = Case(pair="p", gate="passed")
    every = records(tmp_path, [START, case])
    many = every._replace(
        runs=[replace(START, run=f"{i:026}") for i in range(1000)],
        cases=[replace(case, run=str(i)) for i in range(1000)],
    )

    facts = provenance.build(many, many).facts

    assert facts["runs"][0]["run"] == f"{999:026}"
    assert (len(facts["runs"]), len(facts["older"]), facts["unshown"]) == (12, 48, 940)
    assert [(c.pair, times) for c, times in facts["cases"]] == [("p", 1000)]


def test_a_shard_map_names_every_holder_every_copy_and_every_gap(tmp_path: Path) -> None:
    def weight(split: str, whole: list[int], held: list[int] | str) -> dict[str, Any]:
        return {"parameter": f"layers.0.{split}.weight", "count": 1, "split": split, "shapes": {"1": whole, "4": held}}

    def of(*found: Any) -> Any:
        return shards.slices(weight(*found))

    assert of("row", [8, 64], [8, 16]) == [(0, 16, (0,)), (16, 32, (1,)), (32, 48, (2,)), (48, 64, (3,))]
    assert of("heads", [64, 8], [32, 8]) == [(0, 32, (0, 1)), (32, 64, (2, 3))]
    assert of("vocab", [100, 8], [48, 8]) == [(0, 48, (0,)), (48, 96, (1,)), (96, 100, (2,))]
    assert of("column", [100, 8], [20, 8])[-1] == (80, 100, ())
    plan = [weight("row", [8, 64], [8, 16]), weight("column", [9, 8], "9 do not divide"),
            weight("replicated", [9], [9])]  # fmt: skip
    side = {"shards": plan}
    audit = Audit(
        target="t", draft="d", pair="p", outcome="passed", facts={"accounting": {"target": {}, "draft": side}}
    )

    section = shards.build(found := records(tmp_path, [audit]), found)

    assert section is not None
    (drawn,) = section.facts["panels"][0].plots
    assert drawn.title == "d"
    assert drawn.note == "1 weight more is on every rank. Cannot be split: layers.0.column.weight: 9 do not divide."
    assert "16 to 31 on 1" in drawn.svg
