"""NOTES.md: what is predicted of every shape before it is measured, what is asked for, and what came out.

    python -m suites.benchmarks.notes [RECORD..]

Predictions are computed from configs and ceilings; outcomes are read from records, and where there is none the table
says so. Nobody types a figure into that file.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import NamedTuple

from harness.environment import ROOT
from suites.benchmarks import forced, roofline
from suites.benchmarks.roofline import Ceilings
from suites.benchmarks.shapes import SHAPES, Built, build
from suites.benchmarks.summary import Row, rows, said, samples_of

NOTES = Path(__file__).with_name("NOTES.md")
RECORDS = ROOT / "reports" / "records"
ASSUMED = Ceilings(copy=4.3e12, read=4.3e12, matmul=0.8 * 989e12)
"""of an H200 where no record measured them: the copy that SGLang's kernels note, four fifths of the datasheet's bf16"""
REACH = {True: 0.85, False: 0.90}
"""share of the ceilings that kernels are expected to reach, with experts and without"""
NODE_S = 1.5e-6
"""expected gap before each node of a graph"""
NODES = {"llama": 9, "gemma3": 9, "gemma4": 9, "gemma4_unified": 9, "qwen3_moe": 10, "deepseek": 14}
"""kernels a layer, as the pages of `optimized/targets` count them"""
DRAFT_NODES, OTHER_NODES = 14, 10
"""kernels of a draft step, and of what stands around layers and steps"""


PROSE = """\
# Predictions and outcomes

Written by `python -m suites.benchmarks.notes [RECORD..]`, which reads `reports/records/gpu-*.jsonl` where nothing is
named. Every figure is computed from configs and ceilings, or read from a record: edit the command, not this file.

Ceilings, {whence}: a copy of {copy} TB/s (read and written), a matrix product
of {matmul} TFLOP/s. The floor of a step is the larger of its bytes over the copy and its operations over the product
(`roofline.py`); the text stands at {standing} tokens, K = {drafts}. Predicted shares assume that kernels reach {dense}
of the ceilings, {mixed} with experts, and lose {gap} us before each node of a graph. Goals are must / stretch. The
break-even is the acceptance length from which a cycle at its floor pays. The speed-up is that of forced acceptance,
{length} tokens a step; random weights route all but uniformly, which is the worst case of a mixture of experts.
"""


class Goal(NamedTuple):
    """Shares of the floor that must be reached, and those that would be better."""

    decode: tuple[float, float]
    cycle: tuple[float, float]


GOALS = {
    ("Llama-3.1-8B-eagle3", 1): Goal((0.80, 0.87), (0.78, 0.85)),
    ("Llama-3.1-8B-eagle3", 8): Goal((0.80, 0.86), (0.78, 0.85)),
    ("Llama-3.1-8B-eagle3", 64): Goal((0.80, 0.86), (0.78, 0.85)),
    ("gemma-4-12B-assistant", 1): Goal((0.78, 0.86), (0.76, 0.84)),
    ("Qwen3-30B-A3B-mtp", 1): Goal((0.55, 0.70), (0.68, 0.80)),
    ("DeepSeek-V2-Lite-eagle3-mla", 1): Goal((0.55, 0.70), (0.68, 0.80)),
    ("gemma-3-4b-eagle3", 1): Goal((0.70, 0.80), (0.70, 0.78)),
    ("gemma-3-12b-eagle3", 1): Goal((0.78, 0.86), (0.78, 0.85)),
    ("gemma-4-31B-assistant", 1): Goal((0.83, 0.90), (0.82, 0.88)),
}


class Prediction(NamedTuple):
    """Of one shape and batch; seconds and shares."""

    weights: float
    """bytes of a decode step"""
    keys: float
    decode: float
    """floor"""
    cycle: float
    """floor"""
    decode_share: float
    cycle_share: float

    @property
    def break_even(self) -> float:
        """Tokens a step from which a cycle at its floor pays."""
        return self.cycle / self.decode


def predict(built: Built, batch: int, ceilings: Ceilings) -> Prediction:
    """Floors, and the share of them that losses known beforehand leave."""
    num_drafts = len(forced.RATES)
    step, whole = roofline.decode(built, batch), roofline.cycle(built, batch, num_drafts)
    floors = [roofline.floor(passes, ceilings) for passes in (step, whole)]
    reach = REACH[bool(getattr(built.text.c, "experts", 0))]
    nodes = NODES[built.shape.pairs[0].name] * len(built.text.layers) + OTHER_NODES
    gaps = [NODE_S * nodes, NODE_S * (nodes + num_drafts * DRAFT_NODES)]
    shares = [least / (least / reach + gap) for least, gap in zip(floors, gaps, strict=True)]
    return Prediction(step[0].weights, step[0].keys, *floors, *shares)


def measured(records: Sequence[Path]) -> tuple[Ceilings | None, dict[tuple[str, int], Row]]:
    """Ceilings and rows of runs on a GPU; dry runs say nothing about one."""
    samples = [s for s in samples_of(records) if s.case.device == "cuda"]
    reached = {
        name: [v for s in samples if s.metric == f"ceiling_{name}" and s.telemetry.get("valid", True) for v in s.values]
        for name in Ceilings._fields
    }
    known = all(reached.values())
    scale = {"copy": 1e9, "read": 1e9, "matmul": 1e12}
    ceilings = Ceilings(**{name: scale[name] * median(v) for name, v in reached.items()}) if known else None
    return ceilings, {(row.pair, row.batch): row for row in rows(samples).values() if not row.is_dry}


def lines(ceilings: Ceilings, found: dict[tuple[str, int], Row]) -> list[str]:
    """The table, a line a shape and batch."""
    head = (
        *("shape", "B", "weights GB", "keys GB", "decode floor ms", "cycle floor ms", "break-even"),
        *("decode share: predicted", "goal", "outcome", "cycle share: predicted", "goal", "outcome", "speed-up"),
    )
    told = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for shape in SHAPES.values():
        built = build(shape, "meta")
        for batch in shape.batches:
            one, goal, row = (
                predict(built, batch, ceilings),
                GOALS.get((shape.name, batch)),
                found.get((shape.name, batch)),
            )
            outcome = {arm: said(row.middle(arm, "utilisation") if row else None) for arm in ("plain", "drafting")}
            cells = (
                *(shape.name, f"{batch}", f"{one.weights / 1e9:.2f}", f"{one.keys / 1e9:.2f}"),
                *(f"{1e3 * one.decode:.2f}", f"{1e3 * one.cycle:.2f}", f"{one.break_even:.2f}"),
                *(f"{one.decode_share:.2f}", _asked(goal.decode if goal else None), outcome["plain"]),
                *(f"{one.cycle_share:.2f}", _asked(goal.cycle if goal else None), outcome["drafting"]),
                said(row.middle("drafting", "speedup") if row else None),
            )
            told.append("| " + " | ".join(cells) + " |")
    return told


def _asked(goal: tuple[float, float] | None) -> str:
    return "{:.2f} / {:.2f}".format(*goal) if goal else ""


def text(records: Sequence[Path]) -> str:
    """The whole file."""
    ceilings, found = measured(records)
    used = ceilings or ASSUMED
    facts = {
        "whence": "measured in the runs below" if ceilings else "assumed, since no record measured them",
        "copy": f"{used.copy / 1e12:.2f}",
        "matmul": f"{used.matmul / 1e12:.0f}",
        "standing": next(iter(SHAPES.values())).length,
        "drafts": len(forced.RATES),
        "dense": f"{REACH[False]:.0%}",
        "mixed": f"{REACH[True]:.0%}",
        "gap": f"{NODE_S * 1e6:.1f}",
        "length": f"{forced.length(forced.RATES):.3f}",
    }
    return "\n".join([PROSE.format(**facts), *lines(used, found), ""])


def main(places: Sequence[str]) -> int:
    """Write the file."""
    NOTES.write_text(text([Path(place) for place in places] or sorted(RECORDS.glob("gpu-*.jsonl"))), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
