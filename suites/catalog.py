"""The catalog: one line a pair, one line a speculation, and the public openers.

    from suites.catalog import open_target, open_draft, open_speculation

A path is a Hugging Face checkpoint folder (`config.json` and safetensors) or a Hub id. Bad input raises one typed
error, a `CheckpointError`, that names the file, the tensor or key, and what to do.
"""

import os
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

import optimized.drafts.eagle3
import optimized.targets.deepseek
import optimized.targets.gemma3
import optimized.targets.gemma4
import optimized.targets.llama
import optimized.targets.qwen3_moe
import reference.drafts.eagle3
import reference.targets.deepseek
import reference.targets.gemma3
import reference.targets.gemma3_mm
import reference.targets.gemma4
import reference.targets.gemma4_mm
import reference.targets.gemma4_unified
import reference.targets.kimi_k25
import reference.targets.llama
import reference.targets.qwen3_moe
from harness import checkpoints, conventions
from harness.checkpoints import Checkpoint, CheckpointError, Entry, Ledger, Plan, open_checkpoint, state_of
from harness.conventions import LayerIds
from harness.pairs import Pair, Speculation
from optimized.ops.table import choose
from optimized.parallel import ShardError, SingleRank
from reference.config import ConfigError
from reference.drafts.eagle3_keys import check_vocab_map
from suites.opened import DraftFacts, OpenDraft, OpenSpeculation, OpenTarget, Ranks, Side

FULL = ("text", "TP", "capture", "loading", "graph")
PAGE = ("text", "capture", "loading")


def _target(name: str, page: ModuleType, twin: ModuleType | None, model: str, covers: tuple[str, ...]) -> Pair:
    return Pair(name, "target", page, twin, f"{model}Config", f"{model}Target", covers)


PAIRS = {
    pair.name: pair
    for pair in (
        _target("llama", reference.targets.llama, optimized.targets.llama, "Llama", FULL),
        _target("gemma3", reference.targets.gemma3, optimized.targets.gemma3, "Gemma3", FULL),
        _target("gemma3_mm", reference.targets.gemma3_mm, None, "Gemma3Mm", (*PAGE, "image")),
        _target("gemma4", reference.targets.gemma4, optimized.targets.gemma4, "Gemma4", FULL),
        _target("gemma4_mm", reference.targets.gemma4_mm, None, "Gemma4Mm", (*PAGE, "image", "audio", "video")),
        _target(
            "gemma4_unified",
            reference.targets.gemma4_unified,
            None,
            "Gemma4Unified",
            (*PAGE, "image", "audio", "video"),
        ),
        _target("deepseek", reference.targets.deepseek, optimized.targets.deepseek, "Deepseek", FULL),
        _target("kimi_k25", reference.targets.kimi_k25, None, "KimiK25", (*PAGE, "image", "video")),
        _target("qwen3_moe", reference.targets.qwen3_moe, optimized.targets.qwen3_moe, "Qwen3Moe", FULL),
        Pair("eagle3", "draft", reference.drafts.eagle3, optimized.drafts.eagle3, "Eagle3Config", "Eagle3Draft", FULL),
    )
}
SPECULATIONS = {
    speculation.name: speculation
    for speculation in (Speculation("llama-eagle3", "llama", "eagle3", "EAGLE3", ("llama", "llama-eagle3")),)
}

TARGET_TYPES = {
    "llama": "llama",
    "deepseek_v2": "deepseek",
    "deepseek_v3": "deepseek",
    "kimi_k2": "deepseek",
    "kimi_k25": "kimi_k25",
    "gemma3_text": "gemma3",
    "gemma3": "gemma3_mm",
    "gemma4_text": "gemma4",
    "gemma4": "gemma4_mm",
    "gemma4_unified_text": "gemma4",
    "gemma4_unified": "gemma4_unified",
    "qwen3_moe": "qwen3_moe",
}
"""`model_type` of a target's config -> pair"""


class MissingTarget(CheckpointError):
    """A draft that cannot be read without its target."""


def find_pair(checkpoint: Checkpoint, kind: str) -> Pair:
    """The pair that a config asks for; errors: CheckpointError naming what is known."""
    config, file = checkpoint.config, checkpoint.path / checkpoints.CONFIG
    model_type, names = str(config.get("model_type")), str(config.get("architectures") or "")
    is_draft = "speculators_model_type" in config or "eagle3" in names.lower() or "draft_vocab_size" in config
    if kind == "draft" and is_draft:
        return PAIRS["eagle3"]
    if kind == "target" and not is_draft and model_type in TARGET_TYPES:
        return PAIRS[TARGET_TYPES[model_type]]
    what = f"model_type {model_type!r}, architectures {names or 'absent'}"
    if is_draft or kind == "draft":
        known = "a draft of EAGLE-3 (architectures like 'LlamaForCausalLMEagle3', or 'speculators_model_type')"
        hint = "this is a draft: open it with open_draft" if kind == "target" else f"known is {known}"
    else:
        hint = f"known targets are {', '.join(sorted(TARGET_TYPES))}"
    raise CheckpointError(f"{file}: {what} is no {kind} of the catalog; {hint}")


def open_target(
    path: str | os.PathLike[str],
    *,
    side: str = "reference",
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    tp_size: int = 1,
    exact: bool = False,
    form: str | None = None,
) -> OpenTarget:
    """Open a target; `tp_size` > 1 runs the twin's ranks as threads and joins their results."""
    where = _side(side, dtype, device, tp_size, exact, form)
    checkpoint = open_checkpoint(path)
    pair = find_pair(checkpoint, "target")
    config = _read_config(pair, checkpoint)
    wanted = _wanted(pair, config)
    ignore = [*getattr(pair.page, "IGNORED", ()), *getattr(config, "ignored", ())]
    # a shell around a text model has the head under its own prefix
    ignore += [("*lm_head.weight", "the head is the embedding (tie_word_embeddings)")] if config.tied_head else []
    todo = checkpoints.plan(checkpoint, wanted, pair.page.CHECKPOINT_NAMES, ignore)
    _check_tied(todo)
    ranks = Ranks(tp_size)
    modules = _build(pair, checkpoint, config, where, ranks)
    ledger = checkpoints.load(todo, _writer(modules))
    _check_written(checkpoint, modules)
    return OpenTarget(pair, checkpoint, config, where, modules, ranks, ledger)


def open_draft(
    path: str | os.PathLike[str],
    target: OpenTarget | None = None,
    *,
    layer_ids: str | None = None,
    norm_output: str | None = None,
    side: str = "reference",
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    tp_size: int = 1,
    exact: bool = False,
    form: str | None = None,
) -> OpenDraft:
    """Open a draft.

    target       gives the number of layers and, where the draft has none of its own, the embedding and the head
    layer_ids    "after_layer", "before_layer", or None for what the checkpoint states
    norm_output  what this config key means: "head", "feedback", or None for what the checkpoint states
    errors: CheckpointError, AmbiguousLayerIds, MissingTarget
    """
    where = _side(side, dtype, device, tp_size, exact, form)
    if target is not None and target.side != where:
        raise ValueError(f"target and draft must be opened alike: {target.side} and {where}")
    checkpoint = open_checkpoint(path)
    pair = find_pair(checkpoint, "draft")
    config = _read_config(pair, checkpoint, norm_output=norm_output)
    wanted = _wanted(pair, config)
    optional = ["embed_tokens.weight", "d2t", "t2d"]
    optional += ["lm_head.weight"] if config.draft_vocab == config.vocab else []
    todo = checkpoints.plan(checkpoint, wanted, pair.page.CHECKPOINT_NAMES, pair.page.IGNORED, optional)
    points = _layer_ids(checkpoint, config, todo, target, layer_ids)
    if target is not None:
        _check_join(checkpoint, config, target)
    ranks = target.ranks if target is not None else Ranks(tp_size)
    modules = _build(pair, checkpoint, config, where, ranks)
    ledger = checkpoints.load(todo, _writer(modules))
    own_embedding, own_head = "embed_tokens.weight" in todo.source, "lm_head.weight" in todo.source or config.tied_head
    if not own_embedding:
        _share(checkpoint, target, modules, "embed_tokens.weight", (config.vocab, config.hidden), ledger)
    if not own_head:
        _share(checkpoint, target, modules, "lm_head.weight", (config.vocab, config.hidden), ledger)
    _vocab_map(pair, todo, config, _writer(modules), ledger)
    _check_written(checkpoint, modules)
    if points is not None:
        ledger.notes.append(points.text)
    facts = DraftFacts(config, points, own_embedding, own_head)
    return OpenDraft(pair, checkpoint, facts, where, modules, ranks, ledger)


def open_speculation(
    target: str | os.PathLike[str],
    draft: str | os.PathLike[str],
    *,
    layer_ids: str | None = None,
    norm_output: str | None = None,
    algorithm: str | None = None,
    topk: int = 1,
    **side: Any,
) -> OpenSpeculation:
    """Open a target and a draft and join them; `side` is that of `open_target`."""
    if topk != 1:
        raise ValueError(f"topk is {topk}; chains (topk=1) are what this speculation offers")
    if algorithm not in (None, "EAGLE3"):
        raise ValueError(
            f"algorithm {algorithm!r} does not fit an EAGLE-3 draft: its `fc` would be left out; use 'EAGLE3'"
        )
    opened = open_target(target, **side)
    joined = open_draft(draft, opened, layer_ids=layer_ids, norm_output=norm_output, **side)
    return OpenSpeculation(opened, joined, algorithm or "EAGLE3")


def _side(name: str, dtype: torch.dtype, device: str, tp_size: int, exact: bool, form: str | None) -> Side:
    if name not in ("reference", "optimized"):
        raise ValueError(f"side is {name!r}; it is 'reference' or 'optimized'")
    if name == "reference" and (tp_size != 1 or exact or form is not None):
        raise ValueError("the reference runs whole, on one device: tp_size, exact and form belong to side='optimized'")
    return Side(name, dtype, device, tp_size, exact, form)


def _read_config(pair: Pair, checkpoint: Checkpoint, **facts: Any) -> Any:
    file = checkpoint.path / checkpoints.CONFIG
    try:
        return pair.read_config(checkpoint.config, **facts)
    except (ConfigError, ValueError, TypeError) as error:
        raise CheckpointError(f"{file}: {error}") from error


def _wanted(pair: Pair, config: Any) -> dict[str, tuple[int, ...]]:
    """Parameter names and shapes as the reference page has them, without memory."""
    with torch.device("meta"):
        return {name: tuple(value.shape) for name, value in state_of(pair.reference(config)).items()}


def _build(pair: Pair, checkpoint: Checkpoint, config: Any, side: Side, ranks: Ranks) -> tuple[Any, ...]:
    if side.name == "reference":
        # meta first: no time goes into initial values that loading replaces
        with torch.device("meta"):
            module = pair.reference(config)
        module = module.to(side.dtype).to_empty(device=side.device).eval().requires_grad_(False)
        module.tie()
        checkpoints.blank(module)
        return (module,)
    if pair.twin is None:
        raise CheckpointError(f"{checkpoint.path}: {pair.name} has no twin yet; open it with side='reference'")
    ops = choose(side.device, side.form, side.exact)
    groups = ranks.seats if side.tp_size > 1 else [SingleRank()]
    try:
        return tuple(pair.optimized(config, ops, group, side.dtype, side.device) for group in groups)
    except ShardError as error:
        raise CheckpointError(f"{checkpoint.path}: cannot be split over tp_size={side.tp_size}: {error}") from error


def _writer(modules: tuple[Any, ...]) -> Callable[[str, Tensor], None]:
    if isinstance(modules[0], torch.nn.Module) and not hasattr(modules[0], "load"):
        return checkpoints.writer(modules[0])

    def write(name: str, tensor: Tensor) -> None:
        for module in modules:
            module.load(name, tensor)

    return write


def _check_written(checkpoint: Checkpoint, modules: tuple[Any, ...]) -> None:
    """The model's own account: nothing may still hold the value that marks the unwritten."""
    for module in modules:
        if hasattr(module, "parameters_missing"):
            missing = list(module.parameters_missing())
        else:
            missing = [n for n, t in state_of(module).items() if t.is_floating_point() and bool(t.isnan().all())]
        if missing:
            raise CheckpointError(
                f"{checkpoint.path}: parameter {missing[0]!r} was never written ({len(missing)} such)"
            )


def _check_tied(todo: Plan) -> None:
    """A head that a tied config says is the embedding must be it."""
    for tensor in todo.ignored:
        if tensor.endswith("lm_head.weight"):
            table = next(name for ours, name in todo.source.items() if ours.endswith("embed_tokens.weight"))
            if not torch.equal(todo.checkpoint.read(tensor), todo.checkpoint.read(table)):
                raise CheckpointError(
                    f"{todo.checkpoint.headers[tensor].file}: tensor {tensor!r} differs from the embedding although "
                    "the config ties them; set tie_word_embeddings to false, or remove the tensor"
                )


def _layer_ids(
    checkpoint: Checkpoint, config: Any, todo: Plan, target: OpenTarget | None, layer_ids: str | None
) -> LayerIds | None:
    if not config.use_aux_hidden_state:
        return None
    if target is None:
        raise MissingTarget(
            f"{checkpoint.path}: which of the target's states this draft reads depends on the target's number of "
            "layers; pass target="
        )
    return conventions.resolve(
        checkpoint.config,
        target.num_layers,
        file=str(checkpoint.path / checkpoints.CONFIG),
        layer_ids=layer_ids,
        fc_width=todo.wanted["fc.weight"][1],
        target_hidden=config.aux_width,
    )


def _share(
    checkpoint: Checkpoint,
    target: OpenTarget | None,
    modules: tuple[Any, ...],
    name: str,
    shape: tuple[int, int],
    ledger: Ledger,
) -> None:
    """Let the draft use the target's table: the module itself, so that the shard keeps its layout."""
    what = name.removesuffix(".weight")
    if target is None:
        raise MissingTarget(f"{checkpoint.path}: has no {name!r} of its own and shares the target's; pass target=")
    theirs = (target.config.vocab, target.config.hidden)
    if theirs != shape:
        raise CheckpointError(
            f"{checkpoint.path}: has no {name!r} of its own, and the target's {list(theirs)} does not fit the draft's "
            f"{list(shape)}; this draft needs its own"
        )
    for mine, source in zip(modules, target.modules, strict=True):
        if isinstance(mine, torch.nn.Module) and not hasattr(mine, "load"):
            setattr(mine, what, getattr(source, what))
        elif what == "embed_tokens":
            mine.share_embedding(source)
        else:
            mine.share_head(source)
    ledger.entries.append(Entry("", name, "shared", f"the target's, {target.checkpoint.path}", shape, ""))


def _vocab_map(pair: Pair, todo: Plan, config: Any, write: Callable[[str, Tensor], None], ledger: Ledger) -> None:
    """Hold d2t and t2d to each other, and fill in the one that can be derived."""
    read: Mapping[str, Tensor] = {n: todo.checkpoint.read(todo.source[n]) for n in ("d2t", "t2d") if n in todo.source}
    whole = config.draft_vocab == config.vocab
    if "d2t" not in read and not whole:
        raise CheckpointError(
            f"{todo.checkpoint.path}: tensor 'd2t' is missing and the draft's vocabulary ({config.draft_vocab}) is not "
            f"the target's ({config.vocab}); without it draft ids would be taken for target ids"
        )
    d2t = read.get("d2t", torch.zeros(config.draft_vocab, dtype=torch.int64))
    if d2t.is_floating_point() or d2t.dtype == torch.bool:
        raise CheckpointError(f"{todo.checkpoint.path}: tensor 'd2t' is {d2t.dtype}; offsets are int64")
    faults = check_vocab_map(d2t.long(), read.get("t2d"), config.vocab)
    if faults:
        raise CheckpointError(f"{todo.checkpoint.path}: tensor 'd2t': {faults[0]}")
    t2d = torch.zeros(config.vocab, dtype=torch.bool)
    t2d[torch.arange(config.draft_vocab) + d2t.long()] = True
    for name, tensor, reason in (("d2t", d2t, "equal vocabularies"), ("t2d", t2d, "from d2t")):
        if name not in read:
            write(name, tensor)
            ledger.entries.append(Entry("", name, "derived", reason, tuple(tensor.shape), str(tensor.dtype)))


def _check_join(checkpoint: Checkpoint, config: Any, target: OpenTarget) -> None:
    if config.vocab != target.config.vocab:
        raise CheckpointError(
            f"{checkpoint.path}: reads {config.vocab} tokens, the target {target.checkpoint.path} has "
            f"{target.config.vocab}; they must share a vocabulary"
        )
    if config.aux_width != target.config.hidden:
        raise CheckpointError(
            f"{checkpoint.path}: reads aux states of width {config.aux_width}, the target's are "
            f"{target.config.hidden} wide; set target_hidden_size, or pair it with its own target"
        )
