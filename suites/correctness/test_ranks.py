"""Claim: W ranks together compute and say what one rank computes and says.

Born of gpt-fast (`output[0]` in its tensor-parallel reduce: only the first row is summed), SGLang #28343 (captures
taken before the all-reduce are partial sums), torchtitan #4245 (a replicated bias added on every rank counts W times)
and of padding rows, whose logit of zero beats a vocabulary that is all below it. Threads are the test double; a dense
model, one of experts and one of latents run in processes over gloo too. The tokens on both sides of every border
between ranks are always among those read.
"""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from harness.compare import bit_equal, hold
from harness.contracts import Group
from harness.groups import run_processes, run_threads
from harness.sharding import padded_vocab, split
from harness.strategies import ranks, seeds, vocabs
from optimized.ops.aten import Aten
from optimized.parallel import Placement, RowLinear, VocabEmbedding, VocabHead
from reference.decoding import Generation
from suites.draws import folders, random_tokens
from suites.families.deepseek import LATENTS
from suites.families.qwen3_moe import MIXTURE
from suites.ranked import Couple, speak_as_a_rank
from suites.teams import FOUR, THREE, TWO, Team, teams

pytestmark = pytest.mark.correctness


@pytest.mark.pair("llama-eagle3")
@given(team=teams())
@example(team=TWO)
@example(team=THREE)
@example(team=FOUR)
def test_many_ranks_compute_what_one_computes(team: Team) -> None:
    one, many = team.open(1), team.open(team.ranks)
    tokens, points = team.text(4), tuple(range(one.target.num_layers + 1))
    size = {"depth": one.target.num_layers, "width": one.target.config.hidden}

    want, got = (speculation.target(tokens, capture=points) for speculation in (one, many))
    for name, a, b in zip(got._fields, got, want, strict=True):
        hold(name, a, b, **size)

    aux, following = want.aux[:, :, list(one.draft.capture_points)], tokens.roll(-1, 1)
    fused = one.draft.fuse(aux)
    hold("fuse", many.draft.fuse(aux), fused, depth=1, width=aux[0, 0].numel())
    step, joined = one.draft(following, fused), many.draft(following, fused)
    for name, a, b in zip(step._fields, joined, step, strict=True):
        hold(f"draft {name}", a, b, **size)


@pytest.mark.pair("llama")
@given(team=teams())
@example(team=TWO)
@example(team=FOUR)
def test_every_rank_captures_the_sum(team: Team) -> None:
    target = team.open(team.ranks).target
    tokens, points = team.text(2), tuple(range(target.num_layers + 1))

    with torch.no_grad():
        seen = target.ranks.run(lambda rank: target.modules[rank](tokens, None, points))

    for other in seen[1:]:
        for name, a, b in zip(other._fields, other, seen[0], strict=True):
            bit_equal(name, a, b)


@pytest.mark.pair("llama-eagle3")
@given(team=teams(), num_draft_tokens=st.integers(0, 3), temperature=st.sampled_from([0.0, 0.8]))
@example(team=TWO, num_draft_tokens=3, temperature=0.0)
@example(team=THREE, num_draft_tokens=2, temperature=0.8)
def test_many_ranks_say_what_one_says(team: Team, num_draft_tokens: int, temperature: float) -> None:
    how = (team.prompts, 7, num_draft_tokens, temperature)

    one, many = (team.open(size).generate(*how, seed=3) for size in (1, team.ranks))

    bit_equal("tokens", many.tokens, one.tokens)
    assert many.accepted == one.accepted


@pytest.mark.pair("llama-eagle3")
@given(team=teams(), num_draft_tokens=st.integers(0, 3))
@example(team=TWO, num_draft_tokens=3)
def test_rank_zero_speaks_for_all(team: Team, num_draft_tokens: int) -> None:
    speculation = team.open(team.ranks)

    def say(rank: int) -> Generation:
        # other coins on every rank: whatever a rank would draw, rank 0 decides
        return speculation.engines[rank].generate(team.prompts, 7, num_draft_tokens, 0.8, seed=3 + rank)

    first, *others = speculation.target.ranks.run(say)

    for said in others:
        bit_equal("tokens", said.tokens, first.tokens)
        assert said.accepted == first.accepted


def on_ranks(ranks: int, make: Callable[[Placement], Any], full: dict[str, Tensor], x: list[Tensor]) -> list[Any]:
    """What one layer gives on every rank, called with each rank's input."""

    def call(group: Group) -> Any:
        part = make(Placement(Aten(), group, torch.float64, "cpu"))
        for name, tensor in full.items():
            part.load(name, tensor.double())
        return part(x[group.rank])

    return run_threads(ranks, call)


@given(vocab=vocabs(512), ranks=ranks())
@example(vocab=331, ranks=4)
@example(vocab=130, ranks=3)
def test_ids_of_all_ranks_are_looked_up(vocab: int, ranks: int) -> None:
    table, ids = torch.arange(1, 2 * vocab + 1).view(vocab, 2), torch.arange(vocab)

    rows = on_ranks(ranks, lambda at: VocabEmbedding("table", vocab, 2, at), {"table": table}, [ids] * ranks)

    for found in rows:
        bit_equal("rows", found, table.double())


class Asked(VocabHead):
    """A head whose call is the argmax, with the gathered logits beside it."""

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [M, H] -> [M], [M, V]"""
        return self.argmax(x), self.logits(x)


@given(vocab=vocabs(512), ranks=ranks(), seed=seeds())
@example(vocab=331, ranks=4, seed=0)
@example(vocab=331, ranks=1, seed=0)
@example(vocab=130, ranks=4, seed=0)
def test_padding_never_wins_and_the_lowest_of_equals_does(vocab: int, ranks: int, seed: int) -> None:
    border = torch.arange(0, vocab, padded_vocab(vocab, ranks) // ranks)
    drawn = random_tokens(vocab, 1, 4, seed)[0]
    winners = torch.cat([border, (border - 1).clamp(min=0), drawn, torch.tensor([vocab - 1])])
    # feature m is the logit of question m: every token loses with -2 but the winner, and a padding row would say 0
    head = torch.full((vocab, len(winners)), -2)
    head[winners, torch.arange(len(winners))] = -1
    # a second winner, which is as good and comes first where it is lower
    rivals = winners.flip(0)
    head[rivals, torch.arange(len(winners))] = -1
    x = torch.eye(len(winners), dtype=torch.float64)

    said = on_ranks(ranks, lambda at: Asked("head", vocab, len(winners), at), {"head": head}, [x] * ranks)

    for chosen, logits in said:
        bit_equal("argmax", chosen, torch.minimum(winners, rivals))
        bit_equal("logits", logits, head.double().T.contiguous())


@given(ranks=ranks(), seed=seeds())
@example(ranks=2, seed=0)
@example(ranks=3, seed=0)
def test_a_replicated_bias_is_added_once(ranks: int, seed: int) -> None:
    noise = torch.Generator().manual_seed(seed)
    # whole numbers: sums are exact in any order
    x, weight, bias = (torch.randint(-9, 10, size, generator=noise) for size in ((3, 4 * ranks), (5, 4 * ranks), (5,)))

    full = {"proj.weight": weight, "proj.bias": bias}
    shards = [split(x, "row", rank, ranks).double() for rank in range(ranks)]
    sums = on_ranks(ranks, lambda at: RowLinear("proj", 4 * ranks, 5, True, at), full, shards)

    for total in sums:
        bit_equal("sum", total, (x @ weight.T + bias).double())


DENSE_MIXED_LATENT = (TWO, MIXTURE, LATENTS)
PROCESSES = {"pinned": [(TWO,)], "nightly": [DENSE_MIXED_LATENT, (THREE,)]}
"""what is spoken in one set of processes each: couples of as many ranks"""


@pytest.mark.pair("llama-eagle3")
def test_processes_say_what_threads_say(profile: str) -> None:
    for cases in PROCESSES.get(profile, [DENSE_MIXED_LATENT]):
        with ExitStack() as kept:
            couples = [Couple(kept.enter_context(folders(*case[1:])), case.prompts) for case in cases]
            answers = run_processes(cases[0].ranks, speak_as_a_rank, couples, 6, 3)

        for case, of_ranks in zip(cases, zip(*answers, strict=True), strict=True):
            threads = case.open(case.ranks)
            want, points = threads.generate(case.prompts, 6, 3), threads.draft.capture_points
            aux = threads.target(case.prompts[0][None], capture=points).aux
            for said, captured in of_ranks:
                bit_equal("tokens", said.tokens, want.tokens)
                assert said.accepted == want.accepted
                hold("aux", captured, aux, depth=threads.target.num_layers, width=threads.target.config.hidden)
