"""Claim: a verdict says what the numbers show: WORSE is found and seldom false, and what is not known is UNCLEAR."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from harness.record import Accept, Case, Observation, RecordError, Run, Sample
from reports import noise, paired, regressions
from reports.gates import GATES, read_gates
from reports.noise import Layout
from reports.regressions import Estimate, judge
from reports.sides import Key, Series, timed
from reports.statistics import Arm
from reports.store import Frames, frames
from suites.nights import Night, alarms, answers, verdicts

pytestmark = pytest.mark.correctness

GATE_FILE = read_gates()
ALPHA = 0.01
CASE = Case(pair="p", gate="passed", num_draft_tokens=3)
RIG = {"cpu": "c", "gpu": {"devices": ["g"]}}

# of a nightly profile on a machine that does other things as well
LONG = pytest.mark.timeout(3600)
# nights, timed series of a night, processes a side, acceptances of a night
COUNTS = {"pinned": (6, 60, 10, 2), "quick": (6, 60, 10, 2), "ci": (10, 60, 10, 2), "nightly": (200, 500, 10, 10)}
# nights, timed series, processes a side
SLOW = {"pinned": (10, 10, 8), "quick": (10, 10, 8), "ci": (20, 10, 8), "nightly": (200, 500, 10)}
# nights, acceptances of a night
LOST = {"pinned": (5, 1), "quick": (5, 1), "ci": (8, 2), "nightly": (200, 5)}


def two_sides(num: int, strata: int = 1) -> Layout:
    return Layout((False,) * num + (True,) * num, tuple(i % strata for i in range(num)) * 2)


def side(seed: int, factor: float = 1.0, **changed: object) -> Frames:
    """Eight processes of one metric, each of fifty calls, as a store would hold them."""
    rng = np.random.default_rng(seed)
    facts = {"metric": "decode", "unit": "ms", "better": "down", "rig": RIG, "telemetry": {}, "processes": 8} | changed
    rig, telemetry, processes = (facts.pop(name) for name in ("rig", "telemetry", "processes"))
    run = f"{seed:026d}"
    found: list[Observation] = [Run(run=run, started="2026-01-02", environment=rig)]
    for process in range(processes):
        level = factor * 10 * np.exp(rng.normal(0, 0.002))
        values = level * np.exp(rng.normal(0, 0.02, 50))
        found.append(Sample(run=run, case=CASE, values=values, process=process, telemetry=telemetry, **facts))
    return frames(found)


def told(old: Frames, new: Frames, again: tuple[Frames, Frames] | None = None) -> tuple[str, str]:
    (found,) = judge(old, new, GATE_FILE, again)
    return found.verdict, found.reasons[0]


def test_a_family_needs_as_many_processes_as_its_smallest_p_allows() -> None:
    assert noise.processes_needed(10, ALPHA) == 8
    assert noise.processes_needed(500, ALPHA) == 10
    assert two_sides(8).smallest_p * 10 <= ALPHA < two_sides(6).smallest_p * 10
    assert two_sides(10).smallest_p * 500 <= ALPHA < two_sides(8).smallest_p * 500


def test_the_exact_p_is_that_of_scipy() -> None:
    rng = np.random.default_rng(0)
    logs = rng.normal(0, 1, (5, 12)) + np.where(np.arange(12) < 6, 0, 0.8)

    found = noise.permutation_p(logs, two_sides(6))

    for row, p in zip(logs, found, strict=True):
        outside = stats.permutation_test((row[:6], row[6:]), lambda a, b: a.mean() - b.mean(), n_resamples=np.inf)
        assert p == pytest.approx(outside.pvalue)


def test_labels_are_dealt_inside_a_stratum() -> None:
    # two rigs of very different speed, the same change on both: hidden unless each rig is compared with itself
    layout = two_sides(6, strata=2)
    logs = 3.0 * np.array(layout.stratum) + 0.05 * np.array(layout.candidate) + 0.001 * np.arange(12) % 0.003

    (found,) = noise.permutation_p(logs[None], layout)

    # 20 deals on either rig, and only the one seen and its mirror are this far apart
    assert found == pytest.approx(2 / 20**2)


def test_rigs_of_different_speed_hide_no_effect() -> None:
    # a rig that is far slower than the other, and a candidate 3 % above the baseline on both
    layout = two_sides(6, strata=2)
    rng = np.random.default_rng(7)
    levels = 0.5 * np.array(layout.stratum) + np.log(1.03) * np.array(layout.candidate)
    values = np.exp(levels + rng.normal(0, 0.003, (50, 12)))
    logs = np.log(values)

    effects = noise.effect(logs, layout)
    low, high = noise.interval(effects, noise.hierarchical(values[..., None].tolist(), layout), 0.95)

    assert np.abs(effects - np.log(1.03)).max() < 0.01
    assert np.mean(high - low) < 0.02
    assert noise.visible(logs, layout, 0.05).max() < 0.02


def test_no_p_is_smaller_than_what_was_tried() -> None:
    layout = two_sides(14)

    (found,) = noise.permutation_p(np.array(layout.candidate, float)[None], layout, careful=0.0)

    assert found == pytest.approx(1 / (noise.SCREEN + 1))


def test_a_p_of_processes_is_uniform_where_nothing_changed() -> None:
    logs = np.random.default_rng(1).normal(0, 1, (1000, 16))

    found = noise.permutation_p(logs, two_sides(8), careful=0.05)

    for level in (0.01, 0.05, 0.2):
        assert np.mean(found <= level) == pytest.approx(level, abs=4 * np.sqrt(level / 1000))


@pytest.mark.parametrize("within", [0.0, 0.01])
def test_the_interval_of_a_ratio_of_medians_holds_the_truth(within: float) -> None:
    rng, layout = np.random.default_rng(2), two_sides(8)
    levels = rng.normal(0, 0.005, (300, 16)) + np.log(1.03) * np.array(layout.candidate)
    values = np.exp(levels[..., None] + rng.normal(0, within, (300, 16, 5)))

    effects = noise.effect(np.log(np.median(values, axis=-1)), layout)
    low, high = noise.interval(effects, noise.hierarchical(values.tolist(), layout), 0.95)

    assert 0.92 <= np.mean((low <= np.log(1.03)) & (np.log(1.03) <= high)) <= 1.0
    assert np.mean(high - low) < 0.025


@pytest.mark.parametrize(("num", "threshold"), [(8, 0.001), (10, 2e-5)])
def test_the_smallest_visible_change_is_found_four_times_in_five(num: int, threshold: float) -> None:
    layout = two_sides(num)
    still = np.random.default_rng(3).normal(0, 0.01, (300, 2 * num))

    seen = float(np.median(noise.visible(still, layout, threshold)))
    found = noise.permutation_p(still + seen * np.array(layout.candidate), layout, careful=0.01) <= threshold

    # the binomial error is 0.023
    assert 0.7 <= found.mean() <= 0.9
    assert np.isinf(noise.visible(still, layout, two_sides(num).smallest_p / 2)).all()


@pytest.mark.parametrize(
    ("better", "effect", "inner", "q", "verdict"),
    [
        ("down", 0.05, (0.03, 0.07), 0.001, "WORSE"),
        ("up", 0.05, (0.03, 0.07), 0.001, "BETTER"),
        ("down", -0.05, (-0.07, -0.03), 0.001, "BETTER"),
        ("up", -0.05, (-0.07, -0.03), 0.001, "WORSE"),
        ("down", 0.05, (0.03, 0.07), 0.02, "UNCLEAR"),
        ("down", 0.005, (0.001, 0.009), 0.001, "SAME"),
        ("down", 0.001, (-0.008, 0.009), 0.9, "SAME"),
        # no evidence of a change is not evidence of none
        ("down", 0.001, (-0.02, 0.02), 0.9, "UNCLEAR"),
        ("down", 0.008, (0.001, 0.012), 0.001, "UNCLEAR"),
        # one of the two one-sided tests is not enough
        ("down", -0.02, (-0.05, 0.005), 0.3, "UNCLEAR"),
    ],
)
def test_the_verdict_of_one_look(
    better: str, effect: float, inner: tuple[float, float], q: float, verdict: str
) -> None:
    gate = GATE_FILE.of("decode")
    assert gate is not None
    series = Series(Key("c", "decode"), gate, "p", "ms", better)

    found = regressions.decide(series, Estimate(effect, *inner, inner, q, 0.02, 8), q, ALPHA)

    assert found.verdict == verdict
    assert found.reasons[0]


def test_worse_is_said_when_fresh_processes_say_it_again() -> None:
    first = side(1), side(2, 1.05)

    assert told(*first)[0] == "UNCLEAR"
    assert "fresh processes" in told(*first)[1]
    assert told(*first, (side(3), side(4, 1.05)))[0] == "WORSE"
    verdict, reason = told(*first, (side(3), side(4)))
    assert (verdict, "not again" in reason) == ("UNCLEAR", True)
    with pytest.raises(RecordError, match="no fresh process"):
        judge(*first, GATE_FILE, (side(3), first[1]))


def test_an_effect_is_candidate_over_baseline_with_what_could_be_seen() -> None:
    (found,) = judge(side(1), side(2, 1.05), GATE_FILE, (side(3), side(4, 1.05)))

    assert found.effect == pytest.approx(1.05, abs=0.01)
    assert found.low <= 1.05 <= found.high
    assert 0.01 <= found.visible <= 0.03
    assert found.p <= found.q <= 0.05
    assert len(found.sides) == 4


def test_the_unit_is_the_process_and_not_the_call() -> None:
    (found,) = judge(side(1), side(2), GATE_FILE)

    assert found.extra["units"] == 8
    assert {key.metric: len(one.processes) for key, one in timed(side(1)).items()} == {"decode": 8}


def test_two_processes_are_too_few_for_any_verdict() -> None:
    verdict, reason = told(side(1, processes=2), side(2, 2.0, processes=2))

    assert verdict == "UNCLEAR"
    assert "2 processes a side; 1 metrics that are judged together need 6" in reason


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"telemetry": {"throttled": 0.1}}, "throttled in 8 visits"),
        ({"rig": {"cpu": "c", "gpu": {"devices": ["other"]}}}, "different machines"),
        ({"metric": "verify"}, "did not measure"),
        ({"unit": "s"}, "is now s"),
        ({"better": "up"}, "better up"),
    ],
)
def test_what_cannot_be_compared_is_invalid(changed: dict[str, object], words: str) -> None:
    found = [v for v in judge(side(1), side(2, 1.5, **changed), GATE_FILE) if v.metric == "decode"]

    assert [v.verdict for v in found] == ["INVALID"]
    assert words in found[0].reasons[0]


def test_a_metric_without_a_direction_or_a_gate_is_not_judged() -> None:
    assert judge(side(1, better="none"), side(2, 2.0, better="none"), GATE_FILE) == []
    assert judge(side(1, metric="draft_loss_1"), side(2, 2.0, metric="draft_loss_1"), GATE_FILE) == []


def acceptance(seed: int, arm: Arm) -> Frames:
    run = f"{seed:026d}"
    return frames(
        Accept(run=run, case=CASE, prompt=name, dataset="d", num_draft_tokens=3, accepted=steps, emitted=1)
        for name, steps in arm.steps.items()
    )


def test_the_same_texts_are_the_same_and_a_lost_draft_is_worse() -> None:
    arm = answers(np.random.default_rng(4), np.full(40, 0.8), 60)
    # the third draft is never accepted any more
    cut = Arm(3, {name: tuple(min(a, 2) for a in steps) for name, steps in arm.steps.items()})

    old, new = acceptance(1, arm), acceptance(2, cut)
    (same,) = judge(old, acceptance(3, arm), GATE_FILE)
    (worse,) = judge(old, new, GATE_FILE, (acceptance(4, arm), acceptance(5, cut)))

    assert (same.verdict, same.effect, same.p) == ("SAME", 0.0, 1.0)
    assert worse.verdict == "WORSE"
    assert worse.effect == pytest.approx(-np.mean([a == 3 for steps in arm.steps.values() for a in steps]))
    moved = next(reason for reason in worse.reasons if "rates that moved" in reason)
    assert "draft 3" in moved
    assert "draft 2" not in moved


def test_prompts_are_paired_by_name() -> None:
    rng = np.random.default_rng(5)
    arm = answers(rng, rng.beta(2, 2, 60), 60)
    turned = Arm(3, dict(reversed(list(arm.steps.items()))))

    found = paired.compare(arm, turned)

    assert found is not None
    assert (found.difference[:3], found.p, found.error) == ((0.0, 0.0, 0.0), 1.0, 0.0)


def test_positions_err_together_as_often_as_one() -> None:
    rng, alarmed = np.random.default_rng(6), 0
    for _ in range(150):
        old, new = (np.cumsum(rng.poisson(20, (40, 9))[:, ::-1], axis=1)[:, ::-1].astype(float) for _ in range(2))
        alarmed += min(position.p for position in paired.positions(old, new, paired._draws(old, new))) <= 0.05

    # eight positions that err one by one would alarm in a fifth of the trials and more; the binomial error is 0.018
    assert alarmed / 150 <= 0.11


@LONG
def test_nights_without_a_change_are_left_in_peace(profile: str) -> None:
    nights, num_timed, processes, num_answered = COUNTS[profile]
    night = Night(GATE_FILE, num_timed, processes, num_answered)

    found = [alarms(verdicts(night, seed)) for seed in range(nights)]

    assert sum(map(bool, found)) <= 0.01 * nights


@LONG
def test_a_slow_down_of_two_per_cent_is_found(profile: str) -> None:
    nights, num_timed, processes = SLOW[profile]
    night = Night(GATE_FILE, num_timed, processes, slow=0.02)

    found = [Key("0" * 12, "decode") in alarms(verdicts(night, seed)) for seed in range(nights)]

    assert np.mean(found) >= 0.8


@LONG
@pytest.mark.parametrize(("prompts", "tokens"), [(80, 512), (160, 256)])
def test_a_twentieth_of_a_token_lost_is_found(profile: str, prompts: int, tokens: int) -> None:
    nights, num_answered = LOST[profile]
    night = Night(GATE_FILE, 1, 6, num_answered, prompts, tokens, loss=0.05)

    found = [any(key.dataset and key.case == "0" * 12 for key in alarms(verdicts(night, seed)))
             for seed in range(nights)]  # fmt: skip

    assert np.mean(found) >= 0.8


def swap(old: str, new: str) -> Callable[[str], str]:
    return lambda text: text.replace(old, new, 1)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (swap('family = "speed"', 'family = "sped"'), "none of acceptance, speed, memory"),
        (swap("min_effect = 0.03\n", ""), "min_effect is missing"),
        (swap("see = 0.06", "see = 0.02"), "min_effect < see"),
        (swap("alpha = 0.05", "alpha = 5"), "between 0 and 0.5"),
        (swap("throttled = 0.02", "throttled = 2"), "share below 1"),
        (swap('scale = "difference"', 'scale = "percent"'), "scale is one of"),
        (swap('on_worse = "fail"', 'onworse = "fail"'), "'onworse' is not known"),
        (swap("[families.acceptance]", "[families.acceptance"), "gates.toml"),
    ],
)
def test_a_gate_that_means_nothing_is_refused(tmp_path: Path, change: Callable[[str], str], words: str) -> None:
    file = tmp_path / "gates.toml"
    file.write_text(change(GATES.read_text()))

    with pytest.raises(RecordError, match=words):
        read_gates(file)
