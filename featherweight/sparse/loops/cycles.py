"""How long each cycle is, and what a whole run of a loop costs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil, floor

from featherweight.common import Registry

Strategy = Callable[[int, int], list[float]]

STRATEGIES: Registry[Strategy] = Registry("cycle strategy")
"""How a budget is shared among cycles: functions of budget and number of cycles, by name."""


def cycle_lengths(
    budget: int, cycles: int, strategy: str = "constant", *, legacy: bool = False
) -> list[int]:
    """Share a training budget among cycles, exactly.

    Every cycle gets the whole part of its share; what is left over goes to the largest remainders,
    the earlier cycle first among equals.

    Args:
        budget: length of the whole training, in epochs or any other unit.
        cycles: how many, at least 1; 1 gets the whole budget.
        strategy: a name of ``STRATEGIES``. The published experiments use "constant".
        legacy: the truncated lengths of published code, whose sum can fall short of the budget.

    Returns:
        One length a cycle; their sum is the budget unless ``legacy``.

    Raises:
        ValueError: a bad argument, or a budget so small that a cycle would be empty.

    Source: the code of Gadhikar, Nelaturu & Burkholz 2024, arXiv:2406.02773.
    """
    if cycles < 1:
        raise ValueError(f"cycles must be at least 1, got {cycles}")
    shares = STRATEGIES[strategy].method(budget, cycles)
    lengths = _truncated(shares, budget) if legacy else _apportioned(shares, budget)
    if min(lengths) < 1:
        raise ValueError(
            f"budget {budget} is too short for {cycles} {strategy} cycles: one would be empty"
        )
    return lengths


def _truncated(shares: Sequence[float], budget: int) -> list[int]:
    lengths = [int(share) for share in shares]
    total = sum(lengths)
    return [int(length * budget / total) for length in lengths] if total > budget else lengths


def _apportioned(shares: Sequence[float], budget: int) -> list[int]:
    total = sum(shares)
    quotas = [budget * share / total if total > 0 else 0.0 for share in shares]
    # Shares that are whole numbers in exact arithmetic must not lose one to a rounding error.
    lengths = [floor(quota + 1e-9) for quota in quotas]
    order = sorted(range(len(quotas)), key=lambda i: (round(lengths[i] - quotas[i], 9), i))
    for index in order[: budget - sum(lengths)]:
        lengths[index] += 1
    return lengths


@STRATEGIES.register("constant", "all cycles alike")
def constant(budget: int, cycles: int) -> list[float]:
    """Give every cycle ``B / n``."""
    return [budget / cycles] * cycles


@STRATEGIES.register("linear-decrease", "each cycle shorter than the last by the same amount")
def linear_decrease(budget: int, cycles: int) -> list[float]:
    """Give cycles shares in the ratio ``n : n - 1 : ... : 1``."""
    step = budget / (cycles * (cycles + 1) / 2)
    return [step * (cycles - i) for i in range(cycles)]


@STRATEGIES.register("linear-increase", "each cycle longer than the last by the same amount")
def linear_increase(budget: int, cycles: int) -> list[float]:
    """Give cycles shares in the ratio ``1 : 2 : ... : n``."""
    return linear_decrease(budget, cycles)[::-1]


@STRATEGIES.register("exponential-decrease", "by a constant factor, the last half the first")
def exponential_decrease(budget: int, cycles: int) -> list[float]:
    """Give cycles shares that fall by ``2^(-1 / (n - 1))``."""
    return _exponential(budget, cycles, 0.5)


@STRATEGIES.register("exponential-increase", "by a constant factor, the last twice the first")
def exponential_increase(budget: int, cycles: int) -> list[float]:
    """Give cycles shares that rise by ``2^(1 / (n - 1))``."""
    return _exponential(budget, cycles, 2.0)


def _exponential(budget: int, cycles: int, end: float) -> list[float]:
    powers = [end ** (i / max(1, cycles - 1)) for i in range(cycles)]
    return [budget * power / sum(powers) for power in powers]


@STRATEGIES.register("peak", "longer until the middle, then shorter")
def peak(budget: int, cycles: int) -> list[float]:
    """Give the first ``n // 2`` cycles a rising ramp, the others a falling one of equal sum."""
    middle = cycles // 2
    return _ramp(budget, middle) + _ramp(budget, cycles - middle)[::-1]


@STRATEGIES.register("alternating", "long, half as long, long, ...")
def alternating(budget: int, cycles: int) -> list[float]:
    """Give even cycles twice as much as odd ones."""
    long = budget // ceil(cycles / 2)
    return [long if i % 2 == 0 else long / 2 for i in range(cycles)]


@STRATEGIES.register("plateau", "longer until the middle, then alike")
def plateau(budget: int, cycles: int) -> list[float]:
    """Give the first ``n // 2`` cycles a rising ramp to ``B``, the others ``B // n`` each."""
    middle = cycles // 2
    return _ramp(budget, middle) + [float(budget // cycles)] * (cycles - middle)


def _ramp(budget: int, cycles: int) -> list[float]:
    return linear_increase(budget, cycles) if cycles else []


@dataclass(frozen=True)
class Ledger:
    """What a run of a loop costs: how long each level trains, and how dense it is.

    Attributes:
        densities: kept fraction of each level.
        lengths: training length of each level, in epochs or any other unit.
    """

    densities: tuple[float, ...]
    lengths: tuple[int, ...]

    @property
    def length(self) -> int:
        """Length of all levels together: the budget of a control that trains as long."""
        return sum(self.lengths)

    @property
    def dense_length(self) -> float:
        """Length of a dense training that does as many multiplications with prunable weights.

        Counts as if all layers were thinned alike and zeros were skipped.
        """
        return sum(d * n for d, n in zip(self.densities, self.lengths, strict=True))

    def __str__(self) -> str:
        return (
            f"{len(self.lengths)} levels, length {self.length}, worth {self.dense_length:.4g} dense"
        )


def ledger(densities: Sequence[float], lengths: int | Sequence[int]) -> Ledger:
    """Add up what a run costs.

    Args:
        densities: kept fraction of each level.
        lengths: one length for all levels, or one for each.

    Raises:
        ValueError: not as many lengths as levels, or no level.
    """
    each = [lengths] * len(densities) if isinstance(lengths, int) else list(lengths)
    if len(each) != len(densities) or not each:
        raise ValueError(f"lengths has {len(each)} entries, densities {len(densities)}")
    return Ledger(tuple(densities), tuple(each))
