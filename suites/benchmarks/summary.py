"""What records of published shapes say, a row a shape and batch.

python -m suites.benchmarks.summary FOLDER
"""

import math
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from harness.record import Case, Check, Sample, read
from harness.runner import Exit
from reports.statistics import Interval, paired_ratio
from suites.benchmarks.shapes import SHAPES
from suites.commands.desk import Desk

DRY = "dry run"
PHASES_AGREE = (0.98, 1.02)


@dataclass
class Row:
    """One shape and batch, by arm: "plain", "drafting", "A/A", or a baseline by its name."""

    pair: str
    batch: int
    is_dry: bool
    values: dict[tuple[str, str], list[float]] = field(default_factory=dict)
    """(arm, metric) -> every valid value"""
    blocks: dict[str, dict[int, list[float]]] = field(default_factory=dict)
    """arm -> tokens/s by block"""
    invalid: int = 0
    """visits that were throttled in every try"""

    def middle(self, arm: str, metric: str) -> float | None:
        """Median of the raw values; None where it was not measured."""
        values = self.values.get((arm, metric))
        return median(values) if values else None

    def ratio(self, arm: str, base: str) -> Interval | None:
        """Tokens/s of one arm over another's, over paired blocks."""
        if arm not in self.blocks or base not in self.blocks:
            return None
        return paired_ratio(self.blocks[base], self.blocks[arm])


def arm_of(case: Case) -> str | None:
    """Which arm of a race a case is; None where it is no arm of the race."""
    if case.impl != "optimized":
        return f"{case.impl}, {case.form}"
    if case.acceptance == "oracle":
        return None
    if "A/A" in case.variant:
        return "A/A"
    return "drafting" if case.num_draft_tokens else "plain"


def rows(samples: Iterable[Sample]) -> dict[tuple[str, int, bool], Row]:
    """Every shape and batch that was measured, in the order in which shapes are asked."""
    found: dict[tuple[str, int, bool], Row] = {}
    for sample in samples:
        case, arm = sample.case, arm_of(sample.case)
        # several ranks and several processes are other questions
        if arm is None or case.pair not in SHAPES or case.tp > 1 or sample.process:
            continue
        key = (case.pair, case.batch, DRY in case.variant)
        row = found.setdefault(key, Row(*key))
        if not sample.telemetry.get("valid", True):
            row.invalid += sample.metric == "cycle"
            continue
        row.values.setdefault((arm, sample.metric), []).extend(sample.values)
        if sample.metric == "decode":
            row.blocks.setdefault(arm, {}).setdefault(sample.block, []).extend(sample.values)
    order = list(SHAPES)
    return dict(sorted(found.items(), key=lambda item: (order.index(item[0][0]), item[0][1:])))


def samples_of(files: Sequence[Path]) -> Iterator[Sample]:
    """Samples of record files; of a file with several runs those of the newest, since the others were cut off."""
    for file in files:
        observed = [o for o in read(file) if isinstance(o, Sample)]
        newest = max((o.run for o in observed), default="")
        yield from (o for o in observed if o.run == newest)


def said(value: float | None, form: str = "{:.2f}") -> str:
    """A number, or that there is none."""
    return "not measured" if value is None else form.format(value)


def ratio_words(found: Interval | None) -> str:
    """A ratio with its interval."""
    if found is None:
        return ""
    if not math.isfinite(found.value):
        return "no block in common"
    return f"{found.value:.2f} ({found.low:.2f} to {found.high:.2f})" if found.known else f"{found.value:.2f}"


def table(found: Mapping[tuple[str, int, bool], Row]) -> list[tuple[str, ...]]:
    """One line a row, for people."""
    lines = []
    for row in found.values():
        share = row.middle("drafting", "phase_sum")
        agree = share is not None and PHASES_AGREE[0] <= share <= PHASES_AGREE[1]
        lines.append((
            f"{row.pair}{', dry run' * row.is_dry}",
            f"{row.batch}",
            said(row.middle("plain", "cycle")),
            said(row.middle("plain", "utilisation")),
            said(row.middle("drafting", "cycle")),
            said(row.middle("drafting", "utilisation")),
            said(row.middle("drafting", "decode"), "{:.0f}"),
            ratio_words(row.ratio("drafting", "plain")),
            ratio_words(row.ratio("A/A", "drafting")),
            said(share) + ("" if agree or share is None else " !"),
            said(row.middle("drafting", "energy"), "{:.3f}"),
            f"{row.invalid}",
        ))  # fmt: skip
    return lines


HEAD = (
    *("shape", "B", "decode ms", "of floor", "cycle ms", "of floor", "tokens/s", "to plain", "A/A"),
    *("phases", "J/token", "INVALID"),
)


def main(folder: str, kind: str = "") -> int:
    """Tables of what a folder of records holds, and what was left out of them."""
    desk, files = Desk(), sorted(Path(folder).glob(f"{kind}*.jsonl"))
    found = rows(samples_of(files))
    if not found:
        desk.say("no shape was measured")
        return Exit.NOTHING_SELECTED
    desk.table("Shapes: forced acceptance, random weights", HEAD, table(found))
    lines = [
        (row.pair, f"{row.batch}", arm, said(row.middle(arm, "cycle")), ratio_words(row.ratio("plain", arm)))
        for row in found.values()
        for arm in row.blocks
        if arm not in ("plain", "drafting", "A/A")
    ]
    if lines:
        desk.table("Baselines, one token", ("shape", "B", "arm", "ms", "plain twin is faster by"), lines)
    observed = [o for file in files for o in read(file)]
    skips = [o for o in observed if isinstance(o, Check) and o.status == "skipped" and o.pair in SHAPES]
    for skip in skips:
        desk.say(f"left out: {skip.claim.partition('::')[2]}: {skip.reason}")
    return Exit.PASSED


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
