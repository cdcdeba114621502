"""Iterative magnitude pruning: prune, go back to the initial weights, train again."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from featherweight.sparse.loops.driver import iterate
from featherweight.sparse.loops.level import Level
from featherweight.sparse.loops.registry import LOOPS


@LOOPS.register(
    "imp",
    "iterative magnitude pruning, rewinding to the start",
    "Frankle & Carbin 2019, arXiv:1803.03635",
)
def imp(
    model: nn.Module, density: float | None = None, per_level: float = 0.2, **options: Any
) -> Iterator[Level]:
    """Find a lottery ticket: after each pruning all weights go back to where they started.

    Example:
        ```python
        for level in sparse.imp(model, sparsity=0.95):
            train(model, masks=level.masks)
        ```

    Args:
        model: trained and changed in place.
        density: final kept fraction, in (0, 1]; or ``sparsity=``, or ``levels=``.
        per_level: fraction of the kept weights that each pruning removes.
        options: of `featherweight.sparse.iterate`; ``reset`` is "weights".

    Source: Frankle & Carbin 2019, arXiv:1803.03635.
    """
    return iterate(model, density, per_level, **{"reset": "weights", **options})
