"""The `draftproof` command.

    0  all gates pass                        4  inconclusive
    1  a gate failed                         5  nothing selected
    2  usage, or input that cannot be opened 6  a required capability is missing
    3  the machine failed

With `--json` stdout holds one JSON object and nothing else. Commands are imported when they run, since most of them
load torch and `draftproof --help` must not.
"""

import sys
import tomllib
from collections.abc import Sequence
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from suites.commands.causes import causes_app
from suites.commands.desk import answer
from suites.commands.nights import nightly
from suites.commands.options import (
    GATES,
    PAGE,
    ROOT,
    RUNS,
    SIDE,
    ZOO,
    Gates,
    Json,
    Memory,
    Profile,
    Prompts,
    Required,
    Runs,
    Zoo,
)
from suites.commands.searches import bisect_app
from suites.commands.witnesses import witnesses_app

app = typer.Typer(
    help="Proves a draft model before it is served.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
zoo_app = typer.Typer(help="The trained pairs that ship, and the recipe that made them.", no_args_is_help=True)
app.add_typer(zoo_app, name="zoo")
baseline_app = typer.Typer(help="What later runs are compared with.", no_args_is_help=True)
app.add_typer(baseline_app, name="baseline")
app.add_typer(bisect_app, name="bisect")
app.add_typer(causes_app)
app.add_typer(witnesses_app)


class Kind(StrEnum):
    """What `list` lists."""

    pairs = "pairs"
    speculations = "speculations"
    bugs = "bugs"
    dialects = "dialects"
    suites = "suites"


class Part(StrEnum):
    """What `bench` measures."""

    ops = "ops"
    acceptance = "acceptance"
    decode = "decode"
    all = "all"


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="The page to write.")] = PAGE,
    runs: Runs = RUNS,
    json: Json = False,
) -> int:
    """The main job on the shipped pairs: claims, acceptance, tokens/s, planted bugs, one HTML page."""
    from suites.commands.runs import begin
    from suites.demo import PROFILE
    from suites.demo import demo as work

    return answer(json, lambda desk: work(desk, partial(begin, runs, PROFILE), out))


@app.command("list")
def list_(
    kind: Kind,
    memory: Memory = False,
    json: Json = False,
) -> int:
    """Tables of what there is."""
    if memory:
        from suites.commands.memory import memory as sizes

        return answer(json, sizes)
    from suites.commands.tables import LISTS

    return answer(json, LISTS[kind])


@app.command()
def check(
    pairs: Annotated[list[str] | None, typer.Argument(help="Pairs or speculations; all when absent.")] = None,
    profile: Profile = Profile.ci,
    require: Required = None,
    only: Annotated[str, typer.Option("-k", help="Only claims whose name matches, as in pytest -k.")] = "",
    draws: Annotated[int | None, typer.Option(min=1, help="Draws of each claim; the profile's when absent.")] = None,
    runs: Runs = RUNS,
    json: Json = False,
) -> int:
    """Hold pairs to their claims."""
    from suites.commands.check import check as work
    from suites.commands.runs import begin

    start = partial(begin, runs, profile)
    return answer(json, lambda desk: work(desk, start, pairs or (), profile, require or (), only, draws=draws))


@app.command()
def audit(
    target: Annotated[Path, typer.Option(help="The target's folder.")],
    draft: Annotated[Path, typer.Option(help="The draft's folder.")],
    headers_only: Annotated[bool, typer.Option(help="Of the target, config and headers or index are enough.")] = False,
    written_by: Annotated[str | None, typer.Option(help="Who wrote the draft; see `list dialects`.")] = None,
    layer_ids: Annotated[
        str | None, typer.Option(help="after_layer or before_layer, if the file says neither.")
    ] = None,
    norm_output: Annotated[str | None, typer.Option(help="head or feedback, where the file is silent.")] = None,
    engine: Annotated[list[str] | None, typer.Option(help="Only this engine; may be given several times.")] = None,
    identify: Annotated[bool | None, typer.Option(help="Measure what the weights say; small targets: yes.")] = None,
    prompts: Prompts = None,
    num_sequences: Annotated[int, typer.Option(min=2, help="Texts that are read, from the first on.")] = 256,
    own_continuations: Annotated[bool, typer.Option(help="Measure on what the target itself says next.")] = False,
    costs: Annotated[bool, typer.Option(help="Measure what each engine's wrong reading costs.")] = False,
    runs: Runs = RUNS,
    json: Json = False,
) -> int:
    """A checkpoint on the stand: every tensor accounted for, how each engine would read it, what its weights say."""
    from suites.commands.audit import Options
    from suites.commands.audited import audited as work
    from suites.commands.runs import begin

    measured = (identify, prompts, num_sequences, own_continuations, costs)
    words = (headers_only, written_by, layer_ids, norm_output, tuple(engine or ()))
    return answer(json, lambda desk: work(desk, partial(begin, runs), Options(target, draft, *measured, *words)))


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="The draft to convert.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write; absent or empty.")],
    to: Annotated[str, typer.Option(help="The dialect to write; see `list dialects`.")],
    written_by: Annotated[str | None, typer.Option(help="Who wrote SRC, where it does not state its facts.")] = None,
    target: Annotated[Path | None, typer.Option(help="The target's folder; its config is enough.")] = None,
    layers: Annotated[int | None, typer.Option(help="The target's number of layers, without --target.")] = None,
    json: Json = False,
) -> int:
    """The same draft as another engine or trainer spells it; refuses what that dialect cannot say."""
    from suites.commands.audit import convert as work

    return answer(json, lambda desk: work(desk, source, out, to, written_by, target, layers))


@app.command()
def bench(
    part: Part,
    pair: Annotated[list[str] | None, typer.Option(help="Only this shipped pair; may be given several times.")] = None,
    prompts: Prompts = None,
    num_prompts: Annotated[int, typer.Option(help="Prompts that are answered, from the first on.")] = 80,
    num_tokens: Annotated[int, typer.Option(help="Tokens of each answer.")] = 64,
    num_draft_tokens: Annotated[int, typer.Option("--num-draft-tokens", "-K", help="Drafts a verify.")] = 3,
    blocks: Annotated[int, typer.Option(help="Blocks of timed turns, each there and back.")] = 10,
    dtype: Annotated[list[str] | None, typer.Option(help="float32 or bfloat16; both when absent.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    threads: Annotated[int, typer.Option(help="Threads of torch.")] = 1,
    big: Annotated[bool, typer.Option(help="Also time a random model of 100 M parameters.")] = True,
    shape: Annotated[
        list[str] | None, typer.Option(help="Of `ops`: a published shape; Llama-3.1-8B's if none.")
    ] = None,
    ab: Annotated[str, typer.Option(metavar="REV", help="This commit against that one, processes taking turns.")] = "",
    processes: Annotated[int, typer.Option(help="Of --ab: processes a side.")] = 5,
    profile: Annotated[Profile, typer.Option(help="Of the claims that must hold first.")] = Profile.quick,
    zoo: Zoo = ZOO,
    believe: Annotated[str, typer.Option(metavar="DIR", help="A run over these very files that held the claims.")] = "",
    runs: Runs = RUNS,
    json: Json = False,
) -> int:
    """Measure acceptance, tokens/s and operations of the shipped pairs, once their claims hold."""
    from suites.commands.bench import PARTS, Options, against
    from suites.commands.bench import bench as work
    from suites.commands.runs import begin

    parts = PARTS if part is Part.all else (part.value,)

    def asked() -> Options:
        return Options(
            pairs=tuple(pair or ()),
            prompts=prompts,
            num_prompts=num_prompts,
            num_tokens=num_tokens,
            num_draft_tokens=num_draft_tokens,
            blocks=blocks,
            dtypes=tuple(dtype or ("float32", "bfloat16")),
            device=device,
            threads=threads,
            big=big,
            zoo=zoo,
            shapes=tuple(shape or ()),
        )

    if ab:
        return answer(json, lambda desk: against(desk, ab, part.value, asked(), profile, runs, processes))
    return answer(json, lambda desk: work(desk, partial(begin, runs, profile, believe), parts, asked(), profile))


@app.command()
def probe(
    url: Annotated[str, typer.Option(help="Where the engine listens: http://HOST:PORT.")],
    engine: Annotated[str, typer.Option(help="vllm or sglang.")],
    target: Annotated[Path | None, typer.Option(help="The target's folder, for the reference.")] = None,
    draft: Annotated[Path | None, typer.Option(help="The draft's folder, for the reference.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="As of `bench`.")] = None,
    num_prompts: Annotated[int, typer.Option(help="Prompts that are asked, from the first on.")] = 80,
    num_tokens: Annotated[int, typer.Option(help="Tokens of each answer.")] = 256,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    model: Annotated[str, typer.Option(help="The served model; needed where there are several.")] = "",
    within: Annotated[float, typer.Option(help="Share of the reference's length that is no difference.")] = 0.05,
    timeout: Annotated[float, typer.Option(help="Seconds for one answer.")] = 60.0,
    retries: Annotated[int, typer.Option(help="Tries after the first one.")] = 3,
    api_key_env: Annotated[str, typer.Option(help="Environment variable that holds the engine's key.")] = "",
    json: Json = False,
) -> int:
    """The acceptance of a running engine in our words, held against the reference on the same prompts."""
    from suites.commands.probe import Asked, Options
    from suites.commands.probe import probe as work

    def asked() -> Options:
        how, reference = Asked(num_tokens, temperature), (target, draft)
        return Options(url, engine, *reference, prompts, num_prompts, how, model, within, timeout, retries, api_key_env)

    return answer(json, lambda desk: work(desk, asked()))


@app.command()
def report(
    names: Annotated[list[str], typer.Argument(metavar="RUN..", help="Run ids, record files, folders or URLs.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The page to write.")] = PAGE,
    md: Annotated[Path | None, typer.Option("--md", help="Also write a summary for a pull request.")] = None,
    junit: Annotated[Path | None, typer.Option("--junit", help="Also write JUnit XML.")] = None,
    runs: Runs = RUNS,
    json: Json = False,
) -> int:
    """One offline HTML page of what runs recorded."""
    from suites.commands.runs import report as work

    return answer(json, lambda desk: work(desk, names, out, runs, md, junit))


@app.command()
def compare(
    baseline: Annotated[str, typer.Argument(metavar="A", help=SIDE)],
    candidate: Annotated[str, typer.Argument(metavar="B", help=SIDE)],
    again: Annotated[
        tuple[str, str] | None, typer.Option(metavar="A2 B2", help="Both sides in fresh processes: only then WORSE.")
    ] = None,
    certify: Annotated[bool, typer.Option(help="A and B are one commit: write how quiet the machine was.")] = False,
    gates: Gates = GATES,
    runs: Runs = RUNS,
    json: Json = False,
) -> int:
    """A verdict a metric: SAME, BETTER, WORSE, UNCLEAR or INVALID."""
    from suites.commands.compare import compare as work
    from suites.commands.runs import begin

    start = partial(begin, runs)
    return answer(json, lambda desk: work(desk, start, (baseline, candidate), again or (), runs, gates, certify))


@app.command()
def history(
    places: Annotated[
        list[str] | None, typer.Argument(metavar="PLACE..", help="Run ids, files, folders, URLs; all runs if none.")
    ] = None,
    pair: Annotated[str, typer.Option(help="Only this pair.")] = "",
    metric: Annotated[str, typer.Option(help="Only this metric.")] = "",
    moved: Annotated[bool, typer.Option(help="Also say where the level moved; needs ruptures.")] = False,
    pack: Annotated[Path | None, typer.Option(help="Also write the records to this folder as Parquet.")] = None,
    runs: Runs = RUNS,
    json: Json = False,
) -> int:
    """What was measured over nights, by pair and metric."""
    from suites.commands.history import history as work

    return answer(json, lambda desk: work(desk, places or (), runs, pair, metric, moved, pack))


@baseline_app.command("promote")
def baseline_promote(
    run: Annotated[str, typer.Argument(metavar="RUN", help="Run id, record file or folder.")],
    label: Annotated[str, typer.Option("--as", help="Its name: compare baseline:NAME RUN.")],
    reason: Annotated[str, typer.Option(help="Why, for the reviewer.")],
    certificate: Annotated[str, typer.Option(help="The run of `compare --certify` that names RUN.")] = "",
    gates: Gates = GATES,
    runs: Runs = RUNS,
    json: Json = False,
) -> int:
    """Write a baseline for review; refuses a failed, throttled, dirty or uncertified run."""
    from suites.commands.baseline import promote

    return answer(json, lambda desk: promote(desk, run, certificate, reason, label, runs, gates))


@app.command()
def planted(
    bug: Annotated[list[str] | None, typer.Option(help="Only this one; may be given several times.")] = None,
    jobs: Annotated[int, typer.Option(help="Worker processes.")] = 2,
    runs: Runs = RUNS,
    json: Json = False,
) -> int:
    """Plant every known bug and see whether its claim catches it: the score of the harness itself."""
    from suites.commands.planted import score, select
    from suites.commands.runs import begin

    return answer(json, lambda desk: score(desk, partial(begin, runs, "pinned"), select(bug or ()), jobs))


@app.command()
def doctor(require: Required = None, json: Json = False) -> int:
    """This machine: GPU, driver, clocks, versions, what cannot run and why."""
    from suites.commands.doctor import doctor as work

    return answer(json, lambda desk: work(desk, require or ()))


app.command("nightly")(nightly)


@zoo_app.command("show")
def zoo_show(zoo: Zoo = ZOO, json: Json = False) -> int:
    """Sizes and training facts of the shipped weights."""
    from suites.commands.zoo import show

    return answer(json, lambda desk: show(desk, zoo))


@zoo_app.command("train")
def zoo_train(
    out: Annotated[Path, typer.Option("--out", help="The folder to train into; drafts read their targets there.")],
    names: Annotated[list[str] | None, typer.Argument(help="Checkpoints as in `zoo show`; all if none.")] = None,
    json: Json = False,
) -> int:
    """Train shipped checkpoints again, ten to twenty minutes each on a core."""
    from suites.commands.zoo import train

    return answer(json, lambda desk: train(desk, out, names or ()))


def run(arguments: Sequence[str] | None = None) -> int:
    """The exit code of one command line."""
    if not is_checkout(ROOT):
        typer.echo(f"draftproof: {ROOT} is no checkout of draftproof; clone it, then pip install -e . there", err=True)
        return 2
    try:
        return app(arguments, standalone_mode=False) or 0
    except typer.Exit as done:
        return done.exit_code
    except (typer.Abort, KeyboardInterrupt):
        return 3
    except Exception as error:
        if not hasattr(error, "show"):
            raise
        error.show()  # a usage error tells itself
        return 2


def is_checkout(root: Path) -> bool:
    """Claims, weights and records live in the source tree, not in an installed copy."""
    try:
        project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))
    except (OSError, tomllib.TOMLDecodeError):
        return False
    return project.get("project", {}).get("name") == "draftproof"


def main() -> None:
    """The console script."""
    sys.exit(run())


if __name__ == "__main__":
    main()
