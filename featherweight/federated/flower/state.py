"""What a client keeps between its rounds, in the state that Flower holds for it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from torch import Tensor, from_numpy

ARRAYS, NUMBERS = "featherweight.arrays", "featherweight.numbers"
BETWEEN = "/"


def write_state(records: RecordDict, state: Mapping[str, Any]) -> None:
    """Replace what was kept.

    Args:
        records: of the node.
        state: nested dicts of tensors, numbers and bytes; names have no slash. Empty dicts are not
            kept.
    """
    leaves = dict(_leaves("", state))
    arrays = {k: Array(v.numpy()) for k, v in leaves.items() if isinstance(v, Tensor)}
    records[ARRAYS] = ArrayRecord(arrays)
    records[NUMBERS] = ConfigRecord({k: v for k, v in leaves.items() if k not in arrays})


def read_state(records: RecordDict) -> dict[str, Any]:
    """Return what was kept last; empty where nothing was."""
    if ARRAYS not in records:
        return {}
    arrays = {k: from_numpy(array.numpy().copy()) for k, array in records[ARRAYS].items()}
    state: dict[str, Any] = {}
    for path, value in {**arrays, **records[NUMBERS]}.items():
        *parents, name = path.split(BETWEEN)
        node = state
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = value
    return state


def _leaves(prefix: str, tree: Mapping[str, Any]) -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for name, value in tree.items():
        path = f"{prefix}{name}"
        found += _leaves(path + BETWEEN, value) if isinstance(value, Mapping) else [(path, value)]
    return found
