"""The table of criteria, and the call that hands each criterion just the arguments it takes."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from featherweight.common import Registry, unknown

Scores = dict[str, Tensor]
"""Parameter name to a score for every entry; larger is kept first."""

CRITERIA: Registry[Callable[..., Scores]] = Registry("criterion")
"""What a weight is worth: functions of the weights, by name."""


def arguments(criterion: str) -> tuple[str, ...]:
    """Name what a criterion takes besides the weights: what it needs, and its options.

    Raises:
        ValueError: the criterion is unknown.
    """
    return tuple(inspect.signature(CRITERIA[criterion].method).parameters)[1:]


def check_arguments(criterion: str, given: Mapping[str, Any]) -> None:
    """Refuse arguments that a criterion does not take.

    What any criterion needs (``model``, ``generator``, ``batches``) may be offered to all.

    Raises:
        ValueError: names the first such argument.
    """
    takes = arguments(criterion)
    common = {need for entry in CRITERIA.values() for need in entry.needs}
    for name in given:
        if name not in takes and name not in common:
            raise ValueError(unknown(f"argument of criterion {criterion!r}", name, takes))


def score(criterion: str, weights: Mapping[str, Tensor], **available: Any) -> Scores:
    """Score weights by a registered criterion.

    Args:
        criterion: registered name.
        weights: parameter name to weight.
        available: what the caller can offer (``generator``, ``batches``, ...); a criterion takes
            what its registry row says it needs and what else its signature names. None is no
            offer.

    Raises:
        ValueError: the criterion is unknown, needs something that is not offered, or a weight or
            a score is not finite.
    """
    entry = CRITERIA[criterion]
    offered = {name: value for name, value in available.items() if value is not None}
    for need in entry.needs:
        if need not in offered:
            raise ValueError(f"criterion {criterion!r} needs {need}=")
    _check_finite(weights, "weights of {!r} hold NaN or infinity")
    taken = {name: offered[name] for name in arguments(criterion) if name in offered}
    scores = entry.method(weights, **taken)
    _check_finite(scores, f"{criterion} scores of {{!r}} hold NaN or infinity")
    return scores


def _check_finite(tensors: Mapping[str, Tensor], message: str) -> None:
    for name, tensor in tensors.items():
        # The extremes carry NaN and infinity, and are much faster to find than isfinite().
        if tensor.numel() and not torch.stack(tensor.detach().aminmax()).isfinite().all():
            raise ValueError(message.format(name))
