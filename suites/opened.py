"""Opened targets, drafts and speculations: what the public openers hand out.

One object serves both sides and any number of ranks: a reference module, a twin, or W twins run as threads whose
results are joined. Both sides read the same folder through the same plan, so a loading mistake cannot hide in a copy.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from harness.checkpoints import Checkpoint, Ledger
from harness.contracts import Group
from harness.conventions import LayerIds
from harness.groups import run_threads
from harness.pairs import Pair
from optimized.decoding import Engine
from reference.decoding import Generation
from reference.decoding import generate as generate_reference
from reference.outputs import DraftOutput, TargetOutput
from suites.voice import Voice

ENGINE = frozenset(inspect.signature(Engine.generate).parameters)
"""what an engine takes; other names belong to inputs of the prompts"""


class Seat:
    """A rank's place: twins outlive the threads of one call, so they hold a seat and each call fills it."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        self.group: Group | None = None

    def all_reduce(self, tensor: Tensor) -> Tensor:
        return self._now().all_reduce(tensor)

    def all_gather(self, tensor: Tensor, dim: int = 0) -> Tensor:
        return self._now().all_gather(tensor, dim)

    def broadcast(self, tensor: Tensor, src: int = 0) -> Tensor:
        return self._now().broadcast(tensor, src)

    def _now(self) -> Group:
        if self.group is None:
            raise RuntimeError(f"rank {self.rank} of {self.size} was called outside `Ranks.run`")
        return self.group


class Ranks:
    """W seats on one machine; `run` calls a function on all of them at once."""

    def __init__(self, size: int) -> None:
        self.seats = [Seat(rank, size) for rank in range(size)]

    def run(self, call: Callable[[int], Any]) -> list[Any]:
        """`call(rank)` on every rank; results in rank order."""
        if len(self.seats) == 1:
            return [call(0)]

        def sit(group: Group) -> Any:
            self.seats[group.rank].group = group
            return call(group.rank)

        return run_threads(len(self.seats), sit)


@dataclass(frozen=True)
class Side:
    """Which implementation, where and in what numbers."""

    name: str = "reference"
    """reference or optimized"""
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    tp_size: int = 1
    exact: bool = False
    """twin on a CPU: bits of a row depend on the row alone (slower)"""
    form: str | None = None
    """twin: "aten" or "triton"; None chooses by device"""


@dataclass(frozen=True, repr=False)
class OpenTarget:
    """A target ready to be called."""

    pair: Pair
    checkpoint: Checkpoint
    config: Any
    side: Side
    modules: tuple[Any, ...]
    """one reference module, or a twin a rank"""
    ranks: Ranks
    ledger: Ledger
    voice: Voice = field(default_factory=Voice)
    """what it never says, and where its texts end; facts of decoding, which no logits show"""

    def __repr__(self) -> str:
        # a claim that fails prints what it was given: the ledger would bury the counterexample
        return f"{type(self).__name__}({self.pair.name}, {self.checkpoint.path}, {self.side})"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        # hypothesis and notebooks print a dataclass by its fields unless it has this
        printer.text(repr(self))

    @property
    def module(self) -> Any:
        return self.modules[0]

    @property
    def num_layers(self) -> int:
        return self.config.layers

    @torch.no_grad()
    def __call__(
        self, tokens: Tensor, positions: Tensor | None = None, capture: Sequence[int] = (), **inputs: Any
    ) -> TargetOutput:
        """Predict the token after each of `tokens`.

        tokens     [B, T]
        positions  [B, T]
        inputs     images, audio and video, named as transformers names them: `pixel_values`, `input_features`, ...
        ->         logits [B, T, V], hidden [B, T, H], aux [B, T, A, H]
        """
        _check_capture(capture, self.num_layers)
        tokens, inputs = tokens.to(self.side.device), self.place(inputs)
        return self.ranks.run(lambda rank: self.modules[rank](tokens, positions, tuple(capture), **inputs))[0]

    def place(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Images, audio and video on the target's device; errors: ValueError where the target reads text alone."""
        if inputs and not hasattr(self.module, "sense"):
            raise ValueError(f"{self.pair.name} reads text alone, and was given {', '.join(inputs)}")
        return {n: v.to(self.side.device) if isinstance(v, Tensor) else v for n, v in inputs.items()}


@dataclass(frozen=True)
class DraftFacts:
    """Every explicit fact of a draft's checkpoint."""

    config: Any
    layer_ids: LayerIds | None
    """None when the draft reads the target's final hidden state"""
    own_embedding: bool
    own_head: bool


@dataclass(frozen=True, repr=False)
class OpenDraft:
    """A draft ready to be called, joined to its target or alone."""

    pair: Pair
    checkpoint: Checkpoint
    facts: DraftFacts
    side: Side
    modules: tuple[Any, ...]
    ranks: Ranks
    ledger: Ledger

    def __repr__(self) -> str:
        # a claim that fails prints what it was given: the ledger would bury the counterexample
        return f"{type(self).__name__}({self.pair.name}, {self.checkpoint.path}, {self.side})"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        # hypothesis and notebooks print a dataclass by its fields unless it has this
        printer.text(repr(self))

    @property
    def module(self) -> Any:
        return self.modules[0]

    @property
    def capture_points(self) -> tuple[int, ...]:
        return self.facts.layer_ids.points if self.facts.layer_ids else ()

    @torch.no_grad()
    def fuse(self, aux: Tensor) -> Tensor:
        """aux [B, T, A, X] -> [B, T, H]"""
        return self.ranks.run(lambda rank: self.modules[rank].fuse(aux))[0]

    @torch.no_grad()
    def __call__(self, tokens: Tensor, hidden: Tensor, positions: Tensor | None = None) -> DraftOutput:
        """Propose the token after each of `tokens`.

        tokens     [B, T]
        hidden     [B, T, H]
        positions  [B, T]
        ->         logits [B, T, Vd], feedback [B, T, H]
        """
        return self.ranks.run(lambda rank: self.modules[rank](tokens, hidden, positions))[0]

    @torch.no_grad()
    def unroll(self, tokens: Tensor, out: TargetOutput, num_steps: int = 3) -> Tensor:
        """Teacher-forced draft steps, as in training; reference side only.

        tokens  [B, T]
        ->      [K, B, T, Vd]  NaN where no next token is known
        """
        if self.side.name != "reference":
            raise ValueError(
                "unroll is the reference's: a twin holds one key a slot; open the draft with side='reference'"
            )
        return self.module.unroll(tokens, self.module.read(out), num_steps)


@dataclass(frozen=True)
class OpenSpeculation:
    """A target, its draft and the loop."""

    target: OpenTarget
    draft: OpenDraft
    algorithm: str
    topk: int = 1

    def generate(
        self,
        prompt_tokens: Tensor | Sequence[Tensor],
        num_tokens: int = 64,
        num_draft_tokens: int = 3,
        temperature: float = 0.0,
        seed: int = 0,
        eos_token_id: int | None = None,
        sequence_ids: Sequence[int] | None = None,
        topk: int | None = None,
        num_steps: int | None = None,
        **more: Any,
    ) -> Generation:
        """Continue every prompt; num_draft_tokens = 0 decodes without the draft. Nobody says `target.voice.suppressed`.

        prompt_tokens  [B, T], or B one-dimensional tensors of any lengths
        topk, num_steps  of trees, whose num_draft_tokens counts the nodes with the root; topk as opened when absent
        more           images, audio and video of the prompts, named as transformers names them; and, twin only,
                       chunk_size, cycles and the like of `optimized.decoding.Engine.generate`
        ->             tokens [B, num_tokens], -1 after the end; accepted drafts of each verify step
        """
        rows = [row.to(self.target.side.device) for row in prompt_tokens]
        _check_prompts(rows, self.target)
        loop = (num_tokens, num_draft_tokens)
        draws: dict[str, Any] = {"temperature": temperature, "seed": seed, "eos_token_id": eos_token_id}
        draws |= {"sequence_ids": sequence_ids, "topk": self.topk if topk is None else topk, "num_steps": num_steps}
        points, engine = self.draft.capture_points, {name: more[name] for name in more if name in ENGINE}
        draws["inputs"] = self.target.place({name: more[name] for name in more if name not in ENGINE})
        if self.target.side.name == "reference":
            draws["suppressed"] = self.target.voice.suppressed
            return generate_reference(self.target.module, self.draft.module, rows, *loop, capture=points, **draws)
        return self.target.ranks.run(lambda rank: self.engines[rank].generate(rows, *loop, **draws, **engine))[0]

    @cached_property
    def engines(self) -> tuple[Engine, ...]:
        """The twin's engine of each rank; kept, since it keeps its buffers and graphs."""
        pairs = zip(self.target.modules, self.draft.modules, strict=True)
        facts = (self.draft.capture_points, self.target.voice.suppressed)
        return tuple(Engine(target, draft, *facts) for target, draft in pairs)


def _check_capture(capture: Sequence[int], num_layers: int) -> None:
    wrong = [c for c in capture if not 0 <= c <= num_layers]
    if wrong:
        raise ValueError(f"capture points {wrong} are outside 0..{num_layers}")


def _check_prompts(rows: Sequence[Tensor], target: OpenTarget) -> None:
    if not rows or any(row.dim() != 1 or not len(row) or row.is_floating_point() for row in rows):
        raise ValueError("prompts are one or more non-empty sequences of token ids")
    vocab, known = target.config.vocab, getattr(target.module, "known", None)
    for row in rows if known is None else map(known, rows):
        # a twin's table has padding rows, which would take an id beyond the vocabulary in silence
        if int(row.min()) < 0 or int(row.max()) >= vocab:
            raise ValueError(f"a prompt holds ids {int(row.min())}..{int(row.max())}, the target's are 0..{vocab - 1}")
