"""Bugs of graphs, kernels and static state: what a capture freezes, what a tile leaves out, and who is keyed how."""

import itertools
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from harness.planting import Bug

CORRECT = "suites/correctness"
SAFE = f"{CORRECT}/test_capture_safety.py::test_every_speculation_is_fit_to_be_captured"
LOOKS = f"{CORRECT}/test_capture_safety.py::test_the_host_looks_once_after_several_cycles[llama-eagle3]"
FEW = f"{CORRECT}/test_launches.py::test_a_layer_is_few_kernels_and_nothing_else"
SAME = f"{CORRECT}/test_ops_choices.py::test_a_step_of_any_number_of_rows_launches_the_same_kernels"
LIBRARY = f"{CORRECT}/test_ops_choices.py::test_the_library_reads_as_many_rows_as_the_bucket_has"
SCALED = f"{CORRECT}/test_ops_choices.py::test_a_float8_weight_is_its_numbers_times_its_scales"
SCORES = f"{CORRECT}/test_ops_choices.py::test_rows_of_a_head_are_scored_by_their_ids[triton float32]"
VISIBLE = f"{CORRECT}/test_ops.py::test_a_query_reads_the_slots_it_may_see[triton float32]"
WIDE = f"{CORRECT}/test_ops_targets.py::test_heads_of_every_width_attend[16-triton float32]"
LATENTS = f"{CORRECT}/test_ops_targets.py::test_absorbed_attention_is_attention[triton float32]"
WRITES = f"{CORRECT}/test_ops_targets.py::test_every_family_turns_and_writes_its_heads[triton float32]"
CHOSEN = f"{CORRECT}/test_ops_mixture.py::test_the_likeliest_experts_are_chosen[triton float32]"
CAPPED = f"{CORRECT}/test_ops_targets.py::test_a_capped_logit_stays_below_the_cap[triton float32]"
TUNED = "suites/selftest/test_tune.py"
UNMEASURED = f"{TUNED}::test_a_dry_run_writes_choices_that_nobody_measured"
UNTIMED = f"{TUNED}::test_a_wrong_product_is_not_timed"

CYCLE, TRITON, LAUNCHES = "optimized.cycle", "optimized.ops.launch.Triton", "optimized.ops.launches.Launches"


class Launcher:
    """A kernel that is launched with other arguments."""

    def __init__(self, kernel: Any, change: Any) -> None:
        self.kernel, self.change, self.fn = kernel, change, kernel.fn

    def __getitem__(self, grid: Any) -> Any:
        return lambda *args, **facts: self.kernel[grid](*self.change(args), **facts)


def rebound(commit: Any) -> Any:
    """A buffer replaced by a new tensor of the same name."""

    def wrong(state: Any, *facts: Tensor) -> None:
        commit(state, *facts)
        state.root = state.root.clone()

    return wrong


def grown(commit: Any) -> Any:
    """A log that grows by a column a cycle."""

    def wrong(state: Any, *facts: Tensor) -> None:
        commit(state, *facts)
        state.log = F.pad(state.log, (0, 1), value=-1)

    return wrong


def asked(accept: Any) -> Any:
    """The host asks whether anybody still speaks."""
    return lambda models, state: None if bool(state.done.all()) else accept(models, state)


def branching(verify: Any) -> Any:
    """Only rows that still speak are verified."""

    def wrong(models: Any, state: Any, *bound: Any) -> None:
        verify(models, state, *bound)
        state.hidden[state.done.nonzero().flatten()] = 0

    return wrong


def first_of_a_replay(decode: Any) -> Any:
    """What the host reads back after several cycles are the counts of the first one."""

    def wrong(self: Any, session: Any) -> None:
        run, state, turn = session.run, session.state, itertools.count()

        def once(*bound: Any) -> None:
            before = state.log.clone()
            run(*bound)
            if next(turn) % session.cycles_per_read:
                state.log.copy_(before)

        session.run = once
        decode(self, session)

    return wrong


def looks_twice(decode: Any) -> Any:
    """The host looks after every cycle of a replay."""

    def wrong(self: Any, session: Any) -> None:
        run = session.run
        session.run = lambda *bound: (run(*bound), session.state.progress.tolist())
        decode(self, session)

    return wrong


def by_rows(product: Any) -> Any:
    """Few rows in the small tile, many in the large one, whatever the engine's bucket."""

    def wrong(self: Any, x: Tensor, *rest: Any) -> Tensor:
        bucket, self.bucket = self.bucket, 16 if x.shape[0] <= 2 else 64
        try:
            return product(self, x, *rest)
        finally:
            self.bucket = bucket

    return wrong


def last_of_the_tile(multiply: Any) -> Any:
    """The padding stands in front, and its rows are handed on."""
    return lambda self, x, *rest: multiply(self, F.pad(x, (0, 0, 0, -x.shape[0] % 16)), *rest)[-x.shape[0] :]


def tied_out(route: Any) -> Any:
    """Of two equally likely experts the second is dropped."""

    def wrong(self: Any, *how: Any, **more: Any) -> tuple[Tensor, Tensor]:
        ids, weights = route(self, *how, **more)
        return ids, weights.masked_fill(F.pad(weights[:, 1:] == weights[:, :-1], (1, 0)), 0.0)

    return wrong


def apart(norm: Any) -> Any:
    """A sum of its own in front of the norm."""
    return lambda self, x, r=None: norm(self, x, r) if r is None else (norm(self, x + r)[0], x + r)


def moved(place: int, by: int) -> Any:
    """A number or a tensor of a call, so much larger."""

    def make(call: Any) -> Any:
        def wrong(self: Any, *args: Any, **facts: Any) -> Any:
            args = tuple(a + by if i == place and a is not None else a for i, a in enumerate(args))
            return call(self, *args, **facts)

        return wrong

    return make


def bug(name: str, origin: str, at: str, make: Any, claim: str) -> Bug:
    """A bug of this page."""
    return Bug(f"kernels-{name}", origin, at, make, claim)


BUGS = (
    bug("state-rebound", "a graph writes to the old address", f"{CYCLE}.commit", rebound, f"{SAFE}[llama-eagle3]"),
    bug("state-grown", "a list that grows with the text", f"{CYCLE}.commit", grown, f"{SAFE}[gemma4-assistant]"),
    bug("host-read-in-accept", "HF candidate_generator.py:1397", f"{CYCLE}.accept", asked, f"{SAFE}[deepseek-nextn]"),
    bug("data-dependent-rows", "vLLM #39773", f"{CYCLE}.verify", branching, f"{SAFE}[qwen3_moe-mtp]"),
    bug("stale-counts", "SGLang #26880", "optimized.decoding.Engine._decode", first_of_a_replay, LOOKS),
    bug("a-look-a-cycle", "gpt-fast generate.py:131", "optimized.decoding.Engine._decode", looks_twice, LOOKS),
    bug(
        "chunk-dropped",
        "a grid rounded down",
        "optimized.ops.launch.attend_merge_kernel",
        lambda kernel: Launcher(kernel, lambda args: (*args[:5], args[5] - 1)),
        VISIBLE,
    ),
    bug("window-off-by-one", "an inclusive bound", f"{TRITON}.attend", moved(5, 1), WIDE),
    bug("written-one-slot-late", "slots of the next step", f"{TRITON}.qk_rope_kv_write", moved(2, 1), WRITES),
    bug("latents-of-the-neighbour", "slots of the next step", f"{TRITON}.latent_write", moved(4, -1), LATENTS),
    bug("expert-dropped-on-a-tie", "a top-k that marks by value", f"{TRITON}.route_softmax", tied_out, CHOSEN),
    bug(
        "cap-unscaled",
        "tanh of the logit, not of its share of the cap",
        f"{TRITON}.softcap",
        lambda cap: lambda self, logits, most: cap(self, logits * most, most),
        CAPPED,
    ),
    bug(
        "scale-of-the-next-block",
        "rows of scales one off",
        f"{TRITON}.linear_scaled",
        lambda call: lambda self, x, w, scales, *rest: call(self, x, w, scales.roll(1, 0), *rest),
        f"{SCALED}[triton float32]",
    ),
    bug(
        "scale-across-read-down",
        "`repeat_interleave` by rows and columns exchanged",
        "optimized.ops.aten.Aten.linear_scaled",
        lambda call: lambda self, x, w, scales, *rest: call(self, x, w, scales.roll(1, 1), *rest),
        f"{SCALED}[aten float64]",
    ),
    bug(
        "ids-of-the-shard",
        "ids that count from the shard's first row",
        f"{TRITON}.score_rows",
        lambda call: lambda self, x, table, ids, first=None: call(self, x, table, ids),
        SCORES,
    ),
    bug("keyed-by-rows", "a table asked for the rows of a call", f"{LAUNCHES}._product", by_rows, SAME),
    bug("padding-handed-on", "the wrong end of a padded tile", f"{LAUNCHES}._by_library", last_of_the_tile, LIBRARY),
    bug(
        "library-of-any-rows",
        "cuBLAS takes other kernels for other numbers of rows",
        f"{LAUNCHES}._by_library",
        lambda call: lambda self, x, weight, bias: F.linear(x, weight, bias),
        LIBRARY,
    ),
    bug(
        "sum-beside-the-norm",
        "a residual added apart",
        "optimized.parallel.Norm.__call__",
        apart,
        f"{FEW}[llama-Llama-3.1-8B]",
    ),
    bug(
        "cast-before-the-router",
        "the sum of a router's wide product begun by a copy",
        "optimized.targets.deepseek.ExpertBlock.__call__",
        lambda call: lambda self, u: call(self, u.float().to(u.dtype)),
        f"{FEW}[deepseek-DeepSeek-V2-Lite]",
    ),
    bug(
        "unmeasured-as-measured",
        "a dry run that signs its table",
        "suites.benchmarks.tune.dry",
        lambda call: lambda *facts: {k: c._replace(measured={"us": 1.0}) for k, c in call(*facts).items()},
        UNMEASURED,
    ),
    bug(
        "speed-of-a-wrong-product",
        "KernelBench: timed before it is compared",
        "suites.benchmarks.tune.Bench.hold",
        lambda call: lambda self, choice: None,
        UNTIMED,
    ),
)
