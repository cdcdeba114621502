"""The training loop: one level of one run, on whatever device Accelerate was given."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import isfinite
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from featherweight.lab.data import Batches
from featherweight.lab.data.seeding import derive_seed
from featherweight.lab.errors import RunFailed
from featherweight.lab.schedule import Schedule


@dataclass(frozen=True)
class Epoch:
    """What one epoch (or the part of one that a level ends with) brought.

    Attributes:
        epoch: number within the level, from 0.
        steps: optimizer steps of the level so far.
        loss, accuracy: mean over the training images seen, while the weights moved.
        learning_rate: of the last step.
        seconds: wall time.
        step_seconds: median wall time of a step.
    """

    epoch: int
    steps: int
    loss: float
    accuracy: float
    learning_rate: float
    seconds: float
    step_seconds: float


class Diverged(RunFailed):
    """The loss or a weight is NaN or infinite."""


@dataclass(frozen=True)
class Loss:
    """What training minimises: cross entropy, and agreement with a teacher where there is one.

    With a teacher's logits t and the model's s the loss of an image is
    ``(1 - a) CE(s) + a T^2 KL(softmax(t / T), softmax(s / T))``.

    Attributes:
        label_smoothing: 0: none.
        distillation: a, weight of the teacher in [0, 1]; 0: none.
        temperature: T > 0.
        teacher: in evaluation mode; None: none.

    Source: Hinton et al. 2015, arXiv:1503.02531.
    """

    label_smoothing: float = 0.0
    distillation: float = 0.0
    temperature: float = 6.0
    teacher: nn.Module | None = None

    def __call__(self, images: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the sum over the images of a batch."""
        hard = F.cross_entropy(
            logits, labels, label_smoothing=self.label_smoothing, reduction="sum"
        )
        if self.teacher is None or self.distillation == 0.0:
            return hard
        with torch.no_grad():
            target = (self.teacher(images) / self.temperature).log_softmax(1)
        found = (logits / self.temperature).log_softmax(1)
        soft = F.kl_div(found, target, log_target=True, reduction="sum") * self.temperature**2
        return (1 - self.distillation) * hard + self.distillation * soft


def train(
    model: nn.Module,
    optimizer: Optimizer,
    batches: Batches,
    loss: Loss,
    schedule: Schedule,
    accelerator: Accelerator,
    *,
    level: int,
    seed: int,
    clip: float | None = None,
    epochs_done: int = 0,
) -> Iterator[Epoch]:
    """Train one level and yield after every epoch; the caller measures and saves in between.

    All randomness of an epoch follows from (seed, level, epoch), so that starting at
    ``epochs_done`` with the weights and optimizer of that moment gives the same numbers as never
    having stopped.

    Args:
        model, optimizer: prepared by the accelerator.
        batches: training images of this rank.
        loss: what is minimised.
        schedule: learning rate and number of steps of the level.
        accelerator: device, precision and ranks.
        level: index of the level.
        seed: of the run.
        clip: limit of the gradient norm; None: none.
        epochs_done: epochs of the level to skip.

    Raises:
        Diverged: the loss or a weight is not finite.
    """
    step = epochs_done * len(batches)
    for epoch in range(epochs_done, -(-schedule.steps // len(batches))):
        torch.manual_seed(derive_seed(seed, "model", level, epoch, accelerator.process_index))
        model.train()
        total = torch.zeros(3, device=accelerator.device, dtype=torch.float64)
        started, times = time.perf_counter(), []
        for images, labels, count in batches.epoch(level, epoch):
            if step == schedule.steps:
                break
            begun = time.perf_counter()
            rate = schedule(step)
            for group in optimizer.param_groups:
                group["lr"] = rate * group.get("rate_factor", 1.0)
            logits = model(images)
            summed = loss(images, logits, labels)
            # Ranks average their gradients, so this makes it the mean over the whole batch even
            # where ranks hold unequal parts of it.
            accelerator.backward(summed * (accelerator.num_processes / count))
            if clip is not None:
                accelerator.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            optimizer.zero_grad()
            total += _sums(summed, logits, labels)
            step += 1
            times.append(time.perf_counter() - begun)
        mean, accuracy = _checked(model, reduced(total, accelerator), epoch, level)
        seconds, median = time.perf_counter() - started, sorted(times)[len(times) // 2]
        yield Epoch(epoch, step, mean, accuracy, rate, seconds, median)


def _checked(model: nn.Module, total: list[float], epoch: int, level: int) -> tuple[float, float]:
    """Return mean loss and accuracy of an epoch, or refuse what is not finite."""
    loss, right, seen = total
    where = f"in epoch {epoch} of level {level}"
    if not isfinite(loss):
        raise Diverged(f"the loss became {loss} {where}")
    if not all(bool(p.isfinite().all()) for p in model.parameters()):
        raise Diverged(f"a weight became infinite or NaN {where}")
    return loss / seen, right / seen


@torch.no_grad()
def evaluate(model: nn.Module, batches: Batches, accelerator: Accelerator) -> tuple[float, float]:
    """Return mean cross entropy and accuracy over a split, on all ranks together.

    Raises:
        Diverged: the loss is not finite.
    """
    model.eval()
    criterion = nn.CrossEntropyLoss(reduction="sum")
    total = torch.zeros(3, device=accelerator.device, dtype=torch.float64)
    for images, labels, _ in batches.epoch("evaluate", 0):
        logits = model(images)
        total += _sums(criterion(logits, labels), logits, labels)
    loss, right, seen = reduced(total, accelerator)
    if not isfinite(loss):
        raise Diverged(f"the loss on held-out images became {loss}")
    return loss / seen, right / seen


@torch.no_grad()
def _sums(loss: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
    right = (logits.argmax(1) == labels).sum()
    return torch.stack([loss.double(), right.double(), right.new_tensor(len(labels)).double()])


def reduced(total: Tensor, accelerator: Accelerator) -> list[float]:
    """Add up a tensor over all ranks."""
    summed: Any = accelerator.reduce(total, "sum") if accelerator.num_processes > 1 else total
    values: list[float] = summed.tolist()
    return values


Progress = Callable[[str], None]
