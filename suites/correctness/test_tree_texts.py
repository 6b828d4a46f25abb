"""Claim: trees of drafts change how soon a text comes, never which text it is, greedy or drawn, on both sides alike.

Born of SGLang #34189 (caches silently corrupted for more than four draft tokens) and of the compaction that trees need
and chains do not: keys, states and tokens of the path that stands move to where a chain would have put them. A tree
that offers every word accepts all its steps through whatever branch the target takes, so paths are compacted from
everywhere. Drawn texts are equal too, token by token: a token's number belongs to its place.
"""

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from harness.compare import bit_equal
from optimized.graphs import GuardMode
from suites.correctness.test_replay import EagerEngine, SpoiltReplays, listed, paused, run
from suites.couples import COUPLES
from suites.families.deepseek import tiny_deepseek
from suites.families.gemma3 import tiny_gemma3
from suites.families.gemma4 import tiny_gemma4
from suites.growing import FEW_WORDS, MORE_WORDS, NUM_TOKENS, Size, asked, opened, said, sizes
from suites.scripted import SIDES, Loop, PoisonedEngine, script, tiny_draft, tiny_target, written

pytestmark = [pytest.mark.correctness, pytest.mark.pair("llama-eagle3")]

every_side = pytest.mark.parametrize("side", SIDES)
temperatures = st.sampled_from([0.0, 0.8])
ALONE = FEW_WORDS._replace(lengths=(4,))
EVERY_WORD = Size(5, 2, 31)
"""two levels of all five words: whatever the target says is there"""


@every_side
@given(loop=asked(), num_steps=st.integers(1, 4))
@example(loop=FEW_WORDS, num_steps=3)
def test_a_tree_of_one_child_is_a_chain(side: str, loop: Loop, num_steps: int) -> None:
    speculation = opened(side, loop)

    tree = said(speculation, loop, Size(1, num_steps, num_steps + 1))

    chain = speculation.generate(loop.prompts, NUM_TOKENS, num_steps)
    bit_equal("tokens", tree.tokens, chain.tokens)
    assert tree.accepted == chain.accepted


@every_side
@given(loop=asked(), size=sizes(), temperature=temperatures)
@example(loop=FEW_WORDS, size=Size(3, 3, 9), temperature=0.0)
@example(loop=FEW_WORDS, size=Size(4, 3, 24), temperature=0.8)
@example(loop=ALONE, size=Size(4, 2, 12), temperature=0.0)
@example(loop=ALONE, size=Size(2, 4, 8), temperature=0.0)
def test_trees_leave_the_text_alone(side: str, loop: Loop, size: Size, temperature: float) -> None:
    speculation, draws = opened(side, loop), {"temperature": temperature, "seed": 3}

    tree = said(speculation, loop, size, **draws)

    bit_equal("tokens", tree.tokens, speculation.generate(loop.prompts, NUM_TOKENS, 0, **draws).tokens)


TARGETS = {
    "llama": FEW_WORDS,
    # a window of two positions: the second level sees no root
    "gemma3": Loop(
        tiny_gemma3(5, vocab=5, tie_word_embeddings=False, sliding_window=2), tiny_draft(6, vocab=5), (5, 1)
    ),
    "gemma4": Loop(tiny_gemma4(6, vocab=5, final_logit_softcapping=1.0), tiny_draft(7, vocab=5), (1, 4)),
    "deepseek": Loop(tiny_deepseek(6, vocab=5), tiny_draft(7, vocab=5), (5, 1)),
}


@pytest.mark.parametrize("target", TARGETS)
@every_side
def test_a_tree_of_every_word_accepts_all_its_steps(side: str, target: str) -> None:
    loop = TARGETS[target]
    speculation = opened(side, loop)

    tree = said(speculation, loop, EVERY_WORD, 13)

    bit_equal("tokens", tree.tokens, speculation.generate(loop.prompts, 13, 0).tokens)
    assert tree.accepted == [[2] * 4] * len(loop.lengths)


@every_side
@pytest.mark.parametrize("size", [Size(2, 4, 9), Size(3, 3, 8)], ids=str)
def test_a_draft_that_knows_advances_by_all_steps_and_one(side: str, size: Size) -> None:
    loop, steps = MORE_WORDS._replace(lengths=(5, 1, 3)), 3
    speculation, num_tokens = opened(side, loop), 1 + steps * (size.num_steps + 1)
    plain = speculation.generate(loop.prompts, num_tokens + size.num_steps, 0).tokens
    knowing, _ = script(speculation, written(loop.prompts, plain))

    tree = said(knowing, loop, size, num_tokens)

    bit_equal("tokens", tree.tokens, plain[:, :num_tokens])
    assert tree.accepted == [[size.num_steps] * steps] * 3


@given(loop=asked(), size=sizes(), temperature=temperatures)
@example(loop=FEW_WORDS, size=Size(3, 3, 9), temperature=0.0)
@example(loop=FEW_WORDS, size=Size(4, 4, 24), temperature=0.8)
@example(loop=FEW_WORDS, size=Size(3, 4, 7), temperature=0.0)
def test_the_twin_grows_the_same_trees(loop: Loop, size: Size, temperature: float) -> None:
    reference, optimized = (said(opened(side, loop), loop, size, temperature=temperature, seed=5) for side in SIDES)

    bit_equal("tokens", optimized.tokens, reference.tokens)
    assert optimized.accepted == reference.accepted


BLOCKS = ("llama-dflash", "llama-peagle")


@pytest.mark.parametrize("name", [name for name in COUPLES if name not in BLOCKS])
def test_every_draft_that_takes_steps_grows_trees(name: str) -> None:
    couple, prompts = COUPLES[name], COUPLES[name].prompts((4, 1))
    reference, optimized = (couple.open(side) for side in SIDES)
    plain = reference.generate(prompts, 9, 0).tokens

    truth, got = (spoken.generate(prompts, 9, 40, topk=8, num_steps=3) for spoken in (reference, optimized))

    bit_equal("tokens", truth.tokens, plain)
    bit_equal("tokens of the twin", got.tokens, plain)
    assert got.accepted == truth.accepted


@pytest.mark.parametrize("name", BLOCKS)
@every_side
def test_a_draft_that_says_all_at_once_grows_none(side: str, name: str) -> None:
    couple = COUPLES[name]

    with pytest.raises(ValueError, match="no trees"):
        couple.open(side).generate(couple.prompts(), 4, 5, topk=2)


TREE = Size(3, 3, 9)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_ranks_grow_the_trees_of_one(temperature: float) -> None:
    ranked = FEW_WORDS.open("optimized", tp_size=2)
    how = {"temperature": temperature, "seed": 3}

    together = said(ranked, FEW_WORDS, TREE, **how)

    alone = said(opened("optimized", FEW_WORDS), FEW_WORDS, TREE, **how)
    bit_equal("tokens", together.tokens, alone.tokens)
    assert together.accepted == alone.accepted


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_what_was_rejected_is_never_read(temperature: float) -> None:
    speculation = opened("optimized", FEW_WORDS)
    models = (speculation.target.module, speculation.draft.module, speculation.draft.capture_points)
    how = {"temperature": temperature, "seed": 3, **TREE._asdict()}

    poisoned = PoisonedEngine(*models).generate(FEW_WORDS.prompts, NUM_TOKENS, chunk_size=2, bucket=4, **how)

    usual = speculation.generate(FEW_WORDS.prompts, NUM_TOKENS, **how)
    bit_equal("tokens", poisoned.tokens, usual.tokens)
    assert poisoned.accepted == usual.accepted


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_cycle_of_trees_can_be_captured(temperature: float) -> None:
    engine = paused(FEW_WORDS)
    engine.generate(FEW_WORDS.prompts, NUM_TOKENS, temperature=temperature, **TREE._asdict())
    session = engine.session
    run(session.run)

    with GuardMode(session.state.buffers) as guard:
        run(session.run)

    assert guard.num_calls > 0
    first, *later = [listed(session.run) for _ in range(3)]
    assert all(calls == first for calls in later)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_graph_of_trees_says_what_eager_cycles_say(temperature: float, dtype: torch.dtype) -> None:
    speculation = FEW_WORDS.open("optimized", dtype, device="cuda")
    models = (speculation.target.module, speculation.draft.module, speculation.draft.capture_points)
    prompts, how = [prompt.cuda() for prompt in FEW_WORDS.prompts], {**TREE._asdict(), "temperature": temperature}

    eager = EagerEngine(*models).generate(prompts, NUM_TOKENS, bucket=4, num_slots=127, **how)

    for cycles_per_read in (1, 3):
        engine = SpoiltReplays(*models)
        replayed = engine.generate(prompts, NUM_TOKENS, bucket=4, num_slots=127, cycles_per_read=cycles_per_read, **how)
        bit_equal("tokens", replayed.tokens, eager.tokens)
        assert replayed.accepted == eager.accepted


def test_a_whole_cycle_in_triton_is_the_cycle_in_aten() -> None:
    ids = {"eagle_aux_hidden_state_layer_ids": [1, 0]}
    loop = Loop(tiny_target(9, vocab=5, num_hidden_layers=2), tiny_draft(10, vocab=5, eagle_config=ids), (3, 1))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    aten, triton = (
        loop.open("optimized", torch.float32, form=f, device=d) for f, d in (("aten", "cpu"), ("triton", device))
    )

    want, got = (said(speculation, loop, Size(4, 2, 10), 4) for speculation in (aten, triton))

    assert got.accepted == want.accepted
    bit_equal("tokens", got.tokens, want.tokens)
    assert max(map(max, want.accepted)) > 0
