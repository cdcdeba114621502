"""The derivative of a loss by a mask at one, entry by entry, by central differences."""

import torch


def slow_mask_derivative(loss_of_masks, shapes, step=1e-6):
    """Return for every entry the slope of the loss as its mask moves through one.

    Args:
        loss_of_masks: from float64 masks by name to a number.
        shapes: name to shape.
    """
    slopes = {}
    for name, shape in shapes.items():
        slopes[name] = torch.zeros(shape, dtype=torch.float64)
        for index in range(shape.numel()):
            values = []
            for sign in (1, -1):
                masks = {n: torch.ones(s, dtype=torch.float64) for n, s in shapes.items()}
                masks[name].view(-1)[index] += sign * step
                values.append(float(loss_of_masks(masks)))
            slopes[name].view(-1)[index] = (values[0] - values[1]) / (2 * step)
    return slopes
