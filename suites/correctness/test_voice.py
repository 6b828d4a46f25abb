"""Claim: what a target never says is said by nobody: not by the target, not by the draft, on either side.

Born of Gemma 4 Unified, whose end marks stand in `suppress_tokens` of its `generation_config.json`. An engine that puts
them into the logits changes what every claim compares; one that reads them for the target alone has a draft propose
what is always rejected. A target that drafts for itself proposes what it would say, so then a draft is lost.
"""

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from harness import witness
from harness.checkpoints import CheckpointError
from harness.compare import bit_equal
from suites.catalog import open_speculation, open_target
from suites.draws import folders
from suites.families.gemma4_unified import SUPPRESSED
from suites.opened import OpenSpeculation
from suites.scripted import SIDES, Loop, tiny_draft, tiny_target
from suites.voice import GENERATION, Voice, read_voice

pytestmark = [pytest.mark.correctness, pytest.mark.pair("llama-eagle3")]

# a draft that has ids of its own: seven of the target's thirteen
LOOP = Loop(tiny_target(3), tiny_draft(4, draft_vocab_size=7), (5, 1, 3))


def never(speculation: OpenSpeculation, suppressed: tuple[int, ...]) -> OpenSpeculation:
    """The same, but some ids are never said."""
    return replace(speculation, target=replace(speculation.target, voice=Voice(suppressed)))


@cache
def both() -> list[OpenSpeculation]:
    """Opened once; engines keep their buffers."""
    return [LOOP.open(side) for side in SIDES]


def favourites(speculation: OpenSpeculation, count: int) -> tuple[int, ...]:
    """What it says most often, left to itself."""
    said = speculation.generate(LOOP.prompts, 12, 0).tokens
    return tuple(torch.bincount(said.flatten(), minlength=13).argsort(descending=True)[:count].tolist())


@given(num_draft_tokens=st.integers(0, 3), temperature=st.sampled_from([0.0, 1.0]), count=st.integers(1, 6))
@example(num_draft_tokens=3, temperature=0.0, count=2)
@example(num_draft_tokens=3, temperature=1.0, count=6)
@example(num_draft_tokens=0, temperature=1.0, count=2)
def test_nobody_says_it_and_both_sides_say_the_same(num_draft_tokens: int, temperature: float, count: int) -> None:
    suppressed, draws = favourites(both()[0], count), {"temperature": temperature, "seed": 5}

    want, got = (never(side, suppressed).generate(LOOP.prompts, 12, num_draft_tokens, **draws) for side in both())

    assert not torch.isin(want.tokens, torch.tensor(suppressed)).any()
    bit_equal("tokens", got.tokens, want.tokens)
    assert got.accepted == want.accepted


@pytest.mark.parametrize("shape", [{}, {"topk": 2, "num_steps": 2}], ids=["chain", "tree"])
@pytest.mark.parametrize("side", SIDES)
def test_a_draft_changes_no_text(side: str, shape: dict[str, int]) -> None:
    speculation = LOOP.open(side)
    muted = never(speculation, favourites(speculation, 3))

    said, plain = (muted.generate(LOOP.prompts, 12, k, **shape) for k in (4, 0))

    bit_equal("tokens", said.tokens, plain.tokens)


def alone(side: str, **how: Any) -> OpenSpeculation:
    """A target that drafts for itself."""
    with folders(LOOP.target) as (path, _):
        return open_speculation(path, path, side=side, dtype=torch.float64, algorithm="STANDALONE", **how)


@pytest.mark.parametrize(("side", "ranks"), [("reference", 1), ("optimized", 1), ("optimized", 2)])
def test_a_draft_that_is_the_target_loses_no_proposal(side: str, ranks: int) -> None:
    speculation = alone(side, **({"tp_size": ranks} if ranks > 1 else {}))
    muted = never(speculation, favourites(speculation, 3))

    said = muted.generate(LOOP.prompts, 12, 3)

    assert {count for row in said.accepted for count in row} == {3}
    bit_equal("tokens", said.tokens, muted.generate(LOOP.prompts, 12, 0).tokens)


def spoken(folder: Path, prompt: Tensor, side: str) -> Tensor:
    """Nine tokens after a prompt, as the folder asks."""
    return open_speculation(folder, folder, side=side, dtype=torch.float64).generate(prompt, 9, 2).tokens


@pytest.mark.parametrize("side", SIDES)
def test_what_a_checkpoint_suppresses_is_what_transformers_suppresses(side: str) -> None:
    prompt = LOOP.prompts[0][None]
    with folders(LOOP.target) as (path, _):
        free = spoken(path, prompt, side)
        (path / GENERATION).write_text(json.dumps({"suppress_tokens": free[0, :2].tolist()}))

        said = spoken(path, prompt, side)

        want = witness.load(path, dtype=torch.float64).generate(prompt, 9)
    bit_equal("tokens", said, want)
    assert not torch.isin(said, free[0, :2]).any()


def written(folder: Path, **said: Any) -> Path:
    (folder / GENERATION).write_text(json.dumps(said))
    return folder


MARKED = SimpleNamespace(suppressed=SUPPRESSED)
"""a config that knows of marks, as Gemma 4 Unified's does"""


def test_what_is_stated_goes_before_what_the_config_knows(tmp_path: Path) -> None:
    plain, keys = SimpleNamespace(), {"eos_token_id": 2}

    assert read_voice(tmp_path, {}, plain) == Voice()
    assert read_voice(tmp_path, keys, MARKED) == Voice(SUPPRESSED, (2,))
    written(tmp_path, eos_token_id=[1, 106], temperature=0.7)
    assert read_voice(tmp_path, keys, MARKED) == Voice(SUPPRESSED, (1, 106))
    written(tmp_path, suppress_tokens=[], eos_token_id=7)
    assert read_voice(tmp_path, keys, MARKED) == Voice((), (7,))
    written(tmp_path, suppress_tokens=[5, 6])
    assert read_voice(tmp_path, keys, MARKED) == Voice((5, 6), (2,))


@pytest.mark.parametrize("said", [{"suppress_tokens": "5"}, {"suppress_tokens": [5, -1]}, {"eos_token_id": [True]}])
def test_what_is_no_id_is_refused_and_named(said: dict[str, Any]) -> None:
    refusal = pytest.raises(CheckpointError, match=rf"{GENERATION}: key '{next(iter(said))}'")
    with folders(LOOP.target) as (path, _), refusal:
        open_target(written(path, **said))
