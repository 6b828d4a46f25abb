"""Claim: a planted bug runs where its name says, every reach is counted, and nothing of it is left behind.

Born of mutation scores counted on bugs that no test ever reached.
"""

import sys
from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch

from harness import acceptance, runner
from harness.acceptance import emitted
from harness.planting import Bug, PlantingError, find, planted
from harness.runner import Exit, Result, to_exit

pytestmark = pytest.mark.correctness

HERE = __name__
CLAIM = "suites/selftest/test_acceptance.py::test_a_step_emits_what_it_accepted_and_one_more"
TABLE = {"fc.weight": "replicated", "norm.weight": "replicated"}
NAMES = (("midlayer.", "layer."), ("layers.0.", "layer."))
NUMBER = 64


class Page:
    width = 4

    def __init__(self, scale: int = 2) -> None:
        self.scale = scale

    def forward(self, x: int) -> int:
        return x * self.scale

    @property
    def half(self) -> float:
        return self.scale / 2

    @staticmethod
    def plain(x: int) -> int:
        return x

    @classmethod
    def named(cls) -> str:
        return cls.__name__


class Heir(Page):
    """Inherits `forward`."""


@dataclass(frozen=True)
class Config:
    width: int = 3


def bug(at, make, **facts):
    return Bug(
        "a bug",
        "this file",
        at if at.startswith(("harness.", "suites.", "no_such")) else f"{HERE}.{at}",
        make,
        CLAIM,
        **facts,
    )


def constant(value):
    return lambda original: lambda *args: value


@pytest.mark.parametrize(
    ("at", "make", "read", "right", "wrong"),
    [
        ("Page.forward", lambda f: lambda self, x: f(self, x) + 1, lambda: Page().forward(3), 6, 7),
        ("Page.plain", lambda f: lambda x: f(x) + 1, lambda: Page().plain(3), 3, 4),
        ("Page.named", lambda f: lambda cls: f(cls) + "!", lambda: Heir.named(), "Heir", "Heir!"),
        ("Page.half", lambda p: property(lambda self: p.fget(self) + 1), lambda: Page().half, 1, 2),
        ("Page.width", lambda w: w + 1, lambda: Heir().width, 4, 5),
        ("Page.__init__", lambda f: lambda self: f(self, 5), lambda: Page().scale, 2, 5),
        ("Heir.forward", constant(0), lambda: Heir().forward(3), 6, 0),
        ("emitted", lambda f: lambda a: f(a) + 1, lambda: emitted(1), 2, 3),
        ("TABLE['fc.weight']", lambda k: "column", lambda: TABLE["fc.weight"], "replicated", "column"),
        ("TABLE", lambda t: {**t, "fc.weight": "row"}, lambda: TABLE.get("fc.weight"), "replicated", "row"),
        ("NAMES[1]", lambda pair: ("layers.", "layer."), lambda: NAMES[-1][0], "layers.0.", "layers."),
        ("NAMES", lambda names: names[::-1], lambda: next(a for a, _ in NAMES), "midlayer.", "layers.0."),
        ("Config", lambda c: partial(c, width=9), lambda: Config().width, 3, 9),
    ],
)
def test_a_bug_is_reached_and_then_gone(at, make, read, right, wrong):
    place = find(f"{HERE}.{at}")
    before = place.stands
    assert read() == right

    with planted(bug(at, make)) as bed:
        assert bed.reached == 0
        assert read() == wrong
        assert bed.reached == 1

    assert read() == right
    assert place.stands is before
    assert "forward" not in vars(Heir)


def test_a_function_is_replaced_where_it_is_used():
    with planted(bug("emitted", constant(0))):
        assert (emitted(1), acceptance.emitted(1)) == (0, 2)
    with planted(bug("harness.acceptance.emitted", constant(0))) as bed:
        assert (emitted(1), acceptance.emitted(1)) == (2, 0)
        assert acceptance.count([[1, 1]], 1).length == 0.0
    assert bed.reached > 1


def test_a_class_stays_a_class():
    class Narrow(Page):
        def forward(self, x):
            return 0

    with planted(bug("Page", lambda original: Narrow)) as bed:
        page = Page(3)
        assert isinstance(page, Narrow)
        assert isinstance(page, Page)
        assert (page.forward(2), page.scale) == (0, 3)
    assert bed.reached == 1
    assert type(Page()) is Page


def test_modules_of_torch_can_be_replaced():
    holder = sys.modules[HERE]
    holder.Linear = torch.nn.Linear

    with planted(
        bug("Linear", lambda c: type("Doubled", (c,), {"forward": lambda self, x: 2 * c.forward(self, x)}))
    ) as bed:
        layer = holder.Linear(2, 2, bias=False)
        assert torch.equal(layer(torch.eye(2)), 2 * layer.weight.T)
    assert bed.reached == 1
    del holder.Linear


def test_an_entry_counts_its_own_reads_and_walks_only():
    with planted(bug("TABLE['fc.weight']", lambda k: "column")) as bed:
        assert TABLE["norm.weight"] == "replicated"
        assert bed.reached == 0
        assert dict(TABLE)["fc.weight"] == "column"
        assert bed.reached > 0


def test_what_was_there_comes_back_after_an_error():
    before = find(f"{HERE}.emitted").stands
    with pytest.raises(ZeroDivisionError), planted(bug("emitted", lambda f: lambda a: a / 0)):
        emitted(1)
    assert find(f"{HERE}.emitted").stands is before


@pytest.mark.parametrize(
    ("at", "message"),
    [
        ("harness.acceptance.omitted", "harness.acceptance has no omitted"),
        ("harness.acceptance.Acceptance.wide.open", "Acceptance has no wide"),
        ("harness.nowhere.at_all", "harness has no nowhere"),
        ("no_such_package.at_all", "no module no_such_package"),
        ("harness.acceptance", "no name to replace in it"),
        (f"{HERE}.TABLE['fc']", "TABLE has no entry 'fc'"),
        (f"{HERE}.TABLE[fc]", "not a literal"),
        (f"{HERE}.NUMBER", "reads of a int in a module cannot be counted"),
        (f"{HERE}.NUMBER[0]", "NUMBER is a int, not a table"),
    ],
)
def test_a_name_that_does_not_exist_is_refused(at, message):
    with pytest.raises(PlantingError, match=message), planted(bug(at, lambda original: original)):
        pass


def test_a_claim_turns_red_with_its_bug_and_green_without():
    twice = bug("harness.acceptance.emitted", lambda f: lambda a: f(a) + 1)
    # the claim imported the name, so the bug goes where the claim looks
    there = replace(twice, at="suites.selftest.test_acceptance.emitted")

    assert runner.run([CLAIM], in_process=True).is_green
    with planted(there) as bed:
        red = runner.run([CLAIM], in_process=True)
    assert bed.reached
    assert red.is_red
    assert red.first_failure.startswith("suites.selftest.test_acceptance::test_a_step_emits")
    assert runner.run([CLAIM], in_process=True).is_green


def test_a_claim_in_its_own_process_does_not_see_the_bug():
    with planted(bug("harness.acceptance.emitted", constant(0))):
        apart = runner.run([CLAIM], timeout=120)
    assert apart.is_green
    assert apart.num("passed") == 1


@pytest.mark.parametrize(
    ("code", "statuses", "ours"),
    [
        (0, ["passed"], Exit.PASSED),
        (0, ["passed", "skipped"], Exit.PASSED),
        (0, ["skipped"], Exit.CAPABILITY_MISSING),
        (1, ["passed", "failed"], Exit.GATE_FAILED),
        (2, ["error"], Exit.GATE_FAILED),
        (2, [], Exit.MACHINE_FAILED),
        (3, [], Exit.MACHINE_FAILED),
        (4, [], Exit.USAGE),
        (5, [], Exit.NOTHING_SELECTED),
        (None, [], Exit.MACHINE_FAILED),
        (-9, [], Exit.MACHINE_FAILED),
    ],
)
def test_exit_codes_of_pytest_become_ours(code, statuses, ours):
    assert to_exit(code, [Result("a claim", status, "", 0.0) for status in statuses]) is ours


def test_runs_that_conclude_nothing_are_neither_red_nor_green():
    nothing = runner.run([CLAIM], options=["-k", "no_such_name"], in_process=True)
    usage = runner.run(["suites/selftest/no_such_file.py"], in_process=True)

    assert (nothing.exit, usage.exit) == (Exit.NOTHING_SELECTED, Exit.USAGE)
    assert not any(outcome.is_red or outcome.is_green for outcome in (nothing, usage))
