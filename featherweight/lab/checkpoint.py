"""Checkpoints of a run: safetensors for tensors, JSON for the rest, checksummed, two kept.

A checkpoint is a pair ``NNNNNN.safetensors`` and ``NNNNNN.json``; the JSON is written last and
holds both checksums, so that a pair is either whole or refused. The rewinding point is stored
once, as ``rewind-HASH.safetensors``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.optim import Optimizer

from featherweight.common import atomic_path, cpu_state, write_text
from featherweight.lab.errors import BadInput
from featherweight.sparse.masks import Masks, pack_bits, unpack_bits

VERSION = 2
KEEP = 2


@dataclass(frozen=True)
class Position:
    """How far a run has come.

    Attributes:
        level: index of the level, -1 for the warm-up.
        epochs: finished epochs of it.
        steps: finished optimizer steps of it.
        finished: whether the level is trained, measured and written.
    """

    level: int
    epochs: int
    steps: int
    finished: bool = False


@dataclass(frozen=True)
class Checkpoint:
    """Everything that a run needs to go on.

    Attributes:
        position: where it stands.
        model: state dict.
        optimizer: optimizer state dict.
        masks: masks in force; None for a dense run.
        rewind: state at the rewinding point, empty if there is none.
        generator_state: of the pruning loop; None if it has none.
        optimizer_rewind: optimizer state dict at the rewinding point; None if not rewound.
        dynamic: state dict of a method that changes masks between steps; None for others.
        logs: length in bytes of each log file.
    """

    position: Position
    model: Mapping[str, Tensor]
    optimizer: dict[str, Any]
    masks: Masks
    rewind: Mapping[str, Tensor] = field(default_factory=dict)
    generator_state: Tensor | None = None
    optimizer_rewind: dict[str, Any] | None = None
    dynamic: dict[str, Any] | None = None
    logs: dict[str, int] = field(default_factory=dict)


def save(folder: Path, checkpoint: Checkpoint) -> Path:
    """Write a checkpoint and remove all but the newest two.

    Args:
        folder: holds the checkpoints of one run.
        checkpoint: what to write.

    Returns:
        The JSON file.

    Raises:
        OSError, SafetensorError: the disk is full or not writable; older checkpoints are untouched
            then.
    """
    numbers = _numbers(folder)
    number = numbers[-1] + 1 if numbers else 0
    tensors: dict[str, Tensor] = {}
    plain = {
        "version": VERSION,
        "position": vars(checkpoint.position),
        "logs": checkpoint.logs,
        "optimizer": _flatten(checkpoint.optimizer, "optimizer", tensors),
        "optimizer_rewind": _flatten(checkpoint.optimizer_rewind, "rewound", tensors),
        "dynamic": _flatten(checkpoint.dynamic, "dynamic", tensors),
        "masks": {name: list(mask.shape) for name, mask in checkpoint.masks.items()},
        "rewind": _save_rewind(folder, checkpoint.rewind),
    }
    tensors |= {f"model.{n}": t for n, t in cpu_state(checkpoint.model).items()}
    tensors |= {f"mask.{n}": pack_bits(mask) for n, mask in checkpoint.masks.items()}
    if checkpoint.generator_state is not None:
        tensors["generator"] = checkpoint.generator_state
    path = folder / f"{number:06d}.safetensors"
    with atomic_path(path) as temporary:
        save_file(_unshared(tensors), temporary)
    plain["tensors"] = _digest(path)
    text = json.dumps(plain)  # in this order: that of the masks matters
    header = hashlib.sha256(text.encode()).hexdigest()
    write_text(path.with_suffix(".json"), f"{header}\n{text}\n")
    _discard(folder, _numbers(folder)[:-KEEP])
    return path.with_suffix(".json")


def newest(folder: Path) -> tuple[Checkpoint | None, dict[int, str]]:
    """Read the newest checkpoint that is whole.

    Args:
        folder: holds the checkpoints of one run.

    Returns:
        The checkpoint, or None if there is no whole one; and a line for each one refused, by
        number.

    Raises:
        BadInput: a later version wrote it, and starting over would throw its work away.
    """
    refused: dict[int, str] = {}
    for number in reversed(_numbers(folder)):
        try:
            return _load(folder, number), refused
        except BadInput:
            raise
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            refused[number] = f"checkpoint {number:06d} refused: {error}"
    return None, refused


def discard(folder: Path) -> None:
    """Remove everything: the run is complete, or starts over because nothing was whole."""
    for path in folder.glob("*"):
        path.unlink()


def tidy(folder: Path, refused: Iterable[int]) -> None:
    """Remove refused checkpoints, so that the newest two are good ones again."""
    _discard(folder, refused)


def _load(folder: Path, number: int) -> Checkpoint:
    path = folder / f"{number:06d}.safetensors"
    header, _, text = path.with_suffix(".json").read_text(encoding="utf-8").partition("\n")
    text = text.removesuffix("\n")
    if hashlib.sha256(text.encode()).hexdigest() != header:
        raise ValueError("its description does not match its checksum")
    plain = json.loads(text)
    if plain["version"] > VERSION:
        text = f"format version {plain['version']}, this reads {VERSION}"
        raise BadInput(f"{path} was written by a newer featherweight: {text}")
    if _digest(path) != plain["tensors"]:
        raise ValueError("its tensors do not match their checksum")
    tensors = load_file(path)
    return Checkpoint(
        position=Position(**plain["position"]),
        model={n.removeprefix("model."): t for n, t in tensors.items() if n.startswith("model.")},
        optimizer=_unflatten(plain["optimizer"], tensors),
        masks=Masks({n: unpack_bits(tensors[f"mask.{n}"], s) for n, s in plain["masks"].items()}),
        rewind=_load_rewind(folder, plain["rewind"]),
        generator_state=tensors.get("generator"),
        optimizer_rewind=_unflatten(plain["optimizer_rewind"], tensors),
        dynamic=_unflatten(plain["dynamic"], tensors) if "dynamic" in plain else None,
        logs=plain["logs"],
    )


def _save_rewind(folder: Path, rewind: Mapping[str, Tensor]) -> str | None:
    if not rewind:
        return None
    stored = sorted(folder.glob("rewind-*.safetensors"))
    if stored:  # a run has one rewinding point; its file name holds its checksum
        return stored[0].stem.removeprefix("rewind-")
    path = folder / "rewind.safetensors"
    with atomic_path(path) as temporary:
        save_file(_unshared(dict(rewind)), temporary)
    digest = _digest(path)
    path.replace(folder / f"rewind-{digest}.safetensors")
    return digest


def _load_rewind(folder: Path, digest: str | None) -> dict[str, Tensor]:
    if digest is None:
        return {}
    path = folder / f"rewind-{digest}.safetensors"
    if _digest(path) != digest:
        raise ValueError("the rewinding point does not match its checksum")
    return dict(load_file(path))


def _flatten(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """Replace the tensors in a nested value by references, collecting them under their paths."""
    if isinstance(value, Tensor):
        tensors[path] = value.detach().to("cpu", copy=True).contiguous()
        return {"tensor": path}
    if isinstance(value, Mapping):
        items = [[k, _flatten(v, f"{path}.{k}", tensors)] for k, v in value.items()]
        return {"mapping": items}
    if isinstance(value, (list, tuple)):
        return {"list": [_flatten(v, f"{path}.{i}", tensors) for i, v in enumerate(value)]}
    return {"value": value}


def _unflatten(node: Any, tensors: Mapping[str, Tensor]) -> Any:
    (kind, content), *_ = node.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "mapping":
        return {key: _unflatten(value, tensors) for key, value in content}
    if kind == "list":
        return [_unflatten(value, tensors) for value in content]
    return content


def _unshared(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copy tensors that share memory, which safetensors refuses to write."""
    seen: set[int] = set()
    result = {}
    for name, tensor in tensors.items():
        result[name] = tensor.clone() if tensor.data_ptr() in seen else tensor
        seen.add(tensor.data_ptr())
    return result


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _numbers(folder: Path) -> list[int]:
    return sorted(int(p.stem) for p in folder.glob("[0-9]*.json") if p.stem.isdigit())


def _discard(folder: Path, numbers: Iterable[int]) -> None:
    for number in numbers:
        for suffix in (".json", ".safetensors"):
            (folder / f"{number:06d}{suffix}").unlink(missing_ok=True)


def restore_optimizer(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Load an optimizer's state dict, keeping the dtypes and devices it was saved with."""
    with torch.no_grad():
        optimizer.load_state_dict(state)
