"""Models without memory: every parameter has its shape and no data, so published sizes cost seconds."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
from torch import nn


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


def count_parameters(module: nn.Module) -> int:
    """Numbers in a model, those of tied parameters once."""
    return sum(parameter.numel() for parameter in module.parameters())
