"""How good a model is for each client: the mean hides whom it serves badly."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from featherweight.federated.population import Population

CHUNK = 4096  # examples that go through the model together


@dataclass(frozen=True, eq=False)
class ClientsReport:
    """Accuracy and loss of each client.

    Attributes:
        accuracy: float64 [clients], fractions of 1.
        loss: float64 [clients], mean cross entropy.
        sizes: int64 [clients], examples each was measured on.
    """

    accuracy: Tensor
    loss: Tensor
    sizes: Tensor

    @property
    def pooled(self) -> float:
        """Accuracy over all examples: clients count by their examples."""
        return float((self.accuracy * self.sizes).sum() / self.sizes.sum())

    @property
    def pooled_loss(self) -> float:
        """Mean loss over all examples."""
        return float((self.loss * self.sizes).sum() / self.sizes.sum())

    def percentile(self, percent: float) -> float:
        """Return a percentile of the clients' accuracies, linear between clients."""
        return float(self.accuracy.quantile(percent / 100))

    def worst(self, fraction: float = 0.1) -> float:
        """Return the mean accuracy of the worst part of the clients, one at least."""
        count = max(1, round(fraction * len(self.accuracy)))
        return float(self.accuracy.sort().values[:count].mean())

    def row(self) -> dict[str, float]:
        """Return what logs keep: pooled figures, and of several clients their distribution."""
        pooled = {"accuracy": self.pooled, "loss": self.pooled_loss}
        if len(self.sizes) < 2:
            return pooled
        return pooled | {
            "client_mean": float(self.accuracy.mean()),
            "client_std": float(self.accuracy.std(correction=0)),
            "client_min": float(self.accuracy.min()),
            "client_p5": self.percentile(5),
            "client_p10": self.percentile(10),
            "client_p50": self.percentile(50),
            "client_worst10": self.worst(0.1),
        }


def evaluate_clients(model: nn.Module, population: Population) -> ClientsReport:
    """Measure a classifier on every client's examples.

    Args:
        model: from inputs to logits [B, classes]; put into evaluation mode meanwhile. Examples
            that no client holds are not looked at.
        population: the clients; held-out ones, or held-out examples of each.
    """
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            right, losses = _measure(model, population)
    finally:
        model.train(training)
    sizes = population.sizes
    owner = torch.repeat_interleave(torch.arange(len(sizes)), sizes)
    accuracy, loss = (
        torch.zeros(len(sizes), dtype=torch.float64).index_add_(0, owner, values.double()) / sizes
        for values in (right, losses)
    )
    return ClientsReport(accuracy, loss, sizes)


def _measure(model: nn.Module, population: Population) -> tuple[Tensor, Tensor]:
    right, losses = [], []
    for chunk in population.indices.split(CHUNK):
        targets = population.targets[chunk]
        logits = model(population.inputs[chunk])
        right.append((logits.argmax(1) == targets).cpu())
        losses.append(F.cross_entropy(logits, targets, reduction="none").cpu())
    return torch.cat(right), torch.cat(losses)
