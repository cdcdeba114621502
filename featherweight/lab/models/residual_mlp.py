"""A deep residual perceptron: what initialisations of residual networks are compared on."""

from __future__ import annotations

import math

from torch import Tensor, nn
from torch.nn import functional as F

from featherweight.lab.models.base import MODELS, Shape, check_positive, he_
from featherweight.lab.models.residual import Scalars, Variant, shift


class LinearBlock(nn.Module):
    """Two linear layers around which the input is added, then a ReLU.

    Args:
        width: units.
        variant: shortcuts and scalars.
    """

    def __init__(self, width: int, variant: Variant) -> None:
        super().__init__()
        self.linear1, self.norm1 = nn.Linear(width, width, variant.bias), _norm(width, variant)
        self.linear2 = nn.Linear(width, width, variant.bias)
        self.norm2 = nn.BatchNorm1d(width) if variant.norm == "batch" else nn.Identity()
        projects = variant.shortcut == "C"
        self.shortcut = nn.Linear(width, width, variant.bias) if projects else None
        self.scalars = Scalars(2, variant)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, width] to [B, width]."""
        before: Tensor = self.scalars.before[0](x)
        out = F.relu(self.norm1(self.linear1(before)))
        out = self.norm2(self.linear2(self.scalars.before[1](out)))
        return F.relu(self.scalars(out, x if self.shortcut is None else self.shortcut(before)))


class ResidualMlp(nn.Module):
    """Flatten, a first layer, blocks of equal width, a linear layer."""

    def __init__(
        self, inputs: int, classes: int, width: int, blocks: int, variant: Variant
    ) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(inputs, width, variant.bias), _norm(width, variant)
        self.blocks = nn.Sequential(*(LinearBlock(width, variant) for _ in range(blocks)))
        self.shift = shift(variant)
        self.classifier = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map inputs [B, ...] to logits [B, classes]."""
        x = F.relu(self.norm(self.linear(x.flatten(1))))
        logits: Tensor = self.classifier(self.shift(self.blocks(x)))
        return logits


def _norm(width: int, variant: Variant) -> nn.Module:
    return nn.BatchNorm1d(width) if variant.norm == "batch" else shift(variant)


@MODELS.register(
    "residual-mlp",
    "fully connected residual network of any depth, without norms",
    "the comparison of Gadhikar and Burkholz 2022, arXiv:2210.02411, without convolutions",
)
def residual_mlp(
    classes: int,
    shape: Shape,
    width: int = 128,
    blocks: int = 50,
    shortcut: str = "B",
    norm: str = "none",
    scale: str = "none",
) -> nn.Module:
    """A residual perceptron of 2 blocks + 2 layers.

    Args:
        classes: number of outputs.
        shape: channels, height and width of the images.
        width: units of each layer.
        blocks: residual blocks of two layers.
        shortcut: the identity ("B") or a linear layer ("C") around every block.
        norm, scale: as in ``resnet20``.

    Raises:
        ValueError: an option is out of range.
    """
    variant = Variant(shortcut, norm, scale)
    variant.check(("B", "C"))
    check_positive(width=width, blocks=blocks)
    model = ResidualMlp(math.prod(shape), classes, width, blocks, variant)
    he_(model)
    return model
