"""Models without memory: every parameter has its shape and no data, so published sizes cost seconds."""

import gc
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import nn

from harness.pairs import Pair
from reference.config import ConfigError

LEAST_ROOM = 512
"""modules that are built whatever the file holds: it may lack most of its tensors, and the account says which"""
MODULES = ("layers", "experts", "aux_states")
"""what configs count modules by"""
LARGEST = 2**31
"""beyond every size and length of a model; two of them still make a number of 64 bits"""


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


@contextmanager
def fitting(config: Any, num_tensors: int | None) -> Iterator[None]:
    """Build what a config asks for; ConfigError before hours and memory go into what no file can hold.

    num_tensors   of the file, which a model of many more modules cannot be meant for
    """
    for part in _parts(config):
        for name in MODULES:
            count = getattr(part, name, 0) or 0
            if num_tensors is not None and count > max(num_tensors, LEAST_ROOM):
                raise ConfigError(f"the config asks for {count} {name}, the file has {num_tensors} tensors")
        for field in fields(part):
            value = getattr(part, field.name)
            if type(value) is int and abs(value) >= LARGEST:
                raise ConfigError(f"the config says {field.name} {value}; no size of a model is beyond {LARGEST}")
    try:
        yield
    except (RuntimeError, ZeroDivisionError) as error:
        if isinstance(error, RuntimeError) and "overflow" not in str(error):
            raise
        raise ConfigError(f"the config's sizes make a tensor that cannot be: {str(error).splitlines()[0]}") from error


def _parts(config: Any) -> Iterator[Any]:
    """A config and the configs inside it."""
    yield config
    for field in fields(config):
        value = getattr(config, field.name)
        if is_dataclass(value) and not isinstance(value, type):
            yield from _parts(value)


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
    with fitting(config, num_tensors), without_memory(), patch.object(nn, "ModuleList", _Alike):
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
