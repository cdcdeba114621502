"""Cyclic sparse training: one mask, and the learning rate begun again cycle after cycle."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

from featherweight.common import Generator, as_generator, kept_density
from featherweight.sparse.density.allocate import Allocation
from featherweight.sparse.loops.cycles import cycle_lengths
from featherweight.sparse.loops.driver import iterate
from featherweight.sparse.loops.level import Level, level_counts
from featherweight.sparse.loops.registry import LOOPS
from featherweight.sparse.loops.start import start_masks
from featherweight.sparse.masks import Masks


@LOOPS.register(
    "cyclic",
    "train one fixed mask in cycles of the learning rate",
    "Gadhikar, Nelaturu & Burkholz 2024, arXiv:2406.02773",
)
def cyclic(
    model: nn.Module,
    density: float | None = None,
    per_level: float = 0.2,
    *,
    sparsity: float | None = None,
    cycles: int | None = None,
    budget: int | None = None,
    strategy: str = "constant",
    allocation: Allocation = "erk",
    support: Masks | None = None,
    seed: int | None = None,
    generator: Generator | None = None,
    include: Iterable[str] | None = None,
    exclude: Iterable[str] = (),
    **options: Any,
) -> Iterator[Level]:
    """Train a fixed mask in cycles; weights and batch-norm statistics are carried on.

    Each cycle's training must restart the learning-rate schedule, warm-up included, with an empty
    optimizer. Compare with *one* cycle of the same total length before you credit the cycles.

    Example:
        ```python
        for cycle in sparse.cyclic(model, density=0.02, cycles=8, seed=0):
            train(model, masks=cycle.masks)
        ```

    Args:
        model: trained and changed in place.
        density: kept fraction of random masks, in (0, 1]; or ``sparsity``; 1 trains the dense
            model; neither, with ``support``: its own.
        per_level: only for the default of ``cycles``.
        sparsity: ``1 - density``.
        cycles: number of trainings; None: as many as `lrr` has levels with this density and
            ``per_level``. 1 is plain training.
        budget: length of all cycles together; each cycle's share is its `Level.length`. None: the
            user knows.
        strategy: how the budget is shared, see `cycle_lengths`.
        allocation: density rule of random masks.
        support: masks to train in, or, with ``density``, to draw random ones inside.
        seed, generator: for random masks, and for random resets.
        include, exclude: shell-style parameter name patterns.
        options: of `featherweight.sparse.iterate`.

    Yields:
        One `Level` a cycle.

    Raises:
        ValueError: a bad argument, or a model without prunable weights.

    Source: Gadhikar, Nelaturu & Burkholz 2024, arXiv:2406.02773.
    """
    if density is not None or sparsity is not None or support is None:
        density = kept_density(density, sparsity)
    generator = None if seed is None and generator is None else as_generator(seed, generator)
    names: dict[str, Any] = {"include": include, "exclude": exclude}
    masks = start_masks(
        model, density, allocation=allocation, support=support, generator=generator, **names
    )
    if cycles is None:
        cycles = len(level_counts(masks.numel, per_level, density=masks.density))
    if cycles < 1:
        raise ValueError(f"cycles must be at least 1, got {cycles}")
    lengths = None if budget is None else cycle_lengths(budget, cycles, strategy)
    options = {"densities": [masks.density] * cycles, "lengths": lengths, **names, **options}
    return iterate(model, support=masks, generator=generator, **options)
