"""Bugs of reading checkpoints and layer ids, and of what a draft shares with its target."""

from typing import Any

from torch import Tensor

from harness.planting import Bug

LOADING = "suites/correctness/test_loading.py"
BAD = "suites/correctness/test_bad_input.py"
IDS = "suites/correctness/test_layer_ids.py"
CAPTURE = "suites/correctness/test_capture.py"
WITNESS = "suites/correctness/test_witness.py::test_the_reference_equals_transformers_at_every_capture_point"
HOOKS = f"{IDS}::test_both_conventions_name_what_hooks_on_transformers_see"
WRONG_TENSOR = f"{LOADING}::test_one_wrong_tensor_of_a_draft_is_a_typed_error"


def replace_anywhere(_: Any) -> Any:
    """`str.replace` on names, as `replace("mtp", "model")`."""

    def rename(name: str, table: Any) -> str:
        for theirs, ours in table:
            name = name.replace(theirs, ours)
        return name

    return rename


def forgive_missing(plan: Any) -> Any:
    """Missing tensors stay at what memory holds."""
    return lambda checkpoint, wanted, names, ignore=(), optional=(): plan(checkpoint, wanted, names, ignore, wanted)


def forgive_unknown(plan: Any) -> Any:
    return lambda checkpoint, wanted, names, ignore=(), optional=(): plan(
        checkpoint, wanted, names, (*ignore, ("*", "not known")), optional
    )


def always_share(share: Any) -> Any:
    """The target's embedding takes the place of the draft's own."""

    def load(todo: Any, write: Any) -> Any:
        kept = {name: tensor for name, tensor in todo.source.items() if name != "embed_tokens.weight"}
        return share(type(todo)(todo.checkpoint, todo.wanted, kept, todo.ignored), write)

    return load


def first_id_decides(_: Any) -> Any:
    """An id list that begins with 1 counts outputs, any other inputs."""

    def reading(given: Any, num_layers: int, file: str) -> Any:
        from harness import conventions

        word = conventions.AFTER if given.ids[0] == 1 else conventions.BEFORE
        return conventions._read(given, word, "first id", num_layers, file)

    return reading


def ascending(to_points: Any) -> Any:
    """Capture points sorted, duplicates dropped, as a set of layers would be."""
    return lambda ids, convention: tuple(sorted(set(to_points(ids, convention))))


def after_the_norm(captured: Any) -> Any:
    """The last capture point, read where transformers' list of hidden states has it."""

    def late(stream: Any, points: Any) -> Tensor:
        scaled = stream[-1] / stream[-1].pow(2).mean(-1, keepdim=True).sqrt()
        return captured([*stream[:-1], scaled], points)

    return late


def shifted(captured: Any) -> Any:
    return lambda stream, points: captured(stream, [min(c + 1, len(stream) - 1) for c in points])


def bug(name: str, origin: str, at: str, make: Any, claim: str) -> Bug:
    return Bug(name, origin, at, make, claim)


BUGS = (
    bug(
        "names changed in the middle",
        "SGLang #26468",
        "harness.checkpoints.rename",
        replace_anywhere,
        f"{LOADING}::test_a_prefix_is_renamed_only_where_a_name_begins",
    ),
    bug("missing tensors pass", "vLLM 1.1.5", "harness.checkpoints.plan", forgive_missing, WRONG_TENSOR),
    bug("unknown tensors pass", "SGLang 1.4", "harness.checkpoints.plan", forgive_unknown, WRONG_TENSOR),
    bug(
        "the draft's own embedding replaced",
        "SGLang 1.5; vLLM #27737",
        "harness.checkpoints.load",
        always_share,
        f"{LOADING}::test_own_tables_survive_and_the_target_keeps_its_own",
    ),
    bug(
        "midlayer not renamed",
        "SGLang list, M30",
        "reference.drafts.eagle3.CHECKPOINT_NAMES[1]",
        lambda _: ("midlayer.", "midlayer."),
        f"{LOADING}::test_spelling_order_and_shards_change_no_bit",
    ),
    bug(
        "after_layer ids not shifted",
        "SGLang list, M01",
        "harness.conventions.SHIFT['after_layer']",
        lambda _: 0,
        HOOKS,
    ),
    bug("before_layer ids shifted", "SGLang #25454", "harness.conventions.SHIFT['before_layer']", lambda _: 1, HOOKS),
    bug(
        "the first id decides",
        "SGLang deepseek_v2.py:3470",
        "harness.conventions._only_reading",
        first_id_decides,
        f"{IDS}::test_ids_that_nothing_explains_are_refused_with_both_readings",
    ),
    bug(
        "layer ids sorted",
        "vLLM interfaces.py:1617",
        "harness.conventions.to_points",
        ascending,
        f"{IDS}::test_stated_ids_are_read_as_stated",
    ),
    bug(
        "default triple one layer early",
        "SGLang list, M02",
        "harness.conventions.default_points",
        lambda right: lambda layers: tuple(c - 1 for c in right(layers)),
        f"{IDS}::test_no_ids_mean_the_default_triple",
    ),
    bug(
        "the last capture after the final norm",
        "TorchSpec #87",
        "reference.targets.llama.captured",
        after_the_norm,
        WITNESS,
    ),
    bug("captures one layer late", "vLLM #43671", "reference.targets.llama.captured", shifted, WITNESS),
    bug(
        "captures sorted",
        "vLLM list, 5",
        "reference.targets.llama.captured",
        lambda right: lambda stream, points: right(stream, sorted(points)),
        f"{CAPTURE}::test_states_come_in_the_order_asked",
    ),
    bug(
        "vocabulary map unchecked",
        "verl-SpeCo 67",
        "suites.joining.check_vocab_map",
        lambda _: lambda *_: [],
        f"{BAD}::test_a_damaged_draft_is_refused_in_words",
    ),
    bug(
        "a draft of another target joins",
        "vLLM #18906",
        "suites.joining.check_join",
        lambda _: lambda *_: None,
        f"{BAD}::test_a_draft_that_does_not_fit_its_target",
    ),
    bug(
        "norm weight is one plus w",
        "SGLang list, M21",
        "reference.ops.norm.RMSNorm.forward",
        lambda right: lambda self, x: right(self, x) + right(self, x) / self.weight,
        WITNESS,
    ),
    bug(
        "llama3 rope read as default",
        "speculators #574",
        "reference.ops.rope.Rope._llama3",
        lambda _: lambda self, plain: plain,
        WITNESS,
    ),
    bug(
        "rope theta of another model",
        "SGLang list, M22",
        "reference.ops.rope._frequencies",
        lambda right: lambda theta, dim: right(10_000.0, dim),
        WITNESS,
    ),
    bug(
        "attention scaled by the hidden width",
        "SGLang list, M27",
        "reference.ops.attention.attend",
        lambda right: lambda q, k, v, seen, scale: right(q, k, v, seen, (q.shape[2] * q.shape[3]) ** -0.5),
        WITNESS,
    ),
    bug(
        "key heads repeated the wrong way",
        "SGLang list, M41",
        "reference.ops.attention.attend",
        lambda right: (
            lambda q, k, v, *rest: right(
                q, k.repeat(1, 1, q.shape[2] // k.shape[2], 1), v.repeat(1, 1, q.shape[2] // v.shape[2], 1), *rest
            )
        ),
        WITNESS,
    ),
    bug(
        "queries see one slot ahead",
        "SGLang list, M46",
        "reference.ops.stream.causal",
        lambda right: lambda positions, slots, window=None: right(positions + 1, slots, window),
        WITNESS,
    ),
)
