"""`draftproof zoo`: the trained pairs that ship, and the recipe that made them."""

import json
from pathlib import Path
from typing import Any

from harness.runner import Exit
from suites.benchmarks.shipped import ZOO, shipped
from suites.commands.desk import Answer, Desk

FACTS = "training.json"


def show(desk: Desk, zoo: Path = ZOO) -> Answer:
    """Sizes and training facts of every shipped checkpoint."""
    rows = [
        {"speculation": pair.name, **described(folder)} for pair in shipped(zoo) for folder in (pair.target, pair.draft)
    ]
    words = [
        (r["speculation"], r["checkpoint"], f"{r['parameters'] / 1e6:.2f} M", f"{r['bytes'] / 1e6:.1f} MB",
         f"{r['seconds']:.0f}", f"{r['loss']:.3f}", r["text"])
        for r in rows
    ]  # fmt: skip
    head = ("speculation", "checkpoint", "parameters", "on disk", "trained, s", "held-out loss", "text")
    desk.table("Shipped weights", head, words)
    for pair in shipped(zoo):
        for case in json.loads((pair.draft / FACTS).read_text())["measured"]["cases"]:
            desk.say(
                f"{pair.name}, when it was trained: T={case['temperature']:g}, {case['num_tokens']} tokens: acceptance "
                f"length {case['acceptance_length']:.2f}, {case['repeated_share']:.2f} of the 4-grams repeated"
            )
    return Answer(Exit.PASSED, {"shipped": rows})


def described(folder: Path) -> dict[str, Any]:
    """One checkpoint, from what training wrote beside it."""
    facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
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


def train(desk: Desk, out: Path) -> Answer:
    """Both checkpoints again, into `out`."""
    from suites.zoo.recipe import train as recipe

    recipe(out, console=desk.err)
    return show(desk, out)
