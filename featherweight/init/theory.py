"""What independent weights do to norms and likeness, in closed form."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from operator import mul


def relu_cosine(cosine: float) -> float:
    """Return the cosine of two ReLU states whose inputs to the ReLU are Gaussian with this cosine.

    ``(sqrt(1 - c^2) + c (pi - arccos c)) / pi``, never below c, equal to it at 1 alone.

    Raises:
        ValueError: no cosine.

    Source: Cho and Saul 2009, *Kernel methods for deep learning*, equation 6 for n = 1.
    """
    if not -1 <= cosine <= 1:
        raise ValueError(f"cosine must lie in [-1, 1], got {cosine:g}")
    return (math.sqrt(1 - cosine**2) + cosine * (math.pi - math.acos(cosine))) / math.pi


def similarity_by_depth(
    cosine: float, blocks: int, *, alpha: float = math.sqrt(0.5)
) -> tuple[float, ...]:
    """Follow the cosine of two inputs through wide residual blocks with projections, He's weights.

    ``c' = k(alpha^2 k(c) + beta^2 c)`` with ``alpha^2 + beta^2 = 1`` and k = `relu_cosine`: every
    start goes to 1. Exact at infinite width.

    Args:
        cosine: of the two states before the first block.
        blocks: how many.
        alpha: weight of the branch, in [0, 1].

    Returns:
        blocks + 1 cosines.

    Raises:
        ValueError: a bad argument.

    Source: this recursion replaces the bound of Gadhikar and Burkholz 2022, arXiv:2210.02411.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must lie in [0, 1], got {alpha:g}")
    found = [cosine]
    for _ in range(blocks):
        mixed = alpha**2 * relu_cosine(found[-1]) + (1 - alpha**2) * found[-1]
        found.append(relu_cosine(min(mixed, 1.0)))
    return tuple(found)


@dataclass(frozen=True)
class BlockScales:
    """Widths of a residual block with a projection, and standard deviations of its weights.

    Attributes:
        width: units of its state.
        hidden: units between its two layers.
        first, second, skip: standard deviations of the layers of the branch and of the projection.
        alpha, beta: multipliers of branch and skip.
    """

    width: int
    hidden: int
    first: float
    second: float
    skip: float
    alpha: float = 1.0
    beta: float = 1.0

    @property
    def factor(self) -> float:
        """What the expected squared norm is multiplied by."""
        branch = (self.alpha * self.second * self.first) ** 2 * self.hidden / 2
        return self.width / 2 * (branch + (self.beta * self.skip) ** 2)


def expected_square_norm(width: int, std: float, blocks: Iterable[BlockScales]) -> float:
    """Return E |state|^2 / |input|^2 of a residual network with independent symmetric weights.

    Exact at any width and depth, for linear layers and zero biases.

    Args:
        width: units of the first layer.
        std: standard deviation of its weights.
        blocks: the residual blocks; none: the state behind the first layer.

    Source: Gadhikar and Burkholz 2022, arXiv:2210.02411 (norm theorem).
    """
    return width / 2 * std**2 * math.prod(block.factor for block in blocks)


def bias_scales(stds: Sequence[float], *, bias_factor: float = 1.0) -> tuple[float, ...]:
    """Return the standard deviation of each layer's biases: the running product of the weights'.

    Args:
        stds: standard deviations of the weights, from the first layer on.
        bias_factor: multiplies all.

    Source: Fischer, Gadhikar and Burkholz 2021, arXiv:2110.11150, section 3.
    """
    return tuple(bias_factor * product for product in accumulate(stds, mul))


def expected_square_norm_with_biases(
    square_norm: float,
    widths: Sequence[int],
    stds: Sequence[float],
    bias_stds: Sequence[float],
) -> float:
    """Return E |state|^2 of a plain ReLU network with independent symmetric weights and biases.

    Exact at any width and depth, for linear layers with a ReLU behind each.

    Args:
        square_norm: of the input.
        widths: units of each layer.
        stds, bias_stds: standard deviations of each layer's weights and biases.

    Raises:
        ValueError: sequences of different lengths.

    Source: Fischer, Gadhikar and Burkholz 2021, arXiv:2110.11150, Lemma 3.2.
    """
    if not len(widths) == len(stds) == len(bias_stds):
        lengths = f"{len(widths)}, {len(stds)}, {len(bias_stds)}"
        raise ValueError(f"widths, stds and bias_stds must be of one length, got {lengths}")
    for width, std, bias in zip(widths, stds, bias_stds, strict=True):
        square_norm = width / 2 * (std**2 * square_norm + bias**2)
    return square_norm
