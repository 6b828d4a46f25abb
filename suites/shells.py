"""Models without memory: every parameter has its shape and no data, so published sizes cost seconds."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import nn

from harness.pairs import Pair


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


def towers_of(pair: Pair, config: Any) -> nn.Module:
    """The reference of a target without its text model: what is left makes features, on the meta device."""
    with without_memory():
        shell = pair.reference(config)
    del shell.language_model
    return shell


def count_parameters(module: nn.Module) -> int:
    """Numbers in a model, those of tied parameters once."""
    return sum(parameter.numel() for parameter in module.parameters())
