"""Criteria that can score the weights of a model in the middle of its training."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor, nn

from featherweight.common import Generator
from featherweight.sparse.criteria import CRITERIA, Scores, score


def scorer(
    criterion: str, model: nn.Module, generator: Generator | None
) -> Callable[[Mapping[str, Tensor]], Scores]:
    """Return a criterion as a function of weights alone.

    Args:
        criterion: a name of ``CRITERIA`` that needs no more than the model and a generator.
        model: offered to the criterion.
        generator: offered to the criterion, advanced.

    Raises:
        ValueError: the criterion is unknown, needs something else, or needs a generator and there
            is none.
    """
    offered = {"model": model, "generator": generator}
    for need in CRITERIA[criterion].needs:
        if need not in offered:
            raise ValueError(f"criterion {criterion!r} needs {need}, which a step does not offer")
        if offered[need] is None:
            raise ValueError(f"criterion {criterion!r} needs seed= or generator=")
    return lambda weights: score(criterion, weights, **offered)
