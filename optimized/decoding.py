"""The engine: read the prompts, replay cycles, say what happened.

Text is what `reference/decoding.py` says for the same models; this file only decides when things are computed. The host
learns from the device once per replay how far every row has come, and nothing else until the end.
Letters: reference/README.md.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from optimized.cycle import TARGET, Speculation, conditional, cycle, draw, probabilities
from optimized.graphs import Replay, bucket_for
from optimized.muted import MutedDraft, MutedTarget
from optimized.prompts import EngineError, read_prompts
from optimized.state import Plan, State, whole_tiles
from optimized.tree_cycle import TreePlan, TreeState
from optimized.tree_cycle import cycle as tree_cycle
from optimized.trees import check

RESERVED_DRAFTS = 16
"""slots kept for drafts however few there are, so that the shape of a cache does not depend on their number"""


class Generation(NamedTuple):
    tokens: Tensor
    """[B, num_tokens]  -1 after the end"""
    accepted: list[list[int]]
    """per sequence: accepted drafts of each verify step"""


class Session:
    """The state of one plan and the replay of its cycles; kept from one generation to the next."""

    def __init__(self, models: Speculation, plan: Plan, cycles_per_read: int) -> None:
        target, draft = models.target, models.draft
        self.plan = plan
        size = (target.c.vocab, target.c.hidden, len(models.capture), target.at.dtype, target.at.device)
        tree = isinstance(plan, TreePlan)
        self.state = TreeState(plan, *size) if isinstance(plan, TreePlan) else State(plan, *size)
        self.state.target_cache = target.new_cache(plan.batch, plan.num_slots)
        way = draft.way(draft, target, self.state) if plan.num_draft_tokens else None
        self.models = models._replace(way=way)
        self.cycles_per_read = cycles_per_read
        self.run = partial(tree_cycle if tree else cycle, self.models, self.state)
        # a state that nobody has started: all rows are silent, and what a run leaves in their slots is written over
        self.replay = Replay(self.run, target.at.device, cycles_per_read)


class Engine:
    """One rank's engine; ranks run the same calls, each with its own models.

    capture     capture points that the draft reads
    suppressed  target ids that are never said
    """

    def __init__(
        self, target: Any, draft: Any = None, capture: Sequence[int] = (), suppressed: Sequence[int] = ()
    ) -> None:
        for model in (target, draft):
            missing = model.parameters_missing() if model is not None else []
            if missing:
                raise EngineError(f"{type(model).__name__} has parameters that were never loaded: {', '.join(missing)}")
        if suppressed:
            target = MutedTarget(target, suppressed)
            draft = None if draft is None else MutedDraft(draft, suppressed)
        self.target, self.draft, self.capture = target, draft, tuple(capture)
        self.session: Session | None = None

    @torch.no_grad()
    def generate(
        self,
        prompts: Tensor | Sequence[Tensor],
        num_tokens: int,
        num_draft_tokens: int = 3,
        temperature: float = 0.0,
        seed: int = 0,
        eos_token_id: int | None = None,
        sequence_ids: Sequence[int] | None = None,
        chunk_size: int | None = None,
        bucket: int | None = None,
        num_slots: int | None = None,
        cycles_per_read: int = 1,
        forced_rates: Sequence[float] | None = None,
        inputs: Mapping[str, Any] | None = None,
        topk: int = 1,
        num_steps: int | None = None,
    ) -> Generation:
        """Continue every prompt by `num_tokens` tokens; the draft changes how soon they come, not which they are.

        prompts           [B, T], or B one-dimensional tensors
        num_draft_tokens  K; 0 is plain decoding and needs no draft. Of a tree D, its nodes with the root
        sequence_ids      name the sequences for sampling; 0..B-1 when absent
        chunk_size        columns of the prompts read at a time; all when absent
        bucket            rows of the batch, padding included; the next of BUCKETS on CUDA, B elsewhere
        num_slots         positions of the caches; exact claims give one number to every call
        cycles_per_read   cycles in a row before the host looks
        forced_rates      [K] unconditional acceptance rates to keep to instead of to the target; for benchmarks alone
        inputs            images, audio and video of the prompts, named as the target's `forward` names them
        topk              of a tree: what each node of a beam offers; errors: TreeError for a tree that cannot be
        num_steps         S, draft steps of a tree; D - 1 when absent. Neither is given: a chain
        """
        rows = list(prompts)
        wanted = Plan(0, 0, num_tokens, num_draft_tokens, temperature > 0, forced_rates is not None)
        if num_draft_tokens and (topk > 1 or num_steps):
            wanted = self._tree(wanted, topk, num_steps or num_draft_tokens - 1)
        plan = self._plan(rows, wanted, bucket, num_slots, forced_rates)
        session = self._session(plan, cycles_per_read)
        names = list(range(len(rows))) if sequence_ids is None else list(sequence_ids)
        if len(names) != len(rows) or temperature < 0:
            raise EngineError(f"{len(names)} sequence_ids name {len(rows)} prompts at temperature {temperature}")
        rates = conditional(forced_rates or ())
        session.state.ask(num_tokens, eos_token_id, seed, names, temperature, rates)
        self._prefill(session, rows, chunk_size, inputs or {})
        self._decode(session)
        return _read(session.state, len(rows), num_tokens, eos_token_id)

    def _tree(self, wanted: Plan, topk: int, num_steps: int) -> TreePlan:
        """The same with trees of as many nodes as there were drafts; errors: TreeError, EngineError."""
        check(topk, num_steps, wanted.num_draft_tokens)
        if self.draft is not None and getattr(self.draft.way, "branch", None) is None:
            raise EngineError(f"{self.draft.way.__name__} has no step for a beam of tokens: chains alone, no trees")
        if wanted.forced:
            raise EngineError("forced_rates are for chains: a tree accepts what its target says")
        return TreePlan(0, 0, wanted.capacity, num_steps, wanted.sampled, False, topk, wanted.num_draft_tokens)

    def _plan(
        self,
        rows: list[Tensor],
        wanted: Plan,
        bucket: int | None,
        num_slots: int | None,
        rates: Sequence[float] | None,
    ) -> Plan:
        """How large its buffers are; errors: EngineError for what would be answered wrongly or not at all."""
        num_tokens, num_drafts = wanted.capacity, wanted.num_draft_tokens
        if not rows or min(len(row) for row in rows) < 1 or num_tokens < 1:
            raise EngineError("a generation needs a prompt, a token in every prompt and a token to say")
        if num_drafts and self.draft is None:
            raise EngineError(f"num_draft_tokens is {num_drafts} and there is no draft")
        # a position is accepted only where all before it are
        if rates is not None and (len(rates) != num_drafts or [*rates] != sorted([*rates, 1.0], reverse=True)[1:]):
            raise EngineError(f"forced_rates {[*rates]} should be {num_drafts} falling numbers of at most one")
        batch = bucket or (bucket_for(len(rows)) if self.target.at.device.type == "cuda" else len(rows))
        if len(rows) > batch:
            raise EngineError(f"{len(rows)} prompts do not fit a bucket of {batch} rows")
        text = max(len(row) for row in rows) + num_tokens
        self._check_ropes(text + num_drafts, num_drafts)
        # whole tiles with the cache's own slot, so that generations of about one length share a session
        used = text + wanted.room - 1
        num_slots = num_slots or whole_tiles(max(used, text + RESERVED_DRAFTS) + 1) - 1
        if used > num_slots:
            raise EngineError(f"num_slots is {num_slots}, this generation may take {used}")
        return replace(wanted, batch=batch, num_slots=num_slots)

    def _check_ropes(self, positions: int, num_drafts: int) -> None:
        for model in (self.target, self.draft) if num_drafts else (self.target,):
            # the ropes of full and of sliding layers; a target that has neither refuses dynamic ones by itself
            for rope in (getattr(model.c, name, None) for name in ("rope", "local_rope")):
                if rope is not None and rope.kind == "dynamic" and positions > rope.original_length:
                    raise EngineError(
                        f"{type(model).__name__} has a dynamic rope of {rope.original_length} positions, this "
                        f"generation may take {positions}: its frequencies would depend on how the text was cut into "
                        "steps"
                    )

    def _session(self, plan: Plan, cycles_per_read: int) -> Session:
        """The last session again where it fits, so that graphs and buffers are made once."""
        if self.session is None or (self.session.plan, self.session.cycles_per_read) != (plan, cycles_per_read):
            # the old buffers are given back before the new ones are taken
            self.session = None
            capture = self.capture if plan.num_draft_tokens else ()
            self.session = Session(Speculation(self.target, self.draft, capture), plan, cycles_per_read)
        return self.session

    def _prefill(self, session: Session, rows: list[Tensor], chunk_size: int | None, inputs: Mapping[str, Any]) -> None:
        """Read the prompts chunk by chunk: the target all of each, the draft all but its last position.

        The draft reads the next prompt token beside each position, so the last position, whose next token is the
        root, is left to the first cycle.
        """
        state, capture, lengths = session.state, session.models.capture, [len(row) for row in rows]
        prompts = read_prompts(self.target, rows, state.plan.batch, inputs)
        last = prompts.last
        aux, hidden = torch.zeros_like(state.aux[:, 0]), torch.zeros_like(state.hidden[:, 0])
        for begin, end in prompts.chunks(chunk_size):
            bound = self._bound(end)
            tokens, positions, media = prompts.columns(begin, end)
            states, captured = self.target.states(tokens, positions, state.target_cache, capture, bound, **media)
            here = (last >= begin) & (last < end)
            index = (last - begin).clamp(0, end - begin - 1)
            hidden = torch.where(here[:, None], _row(states, index), hidden)
            aux = torch.where(here[:, None, None], _row(captured, index), aux)
            if session.models.way is not None:
                session.models.way.prefill(prompts.chunk(begin, end, captured, states), bound)
        root = self._first(state, hidden, prompts.length)
        state.start(lengths, *(x[: len(rows)] for x in (root, aux, hidden)))

    def _first(self, state: State, hidden: Tensor, length: Tensor) -> Tensor:
        """The token after each prompt.

        hidden  [B, H]
        length  [B]
        ->      [B]
        """
        head, group = self.target.lm_head, self.target.at.group
        if not state.plan.sampled:
            return group.broadcast(head.argmax(hidden))
        u = self.target.at.ops.uniform(state.seed, state.sequence, length, TARGET)
        return group.broadcast(draw(probabilities(head.logits(hidden), state.temperature), u))

    def _decode(self, session: Session) -> None:
        """Cycles until every row is done; between two replays the host looks at one number a row."""
        state, step, room = session.state, session.plan.num_draft_tokens + 1, session.plan.room
        progress = state.progress.tolist()
        while max(progress) >= 0:
            if session.replay.graph is not None:
                session.replay()
            else:
                longest = max(~length if length < 0 else length for length in progress)
                for done in range(session.cycles_per_read):
                    session.run(self._bound(longest + done * step + room))
            progress = state.progress.tolist()

    def _bound(self, positions: int) -> int | None:
        """How many slots the operations need to look at, in whole tiles; exact ones always look at all."""
        if getattr(self.target.at.ops, "exact", False):
            return None
        return whole_tiles(positions)


def _row(x: Tensor, index: Tensor) -> Tensor:
    """x [B, T, ...], index [B] -> [B, ...]"""
    return x[torch.arange(x.shape[0], device=x.device), index]


def _read(state: State, rows: int, num_tokens: int, eos_token_id: int | None) -> Generation:
    """Cut every row at its end, which may stand inside an accepted run."""
    tokens = torch.full((rows, num_tokens), -1, dtype=torch.int64)
    output, log = state.output[:rows].tolist(), state.log[:rows].tolist()
    counts = zip(state.num_output[:rows].tolist(), state.num_cycles[:rows].tolist(), strict=True)
    accepted = []
    for row, (num_output, num_cycles) in enumerate(counts):
        text = output[row][: min(num_output, num_tokens)]
        if eos_token_id in text:
            text = text[: text.index(eos_token_id) + 1]
        tokens[row, : len(text)] = torch.tensor(text)
        accepted.append(log[row][:num_cycles])
    return Generation(tokens, accepted)
