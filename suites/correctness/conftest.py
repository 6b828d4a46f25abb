"""What several claims stand on: the pinned target, written once and opened once a dtype."""

from pathlib import Path

import pytest
import torch

from suites.catalog import OpenTarget, open_target
from suites.draws import PINNED_DRAFT, PINNED_TARGET, write_draft, write_target


@pytest.fixture(scope="session")
def target_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pinned target on disk; whoever wants to damage it takes a copy."""
    return write_target(PINNED_TARGET, tmp_path_factory.mktemp("pinned") / "target")


@pytest.fixture(scope="session")
def draft_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pinned draft on disk."""
    return write_draft(PINNED_DRAFT, tmp_path_factory.mktemp("pinned") / "draft")


@pytest.fixture(scope="module")
def target(target_folder: Path) -> OpenTarget:
    """The pinned target in float32."""
    return open_target(target_folder)


@pytest.fixture(scope="module")
def wide_target(target_folder: Path) -> OpenTarget:
    """The pinned target in float64."""
    return open_target(target_folder, dtype=torch.float64)
