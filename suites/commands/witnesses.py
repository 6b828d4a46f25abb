"""The command lines that ask an outside implementation: `engine`."""

from pathlib import Path
from typing import Annotated

import typer

from suites.commands.desk import answer
from suites.commands.options import Json

witnesses_app = typer.Typer()


@witnesses_app.command()
def engine(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Which engine: vllm.")],
    target: Annotated[Path | None, typer.Option(help="The target's folder.")] = None,
    draft: Annotated[Path | None, typer.Option(help="The draft's folder; the target alone without one.")] = None,
    every: Annotated[bool, typer.Option("--all", help="All cases of the project in the place of one pair.")] = False,
    python: Annotated[Path | None, typer.Option(help="The python of the engine's own environment.")] = None,
    make_env: Annotated[Path | None, typer.Option(metavar="DIR", help="Make such an environment, then ask.")] = None,
    pip_args: Annotated[str, typer.Option(help="For pip while it is made, such as an index of CPU builds.")] = "",
    runner: Annotated[str, typer.Option(help="Which of vLLM's two model runners: v1 or v2.")] = "v1",
    evidence: Annotated[Path | None, typer.Option(metavar="FILE", help="Write what was found there.")] = None,
    json: Json = False,
) -> int:
    """An engine's own model classes, run beside the reference: what they load, capture and compute."""
    from suites.commands.engine import Options
    from suites.commands.engine import engine as work

    asked = Options(name, target, draft, every, python, make_env, tuple(pip_args.split()), runner, evidence)
    return answer(json, lambda desk: work(desk, asked))
