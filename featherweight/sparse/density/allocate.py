"""From a rule, other masks, or a table of densities to whole numbers of kept weights."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from math import prod

from torch import Tensor

from featherweight.sparse.density.registry import DENSITIES, Shapes
from featherweight.sparse.density.solve import waterfill
from featherweight.sparse.masks import Masks

Allocation = str | Masks | Mapping[str, float]
"""The name of a density rule, masks whose layer densities are copied, or densities by layer."""


def allocate(
    shapes: Shapes, density: float, allocation: Allocation = "erk", *, legacy: bool = False
) -> dict[str, float]:
    """Return the fraction that each layer keeps.

    Args:
        shapes: parameter name to shape, in forward order.
        density: overall kept fraction, in (0, 1].
        allocation: a registered rule's name; or `Masks`, or densities by name: their ratios are
            kept and scaled to the overall density, with what a full layer can't take handed on.
        legacy: the formulas of published code, which can miss the overall density.

    Raises:
        ValueError: the density is outside (0, 1], the rule is unknown or has no legacy form, or
            the names differ.
    """
    if not 0.0 < density <= 1.0:
        raise ValueError(f"density must lie in (0, 1], got {density:g}")
    if isinstance(allocation, str):
        rule = DENSITIES[allocation].method
        # A rule without a legacy= argument is published in one form only, and exact in it.
        if legacy and "legacy" in inspect.signature(rule).parameters:
            return rule(shapes, density, legacy=True)
        return rule(shapes, density)
    profile = allocation.densities() if isinstance(allocation, Masks) else dict(allocation)
    if set(profile) != set(shapes):
        odd = sorted(set(profile) ^ set(shapes))[0]
        raise ValueError(f"allocation and model differ: {odd!r} is only in one of them")
    sizes = {name: prod(shape) for name, shape in shapes.items()}
    kept = waterfill({n: profile[n] for n in sizes}, sizes, density * sum(sizes.values()))
    return {name: kept[name] / size for name, size in sizes.items()}


def kept_counts(
    densities: Mapping[str, float],
    shapes: Shapes,
    total: int | None = None,
    support: Mapping[str, Tensor] | None = None,
) -> dict[str, int]:
    """Round densities to whole numbers of kept weights with an exact sum.

    Every layer gets the floor of its share; the largest remainders get one more, ties in layer
    order. A layer whose support is too small passes the surplus on, in proportion to densities.

    Args:
        densities: kept fraction by layer.
        shapes: parameter name to shape.
        total: the sum to meet; None: the rounded sum of the shares.
        support: masks outside which nothing can be kept; None: everywhere.

    Raises:
        ValueError: the support holds fewer than ``total`` entries.
    """
    sizes = {name: prod(shape) for name, shape in shapes.items()}
    room = (
        sizes if support is None else {name: int(support[name].count_nonzero()) for name in sizes}
    )
    shares = {name: densities[name] * size for name, size in sizes.items()}
    total = round(sum(shares.values())) if total is None else total
    if total > sum(room.values()):
        raise ValueError(
            f"{total} weights are to be kept but the support holds {sum(room.values())}"
        )
    if any(shares[name] > room[name] for name in sizes):
        wish = {n: shares[n] / room[n] if room[n] else 0.0 for n in sizes}
        shares = waterfill(wish, room, total)
    counts = {name: min(int(share + 1e-9), room[name]) for name, share in shares.items()}
    by_remainder = sorted(sizes, key=lambda name: counts[name] - shares[name])
    while missing := total - sum(counts.values()):
        step = 1 if missing > 0 else -1
        order = by_remainder if step > 0 else reversed(by_remainder)
        movable = [n for n in order if 0 <= counts[n] + step <= room[n]]
        for name in movable[: abs(missing)]:
            counts[name] += step
    return counts
