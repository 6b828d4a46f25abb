"""What a reading means for the draft: how it differs from what was meant, and the very model that would run."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from harness.checkpoints import Checkpoint, CheckpointError, state_of
from suites.formats.reading import Reading, Refusal
from suites.formats.rows import NOISE, ONES, OWN, SILENT, TARGETS, ZEROS, Row

LATER_STEPS = ("feedback_normed",)
"""facts that the first draft step cannot show"""

BLIND = ("intermediate", "heads", "kv_heads", "windows")
"""fields of the body, the same wherever the same tensors fit"""


@dataclass(frozen=True)
class Difference:
    """One fact that a consumer runs with and nobody meant."""

    fact: str
    meant: Any
    read: Any
    manner: str
    first_step: int
    """the draft step whose logits show it first"""
    source: str = ""

    def __str__(self) -> str:
        return f"{self.fact}: {self.read} in the place of {self.meant}"


def differences(meant: Reading, read: Reading | Refusal) -> list[Difference]:
    """Every fact in which a reading is not what was meant; none where the consumer loads the draft as intended."""
    if isinstance(read, Refusal):
        raise TypeError("a refusal is no reading; ask for its reason")
    pairs = [(name, getattr(meant, name), getattr(read, name)) for name in ("points", "skips_fc", "captures")]
    pairs += [("embedding scale", meant.embedding_scale, read.embedding_scale)]
    pairs += [(name, *values) for name, values in _facts(meant, read).items()]
    pairs += _parameters(meant, read)
    found = [_difference(fact, mine, theirs, read.decided) for fact, mine, theirs in pairs if mine != theirs]
    if read.embedding == TARGETS and meant.embedding == OWN and not _is_stand_in(meant, read):
        found.append(_difference("embedding", OWN, TARGETS, read.decided))
    return found


def _is_stand_in(meant: Reading, read: Reading) -> bool:
    """Whether the target's table takes the place of one that is missing, which is told as a missing tensor."""
    return "embed_tokens.weight" in read.filled and "embed_tokens.weight" not in meant.filled


def _facts(meant: Reading, read: Reading) -> dict[str, tuple[Any, Any]]:
    """Fields of the config that differ and have a meaning here."""
    mine, theirs = dataclasses.asdict(meant.config), dataclasses.asdict(read.config)
    # without a second layer, without a final norm, without states: these facts have nothing to act on
    idle = {"later_norm"} if meant.config.layers == 1 == read.config.layers else set()
    idle |= {"target_hidden"} if meant.config.aux_width == read.config.aux_width else set()
    idle |= {"aux_states"} if not meant.config.use_aux_hidden_state else set()
    names = mine.keys() & theirs.keys() - idle - set(BLIND)
    return {name: (mine[name], theirs[name]) for name in sorted(names) if mine[name] != theirs[name]}


def _parameters(meant: Reading, read: Reading) -> list[tuple[str, Any, Any]]:
    """Tensors that one loads and the other does not."""
    lost = [
        (f"missing {name}", meant.filled.get(name, "loaded"), what)
        for name, what in read.filled.items()
        if what != meant.filled.get(name)
    ]
    read_tensors = set(meant.source.values())
    return lost + [(f"dropped {name}", "loaded", "unread") for name in read.dropped if name in read_tensors]


def _difference(fact: str, mine: Any, theirs: Any, decided: Mapping[str, Row]) -> Difference:
    row = decided.get({"points": "layer ids", "rope": "rope theta"}.get(fact, fact))
    manner, source = (row.manner, row.source) if row else (SILENT, "")
    return Difference(fact, mine, theirs, manner, 2 if fact in LATER_STEPS else 1, source)


class Bare(nn.Module):
    """What runs where a shape test takes the aux states for a hidden state: no norm, no `fc`."""

    def forward(self, aux: Tensor) -> Tensor:
        """aux [B, T, X] -> [B, T, X]"""
        return aux


def realise(reading: Reading, checkpoint: Checkpoint, target: Any = None, seed: int = 0) -> Any:
    """The draft as this consumer would run it: a reference module with everything where the consumer has it.

    target   the target's module, for tables that the consumer takes from it
    seed     of the noise that stands for uninitialised memory
    """
    with torch.device("meta"):
        module = reading.pair.reference(reading.config)
    module = module.to(torch.float32).to_empty(device="cpu").eval().requires_grad_(False)
    module.tie()
    state, noise = state_of(module), torch.Generator().manual_seed(seed)
    for name, value in state.items():
        if name in ("d2t", "t2d"):
            value.zero_()
    for name, tensor in reading.source.items():
        if name in state:
            state[name].copy_(checkpoint.read(tensor))
    for name, what in reading.filled.items():
        state[name].copy_(_stand_in(name, what, state[name], target, noise, checkpoint))
    if reading.embedding == TARGETS and target is not None:
        module.embed_tokens.weight.copy_(target.embed_tokens.weight)
    if reading.embedding_scale != "raw rows":
        module.embed_tokens.weight.mul_(module.embed_tokens.weight.shape[1] ** 0.5)
    if reading.skips_fc:
        module.fc, module.input_norm, module.fc_norm = Bare(), None, None
    return module


def _stand_in(
    name: str, what: str, value: Tensor, target: Any, noise: torch.Generator, checkpoint: Checkpoint
) -> Tensor:
    if what == ONES:
        return torch.ones_like(value)
    if what == ZEROS:
        return torch.zeros_like(value)
    if what == NOISE:
        return torch.randn(value.shape, generator=noise)
    if target is None:
        raise CheckpointError(f"{checkpoint.path}: {name!r} would be the target's; pass target=")
    table = target.get_submodule(name.removesuffix(".weight")).weight
    return table[: len(value)]  # a smaller head reads the first rows
