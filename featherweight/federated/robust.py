"""Aggregators: the mean of the clients' vectors, and what withstands clients that lie.

Each takes the vectors [n, length] of the n clients of a round and their weights [n], and returns
one vector [length]. The robust ones count every client once: a weight is a claim too.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from featherweight.common import Registry

Aggregator = Callable[[Tensor, Tensor], Tensor]

AGGREGATORS: Registry[Callable[..., Tensor]] = Registry("aggregator")

YIN = "Yin et al. 2018, arXiv:1803.01498"
KRUM = "Blanchard et al. 2017, arXiv:1703.02757"


@AGGREGATORS.register("mean", "weighted mean")
def mean(vectors: Tensor, weights: Tensor) -> Tensor:
    """Return the weighted mean of vectors [n, length], weights [n] above 0."""
    return (weights / weights.sum()) @ vectors


@AGGREGATORS.register("median", "median of each coordinate", YIN)
def median(vectors: Tensor, weights: Tensor) -> Tensor:
    """Return the median of each coordinate; of an even number, the mean of the two in the middle.

    Args:
        vectors: [n, length].
        weights: [n], not used.

    Source:
        Dong Yin, Yudong Chen, Kannan Ramchandran, Peter Bartlett 2018, arXiv:1803.01498,
        definition 1.
    """
    ordered, last = vectors.sort(dim=0).values, len(vectors) - 1
    return ordered[[last // 2, (last + 1) // 2]].mean(0)


@AGGREGATORS.register("trimmed-mean", "mean of each coordinate without its extremes", YIN)
def trimmed_mean(vectors: Tensor, weights: Tensor, *, trim: float = 0.1) -> Tensor:
    """Return the mean of each coordinate without its ``floor(trim n)`` least and largest values.

    Args:
        vectors: [n, length].
        weights: [n], not used.
        trim: part cut from either end, in [0, 0.5); 0: the mean.

    Raises:
        ValueError: ``trim`` is out of range.

    Source:
        Yin et al. 2018, arXiv:1803.01498, definition 2.
    """
    if not 0.0 <= trim < 0.5:
        raise ValueError(f"trim must lie in [0, 0.5), got {trim:g}")
    cut = int(trim * len(vectors) + 1e-9)  # 0.29 * 100 is 28.999...
    return vectors.sort(dim=0).values[cut : len(vectors) - cut].mean(0)


def krum_scores(vectors: Tensor, byzantine: int) -> Tensor:
    """Return for each vector the sum of squared distances to its ``n - byzantine - 2`` nearest.

    Args:
        vectors: [n, length].
        byzantine: number of clients that may lie, at least 0; n must be 2 byzantine + 3 at least.

    Returns:
        [n].

    Raises:
        ValueError: there are too few vectors.
    """
    count = len(vectors)
    if byzantine < 0 or count < 2 * byzantine + 3:
        raise ValueError(
            f"byzantine must lie in [0, (n - 3) / 2], got {byzantine} with n = {count} clients"
        )
    # by differences: a matrix product would cancel where vectors are close
    mode = "donot_use_mm_for_euclid_dist"
    distances = torch.cdist(vectors, vectors, compute_mode=mode).square()
    ordered: Tensor = distances.sort(dim=1).values
    return ordered[:, 1 : count - byzantine - 1].sum(1)  # column 0 is the vector itself


@AGGREGATORS.register("krum", "the one vector that is nearest to its neighbours", KRUM)
def krum(vectors: Tensor, weights: Tensor, *, byzantine: int = 1) -> Tensor:
    """Return the vector with the least `krum_scores`.

    Args:
        vectors: [n, length].
        weights: [n], not used.
        byzantine: number of clients that may lie.

    Raises:
        ValueError: there are fewer than ``2 byzantine + 3`` vectors.

    Source:
        Peva Blanchard, El Mahdi El Mhamdi, Rachid Guerraoui, Julien Stainer 2017, arXiv:1703.02757,
        section 4.
    """
    return vectors[krum_scores(vectors, byzantine).argmin()]


@AGGREGATORS.register("multi-krum", "mean of the vectors nearest to their neighbours", KRUM)
def multi_krum(
    vectors: Tensor, weights: Tensor, *, byzantine: int = 1, keep: int | None = None
) -> Tensor:
    """Return the mean of the vectors with the least `krum_scores`.

    Args:
        vectors: [n, length].
        weights: [n], not used.
        byzantine: number of clients that may lie.
        keep: how many to average, in [1, n]; None: ``n - byzantine - 2``. 1: `krum`.

    Raises:
        ValueError: there are too few vectors, or ``keep`` is out of range.

    Source:
        Blanchard et al. 2017, arXiv:1703.02757, section 5.
    """
    count = len(vectors) - byzantine - 2 if keep is None else keep
    scores = krum_scores(vectors, byzantine)
    if not 1 <= count <= len(vectors):
        raise ValueError(f"keep must lie in [1, {len(vectors)} clients], got {count}")
    return vectors[scores.argsort(stable=True)[:count]].mean(0)


def clip_to(vectors: Tensor, norm: float) -> Tensor:
    """Scale down the vectors [n, length] whose Euclidean norm is above ``norm``."""
    norms: Tensor = torch.linalg.vector_norm(vectors, dim=1, keepdim=True)
    return vectors * (norm / norms.clamp(min=norm))


@AGGREGATORS.register(
    "clipped-mean",
    "weighted mean of vectors clipped to a norm",
    "Sun et al. 2019, arXiv:1911.07963",
    defaults={"norm": 1.0},
)
def clipped_mean(vectors: Tensor, weights: Tensor, *, norm: float = 1.0) -> Tensor:
    """Return the weighted mean of the vectors, each scaled down to a norm of at most ``norm``.

    Args:
        vectors: [n, length].
        weights: [n], above 0.
        norm: largest Euclidean norm, above 0; infinity: the mean.

    Raises:
        ValueError: ``norm`` is not above 0.

    Source:
        Ziteng Sun, Peter Kairouz, Ananda Theertha Suresh, Brendan McMahan 2019, arXiv:1911.07963.
    """
    if not norm > 0.0:
        raise ValueError(f"norm must be above 0, got {norm:g}")
    return mean(vectors if norm == float("inf") else clip_to(vectors, norm), weights)


@AGGREGATORS.register(
    "geometric-median",
    "the point of least mean distance to the vectors",
    "Pillutla et al. 2019, arXiv:1912.13445",
)
def geometric_median(
    vectors: Tensor, weights: Tensor, *, iterations: int = 32, smoothing: float = 1e-6
) -> Tensor:
    """Return nearly the point of least weighted mean Euclidean distance, by Weiszfeld's steps.

    Args:
        vectors: [n, length].
        weights: [n], above 0: the only robust aggregator here that uses them.
        iterations: reweightings, at least 1.
        smoothing: least distance that is divided by, above 0.

    Raises:
        ValueError: an argument is out of range.

    Source:
        Krishna Pillutla, Sham Kakade, Zaid Harchaoui 2019, arXiv:1912.13445, algorithm 2.
    """
    if iterations < 1 or not smoothing > 0.0:
        raise ValueError(
            f"iterations must be at least 1 and smoothing above 0, got {iterations}, {smoothing:g}"
        )
    center = mean(vectors, weights)
    for _ in range(iterations):
        distances = torch.linalg.vector_norm(vectors - center, dim=1)
        center = mean(vectors, weights / distances.clamp(min=smoothing))
    return center


def as_aggregator(aggregator: Aggregator | str | None) -> Aggregator | None:
    """Return a registered aggregator by its name, with its defaults; others as they are."""
    return AGGREGATORS[aggregator].method if isinstance(aggregator, str) else aggregator
