"""Learning rates that change with the round, for clients and server."""

from __future__ import annotations

from collections.abc import Callable

Rate = float | Callable[[int], float]


def check_rate(name: str, rate: Rate) -> None:
    """Refuse a constant rate that is not a number above 0.

    Raises:
        ValueError: it is not.
    """
    if not callable(rate) and not 0.0 < rate < float("inf"):
        raise ValueError(f"{name} must be a finite number above 0 or a function, got {rate!r}")


def rate_at(rate: Rate, round: int) -> float:
    """Return the rate of a round."""
    return float(rate(round)) if callable(rate) else float(rate)


def exponential(rate: float, decay: float, every: int = 1) -> Callable[[int], float]:
    """Return ``rate * decay ** (round // every)``.

    Raises:
        ValueError: ``every`` is below 1, or rate or decay is not above 0.
    """
    _positive(rate=rate, decay=decay, every=every)
    return lambda round: rate * decay ** (round // every)


def inverse_linear(rate: float, scale: float) -> Callable[[int], float]:
    """Return ``rate / (1 + round / scale)``.

    Raises:
        ValueError: an argument is not above 0.
    """
    _positive(rate=rate, scale=scale)
    return lambda round: rate / (1.0 + round / scale)


def inverse_square_root(rate: float, scale: float) -> Callable[[int], float]:
    """Return ``rate / sqrt(1 + round / scale)``.

    Raises:
        ValueError: an argument is not above 0.
    """
    _positive(rate=rate, scale=scale)
    return lambda round: float(rate / (1.0 + round / scale) ** 0.5)


def warmup(rate: Rate, rounds: int) -> Callable[[int], float]:
    """Return a rate that grows linearly over the first rounds, then is ``rate``.

    Raises:
        ValueError: ``rounds`` is below 1.
    """
    _positive(rounds=rounds)
    return lambda round: min(1.0, (round + 1) / rounds) * rate_at(rate, round)


def _positive(**values: float) -> None:
    for name, value in values.items():
        if not value > 0:
            raise ValueError(f"{name} must be above 0, got {value!r}")
