"""SCULPT-ing: cycles on a moderately sparse mask, one pruning, one more cycle."""

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
from featherweight.sparse.select import Scope


@LOOPS.register(
    "sculpt",
    "train a denser mask in cycles, prune once, train one cycle more",
    "Gadhikar, Nelaturu & Burkholz 2024, arXiv:2406.02773",
)
def sculpt(
    model: nn.Module,
    density: float | None = None,
    per_level: float = 0.2,
    *,
    sparsity: float | None = None,
    start: float | None = None,
    cycles: int | None = None,
    budget: int | None = None,
    strategy: str = "constant",
    allocation: Allocation = "erk",
    scope: Scope = "global",
    support: Masks | None = None,
    seed: int | None = None,
    generator: Generator | None = None,
    include: Iterable[str] | None = None,
    exclude: Iterable[str] = (),
    **options: Any,
) -> Iterator[Level]:
    """Train a mask in cycles, prune what is smallest in one step, and train once more.

    The pruning leaves the kept weights as they are. It must not be too hard: with small networks
    going below about a third of the start density lost more than the cycles had won.

    Example:
        ```python
        for stage in sparse.sculpt(model, density=0.05, start=0.2, cycles=4, seed=0):
            train(model, masks=stage.masks)
        ```

    Args:
        model: trained and changed in place.
        density: final kept fraction, in (0, 1]; or ``sparsity``.
        per_level: only for the default of ``cycles``.
        sparsity: ``1 - density``.
        start: kept fraction of the random masks of the cycles; None: the support's, 0.5 without
            one (the papers use 0.8, 0.5 and 0.3). The final density itself: `cyclic` with one
            cycle more.
        cycles: number of trainings before the pruning, at least 1; None: as many as make the
            whole half as long as `lrr` with this density and ``per_level``. One more follows.
        budget: length of all trainings together, the last included; each one's share is its
            `Level.length`. None: the user knows.
        strategy: how the budget is shared, see `cycle_lengths`.
        allocation: density rule of random masks.
        scope: where weights compete at the pruning, see `featherweight.sparse.select`; "start"
            keeps the layer ratios of the start masks, which protects thin layers.
        support: masks to start from, or, with ``start``, to draw random ones inside.
        seed, generator: for random masks, criteria and resets.
        include, exclude: shell-style parameter name patterns.
        options: of `featherweight.sparse.iterate`, such as ``criterion`` ("magnitude"),
            ``structure`` and ``keep_units``.

    Yields:
        One `Level` a training.

    Raises:
        ValueError: a bad argument, a density over the start's, or a model without prunable
            weights.

    Source: Gadhikar, Nelaturu & Burkholz 2024, arXiv:2406.02773.
    """
    density = kept_density(density, sparsity)
    if start is None and support is None:
        start = 0.5
    if start is not None and not 0.0 < start <= 1.0:
        raise ValueError(f"start must lie in (0, 1], got {start:g}")
    generator = None if seed is None and generator is None else as_generator(seed, generator)
    names: dict[str, Any] = {"include": include, "exclude": exclude}
    masks = start_masks(
        model, start, allocation=allocation, support=support, generator=generator, **names
    )
    if cycles is None:
        cycles = max(1, round(len(level_counts(masks.numel, per_level, density=density)) / 2) - 1)
    if cycles < 1:
        raise ValueError(f"cycles must be at least 1, got {cycles}")
    lengths = None if budget is None else cycle_lengths(budget, cycles + 1, strategy)
    options = {
        "densities": [masks.density] * cycles + [density],
        "lengths": lengths,
        "scope": masks if scope == "start" else scope,
        **names,
        **options,
    }
    return iterate(model, support=masks, generator=generator, **options)
