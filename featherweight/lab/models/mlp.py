"""A multilayer perceptron with batch normalisation."""

from __future__ import annotations

import math
from collections import OrderedDict

from torch import nn

from featherweight.lab.models.base import MODELS, Shape, check_choice, check_positive, he_


@MODELS.register(
    "mlp",
    "fully connected: hidden layers of equal width with batch norm and ReLU",
    "Rumelhart, Hinton and Williams 1986; batch norm: Ioffe and Szegedy 2015, arXiv:1502.03167",
)
def mlp(
    classes: int, shape: Shape, width: int = 300, depth: int = 2, norm: str = "batch"
) -> nn.Module:
    """Flatten, then ``depth`` times Linear, BatchNorm1d, ReLU, then a Linear classifier.

    Args:
        classes: number of outputs.
        shape: channels, height and width of the images.
        width: units of each hidden layer.
        depth: number of hidden layers.
        norm: "batch", or "none" for no normalisation.

    Raises:
        ValueError: an option is out of range.
    """
    check_positive(width=width, depth=depth)
    check_choice("norm", norm, ("batch", "none"))
    layers: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
    inputs = math.prod(shape)
    for layer in range(1, depth + 1):
        layers[f"linear{layer}"] = nn.Linear(inputs, width)
        if norm == "batch":
            layers[f"norm{layer}"] = nn.BatchNorm1d(width)
        layers[f"relu{layer}"] = nn.ReLU()
        inputs = width
    layers["classifier"] = nn.Linear(inputs, classes)
    model = nn.Sequential(layers)
    he_(model)
    return model
