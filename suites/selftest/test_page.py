"""Claim: the page is one offline file, the same bytes for the same record, and says what was not measured.

All numbers below are made up for these tests.
"""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from harness.record import Accept, Case, Check, Observation, Run, Sample, Verdict
from reports import statistics
from reports.panels import place_of, sentence_of
from reports.sections import acceptance, claims, separation, speed, verdict
from suites.selftest.made_up import START, Elements, accepts, checks, everything, page, planted, records, samples

pytestmark = pytest.mark.correctness


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> str:
    return page(tmp_path_factory.mktemp("page"), everything())


def test_the_page_asks_no_network_and_is_small(full: str) -> None:
    assert len(full.encode()) < 2_000_000
    assert not re.search(r"https?:|//[a-z]", full)
    for tag, attributes in Elements(full).found:
        assert tag not in ("script", "img", "iframe", "object")
        assert all(name not in attributes for name in ("src", "srcset", "action"))
        assert re.match(r"#|data:,", attributes.get("href") or "#")
    assert "@import" not in full


def test_the_same_record_gives_the_same_bytes(tmp_path: Path, full: str) -> None:
    assert page(tmp_path, everything(), "again.html") == full


def test_tags_close_ids_are_unique_and_links_arrive(full: str) -> None:
    elements = Elements(full)
    ids = [attributes["id"] for _, attributes in elements.found if "id" in attributes]

    assert elements.open == []
    assert len(ids) == len(set(ids))
    targets = [a["href"] for _, a in elements.found if (a.get("href") or "").startswith("#")]
    assert {t[1:] for t in targets if t} <= set(ids)
    assert set(re.findall(r"url\(#([^)]+)\)", full)) <= set(ids)


def test_every_plot_has_words_instead_of_itself(full: str) -> None:
    plots = [attributes for tag, attributes in Elements(full).found if tag == "svg"]

    assert len(plots) == 9
    assert all(p["role"] == "img" and len(p["aria-label"] or "") > 40 for p in plots)


def test_plots_take_every_colour_from_the_page(full: str) -> None:
    drawn = "".join(re.findall(r"<svg.*?</svg>", full, flags=re.DOTALL))

    assert set(re.findall(r"#[0-9a-f]{6}\b", drawn)) == set()
    assert set(re.findall(r"var\((--[a-z0-9-]+)\)", drawn)) <= set(re.findall(r"(--[a-z0-9-]+):", full))


def test_light_dark_print_and_phone_are_thought_of(full: str) -> None:
    for query in ("prefers-color-scheme: dark", "@media print", "max-width: 40rem", "width=device-width"):
        assert query in full


def contrast(one: str, other: str) -> float:
    """Of two colours, as WCAG 2 defines it."""
    lights = []
    for color in (one, other):
        parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        lights.append(0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2] + 0.05)
    return max(lights) / min(lights)


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_words_and_marks_stand_out_in_light_and_dark(full: str, scheme: int) -> None:
    roots = re.findall(r":root \{(.*?)\}", full, flags=re.DOTALL)
    colors = dict(re.findall(r"--([a-z0-9-]+): (#[0-9a-f]{6})", roots[scheme]))

    for under in ("page", "sheet"):
        for word in ("ink", "muted", "link", "good", "bad", "unsure"):
            assert contrast(colors[word], colors[under]) >= 4.5, (word, under)
        for number in range(1, 7):
            assert contrast(colors[f"series-{number}"], colors[under]) >= 3, (number, under)


def test_sections_come_in_the_order_of_need(full: str) -> None:
    sections = [a["id"] for tag, a in Elements(full).found if tag == "section"]

    assert sections == [
        "verdict", "ledger", "rig", "claims", "failures", "planted", "acceptance", "separation",
        "compared", "speed", "provenance",
    ]  # fmt: skip


def test_what_others_wrote_is_escaped(full: str) -> None:
    assert "<script>alert" not in full
    assert "&lt;script&gt;alert" in full


def test_a_failure_leads_and_can_be_run_again(full: str) -> None:
    assert "1 of 19 checks failed, in 1 claim." in full
    assert full.count("draftproof replay counterexamples/twin-eagle3-mla-17.json") == 2
    assert "logits[0, 5, 131]" in full
    assert "failed, 340 %" in full


def test_the_rig_is_told_as_it_is(full: str) -> None:
    assert "no GPU: not measured (no NVIDIA driver)" in full
    assert "0123456789ab, dirty" in full
    assert "numbers of eagle3-mla" in full


def test_an_empty_run_measures_nothing_and_says_so(tmp_path: Path) -> None:
    text = page(tmp_path, [Run(started="2026-01-02T03:04:05Z")])

    assert "No check ran, so nothing can be concluded about correctness." in text
    assert text.count("not measured:") >= 5
    assert "<svg" not in text


@pytest.mark.parametrize(
    ("more", "tone", "words"),
    [
        ([], "good", "did not run"),
        ([Check(claim="c", pair="p", status="error", reason="worker died")], "bad", "nothing is proven"),
        ([replace(planted()[0], caught=False)], "bad", "1 planted change had the wrong outcome"),
        ([replace(planted()[-1], caught=True)], "bad", "1 planted change had the wrong outcome"),
        ([Verdict(metric="decode", pair="p", verdict="WORSE")], "bad", "WORSE than before: p decode"),
        (
            [Verdict(metric="decode", verdict="UNCLEAR", reasons=("few blocks",))],
            "unsure",
            "1 comparison ended UNCLEAR",
        ),
        ([Verdict(metric="decode", verdict="BETTER")], "good", "did not run"),
    ],
)
def test_the_first_sentence_is_the_gravest_finding(
    tmp_path: Path, more: list[Observation], tone: str, words: str
) -> None:
    found = verdict.headline(records(tmp_path, [START, *checks(failing=False), *more]))

    assert found.tone == tone
    assert words in found.sentence


def test_speed_is_a_ratio_to_transformers_of_the_same_run(tmp_path: Path) -> None:
    (real,) = speed.speeds(records(tmp_path, samples()))
    rows = {row[0]: row[2] for row in real.rows}

    ratios = [float(text.split()[0]) for text in rows.values()]
    assert ratios == pytest.approx([1, 55 / 21, 128 / 21], rel=0.02)

    alone = [s for s in samples() if s.case.impl != "transformers"]
    (real,) = speed.speeds(records(tmp_path, alone))
    assert {row[2] for row in real.rows} == {"no baseline"}


def test_ways_of_accepting_share_no_table_and_no_plot(tmp_path: Path) -> None:
    ways = ({"acceptance": "forced", "forced_rates": (0.9, 0.8, 0.7, 0.6)}, {"acceptance": "oracle"})
    chosen = [
        replace(s, case=replace(s.case, **way), values=tuple(more * v for v in s.values))
        for way, more in zip(ways, (2, 4), strict=True)
        for s in samples()
        if s.case.num_draft_tokens
    ]

    found = records(tmp_path, [*samples(), *chosen])

    sections = speed.speeds(found)
    assert [s.title for s in sections] == ["Real acceptance", "Forced acceptance", "Oracle draft"]
    assert [s.rows[:2] for s in sections] == [sections[0].rows[:2]] * 3
    speeds = [float(s.rows[2][1]) for s in sections]
    assert speeds == pytest.approx([128, 256, 512], rel=0.02)
    assert all(len(s.rows) == 3 for s in sections)
    assert [len(s.plots) for s in sections] == [3, 3, 3]
    assert "0.900, 0.800, 0.700, 0.600 (unconditional" in sections[1].note
    elements = Elements(page(tmp_path, [*samples(), *chosen]))
    ids = [attributes["id"] for _, attributes in elements.found if "id" in attributes]
    assert len(ids) == len(set(ids))


def test_cases_of_one_test_stand_in_the_row_of_their_claim(tmp_path: Path) -> None:
    names = ("test_layer_ids.py::test_a_b[c-1]", "test_layer_ids.py::test_a_b[d]", "test_layer_ids.py::test_e")
    folded = [Check(claim=f"suites/{name}", pair="p", status="passed", used=0.1 * i) for i, name in enumerate(names)]

    found = records(tmp_path, folded)

    ((claim, (cell,)),) = claims.table(found).rows
    assert (claim, cell.text, cell.more) == ("layer ids", "20 %", "3 checks")
    assert [row[0] for row in claims.table(found, sentence_of).rows] == ["layer ids: a b", "layer ids: e"]
    assert place_of(folded[0].claim) == "layer ids: a b [c-1]"


def test_a_data_set_has_its_own_length(tmp_path: Path) -> None:
    mixed = [replace(a, dataset=name) for name in ("made-up", "other") for a in accepts("p", 0.7, prompts=3)]

    rows = acceptance.acceptance(records(tmp_path, mixed)).rows

    assert [row[0] for row in rows] == ["p, greedy, made-up", "p, greedy, other"]


@pytest.mark.parametrize("prompts", [1, 2])
@pytest.mark.parametrize("kept", [(), (0,), (2, 2, 2)])
def test_few_or_extreme_prompts_still_make_a_page(tmp_path: Path, prompts: int, kept: tuple[int, ...]) -> None:
    case = Case(pair='odd <b> $x$ & "name"', gate="passed", num_draft_tokens=2)
    answers = [
        Accept(case=case, prompt=str(i), dataset="d", num_draft_tokens=2, accepted=kept, emitted=1 + 3 * len(kept))
        for i in range(prompts)
    ]

    text = page(tmp_path, [*answers, *samples()[:1]])

    Elements(text)
    assert "<b>" not in text
    assert ("no complete verify step" in text) is (not kept)


def test_rates_are_told_with_and_without_the_condition(tmp_path: Path) -> None:
    case = Case(pair="p", gate="passed", num_draft_tokens=2)
    one = Accept(case=case, prompt="a", dataset="d", num_draft_tokens=2, accepted=(2, 1, 0, 1), emitted=9)

    rows = acceptance.positions(records(tmp_path, [one])).rows

    assert rows == (("p, greedy", "75.0% / 75.0%", "25.0% / 33.3%"),)


def test_readings_are_compared_by_length_and_by_loss(tmp_path: Path) -> None:
    published, other = (
        Case(pair="p", gate="passed", variant=v, capture_points=c) for v, c in (("", (2,)), ("-1", (1,)))
    )
    nats = ((published, ((1.0, 2.0, 3.0), (2.0, 2.0, 2.0))), (other, ((1.5, 2.5, 3.5), (2.0, 2.5, 3.0))))
    loss = [
        Sample(case=case, metric=f"draft_loss_{k}", unit="nats", better="down", values=values)
        for case, steps in nats
        for k, values in enumerate(steps, 1)
    ]
    lengths = [*accepts("p", 0.6), *accepts("p", 0.3, variant="last layer for all")]

    by_length, by_loss = separation.separation(records(tmp_path, [*loss, *lengths])).rows

    # differences of the means over steps: 0.25, 0.5, 0.75
    assert by_loss[:3] == ("-1", "1", "+0.500 nats")
    assert float(by_loss[4]) == pytest.approx(0.5 / (0.25 / 3**0.5), abs=0.05)
    assert by_length[:2] == ("last layer for all", "8, 8, 8")
    assert by_length[2].endswith("tokens")
    assert float(by_length[4]) > statistics.APART


def test_plain_decoding_has_no_acceptance_length(tmp_path: Path) -> None:
    case = Case(pair="p", gate="passed")
    plain = [Accept(case=case, prompt="a", dataset="d", num_draft_tokens=0, accepted=(0, 0), emitted=3)]

    assert "no complete verify step" in acceptance.acceptance(records(tmp_path, plain)).missing


def test_many_arms_are_spread_over_several_plots(tmp_path: Path) -> None:
    many = [a for i in range(8) for a in accepts(f"pair-{i}", 0.6, prompts=3)]

    plots = acceptance.acceptance(records(tmp_path, many)).plots

    assert [p.title for p in plots[1::3]] == [
        "How far drafts survive, part 1 of 2",
        "How far drafts survive, part 2 of 2",
    ]
