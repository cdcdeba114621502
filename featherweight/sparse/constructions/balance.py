"""How a layer's entries are best spread over its kernels, in closed form."""

from __future__ import annotations

import torch
from torch import Tensor

from featherweight.common import Generator


def kernel_counts(
    paths: Tensor,
    room: Tensor,
    count: int,
    *,
    alpha: float,
    beta: float,
    generator: Generator,
) -> Tensor:
    """Spread a layer's entries over its kernels.

    Maximises, over whole numbers ``0 <= K <= room`` with ``sum(K) = count``, ::

        alpha * (used inputs + used outputs) / (inputs + outputs)
        + (1 - alpha) * sum(paths * K) / most paths + beta * used kernels / count

    where a unit or kernel is used if an entry touches it, and "most paths" is what ``count``
    entries could reach if they only went for paths.

    Given how many entries each input unit gets, the best for the outputs is to serve unused ones
    first, and for kernels not to serve one twice before all. Everything but the outputs is then a
    sum of concave functions of the inputs' numbers, and how many outputs get used depends on the
    sum alone; so taking the largest gains first is exact. With `room` zero in places (a support)
    the inputs' numbers are still the best ones for all terms but the outputs', of which some may
    stay unused that could be served: the loss is at most ``alpha / (inputs + outputs)`` for each.

    Args:
        paths: float64 [groups, inputs], numbers of paths that reach each input unit.
        room: int64 [groups, outputs, inputs], most entries of each kernel.
        count: how many entries to keep, at most ``room.sum()``.
        alpha: weight of used units against paths, in [0, 1].
        beta: weight of used kernels, >= 0.
        generator: breaks ties between output units.

    Returns:
        K, int64 [groups, outputs, inputs].

    Source: the objective of Pham et al. 2023; solved there by a mixed-integer program.
    """
    degrees = _input_degrees(paths, room, count, alpha, beta)
    tables = [_serve(degree, limit, generator) for degree, limit in zip(degrees, room, strict=True)]
    return torch.stack(tables)


def _input_degrees(paths: Tensor, room: Tensor, count: int, alpha: float, beta: float) -> Tensor:
    """Return how many entries each input unit gets, int64 [groups, inputs].

    The gain of one more entry falls in steps: for the first also the unit gets used, for as many as
    the unit has kernels a kernel gets used. In the first entries of a group outputs get used.
    """
    groups, outputs, inputs = room.shape
    unit = alpha / (groups * (outputs + inputs))
    kernel = beta / max(1, count)
    path = (1 - alpha) * paths / _most_paths(paths, room, count)
    kernels, size = (room > 0).sum(1), room.sum(1)
    first = kernels.clamp(max=1)
    gain = torch.cat([path + kernel + unit, path + kernel, path], 1)
    length = torch.cat([first, kernels - first, size - kernels], 1)
    order = gain.argsort(dim=1, descending=True, stable=True)
    length = length.gather(1, order)
    served = (room > 0).any(2).sum(1, keepdim=True)  # outputs that can be used, by group
    start = length.cumsum(1) - length
    within = torch.minimum((served - start).clamp(min=0), length)
    gain = gain.gather(1, order)
    taken = _largest_gains(
        torch.cat([gain + unit, gain], 1), torch.cat([within, length - within], 1), count
    )
    spent = taken.view(groups, 2, 3 * inputs).sum(1)
    return torch.zeros_like(spent).scatter_(1, order, spent).view(groups, 3, inputs).sum(1)


def _most_paths(paths: Tensor, room: Tensor, count: int) -> float:
    size = room.sum(1)
    taken = _largest_gains(paths, size, count)
    most = float((taken * paths).sum())
    return most if most > 0 else 1.0


def _largest_gains(gain: Tensor, length: Tensor, count: int) -> Tensor:
    """Take ``count`` units, those of largest gain first, of equal gain evenly.

    Args:
        gain: float64, any shape.
        length: int64, same shape; how many units have each gain.
        count: at most the sum of ``length``.

    Returns:
        How many of each are taken, int64 of the same shape.
    """
    gains, lengths = gain.flatten(), length.flatten()
    order = gains.argsort(descending=True, stable=True)
    before = lengths[order].cumsum(0) - lengths[order]
    last = gains[order[(before < count).sum() - 1]] if count else torch.inf
    taken = lengths * (gains > last)
    tied = ((gains == last) & (lengths > 0)).nonzero().flatten()
    while left := count - int(taken.sum()):
        free = tied[taken[tied] < lengths[tied]]
        share = torch.full_like(free, left // len(free))
        share[: left % len(free)] += 1
        taken[free] += torch.minimum(share, lengths[free] - taken[free])
    return taken.view(gain.shape)


def _serve(degree: Tensor, room: Tensor, generator: Generator) -> Tensor:
    """Give each input unit its number of entries, the least served outputs first.

    Args:
        degree: int64 [inputs].
        room: int64 [outputs, inputs].
        generator: breaks ties.

    Returns:
        K, int64 [outputs, inputs].
    """
    table = torch.zeros_like(room)
    load = torch.zeros(len(room))
    # Units with few kernels to choose from come first, the others can give way to them.
    for unit in (room > 0).sum(0).argsort(stable=True).tolist():
        limit, left = room[:, unit], int(degree[unit])
        while left:
            free = (table[:, unit] < limit).nonzero().flatten()
            ties = torch.rand(len(free), generator=generator)
            chosen = free[(load[free] + ties).argsort()[:left]]
            table[chosen, unit] += 1
            load[chosen] += 1
            left -= len(chosen)
    return table
