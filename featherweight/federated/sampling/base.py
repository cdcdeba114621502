"""What every sampler uses: the registry, streams of random numbers, checks."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from featherweight.common import Registry
from featherweight.federated.streams import stream


class Sampler(Protocol):
    """Whatever says who takes part."""

    def cohort(self, round: int) -> Tensor:
        """Return the ids of a round's clients: int64 [M], ascending."""


SAMPLERS: Registry[Any] = Registry("sampler")
"""Classes of samplers by name. ``needs`` names what they take beside seed and own options."""


def draws(purpose: str, seed: int, round: int) -> np.random.Generator:
    """Return the random numbers of one round for one purpose."""
    return np.random.default_rng(stream(seed, purpose, round))


def cohort_of(ids: Any) -> Tensor:
    """Return ids as an ascending int64 tensor."""
    return torch.from_numpy(np.sort(np.asarray(ids, dtype=np.int64)))


def check_size(size: int, clients: int) -> None:
    """Refuse a cohort that is empty or larger than the population."""
    if not 1 <= size <= clients:
        raise ValueError(f"size must lie in [1, {clients} clients], got {size}")


def participation(sampler: Sampler, clients: int, rounds: int) -> Tensor:
    """Count how often each client takes part in the first rounds.

    Args:
        sampler: of any kind.
        clients: number of clients.
        rounds: so many, from 0.

    Returns:
        int64 [clients].
    """
    cohorts = [sampler.cohort(round) for round in range(rounds)]
    drawn = torch.cat(cohorts) if cohorts else torch.empty(0, dtype=torch.int64)
    return torch.bincount(drawn, minlength=clients)
