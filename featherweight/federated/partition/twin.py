"""The shuffled twin: the same numbers of examples, other examples."""

from __future__ import annotations

import numpy as np

from featherweight.federated.partition.base import Partition, draws, partition_of


def shuffled(partition: Partition, *, seed: int, fraction: float = 1.0) -> Partition:
    """Return the twin of a partition in which part of everyone's examples is dealt anew.

    The numbers of examples stay as they are. What changes between a partition and its twin is due
    to how the clients' data differ, and to nothing else.

    Args:
        partition: of any kind.
        seed: of the deal.
        fraction: part of each client's examples that goes into the pool, in [0, 1]; 1: IID data,
            0: the partition itself.

    Raises:
        ValueError: ``fraction`` lies outside [0, 1].
    """
    if not 0 <= fraction <= 1:
        raise ValueError(f"fraction must lie in [0, 1], got {fraction}")
    rng = draws("shuffled", seed)
    parts = [rng.permutation(part.numpy()) for part in partition]
    given = [round(fraction * len(part)) for part in parts]
    pool = rng.permutation(np.concatenate([p[:n] for p, n in zip(parts, given, strict=True)]))
    dealt = np.split(pool, np.cumsum(given)[:-1])
    kept = [part[n:] for part, n in zip(parts, given, strict=True)]
    return partition_of([np.concatenate(pair) for pair in zip(kept, dealt, strict=True)])
