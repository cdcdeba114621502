"""Whole runs to compare with, made once."""

from pathlib import Path

import pytest

from featherweight.lab.runs import run
from tests.lab.tiny_runs import METHODS, tiny


@pytest.fixture(scope="session")
def whole(tmp_path_factory) -> dict[str, Path]:
    """One uninterrupted run of each method."""
    folder = tmp_path_factory.mktemp("whole")
    return {name: run(tiny(**changes), 0, folder) for name, changes in METHODS.items()}
