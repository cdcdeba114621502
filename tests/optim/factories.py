"""The optimizers that the conformance suite runs: to add one, add a line to ROWS."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.optim import Optimizer

from featherweight import optim

HAM = {"alpha": 20.0, "beta": 0.1}


class Row(NamedTuple):
    """One optimizer.

    Attributes:
        make: parameters or groups, and options of torch's optimizers, to an optimizer. The
            learning rate is the factory's own unless ``lr`` is given.
        options: names of the options it takes among lr, foreach, fused, maximize.
        dtensor: works on sharded parameters.
        layouts: takes gradients of another memory layout than their weights. torch's fused CPU
            kernel reads them as they lie in memory.
    """

    make: Callable[..., Optimizer]
    options: tuple[str, ...] = ("lr", "foreach", "fused", "maximize")
    dtensor: bool = True
    layouts: bool = True


def _ham(base: type[Optimizer], lr: float, **fixed: Any) -> Callable[..., Optimizer]:
    own = {key: fixed.pop(key) for key in ("direction",) if key in fixed}

    def make(params, **options):
        return optim.ham(base(params, **{"lr": lr, **fixed, **options}), **HAM, **own)

    return make


def _plain(kind: Callable[..., Optimizer], **fixed: Any) -> Callable[..., Optimizer]:
    return lambda params, **options: kind(params, **{**fixed, **options})


SGD, ADAMW = torch.optim.SGD, torch.optim.AdamW

ROWS: dict[str, Row] = {
    "torch AdamW": Row(_plain(ADAMW, lr=1e-2)),  # the control
    "ham SGD": Row(_ham(SGD, 0.05, momentum=0.9)),
    "ham AdamW": Row(_ham(ADAMW, 1e-2)),
    "ham AdamW fused": Row(_ham(ADAMW, 1e-2, fused=True), ("lr", "maximize"), layouts=False),
    "ham update": Row(_ham(SGD, 0.01, momentum=0.9, direction="update")),
    "HamSGD": Row(_plain(optim.HamSGD, lr=0.05, momentum=0.9, **HAM)),
    "HamAdamW": Row(_plain(optim.HamAdamW, lr=1e-2, **HAM)),
    "HamAdamW update": Row(_plain(optim.HamAdamW, lr=1e-2, direction="update", **HAM)),
    "NanoAdam": Row(
        _plain(optim.NanoAdam, lr=1e-2, density=0.5, mask_interval=3, min_size=8), dtensor=False
    ),
}


def network(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """A small network with weights of one to four axes, the same at each call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return nn.Sequential(
            nn.Conv2d(2, 4, 3),
            nn.GroupNorm(2, 4),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(64, 16),
            nn.ReLU(),
            nn.Linear(16, 3),
        ).to(dtype)


def batch(step: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """The images and labels of a step."""
    generator = torch.Generator().manual_seed(step)
    images = torch.randn(12, 2, 6, 6, generator=generator).to(dtype)
    return images, torch.randint(3, (12,), generator=generator)


def loss_of(model: nn.Module, step: int) -> torch.Tensor:
    images, labels = batch(step, next(model.parameters()).dtype)
    return nn.functional.cross_entropy(model(images), labels)


def train(model: nn.Module, optimizer: Optimizer, steps: range, schedule: Any = None) -> None:
    for step in steps:
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()
        if schedule is not None:
            schedule.step()


def schedule_of(optimizer: Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 9)
