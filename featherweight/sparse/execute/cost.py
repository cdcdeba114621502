"""What layers cost on this machine: measured once, kept in a file of the user's cache directory."""

from __future__ import annotations

import functools
import json
import os
import platform
from collections.abc import Callable, Mapping
from importlib import metadata
from math import log2
from pathlib import Path

import torch

from featherweight.common import write_text

VARIABLE = "FEATHERWEIGHT_COSTS"
LARGEST = 2048  # features, and
LARGEST_BATCH = 512  # rows; layers beyond cost in proportion, so that their ratios are the same


def path() -> Path | None:
    """Return where costs are kept: the file that ``FEATHERWEIGHT_COSTS`` names, else a default.

    None, where the variable is set to nothing: they are kept nowhere.
    """
    named = os.environ.get(VARIABLE)
    if named is not None:
        return Path(named) if named else None
    cache = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(cache) / "featherweight" / "costs.json"


def machine() -> str:
    """Name what costs depend on: processor, torch, numba, threads and matmul precision."""
    return (
        f"{_processor()}; torch {torch.__version__}; numba {_numba()}; "
        f"{torch.get_num_threads()} threads; {torch.get_float32_matmul_precision()}"
    )


@functools.cache
def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text("utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


@functools.cache
def _numba() -> str:
    try:
        return metadata.version("numba")
    except metadata.PackageNotFoundError:
        return "none"


def rounded(value: float, steps: int) -> float:
    """Round to a power of 2, or with more ``steps`` to that power's fractions; 0 stays 0."""
    return 2.0 ** (round(log2(value) * steps) / steps) if value > 0 else 0.0


def seconds(cell: str, measure: Callable[[], Mapping[str, float]]) -> dict[str, float]:
    """Return the costs of one kind of layer, by backend: as kept, or else measured and kept.

    Args:
        cell: names the kind: shape, batch, density, dtype.
        measure: returns seconds by backend.
    """
    file, here = path(), machine()
    kept = _read(file)
    found = kept.get(here, {}).get(cell)
    if found is None:
        found = dict(measure())
        kept = _read(file)  # others may have written meanwhile
        kept.setdefault(here, {})[cell] = found
        _write(file, kept)
    return found


def _read(file: Path | None) -> dict[str, dict[str, dict[str, float]]]:
    try:
        table = json.loads(file.read_text("utf-8")) if file is not None else {}
        return {
            machine: {
                cell: {str(name): float(value) for name, value in row.items()}
                for cell, row in cells.items()
            }
            for machine, cells in table.items()
        }
    except (OSError, ValueError, AttributeError, TypeError):
        return {}  # absent or damaged: measure again


def _write(file: Path | None, table: Mapping[str, object]) -> None:
    if file is not None:
        try:
            write_text(file, json.dumps(table, indent=1, sort_keys=True) + "\n")
        except OSError:
            return  # a read-only home: measure again next time
