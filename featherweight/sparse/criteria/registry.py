"""The table of criteria, and the call that hands each criterion just the arguments it needs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from featherweight.common import Registry

Scores = dict[str, Tensor]
"""Parameter name to a score for every entry; larger is kept first."""

CRITERIA: Registry[Callable[..., Scores]] = Registry("criterion")
"""What a weight is worth: functions of the weights, by name."""


def score(criterion: str, weights: Mapping[str, Tensor], **available: Any) -> Scores:
    """Score weights by a registered criterion.

    Args:
        criterion: registered name.
        weights: parameter name to weight.
        available: what the caller can offer (``generator``, ...); a criterion takes what its
            registry row says it needs.

    Raises:
        ValueError: the criterion is unknown, needs something that is not offered, or a weight is
            not finite.
    """
    entry = CRITERIA[criterion]
    for need in entry.needs:
        if available.get(need) is None:
            raise ValueError(f"criterion {criterion!r} needs {need}=")
    for name, weight in weights.items():
        if not weight.isfinite().all():
            raise ValueError(f"weights of {name!r} hold NaN or infinity")
    return entry.method(weights, **{need: available[need] for need in entry.needs})
