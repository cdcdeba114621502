"""Lengths of training: ``5ep`` is five epochs, ``300it`` is three hundred optimizer steps."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BeforeValidator, PlainSerializer


@dataclass(frozen=True)
class Duration:
    """A length of training.

    Attributes:
        amount: how many, at least 0.
        unit: "ep" for epochs or "it" for optimizer steps.
    """

    amount: int
    unit: str

    def steps(self, steps_per_epoch: int) -> int:
        """Return the number of optimizer steps."""
        return self.amount * (steps_per_epoch if self.unit == "ep" else 1)

    def __str__(self) -> str:
        return f"{self.amount}{self.unit}"


def parse_duration(value: Any) -> Duration:
    """Read a duration.

    Args:
        value: text such as "5ep" or "300it", or a duration.

    Raises:
        ValueError: anything else, a number without a unit included.
    """
    if isinstance(value, Duration):
        return value
    found = re.fullmatch(r"(\d+)(ep|it)", str(value).strip())
    if not found:
        raise ValueError("must be epochs such as 5ep or optimizer steps such as 300it")
    return Duration(int(found[1]), found[2])


DurationField = Annotated[
    Duration, BeforeValidator(parse_duration), PlainSerializer(str, return_type=str)
]
