"""Claim: a Gemma 4 assistant proposes from the tokens that stand, and computes what transformers' module computes.

Born of transformers 5.17, whose module agrees with this page to the last bits when both are shown the same keys and
whose generation loop shows others; of vLLM #47920, where rejected tokens were counted among the keys; and of SGLang,
where position, keys and window each have another meaning. What the numbers say, and which choice follows (a difference
is the largest one, over the standard deviation):

    keys      0..n-1 where n tokens stand. The loop of transformers shows n keys at first and after a cycle whose drafts
              were all accepted, n + 1 after every other: the last is a rejected token's and moves logits by 0.1 to 1.3.
              What is proposed must depend on the accepted prefix alone: the page shows n, as SGLang and vLLM do, and
              rejected tokens move nothing by a bit.
    window    w, as in the target; the module of transformers shows w + 1. Told w - 1 it is this page, told w it is this
              page with w + 1; behind a window of 4 the one key moves feedback by 1.2.
    position  n - 1, where the target stood when it wrote the newest key and the state that the draft reads. Then a text
              is unrolled in one pass, a position a column, and serving is that column to the last bits. The loop of
              transformers says n. Rope knows distances alone, so this moves every key by one, and feedback by 0.5 to
              1.5. Which of the two the published weights were trained for, random weights cannot say, and no trainer is
              published; SGLang and vLLM serve them at n - 1.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from harness import witness
from harness.checkpoints import CheckpointError, open_checkpoint, rename, save_checkpoint, state_of
from harness.compare import bit_equal, budget, hold
from reference.config import ConfigError
from reference.drafts.gemma4_assistant import CHECKPOINT_NAMES, Gemma4AssistantConfig, Gemma4AssistantDraft
from reference.outputs import DraftOutput
from suites.catalog import open_draft, open_target
from suites.draws import random_tokens
from suites.families.gemma4 import DENSE, FULL, drawn_of
from suites.families.gemma4_assistant import (
    ORDERING,
    PINNED,
    PUBLISHED,
    WITH_BOTH,
    Couple,
    beside,
    couples,
    folders,
    write_assistant,
)
from suites.opened import OpenDraft, OpenTarget

pytestmark = [pytest.mark.correctness, pytest.mark.pair("gemma4_assistant")]


@dataclass(frozen=True)
class Stand:
    """An assistant beside its target, which has read a text, and the assistant as transformers has it."""

    target: OpenTarget
    draft: OpenDraft
    body: dict[str, Any]
    """the assistant's own `text_config`, as its file has it"""
    tokens: Tensor
    """[B, T+2]  the text, the token that follows, a token drafted after it"""
    cache: Any
    hidden: Tensor
    """[B, T, X]"""

    @cached_property
    def outside(self) -> Any:
        """The module of transformers, from the same folder."""
        return witness.load(self.draft.checkpoint.path, dtype=torch.float64).model

    @property
    def size(self) -> dict[str, int]:
        return {"depth": 1 + self.draft.facts.config.layers, "width": 2 * self.draft.facts.config.aux_width}

    def step(self, token: Tensor, hidden: Tensor) -> DraftOutput:
        """The page's step behind the whole text: token [B, 1], hidden [B, 1, X]"""
        positions = torch.full_like(token, self.hidden.shape[1] - 1)
        return self.draft.module(token, hidden, positions, self.cache)

    def ask(self, token: Tensor, hidden: Tensor, position: int, num_keys: int, window: int) -> Any:
        """The module of transformers: token [B, 1], hidden [B, 1, X], shown the first keys and told a window"""
        shared = self.target.module.shared_kv(self.cache)
        keys = {kind: tuple(x[:, :num_keys].transpose(1, 2) for x in both) for kind, both in shared.items()}
        embeds = torch.cat([self.target.module.embed(token), hidden], -1)
        self.outside.config.get_text_config().sliding_window = window
        with witness.StayWide():
            return self.outside(
                inputs_embeds=embeds, shared_kv_states=keys, position_ids=torch.full_like(token, position)
            )

    def hold(self, got: DraftOutput, want: Any) -> None:
        """Logits as capped here, where they were looked at; feedback."""
        cap, logits, seen = self.body.get("final_logit_softcapping"), want.logits, got.logits.isfinite()
        logits = logits if cap is None else (logits / cap).tanh() * cap
        # what was not looked at has the lowest logit of all there and none here
        assert bool((seen | (want.logits < want.logits.amax(-1, keepdim=True))).all())
        assert int(seen.sum(-1).min()) == self.looked_at
        hold("logits", got.logits[seen], logits[seen], **self.size)
        hold("feedback", got.feedback, want.last_hidden_state, **self.size)

    @property
    def looked_at(self) -> int:
        c = self.draft.facts.config
        return c.vocab // c.clusters * c.clusters_asked if c.clusters else c.vocab


@contextmanager
def standing(couple: Couple, batch: int, width: int, room: int = 4) -> Iterator[Stand]:
    """Opened in float64, behind a text of random tokens."""
    with folders(couple) as (path, draft_path), torch.no_grad():
        target = open_target(path, dtype=torch.float64)
        draft = open_draft(draft_path, target, dtype=torch.float64)
        tokens = random_tokens(target.config.vocab, batch, width + 2, couple.draft.seed)
        cache = target.module.new_cache(batch, width + room)
        hidden = target.module(tokens[:, :width], cache=cache).hidden
        yield Stand(target, draft, couple.draft.keys["text_config"], tokens, cache, hidden)


@given(couple=couples(), batch=st.integers(1, 3), width=st.integers(1, 16))
@example(couple=PINNED["dense"], batch=2, width=11)
@example(couple=PINNED["ordered"], batch=2, width=11)
@example(couple=PINNED["unified"], batch=2, width=11)
@example(couple=PINNED["experts"], batch=1, width=3)
def test_two_draft_steps_are_those_of_transformers_shown_the_same_keys(couple: Couple, batch: int, width: int) -> None:
    with standing(couple, batch, width) as stand:
        # its sliding mask shows one key more than it is told
        place = (width - 1, width, stand.body["sliding_window"] - 1)
        token, later, hidden = stand.tokens[:, -2:-1], stand.tokens[:, -1:], stand.hidden[:, -1:]

        first = stand.step(token, hidden)
        second = stand.step(later, first.feedback)

        stand.hold(first, stand.ask(token, hidden, *place))
        stand.hold(second, stand.ask(later, first.feedback, *place))


def apart(a: Tensor, b: Tensor) -> float:
    """The largest difference over the spread of `b`."""
    return float((a - b).abs().max() / b.std())


@pytest.mark.parametrize("name", PINNED)
def test_the_module_of_transformers_shows_one_key_more_than_its_window(name: str) -> None:
    with standing(PINNED[name], 1, 11) as stand:
        c, token, hidden = stand.draft.facts.config, stand.tokens[:, -2:-1], stand.hidden[:, -1:]
        stand.draft.module.c = replace(c, sliding=replace(c.sliding, window=c.sliding.window + 1))

        more = stand.step(token, hidden)

        stand.hold(more, stand.ask(token, hidden, 10, 11, c.sliding.window))


def test_that_key_moves_proposals_where_the_window_is_narrower_than_the_text() -> None:
    moved = []
    for name in ("dense", "unified"):
        with standing(PINNED[name], 1, 11) as stand:
            token, hidden = stand.tokens[:, -2:-1], stand.hidden[:, -1:]
            theirs = stand.ask(token, hidden, 10, 11, stand.body["sliding_window"])
            moved.append(apart(theirs.last_hidden_state, stand.step(token, hidden).feedback))

    # a window of 4 behind a text of 11, and one of 32
    assert moved[0] > 0.9
    assert moved[1] < budget(torch.float64, 4, 96, 10.0)


@given(couple=couples(), width=st.integers(1, 8), seed=st.integers(0, 99))
@example(couple=PINNED["dense"], width=5, seed=1)
@example(couple=PINNED["ordered"], width=3, seed=1)
def test_rejected_tokens_change_no_proposal(couple: Couple, width: int, seed: int) -> None:
    with standing(couple, 2, width) as stand:
        token, hidden, before = stand.tokens[:, -2:-1], stand.hidden[:, -1:], stand.cache.positions
        clean = stand.step(token, hidden)

        # the target reads the root and drafts that it then rejects
        rejected = random_tokens(stand.target.config.vocab, 2, 3, seed)
        stand.target.module(rejected, torch.arange(width, width + 3).expand(2, -1), cache=stand.cache)
        step = stand.step(token, hidden)

        assert not torch.equal(stand.cache.positions, before)
        for name, got, want in zip(step._fields, step, clean, strict=True):
            bit_equal(name, got, want)


class Call(NamedTuple):
    """What the loop of transformers asked its assistant."""

    position: int
    num_keys: int
    moved: float
    """by how much the keys beyond the position move the logits, over their spread"""


def calls_of_transformers() -> list[Call]:
    """Its own loop over 20 tokens, three drafts a cycle, watched at the door of the assistant."""
    target = drawn_of(DENSE, **WITH_BOTH, sliding_window=64, vocab_size=13, vocab_size_per_layer_input=13)
    with folders(beside(target)) as (path, draft_path):
        main, assistant = (witness.load(p, dtype=torch.float64) for p in (path, draft_path))
    assistant.model.generation_config.num_assistant_tokens = 3
    assistant.model.generation_config.num_assistant_tokens_schedule = "constant"
    asked: list[dict[str, Any]] = []
    hook = assistant.model.register_forward_pre_hook(lambda m, args, kw: asked.append(dict(kw)), with_kwargs=True)
    with witness.StayWide():
        said = main.generate(random_tokens(13, 1, 6, 2), 20, inputs={"assistant_model": assistant.model})
        bit_equal("text", said, main.generate(random_tokens(13, 1, 6, 2), 20))
    hook.remove()
    calls = []
    for kw in asked:
        position = int(kw["position_ids"])
        standing_keys = {k: tuple(x[:, :, :position] for x in both) for k, both in kw["shared_kv_states"].items()}
        with torch.no_grad(), witness.StayWide():
            as_asked = assistant.model(**kw).logits
            want = assistant.model(**{**kw, "shared_kv_states": standing_keys}).logits
        calls.append(Call(position, kw["shared_kv_states"][FULL][0].shape[2], apart(as_asked, want)))
    return calls


def test_the_loop_of_transformers_shows_the_key_of_a_rejected_token() -> None:
    calls = calls_of_transformers()

    # n tokens stand when n is the position that it says
    beyond = [call for call in calls if call.num_keys > call.position]
    assert {call.num_keys - call.position for call in calls} == {0, 1}
    assert 0 < len(beyond) < len(calls)
    assert min(call.moved for call in beyond) > 0.05
    assert max(call.moved for call in beyond) > 1.0


@pytest.mark.parametrize("shift", [1, 40])
def test_only_the_distance_to_the_keys_counts(shift: int) -> None:
    with standing(PINNED["dense"], 1, 6) as stand:
        token, hidden, columns = stand.tokens[:, -2:-1], stand.hidden[:, -1:], torch.arange(6)[None]
        moved = stand.target.module.new_cache(1, 6)
        stand.target.module(stand.tokens[:, :6], columns + shift, cache=moved, slots=columns)

        here, there = stand.step(token, hidden), stand.draft.module(token, hidden, columns[:, -1:] + shift, moved)

    # angles are float32: a shift of the text rounds them anew
    hold("feedback", there.feedback.float(), here.feedback.float(), **stand.size)


def test_a_position_more_is_another_proposal() -> None:
    with standing(PINNED["unified"], 1, 6) as stand:
        token, hidden = stand.tokens[:, -2:-1], stand.hidden[:, -1:]

        here = stand.step(token, hidden)
        beyond = stand.draft.module(token, hidden, torch.tensor([[6]]), stand.cache)

    # nothing stands in slot 6, so the same keys are asked
    assert apart(beyond.feedback, here.feedback) > 1.0


@pytest.mark.parametrize("name", PINNED)
def test_unrolling_a_text_is_serving_every_position_of_it(name: str) -> None:
    width = 6
    with standing(PINNED[name], 2, width) as stand:
        steps = stand.draft.module.unroll(stand.tokens, stand.draft.module.read(stand.target(stand.tokens)), 2)

        for t in range(width):
            # a cache that holds nothing beyond t
            cache, columns = stand.target.module.new_cache(2, width + 2), torch.arange(t + 1).expand(2, -1)
            hidden = stand.target.module(stand.tokens[:, : t + 1], columns, cache=cache).hidden[:, -1:]
            for k in range(2):
                step = stand.draft.module(stand.tokens[:, t + 1 + k : t + 2 + k], hidden, columns[:, -1:], cache)
                hidden = step.feedback
                hold(f"step {k + 1}", steps[k, :, t : t + 1], step.logits, **stand.size)


def damaged(couple: Couple, folder: Path, **changes: Any) -> tuple[Path, Path]:
    """The checkpoints of a couple, the assistant's with other tensors: None takes one away."""
    target, draft = folder / "target", folder / "draft"
    witness.create(couple.target.keys, target, seed=couple.target.seed)
    saved = open_checkpoint(write_assistant(couple.draft, folder / "saved"))
    tensors = {name: saved.read(name) for name in saved.headers} | changes
    save_checkpoint(draft, saved.config, {name: t for name, t in tensors.items() if t is not None})
    return target, draft


def test_the_ledger_accounts_for_every_tensor_and_every_parameter(tmp_path: Path) -> None:
    for name, couple in PINNED.items():
        with folders(couple) as (path, draft_path):
            checkpoint, target = open_checkpoint(draft_path), open_target(path)
            draft = open_draft(draft_path, target)

        entries = draft.ledger.entries
        loaded = [entry.parameter for entry in entries if entry.status == "loaded"]
        assert sorted(entry.tensor for entry in entries if entry.tensor) == sorted(checkpoint.headers)
        assert sorted(loaded) == sorted(state_of(draft.module)), name
        assert [entry.parameter for entry in entries if entry.status == "shared"] == ["target.embed_tokens.weight"]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({ORDERING: torch.zeros(130, dtype=torch.int64)}, "token_ordering"),
        ({ORDERING: None}, "token_ordering"),
        ({"masked_embedding.centroids.weight": None}, "centroids"),
        ({"model.layers.0.layer_scalar": None}, "layer_scalar"),
        ({"model.layers.0.self_attn.k_proj.weight": torch.ones(16, 32)}, "k_proj"),
        ({"post_projection.weight": torch.ones(48, 48)}, "post_projection"),
    ],
)
def test_a_checkpoint_that_is_not_whole_is_refused(tmp_path: Path, changes: dict[str, Any], named: str) -> None:
    path, draft_path = damaged(PINNED["ordered"], tmp_path, **changes)
    target = open_target(path)

    with pytest.raises(CheckpointError, match=named):
        open_draft(draft_path, target)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"text_config": {"num_key_value_heads": 1}}, "sliding_attention"),
        ({"text_config": {"head_dim": 16}}, "sliding_attention"),
        ({"text_config": {"global_head_dim": 8}}, "full_attention"),
        ({"backbone_hidden_size": 32}, "48"),
        ({"text_config": {"vocab_size": 97}}, "97"),
    ],
)
def test_an_assistant_of_another_target_is_refused(changes: dict[str, Any], named: str) -> None:
    couple = beside(drawn_of(DENSE), **changes)
    with folders(couple) as (path, draft_path), pytest.raises(CheckpointError, match=named):
        open_draft(draft_path, open_target(path))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model_type": "gemma3_assistant"}, "model_type"),
        ({"text_config": None}, "text_config"),
        ({"num_centroids": 7, "use_ordered_embeddings": True}, "num_centroids"),
        ({"centroid_intermediate_top_k": 4096, "use_ordered_embeddings": True}, "centroid_intermediate_top_k"),
        ({"num_draft_heads": 3}, "num_draft_heads"),
        ({"text_config": {**PUBLISHED["gemma-4-31B-assistant"]["text_config"], "num_kv_shared_layers": 2}}, "shared"),
        (
            {"text_config": {**PUBLISHED["gemma-4-31B-assistant"]["text_config"], "hidden_size_per_layer_input": 8}},
            "hidden_size_per_layer_input",
        ),
    ],
)
def test_a_config_that_cannot_be_read_in_one_way_is_refused(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        Gemma4AssistantConfig.from_hf({**PUBLISHED["gemma-4-31B-assistant"], **changes})


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes_have_the_parameters_of_transformers(name: str) -> None:
    def shapes(state: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
        return {rename(n, CHECKPOINT_NAMES): tuple(t.shape) for n, t in state.items()}

    config = json.loads(json.dumps(PUBLISHED[name]))
    with torch.device("meta"):
        ours = Gemma4AssistantDraft(Gemma4AssistantConfig.from_hf(config))
        theirs = witness.build(config)

    assert shapes(state_of(ours)) == shapes({n: t for n, t in theirs.state_dict().items() if n != "lm_head.weight"})
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())
