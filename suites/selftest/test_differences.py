"""Claim: of everything that differs between two sides, the fewest things that make it bad together are named.

Born of regressions that came with a lock file: the commit is known, and which of thirty packages it was is not.
"""

import json
import sys
import zipfile
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from harness.record import Bisection, Probe
from harness.runner import ROOT, Exit
from suites import cli
from suites.bisect.configs import differences, mixed
from suites.bisect.dependencies import read_pins
from suites.bisect.differences import Asked, name_of, search
from suites.bisect.environments import is_held
from suites.commands.desk import UsageFault

pytestmark = pytest.mark.correctness


@example(num=9, culprits={2, 7})
@given(num=st.integers(2, 12), culprits=st.sets(st.integers(0, 11), min_size=1, max_size=3))
def test_the_smallest_set_of_differences_is_found(num: int, culprits: set[int]) -> None:
    wanted = {f"d{i % num}" for i in culprits}
    order = [f"d{i}" for i in range(num)]

    class Page:
        def append(self, *lines: object) -> None: ...

    def ask(moved: frozenset[str]) -> Probe:
        return Probe(candidate=name_of(moved, order), answer="bad" if wanted <= moved else "good")

    asked = Bisection(kind="config", question="q", good="a", bad="b", candidates=[(name, "") for name in order])
    ending = search(asked, Asked(order, ask, Page(), (), 500, lambda probe: None), Page())  # type: ignore[arg-type]

    assert (ending.status, set(ending.culprits)) == ("found", wanted)


def test_a_config_is_mixed_key_by_key(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = {"rope": {"theta": 1e4, "type": "default"}, "layers": 1, "eps": 1e-6}
    bad = {"rope": {"theta": 1e6, "type": "default"}, "layers": 2, "bias": True}
    assert list(differences(good, bad)) == ["bias", "eps", "layers", "rope.theta"]
    assert mixed(good, bad, [("eps",), ("rope", "theta")]) == {"rope": bad["rope"], "layers": 1}

    for name, config in (("good.json", good), ("bad.json", bad)):
        (tmp_path / name).write_text(json.dumps(config))
    folder = tmp_path / "draft"
    folder.mkdir()
    command = (f"{sys.executable} -c \"import json, os; c = json.load(open(os.environ['DRAFTPROOF_CHECKPOINT'] + "
               "'/config.json')); exit(c['rope']['theta'] > 1e4 and c['layers'] == 2)\"")  # fmt: skip
    code = cli.run(["bisect", "config", "--good", str(tmp_path / "good.json"), "--bad", str(tmp_path / "bad.json"),
                    "--command", command, "--checkpoint", str(folder), "--runs", str(tmp_path / "runs"),
                    "--json"])  # fmt: skip

    assert (code, json.loads(capsys.readouterr().out)["culprits"]) == (Exit.PASSED, ["layers", "rope.theta"])


@pytest.mark.parametrize(
    ("lines", "held"),
    [
        ([f"pytest=={pytest.__version__}", "numpy>=1.0  # any", ""], True),
        (["pytest==0.1"], False),
        (["a-package-that-nobody-has>=1"], False),
        # a pin says which version, not that it is needed
        (["a-package-that-nobody-has==1"], True),
        (["a-package-that-nobody-has>=1; sys_platform == 'nowhere'"], True),
        (["--index-url https://example.org"], False),
    ],
)
def test_an_environment_serves_whoever_asks_for_what_it_holds(lines: list[str], held: bool) -> None:
    assert is_held(lines) == held


def wheel(folder: Path, name: str, version: str) -> None:
    """A package of one line."""
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as file:
        file.writestr(f"{name}.py", f"version = {version!r}\n")
        file.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        file.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: a\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        file.writestr(f"{info}/RECORD", "")


def test_the_package_that_makes_it_bad_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("spam", "eggs"):
        for version in ("1.0", "2.0"):
            wheel(tmp_path, name, version)
    for side, version in (("good", "1.0"), ("bad", "2.0")):
        (tmp_path / side).write_text(f"pytest=={pytest.__version__}\nspam=={version}\neggs=={version}\n")
    for name, value in (("PIP_NO_INDEX", "1"), ("PIP_FIND_LINKS", str(tmp_path)), ("DRAFTPROOF_CACHE", str(tmp_path))):
        monkeypatch.setenv(name, value)

    sides = ["--good", str(tmp_path / "good"), "--bad", str(tmp_path / "bad")]
    code = cli.run(["bisect", "deps", *sides, "--repo", str(ROOT),
                    "--command", f"{sys.executable} -S -c 'import eggs; raise SystemExit(eggs.version > \"1.0\")'",
                    "--runs", str(tmp_path / "runs"), "--json"])  # fmt: skip

    assert (code, json.loads(capsys.readouterr().out)["culprits"]) == (Exit.PASSED, ["eggs"])


def test_a_list_without_pins_is_refused(tmp_path: Path) -> None:
    (tmp_path / "pins").write_text("numpy>=2\n")

    with pytest.raises(UsageFault, match="pip freeze"):
        read_pins(tmp_path / "pins")
