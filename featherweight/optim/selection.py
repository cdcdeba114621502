"""Which weights NanoAdam trains: the smallest of a tensor or chunk, exactly as many as asked."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

BIT_PATTERN = {2: torch.int16, 4: torch.int32, 8: torch.int64}

SAMPLE = 1 << 14  # entries looked at to guess a large tensor's threshold


def count(size: int, density: float) -> int:
    """Return how many of ``size`` entries a density selects: the ceiling, and one at least.

    Args:
        size: number of entries; 0 selects none.
        density: selected fraction in (0, 1].
    """
    # 0.07 * 100 is 7.000000000000001 in floating point; a density is meant as it is written.
    return min(size, max(1, math.ceil(round(density * size, 6)))) if size else 0


def magnitudes(weights: Tensor) -> Tensor:
    """Return integers that are ordered as the absolute values are: the bits without the sign.

    Equality and order are exact for them, NaN included, which comes after infinity.

    Args:
        weights: real floating tensor of any shape.
    """
    kind = BIT_PATTERN[weights.element_size()]
    return weights.view(kind).bitwise_and(torch.iinfo(kind).max)


@torch.no_grad()
def smallest(
    weights: Tensor, density: float, chunk: int | None = None, skip_zeros: bool = False
) -> Tensor:
    """Find the weights of smallest magnitude.

    Of equal magnitudes the one with the lowest index is selected, on every device. ``ceil(density *
    n)`` of the ``n`` weights of the tensor, or of each chunk, are selected; the last chunk may be
    shorter.

    Args:
        weights: flat real floating tensor.
        density: selected fraction in (0, 1].
        chunk: entries that compete with each other; None: all of the tensor.
        skip_zeros: never select exact zeros; the density then counts the others alone.

    Returns:
        int64 indices, ascending.

    Source: Zhou et al. 2025, arXiv:2506.21374, Algorithm 1 (Bottom_k) and Appendix G (chunks).
    """
    keys = magnitudes(weights)
    size = len(keys) if chunk is None else min(chunk, len(keys))
    if size == len(keys):
        return _smallest(keys, density, skip_zeros)
    whole = len(keys) // size * size
    parts = [_of_rows(keys[:whole].view(-1, size), density, skip_zeros)]
    if whole < len(keys):
        parts.append(_smallest(keys[whole:], density, skip_zeros) + whole)
    return torch.cat(parts)


def _smallest(keys: Tensor, density: float, skip_zeros: bool) -> Tensor:
    if skip_zeros:
        kept = where(keys != 0)
        return kept[_lowest(keys[kept], count(len(kept), density))]
    return _lowest(keys, count(len(keys), density))


def _lowest(keys: Tensor, keep: int) -> Tensor:
    """Return the ascending indices of the ``keep`` lowest keys."""
    if keep == len(keys):
        return torch.arange(len(keys), device=keys.device)
    found = _candidates(keys, keep)
    values = keys[found]
    threshold = values.kthvalue(keep).values
    found, values = found[values <= threshold], values[values <= threshold]
    if (surplus := len(found) - keep) > 0:
        ties = where(values == threshold)
        kept = torch.ones_like(values, dtype=torch.bool)
        kept[ties[len(ties) - surplus :]] = False
        found = found[kept]
    return found


def _candidates(keys: Tensor, keep: int) -> Tensor:
    """Return ascending indices that hold the ``keep`` lowest keys and few others.

    A sample says about how large they are. It decides how fast this goes, not what is selected.
    """
    if len(keys) > 4 * SAMPLE:
        sample = keys[:: len(keys) // SAMPLE | 1].sort().values
        middle = keep / len(keys) * len(sample)
        bound = int(middle + 4 * math.sqrt(middle) + 8)
        if bound < len(sample):
            found = where(keys <= sample[bound])
            if len(found) >= keep:
                return found
    return torch.arange(len(keys), device=keys.device)


def where(mask: Tensor) -> Tensor:
    """Return the ascending int64 indices of the true entries of a flat bool tensor."""
    if mask.device.type == "cpu":  # several times as fast as torch's on one core
        return torch.from_numpy(np.flatnonzero(mask.numpy()))
    return mask.nonzero().flatten()


def _of_rows(keys: Tensor, density: float, skip_zeros: bool) -> Tensor:
    rows, size = keys.shape
    if skip_zeros:
        zeros = (keys == 0).sum(1).tolist()
        keep = torch.tensor([count(size - z, density) for z in zeros], device=keys.device)
        ranks = keep + torch.tensor(zeros, device=keys.device)
        threshold = keys.sort(1).values.gather(1, (ranks - 1).clamp(min=0)[:, None])
        keys = keys.masked_fill(keys == 0, torch.iinfo(keys.dtype).max)
    else:
        keep = torch.full((rows,), count(size, density), device=keys.device)
        threshold = keys.kthvalue(count(size, density), 1, keepdim=True).values
    below, ties = keys < threshold, keys == threshold
    room = keep - below.sum(1)
    return where((below | (ties & (ties.cumsum(1) <= room[:, None]))).flatten())
