"""Cyclic results beside their matched-budget controls: same epochs, one long schedule."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from featherweight.lab.control import control
from featherweight.lab.errors import BadInput
from featherweight.lab.identity import distinctive
from featherweight.lab.parse import build
from featherweight.lab.report.records import Run
from featherweight.lab.statistics import interval


@dataclass(frozen=True)
class Matched:
    """A cyclic method and what one long schedule brings.

    Attributes:
        method: display name.
        control: display name of the control; None: it is not among the runs.
        seeds: finished in both.
        gain: mean accuracy of the method minus that of the control; None without seeds.
        low, high: 95 % confidence interval of it, paired over seeds.
    """

    method: str
    control: str | None
    seeds: int = 0
    gain: float | None = None
    low: float | None = None
    high: float | None = None

    def __str__(self) -> str:
        if self.control is None:
            return (
                f"{self.method}: the control, one schedule of the same epochs, is missing; "
                "`featherweight run` adds it"
            )
        if self.gain is None or self.low is None or self.high is None:
            return f"{self.method}: the control {self.control} has no finished seed in common"
        points = f"{100 * self.gain:+.1f} points"
        spread = f" (95 % interval {100 * self.low:+.1f} to {100 * self.high:+.1f})"
        return (
            f"{self.method} minus {self.control}: {points}{spread if self.seeds > 1 else ''} "
            f"at equal epochs, {self.seeds} seed{'s' if self.seeds != 1 else ''}"
        )


def matched(runs: Sequence[Run]) -> tuple[Matched, ...]:
    """Return one line for each run of a cyclic method."""
    keys = [_key(run.recipe) for run in runs]
    lines = []
    for run in runs:
        wanted = _control_key(run.recipe)
        if wanted is not None:
            found = runs[keys.index(wanted)] if wanted in keys else None
            lines.append(_compare(run, found))
    return tuple(lines)


def _compare(run: Run, other: Run | None) -> Matched:
    if other is None:
        return Matched(run.name, None)
    own, controls = _accuracies(run), _accuracies(other)
    gains = [own[seed] - controls[seed] for seed in own if seed in controls]
    if not gains:
        return Matched(run.name, other.name)
    return Matched(run.name, other.name, len(gains), fmean(gains), *interval(gains))


def _accuracies(run: Run) -> dict[int, float]:
    last = {seed.number: seed.levels[-1] for seed in run.seeds if seed.complete and seed.levels}
    return {n: v.test_accuracy for n, v in last.items() if v.test_accuracy is not None}


def _key(recipe: Mapping[str, Any]) -> dict[str, Any] | None:
    try:
        return distinctive(build(recipe))
    except BadInput:  # of another version
        return None


def _control_key(recipe: Mapping[str, Any]) -> dict[str, Any] | None:
    try:
        found = control(build(recipe))
    except BadInput:
        return None
    return None if found is None else distinctive(found)
