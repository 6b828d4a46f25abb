"""Claim: a cycle of every speculation is fit to be one CUDA graph, on a machine without a GPU.

It asks the host nothing, no shape of it depends on a value, its state is made once and keeps its addresses, and from
the same state it gives the same bits. `test_replay.py` draws loops of one speculation; this claim asks every one of the
catalog, and trees where a draft can grow them. The form is the one a GPU has: mixtures look at no expert's number.

Born of vLLM #39773 (indices left from the batch before), of SGLang #21987 (a shape baked in at capture that varies at
replay) and of transformers' assistant, which asks the host twice for every drafted token.
"""

from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from harness.compare import bit_equal
from optimized.decoding import Engine, Session
from optimized.graphs import LEAVING, GuardMode
from suites.algorithms import ALGORITHMS
from suites.catalog import SPECULATIONS
from suites.correctness.test_replay import Cycles as Chain
from suites.correctness.test_replay import PausedEngine, begin, listed, put_back, run, same_state, saved
from suites.couples import COUPLES
from suites.opened import OpenSpeculation

pytestmark = [pytest.mark.correctness]

WAYS: dict[str, tuple[Chain, dict[str, int]]] = {
    "greedy": (Chain(3), {}),
    "sampled": (Chain(2, 0.8), {}),
    "tree": (Chain(4), {"topk": 2, "num_steps": 2}),
}
EACH = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.pair(name)) for name in COUPLES if name in SPECULATIONS]
)

ONE_A_WAY = [next(n for n, s in SPECULATIONS.items() if s.draft == draft and n in COUPLES) for draft in ALGORITHMS]


def ways(speculation: OpenSpeculation) -> list[str]:
    """Trees where the draft has a step for a beam."""
    grows = getattr(speculation.draft.module.way, "branch", None) is not None
    return [way for way in WAYS if grows or way != "tree"]


def started(name: str) -> list[tuple[Any, Any]]:
    """A session of every way to speak, its prompts read and its tables made; engines are kept, since they own it."""
    speculation, sessions = COUPLES[name].open("optimized", torch.float32, form="blind"), []
    models = (speculation.target.module, speculation.draft.module, speculation.draft.capture_points)
    for way in ways(speculation):
        (how, tree), engine = WAYS[way], PausedEngine(*models)
        session = begin(engine, COUPLES[name].prompts(), how, **tree)
        # tables and packed weights are made at first use: a capture warms up as well
        run(session.run)
        sessions.append((engine, session))
    return sessions


@EACH
def test_every_speculation_is_fit_to_be_captured(name: str) -> None:
    for _, session in started(name):
        state = session.state
        before, attributes = saved(state), dict(vars(state))

        with GuardMode(state.buffers) as guard:
            run(session.run)
        once = saved(state)
        put_back(state, before)
        calls = listed(session.run)

        # the same bits from the same state, in the memory that was there before
        same_state(saved(state), once)
        assert {n: id(v) for n, v in vars(state).items()} == {n: id(v) for n, v in attributes.items()}
        # and the same work from another one
        assert listed(session.run) == calls
        assert guard.num_calls > 0


class Looks(TorchFunctionMode):
    """How often numbers are handed to the host."""

    num_looks = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.num_looks += getattr(func, "__name__", "") in LEAVING
        return func(*args, **(kwargs or {}))


class WatchedEngine(Engine):
    """The twin's engine, and how often the host looked while it decoded."""

    def _decode(self, session: Session) -> None:
        with Looks() as looks:
            super()._decode(session)
        self.num_looks = looks.num_looks


@pytest.mark.parametrize("name", ONE_A_WAY)
def test_the_host_looks_once_after_several_cycles(name: str) -> None:
    couple = COUPLES[name]
    speculation = couple.open("optimized", torch.float32, form="blind")
    models = (speculation.target.module, speculation.draft.module, speculation.draft.capture_points)
    prompts, said = couple.prompts((2, 1)), {}

    for num_cycles in (1, 3):
        engine = WatchedEngine(*models)
        said[num_cycles] = engine.generate(prompts, 9, 2, cycles_per_read=num_cycles)

        # before the first cycle, and after every replay
        cycles = max(len(accepted) for accepted in said[num_cycles].accepted)
        assert engine.num_looks == 1 + -(-cycles // num_cycles)

    bit_equal("tokens", said[3].tokens, said[1].tokens)
    assert said[3].accepted == said[1].accepted
