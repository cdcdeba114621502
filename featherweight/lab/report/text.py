"""How numbers are written in tables, page and pictures: one function a kind of number."""

from __future__ import annotations

import math

MISSING = "–"


def three(value: float | None) -> str:
    """Write a number with three significant digits and never an exponent: ``0.0156``, ``1.00``."""
    if value is None or not math.isfinite(value):
        return MISSING
    if value == 0:
        return "0"
    rounded = float(f"{value:.2e}")
    decimals = max(0, 2 - math.floor(math.log10(abs(rounded))))
    return f"{rounded:,.{decimals}f}"


def percent(fraction: float | None) -> str:
    """Write a fraction of 1 as percent with one decimal place: ``97.3 %``."""
    if fraction is None or not math.isfinite(fraction):
        return MISSING
    return f"{100 * fraction:.1f} %"


def accuracy(mean: float | None, deviation: float | None, seeds: int) -> str:
    """Write ``97.3 ± 0.4 % (3)``; the deviation is left out where one seed alone was run."""
    if mean is None or not math.isfinite(mean):
        return MISSING
    spread = "" if deviation is None else f" ± {100 * deviation:.1f}"
    return f"{100 * mean:.1f}{spread} % ({seeds})"


def count(value: float | None) -> str:
    """Write a whole number with separators: ``266,610``."""
    return MISSING if value is None else f"{round(value):,}"


def scaled(value: float | None, unit: str = "") -> str:
    """Write a large number with a decimal prefix: ``41.0 M``, ``12.3 kB``."""
    if value is None or not math.isfinite(value):
        return MISSING
    prefixes = ["", "k", "M", "G", "T", "P"]
    while abs(value) >= 999.5 and len(prefixes) > 1:
        value, prefixes = value / 1000, prefixes[1:]
    whole = prefixes[0] == "" and float(value).is_integer()
    return f"{f'{value:.0f}' if whole else three(value)} {prefixes[0]}{unit}".rstrip()


def milliseconds(seconds: float | None) -> str:
    """Write a time of a step: ``3.12 ms``."""
    return MISSING if seconds is None else f"{three(1000 * seconds)} ms"


def duration(seconds: float | None) -> str:
    """Write a long time in the largest two units: ``42 s``, ``3 min 05 s``, ``2 h 10 min``."""
    if seconds is None or not math.isfinite(seconds):
        return MISSING
    if seconds < 60:
        return f"{three(seconds)} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"
