"""The command line of `draftproof nightly`."""

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from suites.commands.desk import answer
from suites.commands.options import PAGE, ROOT, RUNS, Json, Required, Runs


def nightly(
    tiny: Annotated[bool, typer.Option(help="Minutes on a CPU: shows that a night works, and proves nothing.")] = False,
    green: Annotated[str, typer.Option(metavar="REV", help="What head is held against; the last green night's.")] = "",
    require: Required = None,
    hours: Annotated[float, typer.Option(help="After which nothing new is begun; it stands beside the lock.")] = 10.0,
    wait: Annotated[float, typer.Option(help="Seconds to wait for somebody else's lock.")] = 0.0,
    resume: Annotated[str, typer.Option(metavar="RUN", help="Go on with a night that was killed.")] = "",
    out: Annotated[Path, typer.Option("--out", "-o", help="The page; summary and JUnit are written beside it.")] = PAGE,
    runs: Runs = RUNS,
    json: Json = False,
) -> int:
    """Everything a night does: doctor, claims, certificate, speed against the last green, culprit, page."""
    from suites.commands.nightly import nightly as work
    from suites.commands.runs import begin

    return answer(
        json,
        lambda desk: work(
            desk,
            partial(begin, runs),
            runs,
            out,
            ROOT,
            is_tiny=tiny,
            green=green,
            require=tuple(require or ()),
            hours=hours,
            wait_s=wait,
            resume=resume,
        ),
    )
