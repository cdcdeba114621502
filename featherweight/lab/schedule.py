"""Learning rates as a pure function of the step, so that resuming needs no scheduler state."""

from __future__ import annotations

from dataclasses import dataclass
from math import cos, pi

from featherweight.lab.recipe import FitRecipe


@dataclass(frozen=True)
class Schedule:
    """The learning rate of one level; every level starts it anew.

    Linear warm-up from ``start * peak`` to ``peak``, then ``shape``.

    Attributes:
        shape: "constant", "cosine", "step" or "triangular" (linear decay).
        steps: length of the level, in optimizer steps.
        peak: highest learning rate.
        warmup: steps of the warm-up; 0: none.
        start: first learning rate over the peak.
        final: last learning rate over the peak (cosine, triangular).
        milestones: steps at which the rate is multiplied by gamma (step).
        gamma: factor at each milestone.
    """

    shape: str
    steps: int
    peak: float
    warmup: int = 0
    start: float = 0.0
    final: float = 0.0
    milestones: tuple[int, ...] = ()
    gamma: float = 0.1

    def __call__(self, step: int) -> float:
        """Return the learning rate of a step, counted from 0."""
        if step < self.warmup:
            return self.peak * (self.start + (1 - self.start) * step / self.warmup)
        if self.shape == "constant":
            return self.peak
        if self.shape == "step":
            return self.peak * self.gamma ** sum(step >= m for m in self.milestones)
        # The last step, not the one after it, gets the final rate.
        progress = (step - self.warmup) / max(1, self.steps - 1 - self.warmup)
        if self.shape == "cosine":
            return self.peak * (self.final + (1 - self.final) * (1 + cos(pi * progress)) / 2)
        return self.peak * (1 - (1 - self.final) * progress)


def schedule(fit: FitRecipe, steps: int, steps_per_epoch: int) -> Schedule:
    """Make the schedule of a level of ``steps`` optimizer steps."""
    default = steps // 5 if fit.schedule == "triangular" else 0
    return Schedule(
        shape=fit.schedule,
        steps=steps,
        peak=fit.learning_rate,
        warmup=default if fit.warmup is None else fit.warmup.steps(steps_per_epoch),
        start=fit.warmup_start,
        final=fit.final,
        milestones=tuple(m.steps(steps_per_epoch) for m in fit.milestones),
        gamma=fit.gamma,
    )
