"""Fixtures shared by all tests: where real data and weights lie, and small models."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent


def _folder(variable: str, default: Path) -> Path:
    folder = Path(os.environ.get(variable, default))
    if not folder.is_dir():
        pytest.skip(f"no folder at {folder}; set {variable} to run this test on real data")
    return folder


@pytest.fixture
def shared_data() -> Path:
    """Folder with cifar10/, mnist/, ...; the test is skipped where there is none."""
    return _folder("FEATHERWEIGHT_DATA", ROOT.parent / "shared" / "data")


@pytest.fixture
def shared_weights() -> Path:
    """Folder with cifar10-resnet/; the test is skipped where there is none."""
    return _folder("FEATHERWEIGHT_WEIGHTS", ROOT.parent / "shared" / "weights")


@pytest.fixture(autouse=True, scope="session")
def _costs(tmp_path_factory) -> Iterator[None]:
    """Keep what layers cost on this machine out of the user's cache directory."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEATHERWEIGHT_COSTS", str(tmp_path_factory.mktemp("costs") / "costs.json"))
        yield


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
