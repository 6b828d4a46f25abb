"""Drafts that are watched, and drafts that say what they are told.

A claim about a loop must hold two things in its hands: what the draft proposes, and what the draft is fed. The drafts
here stand in a real draft's place on either side. They pass every call on to it, so its caches and its feedback are
real; `WatchedDraft` only notes what goes in and out, `ScriptedDraft` proposes a known text with known errors, and
`TableDraft` proposes by a table of the last token alone.

The reference asks a draft by calling it; the twin asks for `states` and later for the `propose` or `logits` of the rows
that it picked. A dictated draft therefore writes what it wants to say into the first feature of the twin's rows.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from harness.acceptance import emitted
from harness.checkpoints import save_checkpoint
from optimized.decoding import Engine
from optimized.trees import Branches
from reference.outputs import DraftOutput
from suites.catalog import open_speculation
from suites.draws import EAGLE3, LLAMA, Drawn, eagle3_weights, folders, variant
from suites.opened import OpenSpeculation

SIDES = ("reference", "optimized")
TINY = {"hidden_size": 48, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
POINTS = {"eagle_aux_hidden_state_layer_ids": [2, 0, 1]}


def tiny_target(seed: int, vocab: int = 13, **changes: Any) -> Drawn:
    """Three layers; a small vocabulary, so that a wrong text is often right by chance and must not count."""
    return variant(LLAMA, seed, **{**TINY, "num_hidden_layers": 3, "vocab_size": vocab, **changes})


def tiny_draft(seed: int, vocab: int = 13, **changes: Any) -> Drawn:
    """A draft beside `tiny_target` that says any token; its layer ids are in no order."""
    eagle = {**POINTS, **changes.pop("eagle_config", {})}
    sizes = {**TINY, "vocab_size": vocab, "draft_vocab_size": vocab}
    return variant(EAGLE3, seed, **{**sizes, **changes, "eagle_config": eagle})


class Loop(NamedTuple):
    """One drawn case: what speaks, and after which prompts."""

    target: Drawn
    draft: Drawn
    lengths: tuple[int, ...]
    """of the prompts"""

    @property
    def prompts(self) -> list[Tensor]:
        generator = torch.Generator().manual_seed(self.target.seed)
        return [torch.randint(0, self.target.keys["vocab_size"], (n,), generator=generator) for n in self.lengths]

    def open(self, side: str, dtype: torch.dtype = torch.float64, **how: Any) -> OpenSpeculation:
        """Opened from a folder that is gone afterwards."""
        with folders(self.target, self.draft) as paths:
            return open_speculation(*paths, side=side, dtype=dtype, **how)


@st.composite
def loops(draw: st.DrawFn, max_batch: int = 3, longest: int = 8) -> Loop:
    """Tiny pairs and ragged prompts, length 1 included."""
    lengths = draw(st.lists(st.integers(1, longest), min_size=1, max_size=max_batch))
    vocab = draw(st.sampled_from([5, 13, 64, 97]))
    seed = draw(st.integers(0, 2**20))
    return Loop(tiny_target(seed, vocab), tiny_draft(seed + 1, vocab), tuple(lengths))


class Reading(NamedTuple):
    """One call of a draft."""

    tokens: Tensor
    """[B, T]"""
    hidden: Tensor
    """[B, T, H]"""
    positions: Tensor
    """[B, T]  -1 where nothing is read"""
    logits: Tensor
    """[B, T, Vd]  the real draft's, whatever is proposed instead"""
    feedback: Tensor
    """[B, T, H]"""


class Proposal(NamedTuple):
    """One greedy proposal."""

    readings: int
    """how many calls were made before it"""
    tokens: Tensor
    """[B]"""


class WatchedDraft:
    """A real draft of either side whose calls and greedy proposals are noted."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.readings: list[Reading] = []
        self.branches: list[Reading] = []
        """readings of the tokens of a tree, a level each"""
        self.proposals: list[Proposal] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def __call__(
        self,
        tokens: Tensor,
        hidden: Tensor,
        positions: Tensor | None = None,
        cache: Any = None,
        *place: Tensor,
        **media: Tensor,
    ) -> DraftOutput:
        """The reference's step; `place` is where the tokens of a tree stand."""
        step = self.inner(tokens, hidden, positions, cache, *place, **media)
        if positions is None:
            positions = torch.arange(tokens.shape[1]).expand_as(tokens)
        self._note(bool(place), tokens, hidden, positions, step.logits, step.feedback)
        return DraftOutput(self.say(tokens, positions, step.logits), step.feedback)

    def states(
        self, tokens: Tensor, hidden: Tensor, positions: Tensor, cache: Any, *rest: Any, **media: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The twin's step."""
        top, feedback = self.inner.states(tokens, hidden, positions, cache, *rest, **media)
        self._note(isinstance(cache, Branches), tokens, hidden, positions, self.inner.logits(top), feedback)
        return self.write(top, tokens, positions), feedback

    def to_target(self, draft_ids: Tensor) -> Tensor:
        """The reference's proposal: [B, 1] -> [B, 1]"""
        return self._propose(self.inner.to_target(draft_ids))

    def propose(self, top: Tensor) -> Tensor:
        """The twin's proposal: [B, H] -> [B]"""
        return self._propose(self.inner.propose(top))

    def say(self, tokens: Tensor, positions: Tensor, logits: Tensor) -> Tensor:
        """What the reference hears."""
        return logits

    def write(self, top: Tensor, tokens: Tensor, positions: Tensor) -> Tensor:
        """What the twin picks its rows from."""
        return top

    def _note(self, in_a_tree: bool, *facts: Tensor) -> None:
        # buffers are written over by the next cycle
        (self.branches if in_a_tree else self.readings).append(Reading(*(x.clone() for x in facts)))

    def _propose(self, tokens: Tensor) -> Tensor:
        self.proposals.append(Proposal(len(self.readings), tokens.flatten().clone()))
        return tokens


class DictatedDraft(WatchedDraft):
    """A draft that proposes by a code of each row, in target ids."""

    def code(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """What a row is asked by: [B, T] -> [B, T]"""
        raise NotImplementedError

    def answer(self, code: Tensor) -> Tensor:
        """[B, T] -> [B, T, V]"""
        raise NotImplementedError

    def say(self, tokens: Tensor, positions: Tensor, logits: Tensor) -> Tensor:
        return self.answer(self.code(tokens, positions))

    def write(self, top: Tensor, tokens: Tensor, positions: Tensor) -> Tensor:
        top = top.clone()
        # a small integer in the first feature, exact in every dtype
        top[..., 0] = self.code(tokens, positions).to(top.dtype)
        return top

    def to_target(self, draft_ids: Tensor) -> Tensor:
        return self._propose(draft_ids)

    def propose(self, top: Tensor) -> Tensor:
        return self._propose(self.logits(top[:, None])[:, 0].argmax(-1))

    def logits(self, top: Tensor) -> Tensor:
        return self.answer(top[..., 0].long())

    def spread(self, logits: Tensor) -> Tensor:
        return logits


class ScriptedDraft(DictatedDraft):
    """Proposes a text by heart: at position p of sequence b the token text[b, p + 2].

    text  [B, P]  prompts and what follows, by absolute position
    """

    def __init__(self, inner: Any, text: Tensor) -> None:
        super().__init__(inner)
        self.text = text

    def code(self, tokens: Tensor, positions: Tensor) -> Tensor:
        return positions

    def answer(self, code: Tensor) -> Tensor:
        # rows that fill a bucket have no text of their own
        row = torch.arange(code.shape[0])[:, None].clamp(max=self.text.shape[0] - 1)
        token = self.text[row, (code + 2).clamp(max=self.text.shape[1] - 1)]
        logits = torch.full((*code.shape, self.inner.c.vocab), float("-inf"), dtype=torch.float64)
        return logits.scatter(2, token[..., None], 0.0)


class TableDraft(DictatedDraft):
    """Proposes by the last token alone.

    table  [V, V]  logits after each token
    """

    def __init__(self, inner: Any, table: Tensor) -> None:
        super().__init__(inner)
        self.table = table

    def code(self, tokens: Tensor, positions: Tensor) -> Tensor:
        return tokens

    def answer(self, code: Tensor) -> Tensor:
        return self.table[code]


def seat(speculation: OpenSpeculation, make: Callable[[Any], Any]) -> tuple[OpenSpeculation, Any]:
    """The same speculation with another draft in the draft's place, and that draft."""
    draft = make(speculation.draft.module)
    return replace(speculation, draft=replace(speculation.draft, modules=(draft,))), draft


def script(speculation: OpenSpeculation, text: Tensor) -> tuple[OpenSpeculation, ScriptedDraft]:
    """A speculation whose draft knows a text."""
    return seat(speculation, partial(ScriptedDraft, text=text))


def written(prompts: Sequence[Tensor], tokens: Tensor) -> Tensor:
    """Prompts and what was said after them, by absolute position.

    tokens  [B, T]
    ->      [B, P]
    """
    rows = [torch.cat([prompt, said]) for prompt, said in zip(prompts, tokens, strict=True)]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


def misspelt(text: Tensor, places: Iterable[tuple[int, int]], vocab: int, by: int = 1) -> Tensor:
    """A text with other tokens at (sequence, position) places."""
    wrong = text.clone()
    for row, position in places:
        wrong[row, position] = (text[row, position] + by) % vocab
    return wrong


def places_for(
    lengths: Sequence[int], pattern: Sequence[Sequence[int]], num_draft_tokens: int
) -> list[tuple[int, int]]:
    """Where a scripted draft must err so that step s of sequence b accepts pattern[b][s] drafts.

    The prompt's own token stands at the prompt's length; the first draft comes after it.
    """
    places = []
    for row, (length, counts) in enumerate(zip(lengths, pattern, strict=True)):
        begin = length + 1
        for count in counts:
            if count < num_draft_tokens:
                places.append((row, begin + count))
            begin += count + 1
    return places


def forget(folder: Path) -> dict[str, Tensor]:
    """Make a target know its last token alone: nothing but the embedding enters its stream. Its tensors."""
    file = folder / "model.safetensors"
    silent = ("self_attn.o_proj.weight", "self_attn.o_proj.bias", "mlp.down_proj.weight", "mlp.down_proj.bias")
    tensors = {name: t * (not name.endswith(silent)) for name, t in load_file(file).items()}
    save_file(tensors, file, {"format": "pt"})
    return tensors


def open_knowing(target: Drawn, words: Sequence[int], side: str, **engine: Any) -> OpenSpeculation:
    """A forgetful target and a real draft that says what the target says, wherever one of its words serves.

    The draft's layer sees its own position alone and hands the embedding of the token it reads to the target's head.
    """
    vocab, width = target.keys["vocab_size"], target.keys["hidden_size"]
    heads = {"num_attention_heads": width // 8, "num_key_value_heads": width // 8, "head_dim": 8}
    sight = {"layer_types": ["sliding_attention"], "sliding_window": 1, "norm_before_residual": True}
    draft = tiny_draft(target.seed + 1, vocab, draft_vocab_size=len(words), **heads, **sight)
    tensors, copy = eagle3_weights(draft), torch.eye(width)
    with folders(target) as (path, draft_path):
        theirs = forget(path)
        ids, layer = torch.tensor(words), "midlayer."
        tensors |= {
            "embed_tokens.weight": theirs["model.embed_tokens.weight"],
            f"{layer}input_layernorm.weight": torch.ones(width),
            f"{layer}hidden_norm.weight": torch.zeros(width),
            f"{layer}self_attn.v_proj.weight": torch.cat([copy, 0 * copy], 1),
            f"{layer}self_attn.o_proj.weight": copy,
            f"{layer}mlp.down_proj.weight": torch.zeros_like(tensors[f"{layer}mlp.down_proj.weight"]),
            "norm.weight": theirs["model.norm.weight"],
            "lm_head.weight": theirs["lm_head.weight"][ids],
            "d2t": ids - torch.arange(len(words)),
            "t2d": torch.zeros(vocab, dtype=torch.bool).index_fill_(0, ids, True),
        }
        save_checkpoint(draft_path, draft.keys, tensors)
        return open_speculation(path, draft_path, side=side, dtype=torch.float64, **engine)


class Heard(NamedTuple):
    """A generation whose accepted counts were dictated."""

    draft: ScriptedDraft
    text: Tensor
    """[B, P]  what is true: prompts, the target's own text, and K tokens more"""
    standing: list[list[int]]
    """per cycle: the last position of each sequence that stands when the cycle begins"""

    def chain(self, cycle: int) -> list[Proposal]:
        """The proposals of one cycle."""
        size = len(self.draft.proposals) // len(self.standing)
        return self.draft.proposals[cycle * size : (cycle + 1) * size]

    def step(self, proposal: Proposal, row: int, position: int) -> tuple[Tensor, Tensor]:
        """What the real draft said at a position just before a proposal: logits [Vd], feedback [H]."""
        reading = self.draft.readings[proposal.readings - 1]
        column = reading.positions[row].tolist().index(position)
        return reading.logits[row, column], reading.feedback[row, column]


def listen(loop: Loop, side: str, steps: Sequence[int], num_draft_tokens: int, by: int = 1, **engine: int) -> Heard:
    """Let step s of every sequence accept steps[s] drafts.

    by   what is added to a token to make it wrong
    """
    speculation = loop.open(side)
    pattern = [list(steps)] * len(loop.lengths)
    num_tokens = 1 + sum(emitted(a) for a in steps)
    text = written(loop.prompts, speculation.generate(loop.prompts, num_tokens + num_draft_tokens, 0).tokens)
    places = places_for(loop.lengths, pattern, num_draft_tokens)
    scripted, draft = script(speculation, misspelt(text, places, speculation.target.config.vocab, by))
    said = scripted.generate(loop.prompts, num_tokens, num_draft_tokens, **engine)
    if said.accepted != pattern:
        raise AssertionError(f"accepted {said.accepted} where the script has {pattern}")
    gone = [sum(emitted(a) for a in steps[:cycle]) for cycle in range(len(steps))]
    return Heard(draft, text, [[length - 1 + tokens for length in loop.lengths] for tokens in gone])


class PoisonedEngine(Engine):
    """The twin's engine; before every cycle all state that the cycle may not read is spoilt."""

    def _session(self, *plan: Any) -> Any:
        session = super()._session(*plan)
        run = session.run

        def spoil_and_run(num_slots: int | None = None) -> None:
            session.state.poison()
            run(num_slots)

        session.run = spoil_and_run
        return session
