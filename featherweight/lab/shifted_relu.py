"""A function that networks without biases can't fit, learned by choosing weights alone."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from featherweight.init import INITS
from featherweight.sparse import reparam

FLOOR = 0.05143
"""Least mean squared error of a network of ReLUs without biases, which can only be two half-lines
through 0, for ``relu(x + 1/2)`` and x uniform in [-1, 1]."""

NOISE = 0.01
EXAMPLES, TESTED, EPOCHS = 4000, 400, 20


def ticket_error(bias: bool, density: float, seed: int) -> float:
    """Train the scores of a random 1-100-100-1 network and return its test error.

    Each epoch ends with the scale of the output fitted to the targets.

    Args:
        bias: whether the network has random biases, which are chosen like weights, or zeros.
        density: kept fraction of each layer.
        seed: of data, weights, scores and batches.

    Returns:
        Mean squared error.

    Source: Fischer, Gadhikar and Burkholz 2021, arXiv:2110.11150, section 5.1; sizes are ours.
    """
    generator = torch.Generator().manual_seed(seed)
    inputs = 2 * torch.rand(EXAMPLES, 1, generator=generator) - 1
    noise = NOISE * torch.randn(EXAMPLES, 1, generator=generator)
    targets = (inputs + 0.5).relu() + noise
    model = nn.Sequential(
        *[nn.Linear(1, 100), nn.ReLU(), nn.Linear(100, 100), nn.ReLU(), nn.Linear(100, 1)]
    )
    factor = 1.0 if bias else 0.0
    INITS["he-nonzero-bias"].method(model, seed=seed, bias_factor=factor)
    reparam.edge_popup(model, density, biases=bias, seed=seed)
    _train(model, inputs[TESTED:], targets[TESTED:], generator)
    with torch.no_grad():
        return float(F.mse_loss(model(inputs[:TESTED]), targets[:TESTED]))


def _train(model: nn.Module, inputs: Tensor, targets: Tensor, generator: torch.Generator) -> None:
    scores = reparam.score_parameters(model)
    optimizer = torch.optim.SGD(scores, lr=0.1, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS)
    for _ in range(EPOCHS):
        for batch in torch.randperm(len(inputs), generator=generator).split(32):
            F.mse_loss(model(inputs[batch]), targets[batch]).backward()
            optimizer.step()
            optimizer.zero_grad()
        reparam.scale_to_fit_(model, inputs[:1000], targets[:1000], optimizer=optimizer)
        schedule.step()
