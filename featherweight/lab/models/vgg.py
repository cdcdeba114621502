"""VGG-16 with batch normalisation and one linear classifier, as used on CIFAR.

Simonyan and Zisserman 2015, "Very Deep Convolutional Networks for Large-Scale Image Recognition",
arXiv:1409.1556, table 1, column D.
"""

from __future__ import annotations

from torch import Tensor, nn

from featherweight.lab.models.base import MODELS, Shape, check_positive, he_

STAGES = ((1, 1), (2, 2), (4, 4, 4), (8, 8, 8), (8, 8, 8))
"""Channels of each convolution in multiples of the width; a max-pooling ends each stage."""


class Vgg(nn.Module):
    """Stages of 3x3 convolutions, mean over the pixels that are left, a linear layer."""

    def __init__(self, classes: int, channels: int, width: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        inputs = channels
        for stage in STAGES:
            for outputs in (multiple * width for multiple in stage):
                conv = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
                layers += [conv, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]
                inputs = outputs
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(inputs, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map images [B, C, H, W] to logits [B, classes]."""
        logits: Tensor = self.classifier(self.features(x).mean((2, 3)))
        return logits


@MODELS.register(
    "vgg16",
    "13 convolutions with batch norm and one linear layer",
    "Simonyan and Zisserman 2015, arXiv:1409.1556",
)
def vgg16(classes: int, shape: Shape, width: int = 64) -> nn.Module:
    """VGG-16 with batch norm, for images of at least 32x32.

    Args:
        classes: number of outputs.
        shape: channels, height and width of the images.
        width: channels of the first stage.

    Raises:
        ValueError: the width is out of range, or the images are too small for five poolings.
    """
    check_positive(width=width)
    if min(shape[1:]) < 2 ** len(STAGES):
        raise ValueError(f"vgg16 needs images of at least 32x32, got shape {tuple(shape)}")
    model = Vgg(classes, shape[0], width)
    he_(model)
    return model
