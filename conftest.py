"""What every claim runs under: one thread, no network, a hypothesis profile, and an account of what it proved."""

import atexit
import gc
import os
import sys

# one GPU a worker, before torch counts them
if "PYTEST_XDIST_WORKER" in os.environ:
    from harness import pinning

    pinning.pin()
# read when a module with a Triton kernel is imported: without a GPU the kernels run in the interpreter
if "TRITON_INTERPRET" not in os.environ:
    import torch

    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings

from harness import compare, pinning
from harness.environment import describe, source
from harness.record import Check, Observation, Recorder, Run
from suites import replay

SLOW_DRAWS = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
COMMON = {"deadline": None, "suppress_health_check": SLOW_DRAWS, "print_blob": True}
# each claim's own examples stand for history and always run; the profile says how many draws come on top
settings.register_profile("pinned", phases=[Phase.explicit], derandomize=True, **COMMON)
settings.register_profile("quick", max_examples=3, derandomize=True, **COMMON)
settings.register_profile("ci", max_examples=6, derandomize=True, **COMMON)
settings.register_profile("nightly", max_examples=200, **COMMON)
PROFILES = ("pinned", "quick", "ci", "nightly")
EXPLAINED = 5
"""failures of a process that are explained; each takes seconds"""


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("draftproof")
    group.addoption("--profile", choices=PROFILES, default="ci", help="how many draws each claim makes")
    group.addoption("--draws", type=int, metavar="N", help="draws of each claim, in the place of the profile's number")
    group.addoption("--records", metavar="FILE", help="append one record a claim to this JSONL file")
    group.addoption("--run-id", metavar="ULID", help="the run that the records belong to")
    group.addoption(
        "--pair", action="append", default=[], metavar="NAME", help="only claims that speak about this pair"
    )
    group.addoption("--replay", metavar="FILE", help="run a counterexample in the place of the claim's own draws")
    group.addoption("--require", default="", metavar="gpu,...", help="a skip for want of one of these is a failure")


def pytest_configure(config: pytest.Config) -> None:
    settings.load_profile(config.getoption("--profile"))
    if draws := config.getoption("--draws"):
        settings.register_profile(
            "drawn", parent=settings.get_profile(config.getoption("--profile")), max_examples=draws
        )
        settings.load_profile("drawn")
    torch.set_num_threads(1)
    path = config.getoption("--records")
    if path and not hasattr(config, "workerinput"):
        run_id = config.getoption("--run-id")
        with Recorder(path, run_id) as recorder:
            if run_id is None:
                argv, profile = tuple(sys.argv), config.getoption("--profile")
                recorder.append(Run(started="", argv=argv, profile=profile, environment=describe()))
            config.option.run_id = recorder.run_id


def pytest_configure_node(node: object) -> None:
    """xdist: every worker writes into the run of the session that started it."""
    node.workerinput["run_id"] = node.config.option.run_id  # type: ignore[attr-defined]


@pytest.fixture
def profile(request: pytest.FixtureRequest) -> str:
    """The profile's name, for claims that count something other than draws."""
    return request.config.getoption("--profile")


@pytest.fixture
def keep(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Appends observations to the record of this session, where one is kept: what a claim counted once it held."""

    def append(*observations: Observation) -> None:
        if path := request.config.getoption("--records"):
            worker = getattr(request.config, "workerinput", {})
            with Recorder(path, worker.get("run_id") or request.config.option.run_id) as recorder:
                recorder.append(*observations)

    return append


@pytest.fixture(autouse=True)
def _fresh_log() -> None:
    """The error log is one claim's at a time."""
    compare.reset()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    pairs = config.getoption("--pair")
    if pairs:
        config.hook.pytest_deselected(items=[item for item in items if _pair(item) not in pairs])
        items[:] = [item for item in items if _pair(item) in pairs]
    if file := config.getoption("--replay"):
        for item in items:
            replay.arm(item, replay.read(file))
    items[:] = [i for i in items if not pinning.is_left_out(i.get_closest_marker("multi_gpu") is not None)]
    needs = {"gpu": 1, "multi_gpu": 2}
    required = set(filter(None, config.getoption("--require").split(",")))
    have = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for item in items:
        for marker, count in needs.items():
            if item.get_closest_marker(marker) and have < count and marker not in required:
                item.add_marker(pytest.mark.skip(reason=f"needs {count} NVIDIA GPU(s), this machine has {have}"))


def pytest_collection_finish() -> None:
    """What was imported stays: no collection of garbage needs to walk through it again."""
    if gc.get_freeze_count() == 0:  # a session inside a session has nothing to add
        gc.collect()
        gc.freeze()
        atexit.register(gc.unfreeze)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo) -> Iterator[None]:
    report = yield
    path = item.config.getoption("--records")
    if path and (report.when == "call" or report.outcome != "passed"):
        worker = getattr(item.config, "workerinput", {})
        facts = _kept(item, call, report, Path(path).parent) if report.outcome == "failed" else {}
        with Recorder(path, worker.get("run_id") or item.config.option.run_id) as recorder:
            recorder.append(_check(item, report, facts))
    return report


def _kept(item: pytest.Item, call: pytest.CallInfo, report: pytest.TestReport, folder: Path) -> Mapping[str, Any]:
    """What a record says of a failure: the counterexample beside it, and what explains it."""
    error = call.excinfo.value if call.excinfo else AssertionError(report.longrepr)
    version, blob = replay.blob_of(error)
    if (file := item.config.getoption("--replay")) and not blob:
        # hypothesis does not tell again what it was told
        version, blob = replay.read(file).hypothesis, replay.read(file).blob
    found = replay.Counterexample(
        claim=item.nodeid,
        pair=_pair(item),
        profile=item.config.getoption("--profile"),
        reason=_reason(str(report.longrepr or "")),
        given=replay.given(error, item.path),
        blob=blob,
        hypothesis=version,
        shares={name: used for named in compare.log().values() for name, used in named.items()},
        versions=replay.versions(),
        source=source(),
    )
    file = replay.write(folder / replay.FOLDER, found)
    facts = {"counterexample": f"{replay.FOLDER}/{file.name}", "given": found.line, "blob": blob}
    if item.get_closest_marker("correctness") and item.session.testsfailed < EXPLAINED:
        # imported here: a run without a failure has no need of it
        from suites.explain.failures import explained

        facts |= explained(found)
    return facts


def _check(item: pytest.Item, report: pytest.TestReport, facts: Mapping[str, Any]) -> Check:
    shares = [named for names in compare.log().values() for named in names.items()]
    tensor, used = max(shares, key=lambda pair: pair[1], default=("", None))
    failed = report.outcome == "failed"
    status = "error" if failed and report.when != "call" else report.outcome
    text = report.longrepr[-1] if isinstance(report.longrepr, tuple) else str(report.longrepr or "")
    return Check(
        claim=item.nodeid,
        pair=_pair(item),
        status=status,
        used=used,
        worst=(tensor, ()) if tensor else None,
        replay=f"pytest '{item.nodeid}' --profile {item.config.getoption('--profile')}",
        duration_s=report.duration,
        reason=_reason(text) if status != "passed" else "",
        extra=facts,
    )


def _pair(item: pytest.Item) -> str:
    """Which pair a claim speaks about: its parameter, its marker, or none."""
    params = getattr(getattr(item, "callspec", None), "params", {})
    marker = item.get_closest_marker("pair")
    return str(params.get("pair") or (marker.args[0] if marker else ""))


def _reason(text: str) -> str:
    """The line of a traceback that says what was wrong."""
    lines = [line[1:].strip() for line in text.splitlines() if line.startswith("E ")]
    return (lines or [text.strip() or "no reason given"])[0][:500]
