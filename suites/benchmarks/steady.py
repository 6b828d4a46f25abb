"""A generation in mid-text: caches that are full up to a length, and cycles that are timed from there.

Nobody reads a prompt for a benchmark: keys and values are random, as the weights are. `begin` puts a generation back to
where it stood, so every visit computes the same cycles, and says the same: what a timed visit said must be what was
said untimed.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from harness import timing
from optimized import cycle
from optimized.decoding import RESERVED_DRAFTS, Session
from optimized.graphs import Replay
from optimized.state import Plan, whole_tiles
from suites.benchmarks import forced
from suites.benchmarks.shapes import Built


class ChangedText(RuntimeError):
    """A timed run said something else than the same run untimed."""


def num_slots(built: Built, num_cycles: int, num_drafts: int) -> int:
    """Slots of a generation that stands at its length and runs so many cycles more."""
    return whole_tiles(built.shape.length + num_cycles * (num_drafts + 1) + RESERVED_DRAFTS + 3) - 1


@contextmanager
def sharing(target: Any, beside: "Steady | None") -> Iterator[None]:
    """Hand out the keys of another arm for the time of a `with`."""
    if beside is None:
        yield
        return
    kept = beside.session.state.target_cache
    with patch.object(target, "new_cache", lambda batch, slots: kept):
        yield


class Steady:
    """One arm of a shape: so many sequences, so many drafts, so many cycles a visit.

    rates   unconditional acceptance rates to force, one a draft; () for a step that decodes plainly
    """

    def __init__(
        self,
        built: Built,
        batch: int,
        rates: Sequence[float] = (),
        num_cycles: int = 12,
        beside: "Steady | None" = None,
        most_drafts: int = 0,
    ) -> None:
        """beside       an arm whose target's keys this one reads too: what each writes, nobody reads after `begin`
        most_drafts  of the arms that share those keys
        """
        self.built, self.rates, self.num_cycles = built, tuple(rates), num_cycles
        room = num_cycles * (len(rates) + 1) + 2
        slots = num_slots(built, num_cycles, max(most_drafts, len(rates)))
        models = built.models if rates else built.models._replace(capture=())
        plan = Plan(batch, slots, room, len(rates), forced=bool(rates))
        # a session captures its graph while nobody speaks
        with sharing(built.target, beside):
            self.session = Session(models, plan, 1)
        self.device = built.text.at.device
        self._start = self._drawn(batch)
        self.begin()
        for _ in range(num_cycles):
            self.step()
        self.said = self.text()

    @property
    def num_drafts(self) -> int:
        return len(self.rates)

    def begin(self, seed: int = 0) -> None:
        """Every sequence stands at its length again; another seed draws other coins."""
        plan, state = self.session.plan, self.session.state
        names, rates = range(plan.batch), cycle.conditional(self.rates)
        state.ask(plan.capacity, None, seed, names, 0.0, rates)
        state.start([self.built.shape.length] * plan.batch, *self._start)

    def step(self) -> None:
        """One cycle, not timed."""
        self.session.replay()

    def visit(self) -> tuple[float, ...]:
        """Seconds of every cycle; ChangedText where they said something else than untimed ones."""
        self.begin()
        seconds = timing.time_calls(self.step, self.num_cycles, self.device)
        if not torch.equal(self.text(), self.said):
            raise ChangedText(f"{self.built.shape.name}: K={self.num_drafts} said something else while it was timed")
        return seconds

    def text(self) -> Tensor:
        """What every sequence said.

        ->  [B, num_tokens]  on the host
        """
        return self.session.state.output.cpu()

    def kept(self) -> list[list[int]]:
        """Drafts that each cycle of each sequence kept."""
        state = self.session.state
        counts = state.num_cycles.tolist()
        return [row[:count] for row, count in zip(state.log.tolist(), counts, strict=True)]

    def hold_rates(self, num_steps: int) -> float:
        """Tokens a step that the device draws, over as many steps; NotForced where they are not the rates'."""
        kept: list[list[int]] = [[] for _ in range(self.session.plan.batch)]
        seed = 0
        while sum(map(len, kept)) < num_steps:
            seed += 1
            self.begin(seed)
            for _ in range(self.num_cycles):
                self.step()
            kept = [old + new for old, new in zip(kept, self.kept(), strict=True)]
        return forced.hold(kept, self.rates, self.session.state.rates.tolist())

    @cached_property
    def phases(self) -> dict[str, timing.Call]:
        """Draft, verify and accept apart, each a graph of its own on CUDA; in this order they are a cycle."""
        # captured where nobody speaks
        plan, state = self.session.plan, self.session.state
        state.ask(plan.capacity, None, 0, range(plan.batch), 0.0, cycle.conditional(self.rates))
        run: dict[str, Any] = {"draft": cycle.propose, "verify": cycle.verify, "accept": cycle.accept}
        parts = {name: partial(call, self.session.models, state) for name, call in run.items()}
        return {name: Replay(part, self.device) for name, part in parts.items()}

    def split(self) -> dict[str, tuple[float, ...]]:
        """Seconds of every phase of a visit's cycles."""
        phases = self.phases
        self.begin()
        return timing.time_in_turn(phases, self.num_cycles, self.device)

    def _drawn(self, batch: int) -> tuple[Tensor, Tensor, Tensor]:
        """Fill the caches, and draw what stands at the end of them: root [B], aux [B, A, H], hidden [B, H]."""
        state, text = self.session.state, self.built.text
        generator = torch.Generator(self.device).manual_seed(batch)
        for cache in (state.target_cache, state.draft_cache):
            for tensor in () if cache is None else cache.tensors():
                tensor.normal_(generator=generator)
        root = torch.randint(0, text.c.vocab, (batch,), device=self.device, generator=generator)
        return root, *(torch.empty_like(x[:, 0]).normal_(generator=generator) for x in (state.aux, state.hidden))
