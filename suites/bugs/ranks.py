"""Bugs of tensor parallelism in the twin and in its second witness."""

from typing import Any

import torch
from torch import Tensor

from harness.planting import Bug

SHARDING = "suites/correctness/test_sharding.py"
RANKS = "suites/correctness/test_ranks.py"
SHARDS = f"{SHARDING}::test_a_rank_holds_its_shard_of_every_parameter"
COMPUTE = f"{RANKS}::test_many_ranks_compute_what_one_computes"
LOOKUP = f"{RANKS}::test_ids_of_all_ranks_are_looked_up"
WINNER = f"{RANKS}::test_padding_never_wins_and_the_lowest_of_equals_does"


def ceil_run(_: Any) -> Any:
    """Rows cut by ceil(V / W), where the engine pads to 64."""

    def run(vocab: int, rank: int, ranks: int) -> slice:
        rows = -(-vocab // ranks)
        return slice(min(rank * rows, vocab), min((rank + 1) * rows, vocab))

    return run


def ceil_rows(_: Any) -> Any:
    return lambda vocab, ranks: -(-vocab // ranks) * ranks


def replica_by_remainder(_: Any) -> Any:
    """With more ranks than key/value heads: head r % G."""

    def run(kv_heads: int, rank: int, ranks: int) -> slice:
        share = max(kv_heads // ranks, 1)
        head = rank % kv_heads if ranks > kv_heads else rank * share
        return slice(head, head + share)

    return run


def bias_on_every_rank(_: Any) -> Any:
    def call(self: Any, x: Tensor) -> Tensor:
        partial = self.ops.linear(x, self.matrix, self.bias)
        return self.group.all_reduce(partial)

    return call


def gate_up_cut_merged(right: Any) -> Any:
    """gate | up cut as one matrix: the first ranks hold gates, the last ones ups."""

    def load(self: Any, name: str, full: Tensor) -> None:
        half = "gate_proj" in name or "up_proj" in name
        right(self, name, full.roll(full.shape[0] // 2, 0) if half and self.group.size > 1 else full)

    return load


def only_row_zero(_: Any) -> Any:
    """The reduction of the first row alone, as gpt-fast's tensor parallel does."""

    def add(group: Any, partial: Tensor) -> Tensor:
        total = partial.clone()
        total[0] = group.all_reduce(partial)[0]
        return total

    return add


def uncut(_: Any) -> Any:
    """Padding rows compete: all rows of the shard are logits."""

    def argmax(self: Any, x: Tensor, scale: float = 1.0) -> Tensor:
        logits = self.group.all_gather(self.ops.linear(x, self.matrix), -1)
        return (logits * scale).argmax(-1)

    return argmax


def local_ids(right: Any) -> Any:
    """A rank's own row number taken for a token id."""

    def argmax(self: Any, x: Tensor, scale: float = 1.0) -> Tensor:
        return right(self, x, scale) - (self.group.broadcast(torch.tensor([self.run.start]))[0] or self.weight.shape[0])

    return argmax


def bug(name: str, origin: str, at: str, make: Any, claim: str) -> Bug:
    return Bug(name, origin, at, make, claim)


BUGS = (
    bug("vocabulary cut by ceil", "SGLang #23976", "optimized.parallel.vocab_run", ceil_run, SHARDS),
    bug("vocabulary padded by ceil", "SGLang list, M39", "optimized.parallel.padded_vocab", ceil_rows, SHARDS),
    bug(
        "key/value replica by remainder", "SGLang list, M41", "optimized.parallel.kv_run", replica_by_remainder, SHARDS
    ),
    bug(
        "replicated bias on every rank",
        "torchtitan #4245",
        "optimized.parallel.RowLinear.__call__",
        bias_on_every_rank,
        f"{RANKS}::test_a_replicated_bias_is_added_once",
    ),
    bug("gate and up cut as one", "vLLM list, 61", "optimized.parallel.GateUpLinear.load", gate_up_cut_merged, SHARDS),
    bug(
        "reduction of the first row alone",
        "gpt-fast tp.py:140",
        "optimized.parallel.sum_in_rank_order",
        only_row_zero,
        COMPUTE,
    ),
    bug(
        "no reduction after the row split",
        "SGLang list, M42",
        "optimized.parallel.sum_in_rank_order",
        lambda _: lambda group, partial: partial,
        COMPUTE,
    ),
    bug(
        "captures before the reduction",
        "SGLang #28343",
        "optimized.parallel.sum_in_rank_order",
        lambda _: lambda group, partial: partial,
        f"{RANKS}::test_every_rank_captures_the_sum",
    ),
    bug(
        "the whole table looked up as a shard",
        "SGLang #23976",
        "optimized.ops.aten.Aten.embed",
        lambda right: lambda self, ids, table, *rest: right(self, ids.clamp(max=table.shape[0] - 1), table),
        LOOKUP,
    ),
    bug("padding rows win", "SGLang list, M43", "optimized.parallel.VocabHead.argmax", uncut, WINNER),
    bug("ids of a rank taken for tokens", "vLLM list, 58", "optimized.parallel.VocabHead.argmax", local_ids, WINNER),
    bug(
        "a hand-over that nobody checks",
        "SGLang 3.2",
        "suites.correctness.test_sharding.check_hand_over",
        lambda _: lambda *_: None,
        f"{SHARDING}::test_a_hand_over_is_refused_where_a_row_would_be_anothers",
    ),
)
