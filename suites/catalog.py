"""The catalog: one line a pair, one line a speculation, and the public openers.

    from suites.catalog import open_target, open_draft, open_speculation

A path is a Hugging Face checkpoint folder (`config.json` and safetensors) or a Hub id. Bad input raises one typed
error, a `CheckpointError`, that names the file, the tensor or key, and what to do.
"""

import os
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

import optimized.drafts.deepseek_nextn
import optimized.drafts.dflash
import optimized.drafts.eagle3
import optimized.drafts.eagle3_mla
import optimized.drafts.gemma4_assistant
import optimized.drafts.peagle
import optimized.drafts.qwen3_moe_mtp
import optimized.drafts.standalone
import optimized.targets.deepseek
import optimized.targets.gemma3
import optimized.targets.gemma3_mm
import optimized.targets.gemma4
import optimized.targets.gemma4_mm
import optimized.targets.gemma4_unified
import optimized.targets.kimi_k25
import optimized.targets.llama
import optimized.targets.qwen3_moe
import reference.drafts.deepseek_nextn
import reference.drafts.dflash
import reference.drafts.eagle3
import reference.drafts.eagle3_mla
import reference.drafts.gemma4_assistant
import reference.drafts.peagle
import reference.drafts.qwen3_moe_mtp
import reference.drafts.standalone
import reference.targets.deepseek
import reference.targets.gemma3
import reference.targets.gemma3_mm
import reference.targets.gemma4
import reference.targets.gemma4_mm
import reference.targets.gemma4_unified
import reference.targets.kimi_k25
import reference.targets.llama
import reference.targets.qwen3_moe
from harness import checkpoints
from harness.checkpoints import Checkpoint, CheckpointError, Plan, open_checkpoint, state_of
from harness.pairs import Pair, Speculation
from optimized.ops.table import choose
from optimized.parallel import ShardError, SingleRank
from optimized.shell import Shell
from reference.config import ConfigError
from reference.drafts.standalone import check_token_map
from suites import joining
from suites.algorithms import ALGORITHMS, TARGET_TYPES, find_pair, resolve
from suites.joining import MissingTarget
from suites.opened import DraftFacts, OpenDraft, OpenSpeculation, OpenTarget, Ranks, Side
from suites.shells import fitting, towers_of
from suites.voice import read_voice

__all__ = ("PAIRS", "SPECULATIONS", "TARGET_TYPES", "MissingTarget", "open_draft", "open_speculation", "open_target")

TIED = "the head is the embedding (tie_word_embeddings)"
FULL = ("text", "TP", "capture", "loading", "graph")
TOWERS = "what towers make of images and sounds enters the twin as features of the reference's towers"


def _target(name: str, page: ModuleType, twin: ModuleType, model: str, *senses: str) -> Pair:
    covers, note = (*FULL, *senses), TOWERS if senses else ""
    return Pair(name, "target", page, twin, f"{model}Config", f"{model}Target", covers, note)


def _draft(name: str, page: ModuleType, twin: ModuleType | None, model: str) -> Pair:
    return Pair(name, "draft", page, twin, f"{model}Config", f"{model}Draft", FULL)


PAIRS = {
    pair.name: pair
    for pair in (
        _target("llama", reference.targets.llama, optimized.targets.llama, "Llama"),
        _target("gemma3", reference.targets.gemma3, optimized.targets.gemma3, "Gemma3"),
        _target("gemma3_mm", reference.targets.gemma3_mm, optimized.targets.gemma3_mm, "Gemma3Mm", "image"),
        _target("gemma4", reference.targets.gemma4, optimized.targets.gemma4, "Gemma4"),
        _target(
            "gemma4_mm", reference.targets.gemma4_mm, optimized.targets.gemma4_mm, "Gemma4Mm", "image", "audio", "video"
        ),
        _target(
            "gemma4_unified",
            reference.targets.gemma4_unified,
            optimized.targets.gemma4_unified,
            "Gemma4Unified",
            *("image", "audio", "video"),
        ),
        _target("deepseek", reference.targets.deepseek, optimized.targets.deepseek, "Deepseek"),
        _target("kimi_k25", reference.targets.kimi_k25, optimized.targets.kimi_k25, "KimiK25", "image", "video"),
        _target("qwen3_moe", reference.targets.qwen3_moe, optimized.targets.qwen3_moe, "Qwen3Moe"),
        _draft("eagle3", reference.drafts.eagle3, optimized.drafts.eagle3, "Eagle3"),
        _draft("eagle3_mla", reference.drafts.eagle3_mla, optimized.drafts.eagle3_mla, "Eagle3Mla"),
        _draft(
            "gemma4_assistant",
            reference.drafts.gemma4_assistant,
            optimized.drafts.gemma4_assistant,
            "Gemma4Assistant",
        ),
        _draft("dflash", reference.drafts.dflash, optimized.drafts.dflash, "Dflash"),
        _draft("peagle", reference.drafts.peagle, optimized.drafts.peagle, "Peagle"),
        _draft("qwen3_moe_mtp", reference.drafts.qwen3_moe_mtp, optimized.drafts.qwen3_moe_mtp, "Qwen3MoeMtp"),
        _draft("deepseek_nextn", reference.drafts.deepseek_nextn, optimized.drafts.deepseek_nextn, "DeepseekNextn"),
        _draft("standalone", reference.drafts.standalone, optimized.drafts.standalone, "Standalone"),
    )
}


def _speculation(target: str, way: str, draft: str, ships: bool = False) -> Speculation:
    name = f"{target}-{way}"
    return Speculation(name, target, draft, ALGORITHMS[draft], (target, name) if ships else None)


SPECULATIONS = {
    speculation.name: speculation
    for speculation in (
        _speculation("llama", "eagle3", "eagle3", ships=True),
        _speculation("llama", "eagle3-postnorm", "eagle3", ships=True),
        _speculation("llama", "dflash", "dflash", ships=True),
        _speculation("llama", "peagle", "peagle", ships=True),
        _speculation("llama", "standalone", "standalone", ships=True),
        _speculation("gemma3", "eagle3", "eagle3", ships=True),
        _speculation("gemma3_mm", "eagle3", "eagle3"),
        _speculation("gemma4", "eagle3", "eagle3"),
        _speculation("gemma4", "assistant", "gemma4_assistant", ships=True),
        _speculation("gemma4_mm", "eagle3", "eagle3"),
        _speculation("gemma4_mm", "assistant", "gemma4_assistant"),
        _speculation("gemma4_unified", "eagle3", "eagle3"),
        _speculation("gemma4_unified", "assistant", "gemma4_assistant"),
        _speculation("qwen3_moe", "eagle3", "eagle3"),
        _speculation("qwen3_moe", "mtp", "qwen3_moe_mtp", ships=True),
        _speculation("deepseek", "eagle3", "eagle3"),
        _speculation("deepseek", "eagle3-mla", "eagle3_mla", ships=True),
        _speculation("deepseek", "nextn", "deepseek_nextn"),
        _speculation("kimi_k25", "eagle3-mla", "eagle3_mla"),
    )
}


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
    return _open_target(checkpoint, PAIRS[find_pair(checkpoint, "target")], where, Ranks(tp_size))


def open_draft(
    path: str | os.PathLike[str] | Checkpoint,
    target: OpenTarget | None = None,
    *,
    layer_ids: str | None = None,
    norm_output: str | None = None,
    algorithm: str | None = None,
    token_map: Tensor | None = None,
    side: str = "reference",
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    tp_size: int = 1,
    exact: bool = False,
    form: str | None = None,
) -> OpenDraft:
    """Open a draft.

    path         a folder, a Hub id, or an opened checkpoint, whose config may be another than its folder's
    target       gives the number of layers and, where the draft has none of its own, the embedding and the head
    layer_ids    "after_layer", "before_layer", or None for what the checkpoint states
    norm_output  what this config key means: "head", "feedback", or None for what the checkpoint states
    token_map    [Vd] target ids that a model which drafts alone may propose; all when absent
    algorithm    tells a next-token module from a model that drafts alone ("STANDALONE") in a folder that holds both
    errors: CheckpointError, AmbiguousLayerIds, MissingTarget
    """
    where = _side(side, dtype, device, tp_size, exact, form)
    if target is not None and target.side != where:
        raise ValueError(f"target and draft must be opened alike: {target.side} and {where}")
    checkpoint = path if isinstance(path, Checkpoint) else open_checkpoint(path)
    ranks = target.ranks if target is not None else Ranks(tp_size)
    pair = PAIRS[find_pair(checkpoint, "draft", algorithm)]
    joining.refuse_side_files(checkpoint)
    if pair.name == "standalone":
        return _open_standalone(checkpoint, pair, target, token_map, where, ranks)
    if token_map is not None:
        raise ValueError(f"token_map is for a model that drafts alone; {pair.name} has a map of its own, 'd2t'")
    config = _read_config(pair, checkpoint, **({} if norm_output is None else {"norm_output": norm_output}))
    names = getattr(config, "names", pair.page.CHECKPOINT_NAMES)
    ignore = [*pair.page.IGNORED, *getattr(config, "ignored", ())]
    todo = checkpoints.plan(checkpoint, _wanted(pair, checkpoint, config), names, ignore, config.optional)
    joining.check_copies(todo, config, target)
    points = joining.find_layer_ids(checkpoint, config, todo, target, layer_ids)
    if target is not None:
        joining.check_join(checkpoint, config, target)
    modules = _build(pair, checkpoint, config, where, ranks)
    ledger = checkpoints.load(todo, _writer(modules))
    own_embedding, own_head = "embed_tokens.weight" in todo.source, "lm_head.weight" in todo.source or config.tied_head
    if "embed_tokens.weight" in todo.wanted and not own_embedding:
        joining.share(checkpoint, target, modules, "embed_tokens.weight", (config.vocab, config.hidden), ledger)
    if "lm_head.weight" in todo.wanted and not own_head:
        joining.share(checkpoint, target, modules, "lm_head.weight", (config.vocab, config.hidden), ledger)
    joining.fill_vocab_map(todo, config, _writer(modules), ledger)
    joining.join(checkpoint, target, modules, ledger)
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
    token_map: Tensor | None = None,
    topk: int = 1,
    **side: Any,
) -> OpenSpeculation:
    """Open a target and a draft and join them; `side` is that of `open_target`.

    algorithm   what an engine would be told, or None; AlgorithmError where it does not fit the draft
    topk        what each node of a tree's beam offers; 1: chains
    """
    if topk < 1:
        raise ValueError(f"topk is {topk}; 1 drafts chains, more draft trees")
    way = resolve(algorithm, find_pair(open_checkpoint(draft), "draft", algorithm))
    opened = open_target(target, **side)
    joined = open_draft(
        draft, opened, layer_ids=layer_ids, norm_output=norm_output, algorithm=algorithm, token_map=token_map, **side
    )
    return OpenSpeculation(opened, joined, way, topk)


def _open_target(checkpoint: Checkpoint, pair: Pair, where: Side, ranks: Ranks) -> OpenTarget:
    config = _read_config(pair, checkpoint)
    wanted = _wanted(pair, checkpoint, config)
    ignore = [*getattr(pair.page, "IGNORED", ()), *getattr(config, "ignored", ())]
    # a shell around a text model has the head under its own prefix
    ignore += [("*lm_head.weight", TIED)] if config.tied_head else []
    todo = checkpoints.plan(checkpoint, wanted, pair.page.CHECKPOINT_NAMES, ignore)
    _check_tied(todo)
    modules = _build(pair, checkpoint, config, where, ranks)
    ledger = checkpoints.load(todo, _writer(modules))
    _check_written(checkpoint, modules)
    voice = read_voice(checkpoint.path, checkpoint.config, config)
    return OpenTarget(pair, checkpoint, config, where, modules, ranks, ledger, voice)


def _open_standalone(
    checkpoint: Checkpoint, pair: Pair, target: OpenTarget | None, token_map: Tensor | None, where: Side, ranks: Ranks
) -> OpenDraft:
    """Any target as a draft: read as a target, then handed the draft's calls."""
    alone = _open_target(checkpoint, PAIRS[find_pair(checkpoint, "target")], where, ranks)
    if target is not None:
        joining.check_vocabulary(checkpoint, alone.config, target)
    room = pair.reference if where.name == "reference" else pair.optimized
    facts = DraftFacts(alone.config, None, True, True)
    try:
        if token_map is not None:
            token_map = token_map.to(where.device)
            check_token_map(token_map, alone.config.vocab)
    except ConfigError as error:
        raise CheckpointError(f"{checkpoint.path}: {error}") from error
    modules = tuple(room(module, token_map) for module in alone.modules)
    return OpenDraft(pair, checkpoint, facts, where, modules, ranks, alone.ledger)


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


def _wanted(pair: Pair, checkpoint: Checkpoint, config: Any) -> dict[str, tuple[int, ...]]:
    """Parameter names and shapes as the reference page has them, without memory."""
    try:
        with fitting(config, len(checkpoint.headers)), torch.device("meta"):
            return {name: tuple(value.shape) for name, value in state_of(pair.reference(config)).items()}
    except ConfigError as error:
        raise CheckpointError(f"{checkpoint.path / checkpoints.CONFIG}: {error}") from error


def _build(pair: Pair, checkpoint: Checkpoint, config: Any, side: Side, ranks: Ranks) -> tuple[Any, ...]:
    if side.name == "reference":
        # meta first: no time goes into initial values that loading replaces
        with torch.device("meta"):
            module = _empty(pair.reference(config), side)
        module.tie()
        return (module,)
    if pair.twin is None:
        raise CheckpointError(f"{checkpoint.path}: {pair.name} has no twin yet; open it with side='reference'")
    ops = choose(side.device, side.form, side.exact)
    groups = ranks.seats if side.tp_size > 1 else [SingleRank()]
    try:
        twins = tuple(pair.optimized(config, ops, group, side.dtype, side.device) for group in groups)
    except ShardError as error:
        raise CheckpointError(f"{checkpoint.path}: cannot be split over tp_size={side.tp_size}: {error}") from error
    for twin in twins if isinstance(twins[0], Shell) else ():
        twin.take(_empty(towers_of(pair, config), side))
    return twins


def _empty(module: torch.nn.Module, side: Side) -> torch.nn.Module:
    """A module of the meta device with room for its tensors, which are marked as unwritten."""
    module = module.to(side.dtype).to_empty(device=side.device).eval().requires_grad_(False)
    checkpoints.blank(module)
    return module


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
    for tensor, reason in todo.ignored.items():
        if reason == TIED:
            table = next(name for ours, name in todo.source.items() if ours.endswith("embed_tokens.weight"))
            if not torch.equal(todo.checkpoint.read(tensor), todo.checkpoint.read(table)):
                raise CheckpointError(
                    f"{todo.checkpoint.headers[tensor].file}: tensor {tensor!r} differs from the embedding although "
                    "the config ties them; set tie_word_embeddings to false, or remove the tensor"
                )
