"""What every partitioner uses: the registry, streams of random numbers, checks."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from featherweight.common import Registry
from featherweight.federated.streams import stream

Partition = tuple[Tensor, ...]
"""Indices of each client's examples: int64 tensors, ascending."""

PARTITIONS: Registry[Callable[..., Partition]] = Registry("partition")
"""Partitioners by name: ``f(targets, *, clients, seed, ...)``."""


def draws(purpose: str, seed: int) -> np.random.Generator:
    """Return a stream of its own for each purpose, so that equal seeds stay independent."""
    return np.random.default_rng(stream(seed, "partition", purpose))


def check(targets: Tensor, clients: int) -> None:
    """Refuse targets that are no labels, and more clients than examples."""
    if targets.ndim != 1:
        raise ValueError(f"targets must be one label an example, got shape {list(targets.shape)}")
    if not 1 <= clients <= len(targets):
        raise ValueError(f"clients must lie in [1, {len(targets)} examples], got {clients}")


def check_alpha(alpha: float) -> None:
    """Refuse a concentration that is not positive and finite."""
    if not 0 < alpha < float("inf"):
        raise ValueError(f"alpha must be positive and finite, got {alpha}")


def pools(targets: Tensor, rng: np.random.Generator) -> list[np.ndarray]:
    """Return the examples of each label that occurs, shuffled."""
    labels = targets.numpy()
    return [rng.permutation(np.flatnonzero(labels == label)) for label in np.unique(labels)]


def even(examples: int, clients: int) -> np.ndarray:
    """Return numbers of examples that differ by one at most."""
    return np.array([len(part) for part in np.array_split(np.arange(examples), clients)])


def deal(sizes: np.ndarray, rng: np.random.Generator) -> Partition:
    """Deal as many examples as ``sizes`` sum to, at random."""
    return partition_of(np.split(rng.permutation(int(sizes.sum())), np.cumsum(sizes)[:-1]))


def partition_of(parts: list[np.ndarray]) -> Partition:
    """Return the indices of each client as ascending tensors."""
    return tuple(torch.from_numpy(np.sort(part).astype(np.int64)) for part in parts)
