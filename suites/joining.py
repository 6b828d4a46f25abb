"""How an opened draft is joined to its target: which states it reads, what it shares, which ids it can say.

Every check raises one typed error that names the file, the key or tensor, and both sizes.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from harness import checkpoints, conventions
from harness.checkpoints import Checkpoint, CheckpointError, Entry, Ledger, Plan, rename
from harness.conventions import LayerIds
from reference.drafts.eagle3_keys import check_vocab_map
from suites.opened import OpenTarget


class MissingTarget(CheckpointError):
    """A draft that cannot be read without its target."""


SIDE_FILES = {"mask_embedding.pt": "the embedding of the mask token, which some D-Flash drafts keep apart"}
"""files beside a checkpoint that hold parameters and are pickles"""


def refuse_side_files(checkpoint: Checkpoint) -> None:
    """A parameter that would be left out in silence."""
    for name, what in SIDE_FILES.items():
        if (checkpoint.path / name).exists():
            raise CheckpointError(
                f"{checkpoint.path / name}: holds {what}; pickles are not read: write it into the safetensors as a row "
                "of 'embed_tokens.weight', or remove the file"
            )


def find_layer_ids(
    checkpoint: Checkpoint, config: Any, todo: Plan, target: OpenTarget | None, layer_ids: str | None
) -> LayerIds | None:
    """Which of the target's states this draft reads; None where it reads none of them."""
    if config.reads != "aux":
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


def share(
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


def fill_vocab_map(todo: Plan, config: Any, write: Callable[[str, Tensor], None], ledger: Ledger) -> None:
    """Hold d2t and t2d to each other, and fill in the one that can be derived."""
    if "d2t" not in todo.wanted:
        return
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


def join(checkpoint: Checkpoint, target: OpenTarget | None, modules: tuple[Any, ...], ledger: Ledger) -> None:
    """Hand a draft what else it reads of its target: `join(target)` of its page says which parameters."""
    if not hasattr(modules[0], "join"):
        return
    if target is None:
        raise MissingTarget(f"{checkpoint.path}: this draft reads its target's own parameters; pass target=")
    for mine, theirs in zip(modules, target.modules, strict=True):
        try:
            shared = mine.join(theirs)
        except ValueError as error:
            raise CheckpointError(f"{checkpoint.path}: does not fit {target.checkpoint.path}: {error}") from error
    for name, reason, shape in shared:
        reason = f"{reason}, {target.checkpoint.path}"
        own = next((i for i, entry in enumerate(ledger.entries) if entry.parameter == name), None)
        if own is None:
            ledger.entries.append(Entry("", name, "shared", reason, shape, ""))
        else:
            # a tensor of its own that was read, compared and found to be the target's
            ledger.entries[own] = replace(ledger.entries[own], status="checked", reason=reason)


def check_copies(todo: Plan, config: Any, target: OpenTarget | None) -> None:
    """Hold what a draft leaves unread to what it reads: copies of a parameter, and tables left to the target."""
    checkpoint = todo.checkpoint
    copies: Mapping[str, str] = getattr(config, "copies", {})
    pairs = {tensor: todo.source.get(copies.get(rename(tensor, config.names), "")) for tensor in todo.ignored if copies}
    for tensor, source in pairs.items():
        if source is not None and not torch.equal(checkpoint.read(tensor), checkpoint.read(source)):
            raise CheckpointError(
                f"{checkpoint.headers[tensor].file}: tensor {tensor!r} differs from {source!r}, the only one that is "
                "read; this draft has one embedding and one head"
            )
    if target is None or target.checkpoint.path == checkpoint.path:
        return
    table = target.pair.page.CHECKPOINT_NAMES
    theirs = {rename(name, table): name for name in target.checkpoint.headers}
    for tensor, reason in todo.ignored.items():
        name = rename(tensor, table)
        if reason != "the target's" or name not in ("embed_tokens.weight", "lm_head.weight"):
            continue
        if name not in theirs or not torch.equal(checkpoint.read(tensor), target.checkpoint.read(theirs[name])):
            raise CheckpointError(
                f"{checkpoint.headers[tensor].file}: tensor {tensor!r} is not that of the target, "
                f"{target.checkpoint.path}, whose table this draft reads; put its own under the module's prefix"
            )


def check_join(checkpoint: Checkpoint, config: Any, target: OpenTarget) -> None:
    """A draft and a target that fit: one vocabulary, and states of the width that the draft reads."""
    check_vocabulary(checkpoint, config, target)
    if config.aux_width != target.config.hidden:
        raise CheckpointError(
            f"{checkpoint.path}: reads aux states of width {config.aux_width}, the target's are "
            f"{target.config.hidden} wide; set target_hidden_size, or pair it with its own target"
        )


def check_vocabulary(checkpoint: Checkpoint, config: Any, target: OpenTarget) -> None:
    """A draft reads its target's tokens as they are."""
    if config.vocab != target.config.vocab:
        raise CheckpointError(
            f"{checkpoint.path}: reads {config.vocab} tokens, the target {target.checkpoint.path} has "
            f"{target.config.vocab}; they must share a vocabulary"
        )
