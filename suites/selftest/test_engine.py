"""Asking an engine: cases go out, dumps come back, and whatever goes wrong on the way is told as what it is.

The engine here is a script of five lines that answers with states of the reference, as they are or with one moved.
"""

import ast
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from harness.runner import Exit
from suites.catalog import open_draft, open_target
from suites.commands.desk import MissingCapability, fault
from suites.draws import PINNED_DRAFT
from suites.engine.cases import V1, Recipe
from suites.engine.environment import steps
from suites.engine.judge import Posed, finding, pose
from suites.engine.protocol import ENGINES, Engine, EngineDied, ask, check_python
from suites.explain.dump import Dump, write_dump
from suites.explain.ladder import drafted
from suites.explain.states import walk

VLLM = ENGINES["vllm"]
ANSWERS = """
import json, shutil, sys
for case in json.load(open(sys.argv[1]))["cases"]:
    shutil.copy({prepared!r}, case["dump"])
    print(case["name"])
"""


@pytest.fixture(scope="module")
def posed(tmp_path_factory: pytest.TempPathFactory) -> Posed:
    root = tmp_path_factory.mktemp("posed")
    return pose(Recipe("plain", PINNED_DRAFT, dialect=V1), root, root / "targets")


@pytest.fixture(scope="module")
def told(posed: Posed) -> Dump:
    """What an engine without a fault would answer."""
    assert posed.stated is not None
    target = open_target(posed.target)
    draft, case = open_draft(posed.stated, target), posed.case(batch=1, width=6)
    made = walk(target, torch.tensor(case.tokens))
    empty = Dump(torch.tensor(case.tokens), {f"logits.{k}": torch.empty(0) for k in (1, 2, 3)})
    notes = {"unwritten": {"model.embed_tokens.weight": "uninitialised memory"}, "unread": ["t2d"],
             "shared": ["embed_tokens"], "points": {"v1": list(draft.capture_points)}}  # fmt: skip
    return Dump(
        empty.tokens, {**made, **drafted(empty, draft, made)}, notes={k: json.dumps(v) for k, v in notes.items()}
    )


def script(folder: Path, text: str) -> Engine:
    runner = folder / "runner.py"
    runner.write_text(text, encoding="utf-8")
    return replace(VLLM, runner=runner)


def test_a_dump_comes_back_for_every_case(posed: Posed, told: Dump, tmp_path: Path) -> None:
    file, heard = write_dump(tmp_path / "answer.safetensors", told), []
    engine = script(tmp_path, ANSWERS.format(prepared=str(file)))

    dumps = ask(engine, Path(sys.executable), [posed.case()], tmp_path, heard.append)

    assert list(dumps) == heard == ["plain"]
    assert torch.equal(dumps["plain"].tensors["logits.3"].nan_to_num(), told.tensors["logits.3"].nan_to_num())


@pytest.mark.parametrize("text", ["import sys; sys.exit(9)", "pass"], ids=["it died", "it answered nothing"])
def test_an_engine_without_an_answer_is_a_machine_that_failed(text: str, posed: Posed, tmp_path: Path) -> None:
    with pytest.raises(EngineDied, match="'plain' was not answered") as caught:
        ask(script(tmp_path, text), Path(sys.executable), [posed.case()], tmp_path)

    assert fault(caught.value).exit == Exit.MACHINE_FAILED


@pytest.mark.parametrize("python", [sys.executable, "/no/such/python"])
def test_an_environment_without_the_engine_is_a_missing_capability(python: str) -> None:
    with pytest.raises(MissingCapability, match="--make-env") as caught:
        check_python(VLLM, Path(python))

    assert fault(caught.value).exit == Exit.CAPABILITY_MISSING


def test_an_answer_like_the_reference_is_as_foretold(posed: Posed, told: Dump) -> None:
    found = finding(posed, told)

    assert found["agrees"], found
    assert max(used for _, used in found["rungs"].values()) <= 1


@pytest.mark.parametrize("name", ["hidden.5", "aux", "fused", "logits.1", "feedback.2"])
def test_a_state_that_moved_is_told(name: str, posed: Posed, told: Dump) -> None:
    moved = replace(told, tensors={**told.tensors, name: told.tensors[name] + 1e-3})

    found = finding(posed, moved)

    assert not found["agrees"]
    assert found["rungs"][name][1] > 1


def test_the_runner_knows_nothing_of_this_project() -> None:
    tree = ast.parse(VLLM.runner.read_text(encoding="utf-8"))
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}

    assert not {name.split(".")[0] for name in names} & {"suites", "harness", "reference", "optimized", "reports"}


def test_the_environment_is_made_of_pinned_packages(tmp_path: Path) -> None:
    lines = [line for line in VLLM.requirements.read_text().splitlines() if not line.startswith("#")]

    assert all("==" in line for line in lines)
    assert f"vllm=={VLLM.version}" in steps(VLLM, tmp_path)[2]
