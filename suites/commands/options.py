"""The options that several commands share; nothing here loads torch."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

ROOT = Path(__file__).resolve().parents[2]
RUNS = ROOT / "runs"
ZOO = ROOT / "suites" / "zoo"
PAGE = ROOT / "reports" / "out" / "index.html"
GATES = ROOT / "reports" / "gates.toml"


class Profile(StrEnum):
    """How many draws each claim makes on top of its own examples."""

    pinned = "pinned"
    quick = "quick"
    ci = "ci"
    nightly = "nightly"


Json = Annotated[bool, typer.Option("--json", help="The result as JSON on stdout, and nothing else there.")]
Prompts = Annotated[Path | None, typer.Option(help="Spec-Bench *.jsonl, or plain text with one prompt a line.")]
Runs = Annotated[Path, typer.Option("--runs", help="Where runs are kept.")]
Required = Annotated[
    list[str] | None, typer.Option("--require", help="gpu or multi_gpu: exit 6 where this machine has none.")
]
Zoo = Annotated[Path, typer.Option("--zoo", help="The folder of trained pairs.")]
Memory = Annotated[bool, typer.Option("--memory", help="Published sizes of the pairs, and what each rank holds.")]
Gates = Annotated[Path, typer.Option("--gates", help="The file of gates, TOML.")]
SIDE = "Run id, record file or folder, URL, or baseline:NAME."
