"""Medians of alternating runs."""

import time
from collections.abc import Callable, Mapping
from statistics import median


def alternate(
    candidates: Mapping[str, Callable[[], object]], rounds: int
) -> dict[str, list[float]]:
    """Time candidates in turn, so that whatever disturbs the machine disturbs all of them.

    Returns:
        Seconds of each round, by candidate.
    """
    times: dict[str, list[float]] = {name: [] for name in candidates}
    names = list(candidates)
    for step in range(rounds + 2):
        for name in names[step % len(names) :] + names[: step % len(names)]:
            started = time.perf_counter()
            candidates[name]()
            if step >= 2:  # the first rounds warm caches and allocators
                times[name].append(time.perf_counter() - started)
    return times


def ratios(times: Mapping[str, list[float]], base: str) -> dict[str, float]:
    """Return for each candidate the median over rounds of its time divided by the base's."""
    return {
        name: median(a / b for a, b in zip(own, times[base], strict=True))
        for name, own in times.items()
    }
