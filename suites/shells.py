"""Models without memory: every parameter has its shape and no data, so published sizes cost seconds."""

import gc
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import nn

from harness.pairs import Pair
from reference.config import ConfigError

LEAST_ROOM = 512
"""modules that are built whatever the file holds: it may lack most of its tensors, and the account says which"""


@contextmanager
def without_memory() -> Iterator[None]:
    """Build on the meta device, without initial values, and without a search for garbage among thousands of modules."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        with torch.device("meta"), patch.object(nn.Linear, "reset_parameters", lambda self: None):
            yield
    finally:
        if collecting:
            gc.enable()


class _Alike(nn.ModuleList):
    """A list that keeps one of many modules whose parameters have the same names and shapes."""

    def __init__(self, modules: Iterable[nn.Module] = ()) -> None:
        kept: dict[Any, nn.Module] = {}
        super().__init__(kept.setdefault(self.shapes(module), module) for module in modules)

    @staticmethod
    def shapes(module: nn.Module) -> Any:
        return type(module), tuple(shapes_of(module).items())


def shapes_of(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Parameters and buffers by name, those of shared modules under each of their names."""
    named = (*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False))
    return {name: tuple(value.shape) for name, value in named}


def wanted_of(pair: Pair, config: Any, num_tensors: int | None = None) -> dict[str, tuple[int, ...]]:
    """Parameter names and shapes as the reference has them; hundreds of equal experts cost the memory of one.

    num_tensors   of the file, which a model of many more modules cannot be meant for: ConfigError, before it is built
    """
    for name in ("layers", "experts", "aux_states"):
        count = getattr(getattr(config, "text", config), name, 0) or 0
        if num_tensors is not None and count > max(num_tensors, LEAST_ROOM):
            raise ConfigError(f"the config asks for {count} {name}, the file has {num_tensors} tensors")
    with without_memory(), patch.object(nn, "ModuleList", _Alike):
        module = pair.reference(config)
    shapes = shapes_of(module)
    # a tied head is the embedding's table
    return {name: s for name, s in shapes.items() if not (config.tied_head and name.endswith("lm_head.weight"))}


def towers_of(pair: Pair, config: Any) -> nn.Module:
    """The reference of a target without its text model: what is left makes features, on the meta device."""
    with without_memory():
        shell = pair.reference(config)
    del shell.language_model
    return shell


def count_parameters(module: nn.Module) -> int:
    """Numbers in a model, those of tied parameters once."""
    return sum(parameter.numel() for parameter in module.parameters())
