"""From one number a seed to a verdict."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf, isfinite, sqrt
from statistics import fmean, stdev
from typing import Literal

from scipy import stats

Verdict = Literal["holds", "does not hold", "undecided"]


def interval(effects: Sequence[float], confidence: float = 0.95) -> tuple[float, float]:
    """Return Student's confidence interval of the mean.

    Effects are differences between runs of the same seed, so this is the paired interval.

    Args:
        effects: one number a seed.
        confidence: in (0, 1).

    Returns:
        Lower and upper end; without bounds for fewer than two seeds or a non-finite effect.
    """
    if len(effects) < 2 or not all(map(isfinite, effects)):
        return -inf, inf
    mean, spread = fmean(effects), stdev(effects) / sqrt(len(effects))
    reach = float(stats.t.ppf((1 + confidence) / 2, len(effects) - 1)) * spread
    return mean - reach, mean + reach


def judge(effects: Sequence[float], region: tuple[float, float]) -> Verdict:
    """Compare the confidence interval with the region in which the claim is true.

    Args:
        effects: one number a seed.
        region: lower and upper end of the region; an end may be infinite.

    Returns:
        "holds" if the interval lies inside the region, "does not hold" if outside, else
        "undecided".
    """
    low, high = interval(effects)
    if region[0] < low and high < region[1]:
        return "holds"
    if high <= region[0] or region[1] <= low:
        return "does not hold"
    return "undecided"
