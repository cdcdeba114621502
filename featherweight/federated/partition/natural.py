"""Clients that are people."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from featherweight.federated.partition.base import PARTITIONS, Partition, draws, partition_of


@PARTITIONS.register("natural", "by who made the examples: writer, user, author", needs=["groups"])
def natural(
    targets: Tensor, *, clients: int | None = None, seed: int = 0, groups: Tensor, least: int = 1
) -> Partition:
    """Make one client of each group.

    Args:
        targets: int64 [N], labels.
        clients: so many groups, chosen at random; the examples of the others are left out. None:
            all groups, in ascending order of their ids.
        seed: of the choice.
        groups: integer [N], the id of each example's group.
        least: groups with fewer examples are left out; 1: none is.

    Raises:
        ValueError: targets and groups differ in length, or there are fewer groups than clients.
    """
    if len(groups) != len(targets):
        raise ValueError(f"groups must name {len(targets)} examples, got {len(groups)}")
    _, inverse, counts = np.unique(groups.numpy(), return_inverse=True, return_counts=True)
    order = np.argsort(inverse, kind="stable")
    parts = [part for part in np.split(order, np.cumsum(counts)[:-1]) if len(part) >= least]
    if not parts or (clients is not None and not 1 <= clients <= len(parts)):
        raise ValueError(
            f"clients must lie in [1, {len(parts)}], the groups of at least {least} examples; "
            f"got {clients}"
        )
    if clients is not None:
        chosen = draws("natural", seed).choice(len(parts), clients, replace=False)
        parts = [parts[i] for i in np.sort(chosen)]
    return partition_of(parts)
