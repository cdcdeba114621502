"""Magnitude: a weight is worth its absolute value."""

from collections.abc import Mapping

from torch import Tensor

from featherweight.sparse.criteria.registry import CRITERIA, Scores


@CRITERIA.register("magnitude", "absolute value of the weight", "Han et al. 2015, arXiv:1506.02626")
def magnitude(weights: Mapping[str, Tensor]) -> Scores:
    """Score every weight by its absolute value.

    Args:
        weights: parameter name to weight.

    Returns:
        Scores of the weights' shapes and dtypes.
    """
    return {name: weight.detach().abs() for name, weight in weights.items()}
