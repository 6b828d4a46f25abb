"""What exists twice, and how two of them join."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any


@dataclass(frozen=True)
class Pair:
    """One target or draft: its reference page and its optimized twin."""

    name: str
    kind: str
    """target or draft"""
    page: ModuleType
    """reference: `CHECKPOINT_NAMES`, `TP_PLAN`, the config class and the model class"""
    twin: ModuleType | None
    """optimized: a model class of the same name; None while there is only the page"""
    config: str
    """name of the frozen config class"""
    model: str
    """name of the model class, the same in both rooms"""
    covers: tuple[str, ...] = ()
    """what the claims reach: text, image, audio, video, TP, capture, loading, graph"""
    note: str = ""
    """what a reader of `covers` must know besides"""

    def read_config(self, config: Mapping[str, Any], **facts: Any) -> Any:
        """The frozen config of a `config.json`."""
        return getattr(self.page, self.config).from_hf(dict(config), **facts)

    @property
    def reference(self) -> Any:
        return getattr(self.page, self.model)

    @property
    def optimized(self) -> Any:
        return getattr(self.twin, self.model)


@dataclass(frozen=True)
class Speculation:
    """A target, a draft and how they join."""

    name: str
    target: str
    """name of the target's pair"""
    draft: str
    """name of the draft's pair"""
    algorithm: str
    """what engines call this way of drafting"""
    checkpoints: tuple[str, str] | None = None
    """folders of a trained pair that ships with the project, relative to `suites/zoo`"""
