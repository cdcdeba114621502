"""Claims of Zhou, Jacobs, Gadhikar & Burkholz 2025, "Pay Attention to Small Weights"."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial

import torch
from torch import nn
from torch.optim import Adam, Optimizer

from featherweight.lab.claims.claim import CLAIMS, Claim, Computed
from featherweight.lab.digits import accuracy, tasks, train
from featherweight.lab.selective_adam import SelectiveAdam, large_gradients
from featherweight.optim import NanoAdam

PAPER = "Zhou, Jacobs, Gadhikar & Burkholz 2025, arXiv:2506.21374"
DENSITY, INTERVAL, STEPS = 0.1, 20, 300
LARGE_RATE = 1e-2  # ten times what suits Adam
HEAD_RATE = 1e-3

Make = Callable[[list[nn.Parameter], list[nn.Parameter]], Optimizer]
"""From the weights of the body and of the fresh head to an optimizer of both."""


def adam(body: list[nn.Parameter], head: list[nn.Parameter]) -> Optimizer:
    """Train everything."""
    groups: list[dict[str, object]] = [{"params": body, "lr": LARGE_RATE}, {"params": head}]
    return Adam(groups, HEAD_RATE)


def nanoadam(body: list[nn.Parameter], head: list[nn.Parameter]) -> Optimizer:
    """Train the smallest weights, and the head."""
    groups = [{"params": body, "lr": LARGE_RATE}, {"params": head, "density": 1.0}]
    return NanoAdam(groups, HEAD_RATE, density=DENSITY, mask_interval=INTERVAL)


def gradients(body: list[nn.Parameter], head: list[nn.Parameter]) -> Optimizer:
    """Train where the gradients are largest, and the head."""
    groups = [{"params": body, "lr": LARGE_RATE}, {"params": head, "density": 1.0}]
    return SelectiveAdam(groups, HEAD_RATE, DENSITY, INTERVAL, large_gradients)


def retention(make: Make, seed: int) -> tuple[float, float]:
    """Learn digits 0 to 4, then 5 to 9 with a fresh output layer.

    Returns:
        Test accuracy on the old digits afterwards, with the old output layer, and on the new.
    """
    body, old_head, new_head = _pretrained(seed)
    _, new = tasks("train", [range(5), range(5, 10)])
    old_test, new_test = tasks("test", [range(5), range(5, 10)])
    optimizer = make(list(body.parameters()), list(new_head.parameters()))
    train(nn.Sequential(body, new_head), optimizer, new, STEPS, seed + 1)
    before = accuracy(nn.Sequential(body, old_head), old_test)
    return before, accuracy(nn.Sequential(body, new_head), new_test)


def _pretrained(seed: int) -> tuple[nn.Sequential, nn.Linear, nn.Linear]:
    """Return a body and its head that know digits 0 to 4, and a head that knows nothing."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers = [nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU()]
        body, head, fresh = nn.Sequential(*layers), nn.Linear(512, 5), nn.Linear(512, 5)
    (old,) = tasks("train", [range(5)])
    model = nn.Sequential(body, head)
    train(model, Adam(model.parameters(), 1e-3), old, STEPS, seed)
    return body, head, fresh


@lru_cache
def _retained(make: Make, seed: int) -> float:
    return retention(make, seed)[0]


def _gain(better: Make, worse: Make, seed: int) -> float:
    return _retained(better, seed) - _retained(worse, seed)


CLAIMS.add(
    Claim(
        name="nanoadam-keeps-the-old-task",
        paper=PAPER,
        sentence="At a large learning rate Adam forgets the task it was trained on before; "
        "NanoAdam, which moves the smallest weights alone, keeps it.",
        measured="test accuracy on digits 0 to 4 after learning 5 to 9 at learning rate 0.01, "
        "NanoAdam at density 0.1 minus Adam, points",
        experiment=Computed(partial(_gain, nanoadam, adam)),
    )
)
CLAIMS.add(
    Claim(
        name="small-weights-keep-more-than-large-gradients",
        paper=PAPER,
        sentence="Of equally many entries, the smallest weights keep the old task better than "
        "those of the largest gradients.",
        measured="test accuracy on digits 0 to 4 after learning 5 to 9 at learning rate 0.01, "
        "small weights minus large gradients at density 0.1, points",
        experiment=Computed(partial(_gain, nanoadam, gradients)),
    )
)
