"""Stochastic uniform quantisation: the mathematics that QSGD and AdaQuantFL share.

The grid on [0, 1] is {0, 1/s, ..., 1}: s intervals, s + 1 points, 2 s + 1 symbols with the signs.

Source: Alistarh et al. 2017, arXiv:1610.02132, section 3.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featherweight.common import unknown
from featherweight.federated.coding.levels import signed_type
from featherweight.federated.wire import Floats

CHUNK = 1 << 15  # entries whose temporaries stay in cache
MOST_LEVELS = 2**16 - 1
NORMS = ("l2", "max")


def check_levels(levels: int, name: str = "levels") -> int:
    """Return a number of levels from 1 to 65,535; else ValueError."""
    if isinstance(levels, bool) or int(levels) != levels or not 1 <= levels <= MOST_LEVELS:
        raise ValueError(f"{name} must be an integer from 1 to {MOST_LEVELS}, got {levels!r}")
    return int(levels)


def norms(vector: Floats, bucket: int, kind: str) -> Floats:
    """Return one norm a bucket, rounded up to float32, so that no ratio exceeds 1.

    Args:
        vector: [length].
        bucket: entries a bucket; 0 for one bucket.
        kind: "l2" or "max".

    Raises:
        ValueError: the kind is unknown.
    """
    if kind not in NORMS:
        raise ValueError(unknown("norm", kind, NORMS))
    size = bucket or len(vector)
    if kind == "max":
        return np.maximum.reduceat(np.abs(vector), np.arange(0, len(vector), size))
    exact = np.sqrt(_squares(vector, size))
    rounded: Floats = exact.astype(np.float32)
    low = rounded < exact
    rounded[low] = np.nextafter(rounded[low], np.float32(np.inf))
    return rounded


def _squares(vector: Floats, size: int) -> NDArray[np.float64]:
    """Return the sum of squares of each bucket, in float64."""
    found = np.zeros(-(-len(vector) // size))
    for part, buckets in parts(len(vector), size):
        squares = np.square(vector[part], dtype=np.float64)
        starts = np.arange(0, len(squares), size)
        found[buckets] += np.add.reduceat(squares, starts)
    return found


def parts(length: int, size: int) -> Iterator[tuple[slice, slice]]:
    """Cut a vector into pieces that stay in cache: entries, and the buckets these belong to.

    A piece is whole buckets, where they are small, or lies within one.
    """
    if size < CHUNK:
        step = CHUNK // size * size
        for start in range(0, length, step):
            end = min(start + step, length)
            yield slice(start, end), slice(start // size, -(-end // size))
        return
    for bucket in range(-(-length // size)):
        last = min((bucket + 1) * size, length)
        for start in range(bucket * size, last, CHUNK):
            yield slice(start, min(start + CHUNK, last)), slice(bucket, bucket + 1)


def spread(scale: Floats, part: slice, buckets: slice, size: int) -> Floats:
    """Return the norm of every entry of a piece, or one for all of them."""
    chosen = scale[buckets]
    return chosen if len(chosen) == 1 else np.repeat(chosen, size)[: part.stop - part.start]


def quantise(
    vector: Floats, scale: Floats, bucket: int, levels: int, generator: np.random.Generator
) -> NDArray[Any]:
    """Round every entry to one of its two neighbours on the grid, unbiased.

    Args:
        vector: [length].
        scale: norm of each bucket.
        bucket: entries a bucket; 0 for one bucket.
        levels: s.
        generator: of the rounding.

    Returns:
        Signed levels [length], of magnitude up to s.
    """
    found = np.empty(len(vector), signed_type(levels))
    size = bucket or len(vector)
    divisors = np.where(scale > 0, scale, np.float32(1))
    for part, buckets in parts(len(vector), size):
        norm = spread(divisors, part, buckets, size)
        found[part] = _rounded(vector[part], norm, levels, generator)
    return found


def _rounded(part: Floats, norm: Floats, levels: int, generator: np.random.Generator) -> Floats:
    ratios = np.abs(part)
    ratios /= norm  # a product with levels / norm overflows for tiny norms
    ratios *= np.float32(levels)
    low = np.floor(ratios)
    ratios -= low
    low += generator.random(len(part), np.float32) < ratios
    np.minimum(low, np.float32(levels), out=low)
    return np.copysign(low, part, out=low)


def variance(vector: Floats, levels: int, norm: float) -> float:
    """Return the exact expected squared error of quantising one bucket.

    Args:
        vector: [length].
        levels: s.
        norm: of the bucket.
    """
    if norm == 0:
        return 0.0
    ratios = np.abs(vector.astype(np.float64)) * levels / norm
    parts = ratios - np.floor(ratios)
    return float((norm / levels) ** 2 * (parts * (1 - parts)).sum())


def variance_factor(length: int, levels: int) -> float:
    """Return a bound on the expected squared error over the squared L2 norm.

    min(d / s^2, sqrt(d) / s, d / (4 s^2)); for many entries a level the second is what counts.
    """
    return min(math.sqrt(length) / levels, length / (4 * levels**2))


def formula_bits(length: int, levels: int) -> int:
    """Return the paper's C_s = d ceil(log2(s + 1)) + d + 32: levels, signs and one norm.

    Source:
        Jhunjhunwala et al. 2021, arXiv:2102.04487; what messages take is ``8 * len(message)``.
    """
    return length * levels.bit_length() + length + 32


def full_bits(levels: int) -> int:
    """Return the largest number of levels that costs no more bits than ``levels``."""
    return int((1 << levels.bit_length()) - 1)
