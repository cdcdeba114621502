"""Pure functions that drop and grow entries of one tensor's mask."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from featherweight.common import Generator
from featherweight.sparse.dynamic.evolving import Moment
from featherweight.sparse.masks import Masks
from featherweight.sparse.select import top_k


def drop(mask: Tensor, worth: Tensor, count: int) -> Tensor:
    """Return the mask without its ``count`` entries of least worth.

    Args:
        mask: bool.
        worth: real, same shape, no NaN; of equal entries the one with the highest index goes.
        count: from 0 to the number of kept entries.
    """
    return top_k(worth, int(mask.count_nonzero()) - count, mask)


def grow(mask: Tensor, worth: Tensor, count: int, support: Tensor | None = None) -> Tensor:
    """Return the mask with the ``count`` entries of greatest worth outside it.

    Args:
        mask: bool.
        worth: real, same shape, no NaN; of equal entries the one with the lowest index comes.
        count: from 0 to the number of entries that may come.
        support: bool, same shape; entries outside never come. None: all may.
    """
    return mask | top_k(worth, count, _free(mask, support))


def exchange(
    mask: Tensor, weight: Tensor, gradient: Tensor, count: int, support: Tensor | None = None
) -> Tensor:
    """Drop the smallest weights, then grow where the gradient is largest.

    What has just been dropped may come back.

    Args:
        mask: bool, in force.
        weight, gradient: same shape; the gradient is dense.
        count: how many go and come, from 0 to the number of kept entries.
        support: bool, same shape; entries outside never come.

    Returns:
        A mask that keeps as many entries.

    Source: Evci et al. 2020, arXiv:1911.11134, algorithm 1.
    """
    return grow(drop(mask, weight.abs(), count), gradient.abs(), count, support)


def rewire(
    mask: Tensor,
    worth: Tensor,
    count: int,
    generator: Generator,
    support: Tensor | None = None,
) -> Tensor:
    """Drop the entries of least worth, then grow as many at random among those masked before.

    Args:
        mask: bool, in force.
        worth: real, same shape.
        count: how many go and come; fewer where not so many are masked within the support.
        generator: CPU generator, advanced by one draw an entry.
        support: bool, same shape; entries outside never come.

    Returns:
        A mask that keeps as many entries.

    Source: Mocanu et al. 2018, arXiv:1707.04780, algorithm 1.
    """
    free = _free(mask, support)
    count = min(count, int(free.count_nonzero()))
    return drop(mask, worth, count) | sample(free, count, generator)


def sample(candidates: Tensor, count: int, generator: Generator) -> Tensor:
    """Mark ``count`` of the candidates (bool), every choice equally likely, the same everywhere."""
    draw = torch.rand(candidates.shape, generator=generator, dtype=torch.float64)
    draw = draw.to(candidates.device)
    # The largest draws are nearly always among these, and few are ranked much faster than all.
    likely = candidates & (draw > 1 - 2 * count / max(1, int(candidates.count_nonzero())))
    enough = int(likely.count_nonzero()) >= count
    return top_k(draw, count, likely if enough else candidates)


def by_layer(now: Moment, change: Callable[[str, Tensor], Tensor]) -> Masks:
    """Apply ``change(name, mask)`` to every mask; those of frozen weights stay."""
    return Masks(
        {
            name: mask if name in now.frozen else change(name, mask)
            for name, mask in now.masks.items()
        }
    )


def within(support: Masks | None, name: str, mask: Tensor) -> Tensor | None:
    """Return the support of one tensor on its mask's device; None: no support."""
    return None if support is None else support[name].to(mask.device)


def _free(mask: Tensor, support: Tensor | None) -> Tensor:
    return ~mask if support is None else support & ~mask
