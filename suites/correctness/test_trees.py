"""Claim: a tree of drafts is its draft's best paths, each node knows its own path alone, and one path of it stands.

Born of SGLang's trees, where scores were summed, parents one off, indices not sorted, sight given to siblings and the
state of a path left where its node was: each in some port, and greedy text hides most of it. The derivation by paths:
`suites/growing.py`.
"""

from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from harness.compare import bit_equal, hold
from harness.strategies import seeds
from optimized import trees as twin
from reference import trees as page
from reference.decoding import Chain
from suites.correctness.test_reads import remembered
from suites.growing import FEW_WORDS, MORE_WORDS, Law, Size, asked, best_paths, grown, opened, said, sizes
from suites.scripted import SIDES, Loop, WatchedDraft, seat, tiny_draft, tiny_target, written

pytestmark = [pytest.mark.correctness, pytest.mark.pair("llama-eagle3")]

every_side = pytest.mark.parametrize("side", SIDES)


@every_side
@given(seed=seeds(), batch=st.integers(1, 2), size=sizes())
@example(seed=0, batch=2, size=Size(2, 3, 6))
@example(seed=3, batch=2, size=Size(3, 4, 12))
@example(seed=5, batch=1, size=Size(8, 8, 64))
def test_the_nodes_are_the_best_paths_breadth_first(side: str, seed: int, batch: int, size: Size) -> None:
    laws = [Law(seed + b, 8) for b in range(batch)]

    nodes = grown(side, laws, size)

    for b, law in enumerate(laws):
        paths = best_paths(law, size)
        assert nodes.tokens[b, 1:].tolist() == [path[-1] for path in paths[1:]]
        assert nodes.depths[b].tolist() == [len(path) for path in paths]
        assert nodes.parents[b].tolist() == [paths.index(path[:-1]) for path in paths]
        for path, word in zip(paths, nodes.words[b].tolist(), strict=True):
            assert [bool(word >> j & 1) for j in range(len(paths))] == [path[: len(p)] == p for p in paths]


@given(seed=seeds(), first=st.integers(0, 70), num_nodes=st.integers(1, 64))
@example(seed=0, first=2, num_nodes=64)
@example(seed=1, first=0, num_nodes=3)
def test_a_word_names_slots_from_the_root_on(seed: int, first: int, num_nodes: int) -> None:
    bits = torch.randint(0, 2, (num_nodes, num_nodes), generator=torch.Generator().manual_seed(seed))
    words = (bits << torch.arange(num_nodes)).sum(1)[None]

    seen = page.visible(words, torch.tensor([first]), 140)

    beyond = torch.zeros(num_nodes, 140 - first - num_nodes, dtype=torch.bool)
    bit_equal("seen", seen[0], torch.cat([torch.ones(num_nodes, first, dtype=torch.bool), bits.bool(), beyond], 1))


@every_side
@given(seed=seeds(), size=sizes(max_topk=3))
@example(seed=1, size=Size(2, 3, 8))
@example(seed=7, size=Size(3, 3, 13))
def test_the_walk_goes_down_while_a_child_says_what_the_target_says(side: str, seed: int, size: Size) -> None:
    nodes = grown(side, [Law(seed, 4)], size)
    own = torch.randint(0, 4, nodes.tokens.shape, generator=torch.Generator().manual_seed(seed))

    if side == "reference":
        path, accepted, following = page.walk(nodes, own, size.num_steps)
    else:
        path, accepted = twin.walk(nodes.tokens, nodes.parents, nodes.words, own, size.num_steps)
        following = own.gather(1, path.gather(1, accepted[:, None]))[:, 0]

    walked = [0]
    while True:
        said = int(own[0, walked[-1]])
        children = [v for v in range(1, size.num_draft_tokens) if int(nodes.parents[0, v]) == walked[-1]]
        match = [v for v in children if int(nodes.tokens[0, v]) == said]
        if not match:
            break
        walked += match
    assert path[0, : int(accepted) + 1].tolist() == walked
    assert int(following) == said


def along(chain: Chain, first: Any, path: list[Tensor]) -> Any:
    """What a chain's draft says after a path of its own: [B] each."""
    step = first
    for k, token in enumerate(path, 2):
        step = chain.way.next(token[:, None], step.feedback, chain.lengths, k)
    return step


@every_side
@given(loop=asked(), topk=st.integers(2, 3))
@example(loop=MORE_WORDS, topk=2)
@example(loop=Loop(tiny_target(7), tiny_draft(8, layer_types=["sliding_attention"], sliding_window=2), (5,)), topk=3)
@torch.no_grad()
def test_the_draft_knows_each_path_alone(side: str, loop: Loop, topk: int) -> None:
    size = Size(topk, 3, topk + 2 * topk**2 + 1)
    watched, draft = seat(opened(side, loop), WatchedDraft)
    truth = opened("reference", loop)
    names, lengths = torch.arange(len(loop.lengths)), torch.tensor(loop.lengths)
    chain = Chain(truth.target.module, truth.draft.module, truth.draft.capture_points, 3, 0.0, 0, names)
    chain.open(len(names), 32)

    said(watched, loop, size, 2)

    prompts = torch.nn.utils.rnn.pad_sequence(loop.prompts, batch_first=True)
    _, first = chain.prefill(prompts, lengths, {})
    second, third = draft.branches[:2]
    width = {"depth": 3, "width": 2 * truth.draft.facts.config.hidden}
    for member in range(topk):
        tokens = second.tokens[:, member]
        step = along(chain, first, [tokens])
        hold("logits after one", second.logits[:, member], step.logits[:, 0], **width)
    for member in range(topk):
        # whose feedback a member of the third step reads is who it grew from
        same = (third.hidden[:, member, None] == second.feedback).all(-1)
        assert (same.sum(1) == 1).all()
        parent = second.tokens.gather(1, same.long().argmax(1)[:, None])[:, 0]
        tokens = third.tokens[:, member]
        offered = along(chain, first, [parent]).logits[:, 0].topk(topk).indices
        assert (truth.draft.module.to_target(offered) == tokens[:, None]).any(1).all()
        step = along(chain, first, [parent, tokens])
        hold("logits after two", third.logits[:, member], step.logits[:, 0], **width)


@every_side
@given(loop=asked())
@example(loop=FEW_WORDS)
def test_after_a_path_the_draft_reads_what_the_target_knew(side: str, loop: Loop) -> None:
    watched, draft = seat(opened(side, loop), WatchedDraft)
    truth = opened("reference", loop)

    tree = said(watched, loop, Size(4, 2, 16))

    text = written(loop.prompts, tree.tokens)
    states = truth.draft.module.read(truth.target(text, capture=truth.draft.capture_points))
    heard = truth.draft(text[:, 1:], states[:, :-1]).logits
    width = {"depth": truth.target.num_layers, "width": truth.target.config.hidden}
    for row, (length, counts) in enumerate(zip(loop.lengths, tree.accepted, strict=True)):
        last = length - 1 + sum(count + 1 for count in counts[:-1])
        # prompts of one token are no reading of the twin's; every cycle is one, and those of other rows do not count
        readings = draft.readings[: len(draft.readings) - max(map(len, tree.accepted)) + len(counts)]
        tokens, hidden = remembered(readings, row, last)
        bit_equal("tokens", tokens, text[row, 1 : last + 2])
        hold("hidden", hidden, states[row, : last + 1], **width)
        # and beside no branch that was thought of before
        _, logits = remembered([reading._replace(hidden=reading.logits) for reading in readings], row, last)
        hold("logits", logits, heard[row, : last + 1], **width)


@every_side
@pytest.mark.parametrize(
    "size", [Size(2, 3, 12), Size(2, 3, 3), Size(9, 9, 64), Size(3, 2, 65), Size(6, 2, 9)], ids=str
)
def test_a_tree_that_cannot_be_is_refused(side: str, size: Size) -> None:
    with pytest.raises(ValueError, match="topk"):
        said(opened(side, FEW_WORDS), FEW_WORDS, size)
