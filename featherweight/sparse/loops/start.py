"""The mask that cyclic training begins with."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from featherweight.common import Generator
from featherweight.sparse.density.allocate import Allocation
from featherweight.sparse.loops.level import target_count
from featherweight.sparse.masks import Masks
from featherweight.sparse.prune import random


def start_masks(
    model: nn.Module,
    density: float | None,
    *,
    allocation: Allocation = "erk",
    support: Masks | None = None,
    generator: Generator | None = None,
    include: Iterable[str] | None = None,
    exclude: Iterable[str] = (),
) -> Masks:
    """Return the support itself, or random masks of a density inside it.

    Args:
        model: its weights are not touched.
        density: kept fraction; None, or the support's own: the support as it is.
        allocation: of random masks, see `featherweight.sparse.random`.
        support: masks to stay inside; None: all prunable weights.
        generator: for random masks.
        include, exclude: shell-style parameter name patterns.

    Raises:
        ValueError: the support does not fit or is too small, or a draw has no generator.
    """
    names: dict[str, Any] = {"include": include, "exclude": exclude}
    dense = Masks.dense(model, **names)
    inside = dense if support is None else support
    dense.check(inside)
    if density is None:
        return inside
    if target_count(dense.numel, density, inside.nonzeros) == inside.nonzeros:
        return inside
    return random(model, density, allocation, support=support, generator=generator, **names)
