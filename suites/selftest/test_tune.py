"""Claim: the table of choices is measured or says that it is not, and a wrong product is never timed."""

from pathlib import Path

import pytest
import torch

from harness.compare import Mismatch
from optimized.ops.tiles import BUCKETS, Choice, Tile, read_choices, tile
from suites.benchmarks.tune import SHARED_BYTES, Bench, Weight, candidates, main, tuned, weights

pytestmark = pytest.mark.correctness

KINDS = ("linear", "gate_up", "head")
MACHINE = {"device": "none", "torch": "0", "triton": "0"}
TINY = [Choice(Tile(16, 16, 32, 4, 2)), Choice(Tile(16, 32, 32, 4, 2))]
DEVICE, DTYPE = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)


def test_a_dry_run_writes_choices_that_nobody_measured(tmp_path: Path) -> None:
    main(["--dry-run", "--size", "Llama-3.1-8B", "-o", str(tmp_path / "choices.json")])

    table = read_choices(tmp_path / "choices.json")

    assert {choice.measured for choice in table.values()} == {None}
    named = {(out, num_in, rows) for _, out, num_in, rows in table}
    assert {(w.out, w.num_in, rows) for w in weights(["Llama-3.1-8B"]) for rows in BUCKETS} <= named


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", BUCKETS)
def test_candidates_fit_and_begin_with_the_rule(kind: str, rows: int) -> None:
    first, *others = candidates(Weight(kind, 4096, 4096), rows)

    assert first == Choice(tile(4096, 4096, rows, 2, 1 + (kind == "gate_up")))
    assert first not in others
    assert any(choice.library for choice in others) == (kind == "linear")
    for t in (choice.tile for choice in others):
        assert t.block_m == rows
        assert (rows + t.block_n) * t.block_k * 2 * t.num_stages <= SHARED_BYTES


@pytest.mark.parametrize("kind", KINDS)
def test_who_won_is_written_with_what_was_measured(kind: str) -> None:
    best, samples = tuned(Bench(Weight(kind, 16, 32), 16, DEVICE, DTYPE, 0), MACHINE, TINY)

    assert best._replace(measured=None, early=False) in TINY
    assert best.measured.keys() == MACHINE.keys() | {"us", "rule_us", "beside"}
    assert best.measured["us"] <= best.measured["rule_us"]
    assert len(samples) == best.measured["beside"] + 1


def test_a_wrong_product_is_not_timed() -> None:
    bench = Bench(Weight("linear", 16, 32), 16, DEVICE, DTYPE, 0)
    right = bench.call
    bench.call = lambda choice, matrix: right(choice, matrix).roll(1, 1)

    with pytest.raises(Mismatch):
        tuned(bench, MACHINE, TINY)
