"""Made-up nights, costs, clocks and searches for the page. All numbers are made up."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from harness.record import Bisection, Case, Certificate, Check, Observation, Probe, Recorder, Run, Sample, Verdict
from suites.selftest.made_up import ENVIRONMENT, accepts

RUNS = [f"01TESTDATA00000000000000{i:02}" for i in range(100)]
CLOCKS = {"available": True, "reason": "", "readings": 30, "valid": True, "throttled": 0.0, "throttle_reasons": [],
          "memory_mhz": None, "power_w": {"low": 300.0, "median": 410.0, "high": 500.0},
          "temperature_c": {"low": 51.0, "median": 55.0, "high": 60.0}}  # fmt: skip
GPU = {"available": True, "reason": "", "driver": "550.1", "devices": [{"name": "Made-up GPU", "vbios": "1"}]}


def telemetry(visit: int) -> dict[str, Any]:
    """Clocks of one visit; every seventh is slowed down."""
    middle = 1700.0 + 10 * np.sin(visit)
    slow = visit % 7 == 6
    told = CLOCKS | {"sm_mhz": {"low": middle - 30, "median": float(middle), "high": middle + 25}}
    return told | ({"throttled": 0.2, "throttle_reasons": ["software power cap"]} if slow else {})


def costs() -> list[Observation]:
    """One shape at three batches: K with an oracle draft, forced acceptance taken apart, ceilings, an operation."""
    found: list[Observation] = []
    shape: dict[str, Any] = {"pair": "Made-up-8B", "gate": "passed", "dtype": "bfloat16", "device": "cuda"}
    forced = {"num_draft_tokens": 3, "acceptance": "forced", "forced_rates": (0.73, 0.521, 0.355)}
    for batch in (1, 8, 64):
        for k in (0, 1, 3, 5):
            case = Case(**shape, batch=batch, num_draft_tokens=k, acceptance="oracle" if k else "real")
            speed = 120.0 * batch**0.85 * (1 + 0.45 * k) / (1 + 0.04 * k * batch**0.5)
            found += [
                Sample(case=case, metric="decode", unit="tokens/s", better="up", block=b, values=(speed + b,),
                       telemetry=telemetry(b + 5 * k))
                for b in range(4)
            ]  # fmt: skip
        case = Case(**shape, batch=batch, **forced)
        factors = {"acceptance": 2.606, "verify": 0.95, "draft": 0.82, "accept": 0.99, "gap": 1.0}
        one = {f"factor_{name}": (value, "x") for name, value in factors.items()}
        one |= {"speedup": (float(np.prod(list(factors.values()))), "x"), "break_even": (1.29, "tokens a step"),
                "phase_sum": (1.001, "share"), "floor": (4.0 + batch / 10, "ms"), "cycle": (6.0 + batch / 8, "ms"),
                "energy": (3.1, "J/token"), "bytes_weights": (16.1, "GB"), 
                "bytes_keys": (0.1 * batch, "GB")}  # fmt: skip
        found += [Sample(case=case, metric=m, unit=u, better="none", values=(v,)) for m, (v, u) in one.items()]
    ceilings, op = Case(pair="ceilings", gate="passed"), Case(pair="ops", gate="passed", family="linear", form="triton",
                                                             variant="4096 -> 6144, 1 row")  # fmt: skip
    found.append(Sample(case=ceilings, metric="ceiling_copy", unit="GB/s", better="up", values=(3900.0,)))
    found.append(Sample(case=op, metric="op_time", unit="us", better="down", values=(15.0,)))
    found.append(Sample(case=op, metric="op_bandwidth", unit="share", better="up", values=(0.83,)))
    return found


def search(num: int = 24, culprit: int = 17) -> list[Observation]:
    """A search over commits that found one."""
    commits = [(f"{i:02x}" * 20, f"Change number {i}") for i in range(num)]
    share = np.exp(-1.5 * np.abs(np.arange(num) - culprit))
    share *= 0.99 / share.sum()
    asked = Bisection(kind="commits", question="llama-eagle3 decode", good="f" * 40, bad=commits[-1][0],
                      candidates=tuple(commits), parents=((), *(((i,)) for i in range(num - 1))))  # fmt: skip
    answers = {num: "good", num - 1: "bad", 11: "good", culprit: "bad", culprit - 1: "untestable", culprit - 2: "good"}
    places = [*(one for one, _ in commits), "f" * 40]
    probes = [
        Probe(candidate=places[at], answer=answer, reason="it does not build" if answer == "untestable" else "")
        for at, answer in answers.items()
    ]
    done = replace(asked, status="found", posterior=tuple(share), unchanged=0.006, already=0.004,
                   culprits=(commits[culprit][0],), confidence=float(share[culprit]), num_probes=len(probes),
                   error_rates=(0.03, 0.05))  # fmt: skip
    return [asked, *probes, done]


def explained() -> Check:
    """A failure with everything that is known about it."""
    rungs = [{"name": f"hidden.{i}", "used": 0.01 * 1.3**i if i < 6 else 40.0 * i, "error": 0.1} for i in range(9)]
    known = {
        "counterexample": "counterexamples/01K.json",
        "given": "batch=2, width=70, <b>",
        "explanation": "explained by: draft's capture shift: 1, error 3.1e-01 -> 2.0e-06",
        "first_wrong": "hidden.6",
        "ladder": [*rungs, {"name": "logits.1", "used": "Infinity", "error": None}],
    }
    claim = "suites/correctness/test_twin.py::test_the_twin_is_the_reference[4]"
    return Check(claim=claim, pair="eagle3-llama", status="failed", used=320.0, worst=("logits", (0, 5, 7)),
                 reason="AssertionError: logits off", replay="pytest 'x' --profile ci", extra=known)  # fmt: skip


def judged() -> list[Observation]:
    """Verdicts of each kind, and a certificate."""
    facts = {
        "WORSE": (0.95, 0.93, 0.97),
        "UNCLEAR": (0.99, 0.96, 1.02),
        "BETTER": (1.06, 1.04, 1.08),
        "SAME": (1, 0.99, 1.01),
    }
    pair = {"pair": "eagle3-llama", "p": 0.01, "reasons": ("why",)}
    found = [
        Verdict(metric=f"kernel_{kind.lower()}", verdict=kind, effect=effect, low=low, high=high, visible=0.02,
                extra={"min_effect": 0.015}, **pair)
        for kind, (effect, low, high) in facts.items()
    ]  # fmt: skip
    length = Verdict(metric="acceptance_length d", verdict="WORSE", scale="difference", effect=-0.1, low=-0.13,
                     high=-0.07, visible=0.05, extra={"min_effect": 0.03}, **pair)  # fmt: skip
    invalid = Verdict(metric="peak_memory", verdict="INVALID", pair="eagle3-llama", reasons=("other machines",))
    seal = Certificate(
        family="speed", status="passed", compared=("a", "b"), metrics=4, processes=8, needed=8, visible=0.021
    )
    return [*found, length, invalid, seal]


def night(number: int, factor: float = 1.0, driver: str = "550.1", rate: float = 0.0) -> list[Observation]:
    """One night: a claim's share of the budget, the speed of eight processes, and answers where a rate is given."""
    rng = np.random.default_rng(number)
    case = Case(pair="eagle3-llama", gate="passed", impl="optimized", num_draft_tokens=4)
    environment = ENVIRONMENT | {"gpu": GPU | {"driver": driver}}
    claim = "twin agrees with reference"
    speeds = factor * 100 * np.exp(rng.normal(0, 0.01, 8))
    return [
        Run(started=f"2026-01-{number % 28 + 1:02}T02:00:00Z", environment=environment),
        Check(claim=claim, pair="eagle3-llama", status="passed", used=float(rng.uniform(0.1, 0.4))),
        *(Sample(case=case, metric="decode", unit="tokens/s", better="up", values=(v,), process=p)
          for p, v in enumerate(speeds)),
        *(accepts("eagle3-llama", rate) if rate else ()),
    ]  # fmt: skip


def nights(folder: Path, count: int, slower_from: int = 1000, last: tuple[Observation, ...] = ()) -> Path:
    """So many nights, a record each; slower from one on, with another driver."""
    for i in range(count):
        late = i >= slower_from
        with Recorder(folder / f"{i:02}.jsonl", RUNS[i]) as recorder:
            recorder.append(*night(i, 0.9 if late else 1.0, "560.2" if late else "550.1",
                                   {count - 2: 0.72, count - 1: 0.5}.get(i, 0.0)))  # fmt: skip
            if i == count - 1:
                recorder.append(*last)
    return folder
