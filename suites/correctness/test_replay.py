"""Claim: a cycle can be replayed: it asks the host nothing, moves no buffer, and gives the same bits every time.

Born of SGLang #26880 and #25529 (a graph for a padded batch replayed with the numbers of the unpadded one), #22958 and
#18647 (stale values in padded rows), #21987 (a shape baked in at capture that varies at replay) and vLLM #39773
(indices left from the batch before). A CUDA graph is only as right as the function it froze, so the function is judged
here on any machine; with a GPU the real graphs are held to it. What a batch says, whatever its company: test_company.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from harness.compare import bit_equal
from optimized.decoding import Engine, Session
from optimized.graphs import BUCKETS, GuardMode, Replay, bucket_for
from optimized.ops.slots import SlotError
from optimized.state import State
from reference.decoding import Generation
from suites.scripted import Loop, PoisonedEngine, loops, tiny_draft, tiny_target

pytestmark = [pytest.mark.correctness, pytest.mark.pair("llama-eagle3")]

# few words: a draft of random weights is right often enough for every count to occur
PINNED = Loop(tiny_target(6, vocab=5), tiny_draft(7, vocab=5), (5, 1, 3))
NUM_TOKENS, SEED = 12, 11
TEMPERATURES = st.sampled_from([0.0, 0.8])
on_devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])


class Cycles(NamedTuple):
    """How a generation is asked for."""

    num_draft_tokens: int = 3
    temperature: float = 0.0


GREEDY, SAMPLED, PLAIN = Cycles(), Cycles(temperature=0.8), Cycles(num_draft_tokens=0)
asked = st.builds(Cycles, st.integers(0, 4), TEMPERATURES)


class PausedEngine(Engine):
    """The twin's engine, stopped where the prompts are read and no cycle has run."""

    def _decode(self, session: Session) -> None:
        pass


def begin(engine: Engine, prompts: list[Tensor], how: Cycles, **more: Any) -> Session:
    """Read the prompts: the session whose next cycle is the first one."""
    engine.generate(prompts, NUM_TOKENS, *how, seed=SEED, **more)
    return engine.session


def paused(loop: Loop, device: str = "cpu", dtype: torch.dtype = torch.float64, **side: Any) -> PausedEngine:
    """An engine for a loop, which stops before the first cycle."""
    speculation = loop.open("optimized", dtype, device=device, **side)
    return PausedEngine(speculation.target.module, speculation.draft.module, speculation.draft.capture_points)


def saved(state: State) -> dict[str, Tensor]:
    """A copy of every buffer."""
    return {name: buffer.clone() for name, buffer in state.buffers().items()}


def put_back(state: State, before: dict[str, Tensor]) -> None:
    """Every buffer as it was."""
    for name, buffer in state.buffers().items():
        buffer.copy_(before[name])


def same_state(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    """Every buffer, bit for bit."""
    assert got.keys() == want.keys()
    for name, buffer in want.items():
        bit_equal(name, got[name], buffer)


@torch.no_grad()
def run(cycles: Callable[[], None]) -> None:
    """A cycle, or a replay of several."""
    cycles()


class Listing(TorchDispatchMode):
    """Which operations ran, on which shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, tuple[tuple[int, ...], ...]]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, Tensor)]
        self.calls.append((str(func), tuple(tuple(x.shape) for x in tensors)))
        return out


def listed(cycles: Callable[[], None]) -> list[tuple[str, tuple[tuple[int, ...], ...]]]:
    """The operations of one call."""
    with Listing() as listing:
        run(cycles)
    return listing.calls


@given(loop=loops(max_batch=3), how=asked)
@example(loop=PINNED, how=GREEDY)
@example(loop=PINNED, how=SAMPLED)
@example(loop=PINNED, how=PLAIN)
def test_a_cycle_asks_the_host_nothing_and_moves_no_buffer(loop: Loop, how: Cycles) -> None:
    session = begin(paused(loop), loop.prompts, how)

    with GuardMode(session.state.buffers) as guard:
        run(session.run)

    assert guard.num_calls > 0


@given(loop=loops(max_batch=3), how=asked)
@example(loop=PINNED, how=GREEDY)
@example(loop=PINNED, how=SAMPLED)
def test_every_cycle_runs_the_same_operations_on_the_same_shapes(loop: Loop, how: Cycles) -> None:
    session = begin(paused(loop), loop.prompts, how)
    # tables and packed weights are made at first use: capture warms up as well, and a prompt of one token did not
    run(session.run)

    first, *later = [listed(session.run) for _ in range(3)]

    assert all(calls == first for calls in later)
    # nor does it matter that nobody speaks any more
    session.state.done.fill_(True)
    assert listed(session.run) == first


@on_devices
@given(loop=loops(max_batch=3), how=asked)
@example(loop=PINNED, how=GREEDY)
@example(loop=PINNED, how=SAMPLED)
def test_from_the_same_state_a_cycle_gives_the_same_bits(device: str, loop: Loop, how: Cycles) -> None:
    session = begin(paused(loop, device, torch.float32), loop.prompts, how)
    state = session.state
    before, places = saved(state), {name: buffer.data_ptr() for name, buffer in state.buffers().items()}

    run(session.run)
    once = saved(state)
    put_back(state, before)
    run(session.run)

    same_state(saved(state), once)
    assert {name: buffer.data_ptr() for name, buffer in state.buffers().items()} == places
    assert bool((state.lengths > before["lengths"]).all())


@on_devices
@given(loop=loops(max_batch=3), how=asked, num_cycles=st.integers(1, 3))
@example(loop=PINNED, how=GREEDY, num_cycles=2)
@example(loop=PINNED, how=SAMPLED, num_cycles=2)
def test_a_replay_is_that_many_cycles(device: str, loop: Loop, how: Cycles, num_cycles: int) -> None:
    session = begin(paused(loop, device, torch.float32), loop.prompts, how, cycles_per_read=num_cycles)
    state, before = session.state, saved(session.state)

    for _ in range(num_cycles):
        run(session.run)
    eager = saved(state)
    put_back(state, before)
    run(session.replay)

    same_state(saved(state), eager)


def standing(state: State, rows: int) -> dict[str, Tensor]:
    """What the first rows of a batch have said and know; nothing that a later cycle may not read."""
    facts = ("root", "lengths", "accepted", "num_output", "num_cycles", "done", "drafted", "hidden", "aux")
    return {name: getattr(state, name)[:rows].clone() for name in facts}


def leave(state: State) -> None:
    """Nothing is done to a state."""


@torch.no_grad()
def after_cycles(
    session: Session, rows: int, before: Callable[[State], None] = leave, num_cycles: int = 3
) -> list[dict[str, Tensor]]:
    """What stands after each of some cycles; `before` each of them something is done to the state."""
    seen = []
    for _ in range(num_cycles):
        before(session.state)
        session.run()
        seen.append(standing(session.state, rows))
    return seen


# every way to the same text: (asked of the engine, done to the state before a cycle)
WAYS = {
    "chunks": ({"chunk_size": 2}, leave),
    "padding": ({"bucket": 5}, leave),
    "poison": ({}, State.poison),
    "padding and poison": ({"bucket": 4, "chunk_size": 3}, State.poison),
}


@pytest.mark.parametrize("way", WAYS)
@given(loop=loops(max_batch=2, longest=5), how=asked)
@example(loop=PINNED, how=GREEDY)
@example(loop=PINNED, how=SAMPLED)
def test_no_way_to_a_cycle_changes_its_bits(way: str, loop: Loop, how: Cycles) -> None:
    (engine, before), rows = WAYS[way], len(loop.lengths)
    opened = loop.open("optimized", torch.float32, exact=True)
    models = (opened.target.module, opened.draft.module, opened.draft.capture_points)

    usual = after_cycles(begin(PausedEngine(*models), loop.prompts, how, num_slots=127), rows)
    other = after_cycles(begin(PausedEngine(*models), loop.prompts, how, num_slots=127, **engine), rows, before)

    for got, want in zip(other, usual, strict=True):
        same_state(got, want)


@given(loop=loops(max_batch=3), how=asked, turn=st.integers(1, 4))
@example(loop=PINNED, how=GREEDY, turn=2)
@example(loop=PINNED, how=SAMPLED, turn=2)
def test_a_session_keeps_nothing_of_the_batch_before(loop: Loop, how: Cycles, turn: int) -> None:
    rows, used = len(loop.lengths), paused(loop)
    earlier = [(prompt + turn) % loop.target.keys["vocab_size"] for prompt in reversed(loop.prompts)]
    first = begin(used, [*earlier, loop.prompts[0]], how, bucket=rows + 1)
    after_cycles(first, rows)

    # one row fewer: what the last one held must not speak
    session = begin(used, loop.prompts, how, bucket=rows + 1)
    assert session is first
    fresh = begin(paused(loop), loop.prompts, how, bucket=rows + 1)

    for got, want in zip(after_cycles(session, rows), after_cycles(fresh, rows), strict=True):
        same_state(got, want)
    assert session.state.num_output[rows:].tolist() == [0]


@pytest.mark.parametrize("model", ["target", "draft"])
def test_slots_that_are_not_side_by_side_are_refused(model: str) -> None:
    session = begin(paused(PINNED), PINNED.prompts, GREEDY)
    cache = getattr(session.state, f"{model}_cache")
    side_by_side = cache.slots
    # every second of a buffer twice as long: the same numbers, which a unit-stride kernel would misread
    cache.slots = lambda positions: side_by_side(positions).repeat_interleave(2)[::2]

    with pytest.raises(SlotError, match="stride"):
        run(session.run)


@given(batch=st.integers(1, BUCKETS[-1]))
@example(batch=1)
@example(batch=3)
@example(batch=64)
def test_the_smallest_bucket_that_holds_a_batch_is_taken(batch: int) -> None:
    assert bucket_for(batch) == min(size for size in BUCKETS if size >= batch)


def test_a_batch_beyond_the_largest_bucket_is_refused() -> None:
    with pytest.raises(ValueError, match="larger than the largest bucket"):
        bucket_for(BUCKETS[-1] + 1)


class SpoiltReplays(PoisonedEngine):
    """The same for graphs: before every replay all state that its first cycle may not read is spoilt."""

    def _session(self, *plan: Any) -> Session:
        session = super()._session(*plan)
        session.replay = SpoiltReplay(session.state, session.replay)
        return session


class SpoiltReplay:
    """A replay that poisons the state first."""

    def __init__(self, state: State, replay: Replay) -> None:
        self.state, self.replay, self.graph = state, replay, replay.graph

    def __call__(self) -> None:
        self.state.poison()
        self.replay()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("how", [GREEDY, SAMPLED, PLAIN], ids=str)
@pytest.mark.parametrize("batch", [1, 3, 5])
def test_a_graph_of_any_bucket_says_what_eager_cycles_say(batch: int, how: Cycles, dtype: torch.dtype) -> None:
    loop = PINNED._replace(lengths=(5, 1, 3, 8, 2)[:batch])
    speculation = loop.open("optimized", dtype, device="cuda")
    models = (speculation.target.module, speculation.draft.module, speculation.draft.capture_points)
    say = partial(Engine.generate, num_tokens=NUM_TOKENS, **how._asdict(), seed=SEED, num_slots=127)
    prompts = [prompt.cuda() for prompt in loop.prompts]

    eager = say(EagerEngine(*models), prompts, bucket=batch)

    # up to 64 rows a call, prompts included, the bits of a row do not depend on how many there are
    for bucket in (size for size in BUCKETS if batch <= size <= 64 // max(loop.lengths)):
        for cycles_per_read in (1, 3):
            said: Generation = say(SpoiltReplays(*models), prompts, bucket=bucket, cycles_per_read=cycles_per_read)
            bit_equal("tokens", said.tokens, eager.tokens)
            assert said.accepted == eager.accepted


class EagerEngine(Engine):
    """The twin's engine without its graphs."""

    def _session(self, *plan: Any) -> Session:
        session = super()._session(*plan)
        session.replay.graph = None
        return session
