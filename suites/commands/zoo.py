"""`draftproof zoo`: the trained pairs that ship, and the recipe that made them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harness.runner import Exit
from suites.benchmarks.shipped import ZOO, shipped
from suites.commands.desk import Answer, Desk

FACTS = "training.json"


def show(desk: Desk, zoo: Path = ZOO) -> Answer:
    """Sizes and training facts of every shipped checkpoint, and what every pair reached when it was trained."""
    pairs = shipped(zoo)
    # several drafts have one target
    rows = [described(folder) for folder in dict.fromkeys(f for pair in pairs for f in (pair.target, pair.draft))]
    words = [
        (r["checkpoint"], f"{r['parameters'] / 1e6:.2f} M", f"{r['bytes'] / 1e6:.1f} MB", f"{r['seconds']:.0f}",
         f"{r['loss']:.3f}", r["text"])
        for r in rows
    ]  # fmt: skip
    head = ("checkpoint", "parameters", "on disk", "trained, s", "held-out loss", "text")
    desk.table("Shipped weights", head, words)
    desk.say(f"together {sum(r['bytes'] for r in rows) / 1e6:.1f} MB")
    found = [(pair.name, case) for pair in pairs for case in facts_of(pair.draft)["measured"]["cases"]]
    measured = [
        (name, f"{c['temperature']:g}", str(c["num_tokens"]), f"{c['acceptance_length']:.2f}",
         f"{c['repeated_share']:.2f}")
        for name, c in found
    ]  # fmt: skip
    asked = ("speculation", "temperature", "tokens", "acceptance length", "repeated 4-grams")
    desk.table("When they were trained, 3 draft tokens", asked, measured)
    return Answer(Exit.PASSED, {"shipped": rows})


def facts_of(folder: Path) -> dict[str, Any]:
    """What training wrote beside a checkpoint."""
    facts: dict[str, Any] = json.loads((folder / FACTS).read_text(encoding="utf-8"))
    return facts


def described(folder: Path) -> dict[str, Any]:
    """One checkpoint, from what training wrote beside it."""
    facts = facts_of(folder)
    losses = facts["held_out_losses"] if "held_out_losses" in facts else [facts["held_out_loss"]]
    return {
        "checkpoint": folder.name,
        "parameters": facts["parameters"],
        "bytes": sum(file.stat().st_size for file in folder.glob("*.safetensors")),
        "seconds": facts["seconds"],
        "loss": losses[0],
        "text": facts["corpus"]["text"],
        "facts": facts,
    }


def train(desk: Desk, out: Path, names: Sequence[str] = ()) -> Answer:
    """The named checkpoints again, or all of them, into `out`."""
    from suites.zoo.recipe import train as recipe

    rows = {name: record["seconds"] for name, record in recipe(out, names, console=desk.err).items()}
    desk.table("Trained", ("checkpoint", "trained, s"), [(name, f"{seconds:.0f}") for name, seconds in rows.items()])
    return Answer(Exit.PASSED, {"trained": rows})
