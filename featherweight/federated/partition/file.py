"""Partitions on disk: safetensors with a hash, so that runs can tell which one they used."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from featherweight.common import atomic_path
from featherweight.federated.partition.base import Partition

Fact = str | int | float | bool | None


def partition_hash(partition: Partition) -> str:
    """Return the SHA-256, in hex, of which example belongs to which client."""
    indices, sizes = _flat(partition)
    digest = hashlib.sha256(b"partition 1\n")
    for tensor in (sizes, indices):
        digest.update(tensor.numpy().astype("<i8").tobytes())
    return digest.hexdigest()


def check_partition(partition: Partition, examples: int) -> None:
    """Refuse a partition that cannot be one of ``examples`` examples.

    Raises:
        ValueError: no client, an empty one, an index out of range, or an example of two clients.
    """
    if not partition or any(not len(part) for part in partition):
        raise ValueError("partition: every client must have an example")
    indices, _ = _flat(partition)
    if int(indices.min()) < 0 or int(indices.max()) >= examples:
        raise ValueError(f"partition: indices must lie in 0..{examples - 1}")
    if len(indices.unique()) < len(indices):
        raise ValueError("partition: an example belongs to two clients")


def save_partition(
    path: str | os.PathLike[str], partition: Partition, facts: Mapping[str, Fact] | None = None
) -> str:
    """Write a partition in one atomic step.

    Args:
        path: file to write, by custom ``*.safetensors``.
        partition: indices of each client.
        facts: how it was made, such as method, seed and alpha; stored as they are.

    Returns:
        The hash, as `partition_hash`.
    """
    indices, sizes = _flat(partition)
    digest = partition_hash(partition)
    header = json.dumps({"hash": digest, "facts": dict(facts or {})}, sort_keys=True)
    with atomic_path(Path(path)) as temporary:
        # One key: safetensors writes several in an order that differs from time to time.
        tensors = {"indices": indices, "sizes": sizes}
        save_file(tensors, temporary, metadata={"partition": header})
    return digest


def load_partition(
    path: str | os.PathLike[str], examples: int | None = None
) -> tuple[Partition, dict[str, Fact]]:
    """Read a partition and the facts stored with it.

    Args:
        path: file that `save_partition` wrote.
        examples: of the data set, to check the indices against; None: not checked.

    Raises:
        ValueError: it is no such file, it does not match its hash, or the examples.
        OSError: it cannot be read.
    """
    Path(path).stat()  # a missing file is an OSError and not a damaged one
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {})["partition"])
            indices, sizes = (file.get_tensor(name) for name in ("indices", "sizes"))
        partition = tuple(torch.split(indices, sizes.tolist()))
        digest, facts = header["hash"], dict(header["facts"])
    except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path} holds no partition: {error}") from None
    if digest != partition_hash(partition):
        raise ValueError(f"{path}: the partition does not match its hash")
    if examples is not None:
        check_partition(partition, examples)
    return partition, facts


def _flat(partition: Partition) -> tuple[Tensor, Tensor]:
    indices = torch.cat(partition) if partition else torch.empty(0, dtype=torch.int64)
    return indices.to(torch.int64), torch.tensor([len(part) for part in partition])
