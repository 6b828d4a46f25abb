"""The command lines that look for a cause: `explain`, `replay`, `bisect layers`."""

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from suites.commands.desk import answer
from suites.commands.options import RUNS, Json
from suites.commands.searches import bisect_app

causes_app = typer.Typer()

Target = Annotated[Path | None, typer.Option(help="The target's folder.")]
Draft = Annotated[Path | None, typer.Option(help="The draft's folder; the target's own where it carries its draft.")]
Case = Annotated[Path | None, typer.Option(help="A case folder of `replay --write-case`, for target and draft.")]
Ours = Annotated[Path | None, typer.Option(help="A dump: states and logits of the implementation, safetensors.")]
LayerIds = Annotated[str | None, typer.Option(help="after_layer or before_layer, if the file says neither.")]
NormOutput = Annotated[str | None, typer.Option(help="head or feedback, where the file is silent.")]


@causes_app.command()
def explain(
    counterexample: Annotated[
        Path | None, typer.Argument(metavar="[CX.json]", help="A failure: its twin is held to its reference.")
    ] = None,
    target: Target = None,
    draft: Draft = None,
    case: Case = None,
    ours: Ours = None,
    layer_ids: LayerIds = None,
    norm_output: NormOutput = None,
    record: Annotated[bool, typer.Option("--record", help="Also write a run that a page can show.")] = False,
    runs: Annotated[Path, typer.Option("--runs", help="Where runs are kept.")] = RUNS,
    json: Json = False,
) -> int:
    """The single edit that makes an error vanish, else the first place beyond its budget."""
    from suites.commands.explain import Options
    from suites.commands.explain import explain as work
    from suites.commands.runs import begin

    asked = Options(target, draft, ours, case, counterexample, layer_ids, norm_output)
    return answer(json, lambda desk: work(desk, asked, partial(begin, runs) if record else None))


@causes_app.command()
def replay(
    file: Annotated[Path, typer.Argument(metavar="CX.json", help="A counterexample, as a failed check names it.")],
    write_case: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Write its checkpoints, text and expected states for others.")
    ] = None,
    script: Annotated[bool, typer.Option("--script", help="Print a script of plain torch for a bug report.")] = False,
    timeout: Annotated[float, typer.Option(help="Seconds until the claim is given up.")] = 600.0,
    json: Json = False,
) -> int:
    """Run a counterexample again: 1 it still fails, 0 it passes, 4 it cannot be told."""
    from suites.commands.replay import replay as work

    return answer(json, lambda desk: work(desk, file, write_case, script, timeout))


@bisect_app.command("layers")
def layers(
    target: Target = None,
    draft: Draft = None,
    case: Case = None,
    ours: Ours = None,
    bug: Annotated[str, typer.Option(help="A planted bug in the place of a dump; see `list bugs`.")] = "",
    layer_ids: LayerIds = None,
    norm_output: NormOutput = None,
    json: Json = False,
) -> int:
    """The first layer beyond its budget when each reads what it should have read."""
    from suites.commands.explain import Options
    from suites.commands.layers import layers as work

    asked = Options(target, draft, ours, case, None, layer_ids, norm_output)
    return answer(json, lambda desk: work(desk, asked, bug))
