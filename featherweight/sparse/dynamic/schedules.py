"""When masks change and by how much: timetables, and curves from a start to an end value."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from featherweight.common import Registry

Curve = Callable[[float, float, float], float]
"""A curve: progress in [0, 1], the value at 0 and the value at 1, to the value at that progress."""

SCHEDULES: Registry[Curve] = Registry("schedule")
"""Curves by name."""


@SCHEDULES.register("constant", "the start value throughout")
def constant(progress: float, start: float, end: float) -> float:
    """Stay at the start value."""
    return start


@SCHEDULES.register("linear", "a straight line")
def linear(progress: float, start: float, end: float) -> float:
    """Go from start to end in a straight line."""
    return polynomial(progress, start, end, degree=1)


@SCHEDULES.register("cubic", "fast first, then ever slower", "Zhu & Gupta 2017, arXiv:1710.01878")
def cubic(progress: float, start: float, end: float) -> float:
    """Go from start to end as ``end + (start - end) (1 - progress)^3``.

    Source: Zhu & Gupta 2017, arXiv:1710.01878, equation 1.
    """
    return polynomial(progress, start, end, degree=3)


@SCHEDULES.register("cosine", "half a period of a cosine", "Evci et al. 2020, arXiv:1911.11134")
def cosine(progress: float, start: float, end: float) -> float:
    """Go from start to end as ``end + (start - end) (1 + cos(pi progress)) / 2``."""
    share = (1 + math.cos(math.pi * progress)) / 2
    return start if progress <= 0 else end + (start - end) * share


@SCHEDULES.register("exponential", "the same factor in every equal time")
def exponential(progress: float, start: float, end: float) -> float:
    """Go from start to end as ``start^(1 - progress) end^progress``.

    Raises:
        ValueError: start or end is not over 0.
    """
    if not (start > 0 and end > 0):
        raise ValueError(f"an exponential schedule needs values over 0, got {start:g} to {end:g}")
    return start if progress <= 0 else end if progress >= 1 else start * (end / start) ** progress


def polynomial(progress: float, start: float, end: float, degree: float = 3) -> float:
    """Go from start to end as ``end + (start - end) (1 - progress)^degree``.

    Args:
        progress: in [0, 1].
        start, end: values at progress 0 and 1, met exactly.
        degree: over 0; 1 is a straight line, 3 the field's usual choice.
    """
    return start if progress <= 0 else end + (start - end) * (1 - progress) ** degree


def curve(schedule: str | Curve) -> Curve:
    """Return a curve by its name; a function is returned as it is.

    Raises:
        ValueError: the name is unknown.
    """
    return SCHEDULES[schedule].method if isinstance(schedule, str) else schedule


def stairs(progress: float, table: Sequence[tuple[float, float]]) -> float:
    """Return the value of the last row that has begun.

    Args:
        progress: in [0, 1].
        table: rows ``(from, value)`` with ``from`` rising from 0.

    Raises:
        ValueError: the table is empty, does not begin at 0, or does not rise.
    """
    begins = [row[0] for row in table]
    if begins[:1] != [0] or any(b <= a for a, b in pairwise(begins)):
        raise ValueError(f"rows (from, value) must rise from 0, got {list(table)}")
    return [value for begin, value in table if begin <= progress][-1]


@dataclass(frozen=True)
class Timetable:
    """The steps at which masks change: multiples of ``interval`` in ``[begin, end)``.

    Attributes:
        begin: steps taken before the first change can come, >= 0.
        end: steps taken when changes have ended, > begin.
        interval: steps from a change to the next, >= 1.

    Raises:
        ValueError: a value is out of range.
    """

    begin: int
    end: int
    interval: int

    def __post_init__(self) -> None:
        if self.interval < 1:
            raise ValueError(f"interval must be at least 1, got {self.interval}")
        if not 0 <= self.begin < self.end:
            raise ValueError(
                f"begin and end must fit 0 <= begin < end, got {self.begin}, {self.end}"
            )

    def due(self, step: int) -> bool:
        """Tell whether masks change when ``step`` steps have been taken."""
        return self.begin <= step < self.end and step % self.interval == 0

    def due_or_end(self, step: int) -> bool:
        """Tell the same, with a last change at the end."""
        return self.due(step) or step == self.end

    def progress(self, step: int) -> float:
        """Return how much of the time from begin to end has passed, in [0, 1]."""
        return min(1.0, max(0.0, (step - self.begin) / (self.end - self.begin)))


def timetable(steps: int, interval: int, begin: int, end: int) -> Timetable:
    """Build a timetable that fits into a training.

    Args:
        steps: optimizer steps of the whole training, >= 1.
        interval: steps from a change to the next, >= 1.
        begin, end: as of `Timetable`; the end lies in the training.

    Raises:
        ValueError: a value is out of range.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    if end > steps:
        raise ValueError(f"end must be at most steps={steps}, got {end}")
    return Timetable(begin, end, interval)


def fraction_of(fraction: float, shape: Curve, end: float = 0.0) -> Callable[[float], float]:
    """Return progress to a fraction that begins at ``fraction`` and goes to ``end``.

    Raises:
        ValueError: one of the two is outside [0, 1].
    """
    if not (0 <= fraction <= 1 and 0 <= end <= 1):
        raise ValueError(f"fractions must lie in [0, 1], got {fraction:g} and {end:g}")
    return lambda progress: shape(progress, fraction, end)
