"""Weight rewinding: as IMP, but back to the weights after a short warm-up."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from featherweight.sparse.loops.driver import iterate
from featherweight.sparse.loops.level import Level
from featherweight.sparse.loops.registry import LOOPS


@LOOPS.register(
    "wr", "as imp, rewinding to the end of a short warm-up", "Frankle et al. 2020, arXiv:1912.05671"
)
def wr(
    model: nn.Module, density: float | None = None, per_level: float = 0.2, **options: Any
) -> Iterator[Level]:
    """Find a lottery ticket with late rewinding: after each pruning go back to an early epoch.

    The first level has ``level.warmup`` set: train it for the few epochs after which the rewinding
    point lies (about 6 % of a level's training in the LRR paper).

    Example:
        ```python
        for level in sparse.wr(model, sparsity=0.95):
            train(model, masks=level.masks, epochs=10 if level.warmup else 150)
        ```

    Args:
        model: trained and changed in place.
        density: final kept fraction, in (0, 1]; or ``sparsity=``, or ``levels=``.
        per_level: fraction of the kept weights that each pruning removes.
        options: of `featherweight.sparse.iterate`; ``reset`` is "weights", ``warmup`` is True.

    Source: Frankle et al. 2020, arXiv:1912.05671.
    """
    return iterate(model, density, per_level, **{"reset": "weights", "warmup": True, **options})
