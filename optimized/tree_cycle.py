"""One cycle whose drafts are a tree: grow it, verify its nodes, accept a path, commit.

The phases of `optimized/cycle.py`, with the same state after each cycle: once the path that stands lies where a chain
would lie, nothing shows that there was a tree. K of the plan is S, the longest path. Greedy or drawn, the target's own
token after a node is chosen first and then looked for among the children. Letters: reference/README.md.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from optimized import trees
from optimized.cycle import TARGET, Speculation, commit, draw, probabilities
from optimized.ops.rows import wide_type
from optimized.state import LOUD, Plan, State
from optimized.trees import Branches


@dataclass(frozen=True)
class TreePlan(Plan):
    """A plan of trees; `num_draft_tokens` is S."""

    topk: int = 1
    num_nodes: int = 2
    """D, with the root"""

    @property
    def room(self) -> int:
        """Slots that a cycle may take: the target's nodes, the draft's root and beams."""
        return max(self.num_nodes, 1 + self.num_read)

    @property
    def num_read(self) -> int:
        """Tokens of a tree that the draft reads: the beams of all levels but the last."""
        return self.topk * (self.num_draft_tokens - 1)


class TreeState(State):
    """The buffers of a plan of trees: those of a chain, and the nodes."""

    plan: TreePlan

    def __init__(
        self, plan: TreePlan, vocab: int, width: int, aux_states: int, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        super().__init__(plan, vocab, width, aux_states, dtype, device)
        nodes = (plan.batch, plan.num_nodes)
        self.tokens, self.parents, self.words, self.chosen = (
            torch.zeros(nodes, dtype=torch.int64, device=device) for _ in range(4)
        )
        # the target's states at every node; those of the path go on to `aux` and `hidden`
        self.node_aux = torch.zeros(*nodes, aux_states, width, dtype=dtype, device=device)
        self.node_hidden = torch.zeros(*nodes, width, dtype=dtype, device=device)
        # no draft is drawn, and a target's own token is drawn where its chances are
        self.p = self.q = self.p[..., :0].clone()

    def poison(self) -> None:
        """As a chain's; the next cycle reads nothing of this one's tree."""
        super().poison()
        self.tokens.fill_(1)
        self.parents.fill_(0)
        self.words.fill_(-1)
        self.node_aux.fill_(LOUD)
        self.node_hidden.fill_(LOUD)


def cycle(models: Speculation, state: TreeState, num_slots: int | None = None) -> None:
    """The three phases; `num_slots` is a bound on the slots in use that the host knows."""
    propose(models, state, num_slots)
    verify(models, state, num_slots)
    accept(models, state)


def propose(models: Speculation, state: TreeState, num_slots: int | None = None) -> None:
    """Fill `tokens` and `parents`: one draft step a level, each of a whole beam."""
    draft, plan, group = models.draft, state.plan, models.draft.at.group
    known, beam = trees.begin(state.root, wide_type(draft.at.dtype))
    tops, feedback = models.way.start(num_slots)
    feedback, line = feedback[:, None], list[Tensor]()
    member = torch.arange(plan.topk, device=state.device).expand(plan.batch, -1)
    for k in range(1, plan.num_draft_tokens + 1):
        if k > 1:
            # what a member goes on from is the row that it grew from, and it sees what that row saw
            feedback = trees.pick(feedback, beam.origin)
            line = [member + (k - 2) * plan.topk, *(node.gather(1, beam.origin) for node in line)]
            tokens = known.tokens.gather(1, beam.numbers)
            tops, feedback = models.way.branch(tokens, feedback, k, line, plan.num_read, num_slots)
        ids, chances = trees.likeliest(draft.logits(tops), plan.topk)
        known, beam = trees.grow(known, beam, draft.to_target(ids), chances)
        if group.size > 1:
            # should ranks not agree on equal chances, they must still read the same tokens
            known, beam = _agree(group, known), _agree(group, beam)
    tokens, parents = trees.select(known, state.root, plan.num_nodes)
    state.tokens.copy_(tokens)
    state.parents.copy_(parents)


def verify(models: Speculation, state: TreeState, num_slots: int | None = None) -> None:
    """Fill `chosen`, `words` and the states of the nodes: the target reads all of them, each seeing its own line."""
    target, plan = models.target, state.plan
    line = trees.lines(state.parents, plan.num_draft_tokens)
    view = Branches(state.target_cache, state.lengths, line, plan.num_nodes, num_slots)
    # a node lies as deep as it has ancestors
    positions = state.lengths[:, None] + torch.stack([node > 0 for node in line]).sum(0)
    hidden, _ = target.states(state.tokens, positions, view, models.capture, view.sight, state.node_aux)
    state.node_hidden.copy_(hidden)
    state.words.copy_(view.sight.words())
    if plan.sampled:
        u = target.at.ops.uniform(state.seed, state.sequence, positions + 1, TARGET)
        p = probabilities(target.lm_head.logits(hidden.flatten(0, 1)), state.temperature)
        state.chosen.copy_(draw(p, u.flatten()).view_as(u))
    else:
        state.chosen.copy_(target.lm_head.argmax(hidden.flatten(0, 1)).view_as(state.chosen))


def accept(models: Speculation, state: TreeState) -> None:
    """Find the path that stands, lay it where a chain would lie, and commit it with the token after it."""
    target, group = models.target, models.target.at.group
    if group.size > 1:
        # ranks compute the same numbers; should one of them not, it must still not say other tokens
        state.chosen.copy_(group.broadcast(state.chosen))
    path, accepted = trees.walk(state.tokens, state.parents, state.words, state.chosen, state.plan.num_draft_tokens)
    following = state.chosen.gather(1, path.gather(1, accepted[:, None]))[:, 0]
    for tensor in state.target_cache.tensors():
        target.at.ops.compact(tensor.flatten(2), state.lengths, path)
    state.aux.copy_(trees.pick(state.node_aux, path))
    state.hidden.copy_(trees.pick(state.node_hidden, path))
    state.drafted.copy_(state.tokens.gather(1, path[:, 1:]))
    commit(state, accepted, following)


def _agree(group: Any, facts: Any) -> Any:
    """The tensors of rank 0."""
    return type(facts)(*(group.broadcast(tensor) for tensor in facts))
