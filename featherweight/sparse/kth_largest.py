"""The k-th largest of many values, several times faster than a full selection."""

from __future__ import annotations

import math

from torch import Tensor

SAMPLE = 4096
"""Values looked at first, to guess between which two of them the answer lies."""

MARGIN = 4.0
"""Standard deviations of a rank in the sample by which the guess is widened."""

FEW = 1 / 16
"""Share of the values."""


def kth_largest(values: Tensor, k: int) -> Tensor:
    """Return the ``k``-th largest value, exactly.

    A sample brackets the answer and only what lies inside the bracket is searched. Where the sample
    has misled, everything is searched.

    Args:
        values: 1-D, real, without NaN.
        k: from 1 to the number of values.

    Returns:
        Scalar tensor.

    Source: Floyd and Rivest 1975, "Expected time bounds for selection", Communications of the ACM.
    """
    if len(values) >= 16 * SAMPLE:
        values, k = _narrowed(values, k)
    return values.kthvalue(len(values) - k + 1).values


def _narrowed(values: Tensor, k: int) -> tuple[Tensor, int]:
    """Return fewer values and the rank that the answer has among them."""
    # An odd stride does not stay in one column of a matrix.
    sample = values[:: len(values) // SAMPLE | 1].sort(descending=True).values
    share = k / len(values)
    rank = share * len(sample)
    margin = MARGIN * math.sqrt(rank * (1 - share)) + 2
    low, high = round(rank + margin), round(rank - margin)
    inside, above = None, 0
    # A bound that would leave out few values costs more than it saves.
    if low < (1 - FEW) * len(sample):
        inside = values >= sample[low]
    if high > FEW * len(sample):
        above = int((values > sample[high]).count_nonzero())
        under = values <= sample[high]
        inside = under if inside is None else inside & under
    chosen = values if inside is None else values[inside]
    return (chosen, k - above) if above < k <= above + len(chosen) else (values, k)
