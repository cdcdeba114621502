"""Trainings of seconds on digits, for claims that recipes can't express."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from featherweight.lab.data import load
from featherweight.lab.data.seeding import derive_seed


@dataclass(frozen=True)
class Task:
    """Standardised images [N, 64] and labels of some classes, numbered from 0."""

    images: Tensor
    labels: Tensor


def tasks(split: str, classes: Sequence[Sequence[int]]) -> list[Task]:
    """Return a split of digits, divided by class.

    Args:
        split: "train" or "test".
        classes: those of each task.
    """
    digits = load("digits", validation=0)
    found = getattr(digits, split)
    images = ((found.images - digits.mean) / digits.std).flatten(1)
    result = []
    for chosen in classes:
        inside = torch.isin(found.labels, torch.tensor(chosen))
        labels = torch.tensor([list(chosen).index(int(label)) for label in found.labels[inside]])
        result.append(Task(images[inside], labels))
    return result


def train(
    model: nn.Module,
    optimizer: Optimizer,
    task: Task,
    steps: int,
    seed: int,
    before_step: Callable[[int], None] | None = None,
) -> None:
    """Train by cross entropy on random batches of 64; learning rates fall along a cosine to 0.

    Args:
        model: trained in place.
        optimizer: its groups' learning rates are the first.
        task: what is learned.
        steps: of the optimizer.
        seed: of the batches.
        before_step: called with the number of the step when gradients are there.
    """
    generator = torch.Generator().manual_seed(derive_seed(seed, "batches"))
    first = [group["lr"] for group in optimizer.param_groups]
    model.train()
    for step in range(steps):
        for group, rate in zip(optimizer.param_groups, first, strict=True):
            group["lr"] = rate * (1 + math.cos(math.pi * step / steps)) / 2
        chosen = torch.randint(len(task.labels), (64,), generator=generator)
        F.cross_entropy(model(task.images[chosen]), task.labels[chosen]).backward()
        if before_step is not None:
            before_step(step)
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def accuracy(model: nn.Module, task: Task) -> float:
    """Return the fraction of a task that is right."""
    right = model.eval()(task.images).argmax(1) == task.labels
    return float(right.double().mean())
