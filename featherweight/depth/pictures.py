"""Which tokens each layer visited, as data and as a picture."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from featherweight.common import unwrap
from featherweight.depth.anatomy import find_stack
from featherweight.depth.convert import ledger_of

DIM = 0.25  # brightness of what a layer skipped


@torch.no_grad()
def visited(model: nn.Module, *inputs: Any, **named: Any) -> Tensor:
    """Run a routed model and return which tokens each of its layers processed.

    Args:
        model: routed, in the mode it is in.
        *inputs, **named: what the model takes.

    Returns:
        bool [layers, B, N]; all True in dense layers.

    Raises:
        ValueError: the model isn't routed.
    """
    ledger = ledger_of(model)
    ledger.visited = [None] * ledger.layers
    unwrap(model)(*inputs, **named)
    masks = ledger.visited
    like = next(mask for mask in masks if mask is not None)
    return torch.stack([torch.ones_like(like) if mask is None else mask for mask in masks])


def picture(
    model: nn.Module, images: Tensor, limit: int = 8, grid: tuple[int, int] | None = None
) -> Any:
    """Draw what each routed layer visited: skipped patches are dark.

    Args:
        model: a routed vision encoder.
        images: [B, C, H, W]; each is stretched to the range of the colours.
        limit: how many of the images are drawn.
        grid: patches down and across; None for a square.

    Returns:
        A matplotlib figure, a row for each image, a column for each routed layer.

    Raises:
        ImportError: matplotlib isn't installed.
        ValueError: the model isn't routed, or the patches don't fill the grid.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("pictures need matplotlib: pip install featherweight[lab]") from None
    images = images[:limit]
    masks = visited(model, images)
    prefix = find_stack(unwrap(model)).prefix
    layers = [layer for layer in range(len(masks)) if not bool(masks[layer].all())]
    figure = Figure(figsize=(1.6 * (len(layers) + 1), 1.7 * len(images)), layout="constrained")
    axes = figure.subplots(len(images), len(layers) + 1, squeeze=False)
    for row, image in enumerate(images):
        shown = _stretched(image)
        for column, layer in enumerate([-1, *layers]):
            kept = masks[layer, row, prefix:] if layer >= 0 else None
            picture = shown if kept is None else shown * _brightness(kept, image, grid)
            axes[row, column].imshow(picture.numpy(), cmap="gray", vmin=0, vmax=1)
            axes[row, column].axis("off")
            if row == 0:
                axes[row, column].set_title("image" if layer < 0 else f"layer {layer}", fontsize=9)
    return figure


def _stretched(image: Tensor) -> Tensor:
    """Return [H, W, 3] or [H, W, 1] in [0, 1]."""
    image = image.detach().float().cpu()
    image = image if image.shape[0] in (1, 3) else image.mean(0, keepdim=True)
    low, high = image.min(), image.max()
    return ((image - low) / (high - low).clamp(min=1e-12)).permute(1, 2, 0)


def _brightness(kept: Tensor, image: Tensor, grid: tuple[int, int] | None) -> Tensor:
    side = round(len(kept) ** 0.5)
    down, across = grid or (side, side)
    if down * across != len(kept):
        raise ValueError(f"grid must hold {len(kept)} patches, got {down} x {across}")
    light = DIM + (1 - DIM) * kept.float().cpu().view(1, 1, down, across)
    return nn.functional.interpolate(light, size=image.shape[1:], mode="nearest")[0, 0, :, :, None]
