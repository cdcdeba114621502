"""Clients that differ in how many examples they hold, or in nothing."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from featherweight.federated.partition.base import PARTITIONS, Partition, check, deal, draws, even


@PARTITIONS.register("iid", "examples dealt at random, equal numbers")
def iid(targets: Tensor, *, clients: int, seed: int) -> Partition:
    """Deal the examples at random; sizes differ by one at most.

    Args:
        targets: int64 [N], labels.
        clients: number of clients, at most N.
        seed: of the deal.

    Raises:
        ValueError: there are more clients than examples.
    """
    check(targets, clients)
    return deal(even(len(targets), clients), draws("iid", seed))


@PARTITIONS.register("quantity", "numbers of examples log-normal, labels at random")
def quantity(targets: Tensor, *, clients: int, seed: int, sigma: float = 1.0) -> Partition:
    """Deal the examples at random in numbers proportional to exp(sigma z), z standard normal.

    Args:
        targets: int64 [N], labels.
        clients: number of clients, at most N; each gets an example at least.
        seed: of numbers and deal.
        sigma: standard deviation of the logarithm, at least 0; 0: equal numbers.

    Raises:
        ValueError: ``sigma`` is negative, or there are more clients than examples.
    """
    check(targets, clients)
    if not 0 <= sigma < 100:
        raise ValueError(f"sigma must lie in [0, 100), got {sigma}")
    rng = draws("quantity", seed)
    shares = np.exp(sigma * rng.standard_normal(clients))
    return deal(proportional(shares, len(targets)), rng)


@PARTITIONS.register("zipf", "numbers of examples by Zipf's law, labels at random")
def zipf(targets: Tensor, *, clients: int, seed: int, exponent: float = 1.0) -> Partition:
    """Deal the examples at random in numbers proportional to rank ** -exponent.

    Args:
        targets: int64 [N], labels.
        clients: number of clients, at most N; each gets an example at least.
        seed: of ranks and deal.
        exponent: at least 0; 0: equal numbers.

    Raises:
        ValueError: ``exponent`` is negative, or there are more clients than examples.
    """
    check(targets, clients)
    if not 0 <= exponent < 100:
        raise ValueError(f"exponent must lie in [0, 100), got {exponent}")
    rng = draws("zipf", seed)
    shares = np.arange(1, clients + 1, dtype=float) ** -exponent
    return deal(proportional(rng.permutation(shares), len(targets)), rng)


def proportional(shares: np.ndarray, total: int) -> np.ndarray:
    """Round shares of ``total`` to whole numbers of at least 1 that sum to it.

    Args:
        shares: float [M], not negative, of any positive sum.
        total: at least M.

    Returns:
        int [M]; beyond the one that each gets, largest remainders decide.
    """
    exact = shares / shares.sum() * (total - len(shares))
    sizes = np.floor(exact).astype(int)
    missing = total - len(shares) - int(sizes.sum())
    sizes[np.argsort(sizes - exact, kind="stable")[:missing]] += 1
    return np.asarray(sizes + 1)
