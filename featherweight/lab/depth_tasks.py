"""What the claims on routing learn, and how: vision transformers of a minute, converted and tuned.

Digits somewhere on a noisy canvas, so that four of 36 patches tell everything; or, where a folder
of CIFAR-10 is given, its images.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from featherweight.common import Generator
from featherweight.lab.data import load
from featherweight.lab.data.augment import PADDING, crop_flip
from featherweight.lab.data.base import Data, Split
from featherweight.lab.data.seeding import derive_generator, derive_seed
from featherweight.lab.models import build

CANVAS, GRID, NOISE, GAIN = 24, 4, 0.1, 1.5
PLACES = 3  # of each held-out digit
BATCH, CLIP, DECAY = 64, 1.0, 0.05
Change = Callable[[Tensor, Generator], Tensor]


class Plan(NamedTuple):
    """Steps of training and peak learning rate."""

    steps: int
    rate: float


@dataclass(frozen=True)
class Place:
    """Which data, and how large a model: hashable, so that what was trained is found again.

    Attributes:
        folder: of CIFAR-10; None for digits.
        classes: those that are told apart.
    """

    folder: Path | None = None
    classes: tuple[int, ...] = tuple(range(10))

    @property
    def options(self) -> dict[str, int]:
        """Sizes of the model."""
        if self.folder is None:
            return {"patch": 4, "width": 48, "depth": 6, "heads": 3}
        return {"patch": 4, "width": 192, "depth": 6, "heads": 3}

    @property
    def plan(self) -> Plan:
        """How the dense model is trained."""
        return Plan(600, 1.5e-3) if self.folder is None else Plan(6000, 1e-3)

    @property
    def tokens(self) -> int:
        """Of an image, class token included."""
        side = CANVAS if self.folder is None else 32
        return (side // self.options["patch"]) ** 2 + 1


@dataclass(frozen=True, eq=False)
class Task:
    """Standardised images [N, C, H, W] and labels from 0, and the random change of training."""

    train: Split
    validation: Split
    test: Split
    change: Change


@lru_cache
def task(place: Place) -> Task:
    """Return the data of a place, of its classes alone.

    Raises:
        ValueError: the folder doesn't hold CIFAR-10.
    """
    digits = place.folder is None
    data = load("digits" if digits else "cifar10", place.folder, validation=0.1)
    train, validation, test = (
        _chosen(split, place.classes, data) for split in (data.train, data.validation, data.test)
    )
    if not digits:
        return Task(train, validation, test, _crop_and_flip)
    return Task(train, _placed(validation, "validation"), _placed(test, "test"), on_canvas)


def on_canvas(images: Tensor, generator: Generator) -> Tensor:
    """Lay images [N, 1, 8, 8] on noise [N, 1, 24, 24], each at a random place of the patch grid."""
    canvas = torch.randn(len(images), 1, CANVAS, CANVAS, generator=generator) * NOISE
    places = (CANVAS - images.shape[-1]) // GRID + 1
    corners = torch.randint(places, (len(images), 2), generator=generator) * GRID
    for image, (top, left), under in zip(images, corners.tolist(), canvas, strict=True):
        under[:, top : top + image.shape[1], left : left + image.shape[2]] += GAIN * image
    return canvas


def _crop_and_flip(images: Tensor, generator: Generator) -> Tensor:
    offset = torch.randint(2 * PADDING + 1, (len(images), 2), generator=generator)
    return crop_flip(images, offset, torch.rand(len(images), generator=generator) < 0.5)


def _placed(split: Split, name: str) -> Split:
    again = split.images.repeat(PLACES, 1, 1, 1)
    return Split(on_canvas(again, derive_generator("canvas", name)), split.labels.repeat(PLACES))


def _chosen(split: Split, classes: Sequence[int], data: Data) -> Split:
    inside = torch.isin(split.labels, torch.tensor(classes))
    labels = torch.tensor([classes.index(int(label)) for label in split.labels[inside]])
    images = split.images[inside]
    if images.dtype == torch.uint8:
        mean, std = (value.view(1, -1, 1, 1) for value in (data.mean, data.std))
        images = (images / 255 - mean) / std
    return Split(images, labels)


@lru_cache
def dense(place: Place, seed: int) -> nn.Module:
    """Train a dense model from scratch, once; copy it before changing it."""
    shape = (1, CANVAS, CANVAS) if place.folder is None else (3, 32, 32)
    drawn = derive_seed(seed, "initialisation")
    options: Mapping[str, Any] = place.options
    model = build("vit", classes=len(place.classes), shape=shape, seed=drawn, **options)
    xavier_(model, derive_generator(seed, "xavier"))
    fit(model, task(place), place.plan, seed)
    return model.eval()


def xavier_(model: nn.Module, generator: Generator) -> None:
    """Draw the weights of linear layers, patches among them, uniformly, with Glorot's variance."""
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            nn.init.xavier_uniform_(module.weight.detach().flatten(1), generator=generator)


def with_fresh_head(model: nn.Module, classes: int, seed: int) -> nn.Module:
    """Return a copy with a new output layer."""
    model = copy.deepcopy(model)
    owner: Any = model
    with torch.random.fork_rng(devices=[]):
        owner.classifier = nn.Linear(owner.classifier.in_features, classes)
    xavier_(owner.classifier, derive_generator(seed, "head"))
    nn.init.zeros_(owner.classifier.bias)
    return model


def fit(
    model: nn.Module, task: Task, plan: Plan, seed: int, every: int | None = None
) -> list[float]:
    """Train by cross entropy with AdamW; the rate rises for a twelfth and falls along a cosine.

    Args:
        model: trained in place, left in evaluation mode.
        task: what is learned.
        plan: how long and how fast.
        seed: of batches and random changes.
        every: steps between looks at the test accuracy, the first before any step; None: one look,
            at the end.

    Returns:
        The test accuracies, the last that of the trained model.
    """
    generator = derive_generator(seed, "batches")
    optimizer = torch.optim.AdamW(model.parameters(), plan.rate, weight_decay=DECAY)
    rising = max(1, plan.steps // 12)
    curve = []
    for step in range(plan.steps):
        if every and step % every == 0:
            curve.append(accuracy(model, task.test))
        falling = (1 + math.cos(math.pi * step / plan.steps)) / 2
        optimizer.param_groups[0]["lr"] = plan.rate * min((step + 1) / rising, falling)
        chosen = torch.randint(len(task.train), (BATCH,), generator=generator)
        images = task.change(task.train.images[chosen], generator)
        F.cross_entropy(model.train()(images), task.train.labels[chosen]).backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
    return [*curve, accuracy(model, task.test)]


@torch.no_grad()
def accuracy(model: nn.Module, split: Split) -> float:
    """Return the fraction of a split that is right."""
    model.eval()
    right = [
        (model(images).argmax(1) == labels).sum()
        for images, labels in zip(split.images.split(500), split.labels.split(500), strict=True)
    ]
    return int(torch.stack(right).sum()) / len(split)
