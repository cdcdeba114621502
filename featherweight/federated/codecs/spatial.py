"""The mathematics of decoders that look at all messages: scales, errors, correlations.

n clients send each entry with probability p; M of them send entry j. Rand-k-Spatial estimates the
mean by beta / T(M) times the sum of what arrived. T(1) = 1 by convention, all else is computed from
the values T(1), ..., T(n).

Source: Jhunjhunwala et al. 2021, arXiv:2110.07751, with closed forms of our own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from featherweight.common import unknown

Doubles = NDArray[np.float64]
LEAST = 1e-3  # T is never smaller
TRANSFORMS = ("avg", "max", "opt", "adaptive")


class Correlation(NamedTuple):
    """What the error depends on.

    Attributes:
        own: R1, the sum of squared norms of the weighted vectors.
        cross: R2, the sum of inner products over ordered pairs of different clients.
    """

    own: float
    cross: float

    @property
    def ratio(self) -> float:
        """R2 / R1, from -1 (they cancel) to n - 1 (all equal); 0 if all vectors are zero."""
        return self.cross / self.own if self.own > 0 else 0.0


def correlation(vectors: Sequence[Tensor] | Tensor) -> Correlation:
    """Measure how alike vectors are.

    Args:
        vectors: [n, length]; weighted, if the mean is.
    """
    stacked = torch.stack(list(vectors)).double()
    own = float(stacked.square().sum())
    return Correlation(own, float(stacked.sum(0).square().sum()) - own)


def binomial(trials: int, probability: float) -> Doubles:
    """Return the probabilities of 0 to ``trials`` successes, also for many trials."""
    if probability >= 1.0:
        certain: Doubles = np.eye(trials + 1)[trials]
        return certain
    counts = np.arange(1, trials + 1)
    steps = np.log((trials + 1 - counts) / counts) + np.log(probability / (1 - probability))
    logarithms = np.concatenate([[0.0], np.cumsum(steps)])
    weights = np.exp(logarithms - logarithms.max())
    found: Doubles = weights / weights.sum()
    return found


def slope(transform: str, clients: int, ratio: float = 0.0) -> float:
    """Return by how much T grows with each further client that sent an entry.

    Args:
        transform: "max": T(m) = m; "avg": 1 + (n / 2) (m - 1) / (n - 1); "opt" and "adaptive":
            1 + ratio (m - 1) / (n - 1).
        clients: n, of which messages arrived.
        ratio: R2 / R1.

    Raises:
        ValueError: the transform is unknown.
    """
    if transform not in TRANSFORMS:
        raise ValueError(unknown("transform", transform, TRANSFORMS))
    if clients < 2:
        return 0.0
    if transform == "max":
        return 1.0
    return (clients / 2 if transform == "avg" else ratio) / (clients - 1)


def transform_values(slope: float, clients: int) -> Doubles:
    """Return T(1), ..., T(n) of a straight line through T(1) = 1, not below 0.001."""
    found: Doubles = np.maximum(1.0 + slope * np.arange(clients), LEAST)
    return found


def scale(values: Doubles, probability: float) -> float:
    """Return beta, which makes the estimate unbiased.

    Args:
        values: T(1), ..., T(n).
        probability: p = k / length.
    """
    return float(1.0 / (probability * (binomial(len(values) - 1, probability) / values).sum()))


def scales(values: Doubles, probabilities: Sequence[float]) -> Doubles:
    """Return beta of each client, where each has its own probability.

    The number of the others that send an entry is then Poisson-binomial.

    Args:
        values: T(1), ..., T(n).
        probabilities: [n].
    """
    if len(set(probabilities)) == 1:
        return np.full(len(values), scale(values, probabilities[0]))
    found = {}
    for one in set(probabilities):
        others = list(probabilities)
        others.remove(one)
        found[one] = 1.0 / (one * (_poisson_binomial(others) / values).sum())
    return np.array([found[one] for one in probabilities])


def _poisson_binomial(probabilities: Sequence[float]) -> Doubles:
    found = np.ones(1)
    for one in probabilities:
        found = np.convolve(found, [1 - one, one])
    return found


def squared_error(values: Doubles, probability: float, given: Correlation) -> float:
    """Return the expected squared error of the estimate of the *sum* of the vectors.

    For the plain mean pass vectors divided by n to `correlation`, or divide by n squared. With
    T = 1 this is Rand-k's (1 / p - 1) R1.

    Args:
        values: T(1), ..., T(n).
        probability: p = k / length.
        given: of the vectors.
    """
    own, cross = moments(values, probability)
    factor = scale(values, probability) ** 2
    return factor * (own * given.own + cross * given.cross) - given.own - given.cross


def moments(values: Doubles, probability: float) -> tuple[float, float]:
    """Return S1 and S2: the means of 1{i sent} / T(M)^2 and of 1{i and l sent} / T(M)^2."""
    clients = len(values)
    squares = values**2
    own = probability * (binomial(clients - 1, probability) / squares).sum()
    if clients < 2:
        return float(own), 0.0
    cross = probability**2 * (binomial(clients - 2, probability) / squares[1:]).sum()
    return float(own), float(cross)


def coefficients(values: Doubles, probability: float) -> tuple[float, float]:
    """Return c1 and c2: the error is Rand-k's, plus c1 R1, minus c2 R2.

    Rand-k is beaten where R2 / R1 exceeds c1 / c2.
    """
    own, cross = moments(values, probability)
    factor = scale(values, probability) ** 2
    return factor * own - 1 / probability, 1 - factor * cross
