"""Checkpoints of a federated run: one safetensors file each, with its checksum, two kept.

The file is named by the number of finished rounds. Plain numbers and the tree's shape lie in its
header as JSON, so that a checkpoint is one atomic file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from featherweight.common import atomic_path
from featherweight.lab.checkpoint import KEEP, _flatten, _unflatten, _unshared
from featherweight.lab.errors import BadInput

VERSION = 1


@dataclass(frozen=True)
class FederatedCheckpoint:
    """Where a run stands.

    Attributes:
        rounds: finished.
        state: nested mappings of tensors and plain values.
        logs: length in bytes of each log file.
    """

    rounds: int
    state: Mapping[str, Any]
    logs: dict[str, int]


def save(folder: Path, checkpoint: FederatedCheckpoint) -> Path:
    """Write a checkpoint and remove all but the newest two.

    Raises:
        OSError, SafetensorError: the disk is full or not writable; older checkpoints are untouched
            then.
    """
    tensors: dict[str, Tensor] = {}
    plain = {"state": _flatten(checkpoint.state, "state", tensors), "logs": checkpoint.logs}
    tensors = _unshared(tensors)
    text = json.dumps(plain)
    header = {"version": str(VERSION), "plain": text, "hash": _digest(text, tensors)}
    path = folder / f"{checkpoint.rounds:08d}.safetensors"
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, metadata=header)
    for old in _files(folder)[:-KEEP]:
        old.unlink()
    return path


def newest(folder: Path) -> tuple[FederatedCheckpoint | None, dict[Path, str]]:
    """Read the newest checkpoint that is whole.

    Returns:
        The checkpoint, or None if there is no whole one; and a line for each file refused.

    Raises:
        BadInput: a later version wrote it, and starting over would throw its work away.
    """
    refused: dict[Path, str] = {}
    for path in reversed(_files(folder)):
        try:
            return _load(path), refused
        except BadInput:
            raise
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
            refused[path] = f"checkpoint {path.stem} refused: {' '.join(str(error).split())}"
    return None, refused


def discard(folder: Path) -> None:
    """Remove everything: the run is complete, or starts over because nothing was whole."""
    for path in folder.glob("*"):
        path.unlink()


def _load(path: Path) -> FederatedCheckpoint:
    with safe_open(path, framework="pt") as file:
        header = file.metadata() or {}
        if int(header["version"]) > VERSION:
            found = f"format version {header['version']}, this reads {VERSION}"
            raise BadInput(f"{path} was written by a newer featherweight: {found}")
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if _digest(header["plain"], tensors) != header["hash"]:
        raise ValueError("it does not match its checksum")
    plain = json.loads(header["plain"])
    return FederatedCheckpoint(int(path.stem), _unflatten(plain["state"], tensors), plain["logs"])


def _digest(text: str, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        digest.update(f"\n{name} {tensors[name].dtype} {list(tensors[name].shape)}\n".encode())
        digest.update(tensors[name].contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.glob("*.safetensors") if p.stem.isdigit())
