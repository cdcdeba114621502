"""What every loader returns, and the table of loaders."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from featherweight.common import Registry


class DataError(ValueError):
    """A data set that is missing, incomplete, damaged, or asked for in an impossible way."""


@dataclass(frozen=True, eq=False)
class Split:
    """Images and their labels, whole in memory.

    Attributes:
        images: [N, C, H, W], uint8 in 0..255, or float32 in [0, 1] (only ``digits``).
        labels: [N], int64 in 0..classes-1.
    """

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, index: Tensor) -> Split:
        """Return the images at the positions ``index`` (int64 [M]), copied."""
        return Split(self.images[index], self.labels[index])


class Parts(NamedTuple):
    """What a loader reads: the official training part, the test part, the number of classes."""

    train: Split
    test: Split
    classes: int


@dataclass(frozen=True, eq=False)
class Data:
    """A data set whose training, validation and test images are kept apart.

    Attributes:
        name: the name it was loaded by.
        train: what a model is fitted to.
        validation: what choices are made on; empty if no validation images were asked for.
        test: looked at once, at the end.
        classes: number of classes.
        mean: float32 [C], mean of the training images on the [0, 1] scale.
        std: float32 [C], their standard deviation (population), 1 where a channel is constant.
    """

    name: str
    train: Split
    validation: Split
    test: Split
    classes: int
    mean: Tensor
    std: Tensor

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of one image."""
        _, channels, height, width = self.train.images.shape
        return channels, height, width


Loader = Callable[..., Parts]

DATA: Registry[Loader] = Registry("data set")
"""The loaders by name; those that need ``path`` are called with it as a string."""


def existing(path: str, name: str, wanted: str) -> Path:
    """Return ``path`` as a Path, or say that it is missing and what was looked for.

    Raises:
        DataError: nothing is there.
    """
    place = Path(path).expanduser()
    if not place.exists():
        raise DataError(f"data set {name!r}: no such file or folder {place}; wanted {wanted}")
    return place


def check(split: Split, classes: int, where: str) -> None:
    """Refuse a split whose images and labels do not belong together.

    Raises:
        DataError: no image, unequal numbers, or a label outside 0..classes-1.
    """
    images, labels = split.images, split.labels
    if images.ndim != 4 or len(images) != len(labels) or not len(labels):
        raise DataError(
            f"{where}: images of shape {list(images.shape)} do not fit {len(labels)} labels"
        )
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= classes:
        raise DataError(f"{where}: labels lie in {low}..{high}, allowed are 0..{classes - 1}")


def as_labels(values: object) -> Tensor:
    """Return an int64 [N] tensor of labels from a list or array of integers."""
    return torch.as_tensor(values).to(torch.int64)
