"""Reduce collected runs over their seeds: the rows of the tables and the curves of the pictures."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from featherweight.lab.report.records import Epoch, Level, Run


@dataclass(frozen=True)
class Row:
    """One method at one level, over its seeds.

    Attributes:
        method: display name of the recipe.
        stage: as in the run ("level-03", "warmup").
        level: number of the level; -1 for the warm-up.
        last: whether it is the last level that the method has reached.
        seeds: how many seeds have finished this level.
        density: kept fraction of the prunable weights, mean over the seeds.
        nonzeros: kept prunable weights, mean over the seeds.
        prunable: prunable weights.
        parameters: all parameters, biases and norms included.
        accuracy: mean test accuracy, fraction of 1; None where no seed has one.
        deviation: sample standard deviation of it; None below two seeds.
        flops: operations of one forward pass of one sample, zeros skipped.
        dense_flops: the same, zeros multiplied too.
        step_seconds: median time of a training step.
        bytes: size of the packed sparse file.
        dense_bytes: size of the dense file.
    """

    method: str
    stage: str
    level: int
    last: bool
    seeds: int
    density: float
    nonzeros: float
    prunable: int
    parameters: int
    accuracy: float | None
    deviation: float | None
    flops: float | None
    dense_flops: float | None
    step_seconds: float | None
    bytes: float | None
    dense_bytes: float | None

    @property
    def all_nonzeros(self) -> float:
        """Parameters that are not masked: kept prunable weights and all that is never pruned."""
        return self.parameters - self.prunable + self.nonzeros

    @property
    def flops_ratio(self) -> float | None:
        """Sparse over dense operations; None where they were not counted."""
        return self.flops / self.dense_flops if self.flops and self.dense_flops else None


@dataclass(frozen=True)
class Curve:
    """Mean, smallest and largest value over the seeds at each place of ``x``."""

    x: tuple[float, ...]
    mean: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]

    def __bool__(self) -> bool:
        return bool(self.x)


def summarise(runs: Sequence[Run]) -> tuple[Row, ...]:
    """Return one row a method and level, methods in the order given, levels ascending."""
    return tuple(row for run in runs for row in _rows_of(run))


def _rows_of(run: Run) -> list[Row]:
    stages = {(level.level, level.stage) for seed in run.seeds for level in seed.levels}
    return [_row(run, key, key == max(stages)) for key in sorted(stages)]


def _row(run: Run, key: tuple[int, str], last: bool) -> Row:
    levels = [level for seed in run.seeds for level in seed.levels if key == _key(level)]
    accuracies = known(level.test_accuracy for level in levels)
    steps = [t.step_seconds for seed in run.seeds for t in seed.timings if t.stage == key[1]]
    return Row(
        method=run.name,
        stage=key[1],
        level=key[0],
        last=last,
        seeds=len(levels),
        density=statistics.fmean(level.density for level in levels),
        nonzeros=statistics.fmean(level.nonzeros for level in levels),
        prunable=levels[0].prunable,
        parameters=levels[0].parameters,
        accuracy=mean(accuracies),
        deviation=statistics.stdev(accuracies) if len(accuracies) > 1 else None,
        flops=mean(known(level.flops for level in levels)),
        dense_flops=mean(known(level.dense_flops for level in levels)),
        step_seconds=statistics.median(steps) if steps else None,
        bytes=mean(known(level.bytes for level in levels)),
        dense_bytes=mean(known(level.dense_bytes for level in levels)),
    )


def _key(level: Level) -> tuple[int, str]:
    return level.level, level.stage


def known(values: Iterable[float | None]) -> list[float]:
    """Drop what is missing or not finite."""
    return [value for value in values if value is not None and math.isfinite(value)]


def mean(values: Sequence[float]) -> float | None:
    """Return the mean, or None of nothing."""
    return statistics.fmean(values) if values else None


def curve(points: Iterable[tuple[float, Sequence[float]]]) -> Curve:
    """Reduce ``(x, one value a seed)`` to a curve; places without a value are left out."""
    kept = [(x, values) for x, values in points if values]
    return Curve(
        x=tuple(x for x, _ in kept),
        mean=tuple(statistics.fmean(values) for _, values in kept),
        low=tuple(min(values) for _, values in kept),
        high=tuple(max(values) for _, values in kept),
    )


def by_level(run: Run, value: Callable[[Level], float | None]) -> dict[int, list[float]]:
    """Gather a value of each finished level over the seeds; the warm-up is left out."""
    numbers = sorted({level.level for seed in run.seeds for level in seed.levels})
    return {
        number: known(
            value(level) for seed in run.seeds for level in seed.levels if level.level == number
        )
        for number in numbers
        if number >= 0
    }


def accuracy_against_density(run: Run) -> Curve:
    """Return test accuracy over density, from dense to sparse."""
    densities = by_level(run, lambda level: level.density)
    accuracies = by_level(run, lambda level: level.test_accuracy)
    places = [(statistics.fmean(densities[n]), accuracies[n]) for n in densities if densities[n]]
    return curve((density, values) for density, values in places if density > 0)


def sign_flips(run: Run, since: str) -> Curve:
    """Return the fraction of kept weights whose sign changed, over the level.

    Args:
        run: what to reduce.
        since: "start" or "previous": what the signs are compared with.
    """

    def fraction(level: Level) -> float | None:
        flips = level.flips_from_start if since == "start" else level.flips_from_previous
        return flips.fraction if flips else None

    return curve(by_level(run, fraction).items())


def over_epochs(run: Run, value: Callable[[Epoch], float | None]) -> Curve:
    """Return a value over the epochs of the whole run, counted from 1 through all stages."""
    values: dict[tuple[int, int], list[float]] = {place: [] for place in epoch_places(run)}
    for seed in run.seeds:
        for epoch in seed.epochs:
            values[epoch.level, epoch.epoch] += known([value(epoch)])
    return curve(enumerate(values.values(), start=1))


def epoch_places(run: Run) -> list[tuple[int, int]]:
    """List (level, epoch) of all epochs that any seed has done, in order."""
    return sorted({(epoch.level, epoch.epoch) for seed in run.seeds for epoch in seed.epochs})


def layer_densities(run: Run) -> dict[str, float]:
    """Return layer name to density at the last level reached, mean over the seeds that did."""
    last = max((level.level for seed in run.seeds for level in seed.levels), default=-1)
    layers = [
        layer
        for seed in run.seeds
        for level in seed.levels
        if level.level == last
        for layer in level.layers
    ]
    names = dict.fromkeys(layer.name for layer in layers)
    return {
        name: statistics.fmean(layer.density for layer in layers if layer.name == name)
        for name in names
    }
