"""Learning rate rewinding: prune, keep the weights, restart the learning rate."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from featherweight.sparse.loops.driver import iterate
from featherweight.sparse.loops.level import Level
from featherweight.sparse.loops.registry import LOOPS


@LOOPS.register(
    "lrr",
    "prune, keep the weights, restart the learning rate",
    "Renda et al. 2020, arXiv:2003.02389",
)
def lrr(
    model: nn.Module, density: float | None = None, per_level: float = 0.2, **options: Any
) -> Iterator[Level]:
    """Prune level by level, training on from the pruned weights.

    Each level's training must restart the learning-rate schedule, warm-up included: that restart
    is all that is rewound, and without the warm-up high learning rates are unstable.

    Example:
        ```python
        for level in sparse.lrr(model, sparsity=0.95):
            train(model, masks=level.masks)
        ```

    Args:
        model: trained and changed in place.
        density: final kept fraction, in (0, 1]; or ``sparsity=``, or ``levels=``.
        per_level: fraction of the kept weights that each pruning removes; 0 trains a fixed mask
            in cycles.
        options: of `featherweight.sparse.iterate`; ``reset`` is "nothing". With
            ``reset="norms", warmup=True`` batch norms are rewound (LRR with BN rewinding).

    Source: Renda et al. 2020, arXiv:2003.02389; studied in Gadhikar & Burkholz 2024,
    arXiv:2402.19262.
    """
    return iterate(model, density, per_level, **{"reset": "nothing", **options})
