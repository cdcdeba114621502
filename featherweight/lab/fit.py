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
from torch.optim import SGD, AdamW, Optimizer

from featherweight.lab.data import Batches
from featherweight.lab.data.seeding import derive_seed
from featherweight.lab.errors import RunFailed
from featherweight.lab.recipe import FitRecipe
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


def make_optimizer(model: nn.Module, fit: FitRecipe) -> Optimizer:
    """Build the recipe's optimizer over all parameters, fused where torch has it."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    fused = all(p.device.type in ("cpu", "cuda", "mps") for p in parameters)
    common: dict[str, Any] = {
        "lr": fit.learning_rate,
        "weight_decay": fit.weight_decay,
        "fused": fused,
    }
    optimizer: Optimizer
    if fit.optimizer == "adamw":
        optimizer = AdamW(parameters, **common)
    else:
        optimizer = SGD(parameters, momentum=fit.momentum, nesterov=fit.nesterov, **common)
    optimizer.register_load_state_dict_post_hook(_lay_out_as_weights)
    return optimizer


@torch.no_grad()
def _lay_out_as_weights(optimizer: Optimizer) -> None:
    """Give loaded state the memory format of its weights.

    Fused steps go through memory in order: state in another format would meet other weights.
    """
    for weight, state in optimizer.state.items():
        for key, value in state.items():
            if isinstance(value, Tensor) and value.shape == weight.shape:
                state[key] = torch.empty_like(weight, dtype=value.dtype).copy_(value)


def train(
    model: nn.Module,
    optimizer: Optimizer,
    batches: Batches,
    fit: FitRecipe,
    schedule: Schedule,
    accelerator: Accelerator,
    *,
    level: int,
    seed: int,
    epochs_done: int = 0,
) -> Iterator[Epoch]:
    """Train one level and yield after every epoch; the caller measures and saves in between.

    All randomness of an epoch follows from (seed, level, epoch), so that starting at
    ``epochs_done`` with the weights and optimizer of that moment gives the same numbers as never
    having stopped.

    Args:
        model, optimizer: prepared by the accelerator.
        batches: training images of this rank.
        fit: the recipe's training part.
        schedule: learning rate and number of steps of the level.
        accelerator: device, precision and ranks.
        level: index of the level.
        seed: of the run.
        epochs_done: epochs of the level to skip.

    Raises:
        Diverged: the loss or a weight is not finite.
    """
    criterion = nn.CrossEntropyLoss(label_smoothing=fit.label_smoothing, reduction="sum")
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
                group["lr"] = rate
            logits = model(images)
            # Ranks average their gradients, so this makes it the mean over the whole batch even
            # where ranks hold unequal parts of it.
            loss = criterion(logits, labels)
            accelerator.backward(loss * (accelerator.num_processes / count))
            if fit.clip is not None:
                accelerator.clip_grad_norm_(model.parameters(), fit.clip)
            optimizer.step()
            optimizer.zero_grad()
            total += _sums(loss, logits, labels)
            step += 1
            times.append(time.perf_counter() - begun)
        loss_sum, right, seen = reduced(total, accelerator)
        where = f"in epoch {epoch} of level {level}"
        if not isfinite(loss_sum):
            raise Diverged(f"the loss became {loss_sum} {where}")
        if not all(bool(p.isfinite().all()) for p in model.parameters()):
            raise Diverged(f"a weight became infinite or NaN {where}")
        seconds = time.perf_counter() - started
        median = sorted(times)[len(times) // 2]
        yield Epoch(epoch, step, loss_sum / seen, right / seen, rate, seconds, median)


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
