"""`draftproof list pairs --memory`: published sizes built without memory, and what each rank would hold.

Both sides are built on torch's meta device: the reference gives the number of parameters, the twin's first rank the
bytes of its packed weights in bfloat16 for every number of ranks that the size can be split over.
"""

import importlib
import pkgutil
from collections.abc import Iterator, Mapping
from typing import Any

import torch

import suites.families
from harness.pairs import Pair
from harness.runner import Exit
from optimized.ops.table import choose
from optimized.parallel import ShardError, SingleRank
from optimized.shell import Shell
from suites.catalog import PAIRS, TARGET_TYPES
from suites.commands.desk import Answer, Desk
from suites.shells import count_parameters, towers_of, without_memory

RANKS = (1, 2, 4, 8)
GIB = 2**30


class FirstOf(SingleRank):
    """The first of W ranks, which never speaks to the others."""

    def __init__(self, size: int) -> None:
        self.size = size


def published() -> Iterator[tuple[str, Pair, dict[str, Any]]]:
    """(size, its pair, its config) of every target."""
    for module in pkgutil.iter_modules(suites.families.__path__):
        sizes = getattr(importlib.import_module(f"suites.families.{module.name}"), "PUBLISHED", {})
        for size, config in sizes.items():
            # drafts are published beside a target, and counted there
            if isinstance(config, Mapping) and config.get("model_type") in TARGET_TYPES:
                yield size, PAIRS[TARGET_TYPES[config["model_type"]]], dict(config)


def held(pair: Pair, config: Any, ranks: int) -> int | None:
    """Bytes of weights on the first of so many ranks in bfloat16; None where they do not divide the model."""
    try:
        twin = pair.optimized(config, choose("cpu"), FirstOf(ranks), torch.bfloat16, "meta")
    except ShardError:
        return None
    if isinstance(twin, Shell):
        twin.take(towers_of(pair, config).to(torch.bfloat16))
    return sum(piece.into.nbytes for part in twin.parts for piece in part.pieces.values())


def memory(desk: Desk) -> Answer:
    """A row a published size."""
    rows = []
    for size, pair, keys in published():
        config = pair.read_config(keys)
        per_rank = {ranks: held(pair, config, ranks) for ranks in RANKS} if pair.twin else {}
        with without_memory():
            parameters = count_parameters(pair.reference(config))
        rows.append({"size": size, "pair": pair.name, "parameters": parameters, "bytes": per_rank})
    head = ("size", "pair", "parameters", *(f"GiB, 1 of {ranks}" for ranks in RANKS))
    desk.table("Weights in bfloat16", head, [_row(row) for row in rows])
    return Answer(Exit.PASSED, {"sizes": rows})


def _row(row: dict[str, Any]) -> tuple[Any, ...]:
    if not row["bytes"]:
        return row["size"], row["pair"], f"{row['parameters']:,}", "no twin", "", "", ""
    cells = ("does not divide" if held is None else f"{held / GIB:.2f}" for held in row["bytes"].values())
    return row["size"], row["pair"], f"{row['parameters']:,}", *cells
