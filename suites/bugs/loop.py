"""Bugs of the speculative loop, of sampling and of static state, on both sides."""

from typing import Any

import torch
from torch import Tensor

from harness.planting import Bug
from reference.ops.sampling import COIN, draw

CORRECT = "suites/correctness"
LOSSLESS = f"{CORRECT}/test_lossless.py::test_every_accepted_count_leaves_the_text_alone"
ENDS = f"{CORRECT}/test_lossless.py::test_the_end_may_fall_inside_an_accepted_run"
READS = f"{CORRECT}/test_reads.py::test_a_position_is_read_with_its_own_state_and_the_next_token"
FEEDBACK = f"{CORRECT}/test_reads.py::test_a_later_step_reads_its_own_feedback_one_position_on"
ORACLE = f"{CORRECT}/test_reads.py::test_an_oracle_draft_advances_by_all_drafts_and_one"
SCRATCH = f"{CORRECT}/test_rejected.py::test_after_rejections_the_draft_says_what_it_says_from_scratch"
ROLLED = f"{CORRECT}/test_rejected.py::test_rolled_back_is_never_read"
LAW = f"{CORRECT}/test_sampling.py::test_the_law_of_the_text_is_the_targets"
TEXTS = f"{CORRECT}/test_sampling.py::test_texts_beside_a_contrary_draft_have_the_targets_law"
PLACE = f"{CORRECT}/test_sampling.py::test_a_number_belongs_to_its_place_alone"
ALONE = f"{CORRECT}/test_company.py::test_alone_or_in_company_a_sequence_says_the_same"
CHUNKS = f"{CORRECT}/test_company.py::test_chunks_and_buckets_change_nothing"
FORGETS = f"{CORRECT}/test_company.py::test_an_engine_forgets_the_batch_before"
NUMBERS = f"{CORRECT}/test_ops.py::test_chance_depends_on_who_asks_alone"
LEADING = f"{CORRECT}/test_ops.py::test_drafts_are_accepted_up_to_the_first_miss"
VISIBLE = f"{CORRECT}/test_ops.py::test_a_query_reads_the_slots_it_may_see"
BITS = f"{CORRECT}/test_ops.py::test_a_row_has_the_same_bits_alone"

LOOP, TWIN, ATEN = "reference.decoding", "optimized.cycle", "optimized.ops.aten.Aten"


def any_match(_: Any) -> Any:
    """Matches counted wherever they stand, not the leading ones."""

    def verify(logits: Tensor, drafted: Tensor) -> tuple[Tensor, Tensor]:
        chosen = logits.argmax(-1)
        accepted = (drafted == chosen[:, :-1]).long().sum(-1)
        return accepted, chosen.gather(1, accepted[:, None])[:, 0]

    return verify


def bonus_one_early(right: Any) -> Any:
    def verify(logits: Tensor, drafted: Tensor) -> tuple[Tensor, Tensor]:
        accepted, _ = right(logits, drafted)
        return accepted, logits.argmax(-1).gather(1, (accepted - 1).clamp(min=0)[:, None])[:, 0]

    return verify


def settle_rejected(right: Any) -> Any:
    """The draft reads the token that was rejected, not the one that took its place."""

    def settle(self: Any, out: Any, root: Tensor, drafted: Tensor, accepted: Tensor, following: Tensor) -> Any:
        wrong = torch.cat([drafted, following[:, None]], 1).gather(1, accepted[:, None])[:, 0]
        return right(self, out, root, drafted, accepted, wrong)

    return settle


def late_positions(right: Any) -> Any:
    """Draft steps sit one position too far on."""

    def propose(self: Any, first: Any) -> Any:
        self.lengths = self.lengths + 1
        try:
            return right(self, first)
        finally:
            self.lengths = self.lengths - 1

    return propose


def last_column(right: Any) -> Any:
    """The last column of a padded batch for every row."""
    return lambda x, index: right(x, torch.full_like(index, x.shape[1] - 1))


def sampled(keep: Any = None, rest: Any = None) -> Any:
    """The acceptance rule, or the rest that a recovered token is drawn from, replaced."""
    keep = keep or (lambda coins, q, p: coins * q < p)
    rest = rest or (lambda p, q: (p - q).clamp(min=0))

    def make(_: Any) -> Any:
        def verify(p: Tensor, q: Tensor, drafted: Tensor, coins: Tensor, draws: Tensor) -> tuple[Tensor, Tensor]:
            at = drafted[..., None]
            kept = keep(coins, q.gather(-1, at)[..., 0], p[:, :-1].gather(-1, at)[..., 0])
            accepted = kept.long().cumprod(-1).sum(-1)
            weights = torch.cat([rest(p[:, :-1], q), p[:, -1:]], 1)
            return accepted, draw(weights, draws).gather(1, accepted[:, None])[:, 0]

        return verify

    return make


def twin_lengths_forget_the_bonus(right: Any) -> Any:
    def commit(state: Any, accepted: Tensor, following: Tensor) -> None:
        before = state.lengths.clone()
        right(state, accepted, following)
        state.lengths -= ((state.lengths != before) & (accepted > 0)).long()

    return commit


def twin_keeps_rejected(right: Any) -> Any:
    def commit(state: Any, accepted: Tensor, following: Tensor) -> None:
        right(state, accepted, following)
        state.settled[:, : state.plan.num_draft_tokens] = state.drafted

    return commit


def seed_of_the_batch_before(right: Any) -> Any:
    def ask(self: Any, num_tokens: int, eos: Any, seed: int, *rest: Any) -> None:
        kept, asked = self.seed.clone(), getattr(self, "asked", False)
        right(self, num_tokens, eos, seed, *rest)
        if asked:
            self.seed.copy_(kept)
        self.asked = True

    return ask


def chunk_tail_invented(right: Any) -> Any:
    """The last column of a chunk is read beside something else than the next prompt token."""

    def prefill(self: Any, *rest: Any) -> Any:
        states = self.draft.states

        def read(tokens: Tensor, *place: Any) -> Any:
            return states(torch.cat([tokens[:, :-1], torch.zeros_like(tokens[:, -1:])], 1), *place)

        self.draft.states = read
        try:
            return right(self, *rest)
        finally:
            del self.draft.states

    return prefill


def one_stream(right: Any) -> Any:
    return lambda seed, sequence, position, stream: right(seed, sequence, position, 0)


def natural_rows(_: Any) -> Any:
    """The whole batch in one product: bits follow the number of rows."""
    return lambda self, call, x, weight=None: call(x)


def bug(name: str, origin: str, at: str, make: Any, claim: str) -> Bug:
    return Bug(name, origin, at, make, claim)


BUGS = (
    bug("matches counted after a miss", "SGLang list, M47", f"{LOOP}.verify_greedy", any_match, LOSSLESS),
    bug("bonus token one row early", "vLLM list, 70", f"{LOOP}.verify_greedy", bonus_one_early, LOSSLESS),
    bug("the draft reads the rejected token", "vLLM #14649", f"{LOOP}.Chain.settle", settle_rejected, READS),
    bug("draft position one late", "SGLang list, M23", f"{LOOP}.Chain.propose", late_positions, FEEDBACK),
    bug("last column of a ragged batch", "SGLang #27846", "reference.drafting.row", last_column, READS),
    bug(
        "end token only at the end of a step",
        "SGLang 6.5",
        f"{LOOP}._ended",
        lambda _: lambda row, num_tokens, eos: len(row) >= num_tokens or row[-1] == eos,
        ENDS,
    ),
    bug(
        "tokens after the length limit",
        "vLLM list, 82",
        f"{LOOP}._cut",
        lambda right: lambda row, num_tokens, eos: right(row, num_tokens + 1, eos)[-num_tokens:],
        ENDS,
    ),
    bug(
        "roll back keeps one slot",
        "SGLang list, M49",
        "reference.ops.cache.Cache.roll_back",
        lambda right: lambda self, lengths: right(self, lengths + 1),
        ROLLED,
    ),
    bug("shared noise of draft and residual", "vLLM #54282", f"{LOOP}.uniform", one_stream, TEXTS),
    bug(
        "one coin for all positions",
        "vLLM list, 77",
        f"{LOOP}.uniform",
        lambda right: lambda s, q, place, stream: right(s, q, place * 0 if stream == COIN else place, stream),
        TEXTS,
    ),
    bug(
        "numbers follow the row of the batch",
        "SGLang list, M56",
        f"{LOOP}.uniform",
        lambda right: lambda s, q, place, stream: right(s, torch.arange(len(q)), place, stream),
        ALONE,
    ),
    bug(
        "recovered token drawn from p",
        "vLLM list, 71",
        "reference.ops.sampling.verify_sampled",
        sampled(rest=lambda p, q: p),
        LAW,
    ),
    bug(
        "acceptance ratio upside down",
        "vLLM list, 72",
        "reference.ops.sampling.verify_sampled",
        sampled(keep=lambda coins, q, p: coins * p < q),
        LAW,
    ),
    bug(
        "everything accepted",
        "vLLM list, 73",
        "reference.ops.sampling.verify_sampled",
        sampled(keep=lambda coins, q, p: p >= 0),
        LAW,
    ),
    bug(
        "twin: matches counted after a miss",
        "SGLang list, M47",
        f"{ATEN}.accept_greedy",
        lambda _: lambda self, drafted, chosen: (drafted == chosen[:, :-1]).long().sum(1),
        LEADING,
    ),
    bug(
        "twin: length forgets the bonus", "SGLang list, M50", f"{TWIN}.commit", twin_lengths_forget_the_bonus, LOSSLESS
    ),
    bug("twin: the draft reads rejected tokens", "vLLM #14649", f"{TWIN}.commit", twin_keeps_rejected, READS),
    bug(
        "twin: always the first column",
        "vLLM #39773",
        f"{ATEN}.gather_rows",
        lambda _: lambda self, x, i: x[:, 0],
        ORACLE,
    ),
    bug(
        "twin: padding writes a real slot",
        "SGLang #22958",
        "optimized.state.KVCache.slots",
        lambda right: lambda self, positions: right(self, positions.clamp(min=0)),
        CHUNKS,
    ),
    bug(
        "twin: seed of the batch before",
        "SGLang list, M53",
        "optimized.state.State.ask",
        seed_of_the_batch_before,
        FORGETS,
    ),
    bug(
        "twin: chunk tail invented", "SGLang #26329", "optimized.decoding.Engine._prefill", chunk_tail_invented, CHUNKS
    ),
    bug(
        "twin: queries see one slot ahead",
        "SGLang list, M58",
        f"{ATEN}.attend",
        lambda right: lambda self, q, k, v, positions, *rest: right(self, q, k, v, positions + 1, *rest),
        VISIBLE,
    ),
    bug(
        "twin: recovered token drawn from p",
        "vLLM list, 71",
        f"{TWIN}.draw_following",
        lambda _: (
            lambda ops, state, accepted: draw(
                ops.gather_rows(state.p, accepted)[:, None],
                ops.uniform(state.seed, state.sequence, state.lengths + 1 + accepted, 0)[:, None],
            )[:, 0]
        ),
        LAW,
    ),
    bug(
        "twin: numbers ignore the position",
        "vLLM list, 77",
        "optimized.ops.aten.uniform",
        lambda right: lambda seed, sequence, position, stream: right(seed, sequence, position * 0, stream),
        NUMBERS,
    ),
    bug(
        "twin: temperature ignored",
        "SGLang #39253",
        f"{TWIN}.probabilities",
        lambda right: lambda logits, temperature: right(logits, torch.ones_like(temperature)),
        TEXTS,
    ),
    bug("twin: rows of any number in one product", "performance: BLAS bits", f"{ATEN}._rows", natural_rows, BITS),
)
