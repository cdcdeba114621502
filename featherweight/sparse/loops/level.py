"""What a loop yields: a level to train, and all it takes to go on from there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from featherweight.common import kept_density
from featherweight.sparse.loops.reset import Rewind
from featherweight.sparse.masks import Masks


@dataclass(frozen=True)
class Resume:
    """Where a loop stands: what it needs, beside the model, to go on after an interruption.

    Attributes:
        index: the level under training, -1 for the warm-up.
        masks: its masks.
        rewind: the state at the rewinding point; empty before it or where nothing is rewound.
        generator_state: of the loop's random generator; None where it has none.
        optimizer: state dict of the optimizer at the rewinding point; None where it is not rewound.
    """

    index: int
    masks: Masks
    rewind: Rewind = field(default_factory=dict)
    generator_state: Tensor | None = None
    optimizer: dict[str, Any] | None = None


@dataclass(frozen=True)
class Level:
    """One stage of a loop: train the model with ``masks`` held, then ask for the next.

    Attributes:
        index: 0 for the first level, -1 for the warm-up before it.
        last: index of the last level.
        masks: masks to train with; the model's masked weights are zero already.
        resume: pass it to the same loop as ``resume=`` to go on from here in another process,
            with the model's state as saved.
        length: how long to train, in the unit of the loop's ``budget=``; None without a budget
            and in the warm-up.
    """

    index: int
    last: int
    masks: Masks
    resume: Resume
    length: int | None = None

    @property
    def warmup(self) -> bool:
        """Whether this is the short training before the rewinding point."""
        return self.index < 0

    @property
    def final(self) -> bool:
        """Whether no level follows."""
        return self.index == self.last

    @property
    def density(self) -> float:
        """Kept fraction of the masks."""
        return self.masks.density

    def __str__(self) -> str:
        name = "warm-up" if self.warmup else f"level {self.index} of {self.last}"
        return f"{name}, density {self.density:.4g}"


def level_counts(
    size: int,
    per_level: float,
    *,
    density: float | None = None,
    levels: int | None = None,
    start: int | None = None,
) -> list[int]:
    """Return how many weights each level keeps: ``round((1 - per_level)**t * start)``.

    Given a density, levels go on until it is reached, and the last one keeps exactly the asked
    number where the formula would keep fewer.

    Args:
        size: number of prunable weights.
        per_level: fraction of the kept weights that each pruning removes, in [0, 1).
        density: wished-for final density; or
        levels: number of prunings.
        start: kept at level 0; None: all.

    Raises:
        ValueError: not exactly one of density and levels, or a value out of range.
    """
    if (density is None) == (levels is None):
        raise ValueError("give exactly one of density= (or sparsity=) and levels=")
    if not 0.0 <= per_level < 1.0:
        raise ValueError(f"per_level must lie in [0, 1), got {per_level:g}")
    start = size if start is None else start
    if levels is not None:
        if levels < 0:
            raise ValueError(f"levels must be at least 0, got {levels}")
        return [round((1 - per_level) ** t * start) for t in range(levels + 1)]
    target = target_count(size, kept_density(density), start)
    if per_level == 0.0 and target < start:
        raise ValueError("per_level must be over 0 to reach a density; or give levels=")
    counts = [start]
    while counts[-1] > target:
        counts.append(max(round((1 - per_level) ** len(counts) * start), target))
    return counts


def target_count(size: int, density: float, start: int) -> int:
    """Return how many of ``size`` weights a density keeps, all of them among ``start``.

    Raises:
        ValueError: it would keep none, or more than there are.
    """
    target = round(density * size)
    if target > start:
        raise ValueError(
            f"density {density:g} asks for {target} weights, the support holds {start}"
        )
    if target < 1:
        raise ValueError(f"density {density:g} of {size} weights keeps none")
    return target


def wished_counts(
    size: int,
    start: int,
    per_level: float,
    density: float | None,
    sparsity: float | None,
    levels: int | None,
    densities: Sequence[float] | None,
) -> list[int]:
    """Return how many of ``size`` weights each level keeps, from whichever wish was given.

    Raises:
        ValueError: not exactly one wish, or a value out of range.
    """
    by_density = density is not None or sparsity is not None
    if by_density + (levels is not None) + (densities is not None) != 1:
        raise ValueError("give exactly one of density= (or sparsity=), levels= and densities=")
    if densities is not None:
        return _given_counts(size, densities, start)
    wish = kept_density(density, sparsity) if by_density else None
    return level_counts(size, per_level, density=wish, levels=levels, start=start)


def _given_counts(size: int, densities: Sequence[float], start: int) -> list[int]:
    counts = [target_count(size, kept_density(density), start) for density in densities]
    if not counts or counts[0] != start:
        first = f"{densities[0]:g}" if counts else "none"
        raise ValueError(f"densities must begin with {start / size:g}, as masked, got {first}")
    if counts != sorted(counts, reverse=True):
        raise ValueError(f"densities must never rise, got {list(densities)}")
    return counts
