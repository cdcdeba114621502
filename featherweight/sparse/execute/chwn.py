"""The layout of sparse convolutions: channels, rows, columns, and the batch innermost.

A tensor keeps its logical shape (N, C, H, W); only its strides are those of a contiguous
(C, H, W, N). Elementwise functions keep strides, so that what one sparse layer returns reaches
the next as it wants it. With a batch of one the layout is that of an ordinary contiguous tensor.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def is_chwn(x: Tensor) -> bool:
    """Tell whether a tensor (N, C, H, W) has the batch innermost and no gaps."""
    return x.ndim == 4 and x.permute(1, 2, 3, 0).is_contiguous()


def to_chwn(x: Tensor) -> Tensor:
    """Return a tensor (N, C, H, W) with the batch innermost: itself where it has that layout."""
    if is_chwn(x):
        return x
    if x.is_contiguous():  # torch transposes a matrix much faster than it permutes four axes
        batch, *rest = x.shape
        return x.view(batch, -1).t().contiguous().view(*rest, batch).permute(3, 0, 1, 2)
    return x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2)


def empty_chwn(like: Tensor, shape: Sequence[int]) -> Tensor:
    """Return a new tensor of a shape (N, C, H, W) with the batch innermost, not filled."""
    batch, _, height, width = shape
    return like.new_empty_strided(shape, (1, height * width * batch, width * batch, batch))
