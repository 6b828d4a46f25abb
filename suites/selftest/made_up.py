"""A made-up run with something for every section of the page, and the page of it. All numbers are made up."""

from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path

import numpy as np

from harness.record import Accept, Case, Check, Observation, Planted, Recorder, Run, Sample, Verdict
from reports import store
from reports.page import render

RUN_ID = "01TESTDATA0000000000000000"
NO_GPU = {"available": False, "reason": "no NVIDIA driver", "driver": None, "devices": []}
ENVIRONMENT = {
    "source": {"commit": "0123456789abcdef" * 2 + "01234567", "dirty": True, "diff_sha256": "ab" * 32, "reason": ""},
    "versions": {"python": "3.12.1", "torch": "0.0-test", "triton": None, "numpy": "2.0"},
    "system": "made-up system",
    "cpu": {"name": "Made-up CPU", "cores": 2, "torch_threads": 1},
    "gpu": NO_GPU,
    "seeds": {"prompts": 0},
    "env": {"OMP_NUM_THREADS": "1"},
}
PAIRS = ("eagle3-llama", "eagle3-mla", "mtp-qwen3-moe", "gemma4-assistant")
CLAIMS = (
    "reference agrees with transformers",
    "shards join to the whole",
    "capture points",
    "greedy text is unchanged",
    "twin agrees with reference",
    "CUDA graph replays the eager step",
)
START = Run(started="2026-01-02T03:04:05Z", version="0.1.0", argv=("draftproof", "demo"), environment=ENVIRONMENT)


def checks(failing: bool = True) -> list[Check]:
    rng, found = np.random.default_rng(0), []
    for claim in CLAIMS:
        for pair in PAIRS:
            if "graph" in claim:
                found.append(Check(claim=claim, pair=pair, status="skipped", reason="no GPU"))
            elif not (claim == "capture points" and pair.startswith(("mtp", "gemma4"))):
                used = None if claim.startswith(("shards", "greedy")) else float(rng.uniform(0.02, 0.9))
                found.append(Check(claim=claim, pair=pair, status="passed", used=used, seed=1))
    if failing:
        found.append(
            Check(
                claim="twin agrees with reference", pair="eagle3-mla", status="failed", used=3.4, seed=17,
                worst=("logits", (0, 5, 131)), reason='3.1e-2 over a budget of 9.1e-3 <script>alert("x")</script>',
                replay="draftproof replay counterexamples/twin-eagle3-mla-17.json",
            )
        )  # fmt: skip
    return found


def accepts(pair: str, rate: float, temperature: float = 0.0, variant: str = "", prompts: int = 24) -> list[Accept]:
    rng = np.random.default_rng(7)
    points = {"": (2, 4, 5), "layer ids + 1": (3, 5, 6), "layer ids - 1": (1, 3, 4)}
    case = Case(
        pair=pair, gate="passed", method="eagle3", form="aten", dtype="float32", device="cpu", num_draft_tokens=4,
        temperature=temperature, variant=variant, capture_points=points.get(variant, (8, 8, 8)),
    )  # fmt: skip
    found = []
    for i in range(prompts):
        own = rng.beta(9 * rate, 9 * (1 - rate))
        steps = np.cumprod(rng.random((256, 4)) < own, axis=-1).sum(-1)
        kept = tuple(steps[: np.searchsorted(1 + np.cumsum(steps + 1), 256) + 1].tolist())
        found.append(
            Accept(
                case=case, prompt=f"prompt-{i}", dataset="made-up", num_draft_tokens=4, accepted=kept,
                emitted=256, truncated=True, stop="length",
            )
        )  # fmt: skip
    return found


def samples() -> list[Sample]:
    rng, found = np.random.default_rng(1), []
    speeds = {("transformers", 0): 21.0, ("optimized", 0): 55.0, ("optimized", 4): 128.0}
    for (impl, drafts), level in speeds.items():
        case = Case(
            pair="eagle3-llama", gate="passed", impl=impl, dtype="float32", device="cpu", num_draft_tokens=drafts
        )
        for block in range(20):
            values = level * np.exp(rng.normal(0, 0.02, 4) + 0.03 * np.sin(block))
            found.append(
                Sample(case=case, metric="decode", unit="tokens/s", better="up", values=tuple(values), block=block)
            )
        for metric, ms in {"draft": 6.0, "verify": 18.0, "accept": 0.7, "cycle": 25.1}.items() if drafts else ():
            found.append(
                Sample(case=case, metric=metric, unit="ms", better="down", values=tuple(ms * rng.normal(1, 0.01, 9)))
            )
    return found


def planted() -> list[Planted]:
    bugs = [
        ("layer ids + 1", "SGLang #25454", "capture points"),
        ("ceil(V/W) rows a shard", "SGLang #23976", "shards join to the whole"),
        ("bonus token counted twice", "seeded", "acceptance length"),
    ]
    found = [Planted(bug=b, origin=o, claim=c, caught=True, caught_by=c, duration_s=0.4) for b, o, c in bugs]
    return [
        *found,
        Planted(bug="softmax in float64", origin="harmless", claim="every claim", caught=False, harmless=True),
    ]


def everything() -> list[Observation]:
    readings = {"layer ids + 1": 0.55, "layer ids - 1": 0.48, "last layer for all": 0.3}
    return [
        START,
        *checks(),
        *accepts("eagle3-llama", 0.72),
        *accepts("eagle3-llama", 0.6, temperature=1.0),
        *accepts("mtp-qwen3-moe", 0.5),
        *(a for variant, rate in readings.items() for a in accepts("eagle3-llama", rate, variant=variant)),
        *samples(),
        *planted(),
        Case(pair="eagle3-mla", gate="failed", num_draft_tokens=4),
        Verdict(metric="decode", verdict="SAME", pair="eagle3-llama", effect=1.004, low=0.99, high=1.02, p=0.6,
                reasons=("inside 2 %",)),
    ]  # fmt: skip


def page(folder: Path, observations: Sequence[Observation], name: str = "page.html") -> str:
    records(folder, observations)
    return render([folder / "run.jsonl"], folder / name).read_text(encoding="utf-8")


def records(folder: Path, observations: Sequence[Observation]) -> store.Records:
    """What a page of these observations is made of."""
    path = folder / "run.jsonl"
    path.unlink(missing_ok=True)
    with Recorder(path, RUN_ID) as recorder:
        recorder.append(*observations)
    return store.gather(path)


class Elements(HTMLParser):
    """Every tag with its attributes, ids counted, and tags that were left open."""

    VOID = ("meta", "link", "br", "img", "path", "use", "rect")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert tag in self.VOID or self.open.pop() == tag
