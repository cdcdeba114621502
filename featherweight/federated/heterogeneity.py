"""How much clients differ: in what they hold, in their gradients, in their updates."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parameters_to_vector

from featherweight.federated.partition.base import Partition
from featherweight.federated.population import Population


@dataclass(frozen=True, eq=False)
class PartitionReport:
    """What the clients of a partition hold.

    Attributes:
        sizes: int64 [clients], numbers of examples.
        labels: int64 [clients], numbers of different labels.
        entropy: float64 [clients], entropy of a client's labels in bits; 0: one label.
        distance: float64 [clients], total variation between a client's labels and those of all
            clients together, in [0, 1]; 0: the same mix.
        pairwise: mean total variation between two different clients, in [0, 1]; 0 for one client.
    """

    sizes: Tensor
    labels: Tensor
    entropy: Tensor
    distance: Tensor
    pairwise: float

    def __str__(self) -> str:
        quantiles = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
        low, middle, high = self.sizes.double().quantile(quantiles).tolist()
        return (
            f"{len(self.sizes)} clients of {low:g} to {high:g} examples (median {middle:g}), "
            f"{self.labels.double().mean():.1f} labels each, "
            f"total variation {self.distance.mean():.2f} to the whole, {self.pairwise:.2f} to "
            "another client"
        )


def partition_report(targets: Tensor, partition: Partition) -> PartitionReport:
    """Describe the clients of a partition.

    Args:
        targets: int64 [N], labels.
        partition: indices of each client, none empty.
    """
    classes = int(targets.max()) + 1
    counts = torch.stack([torch.bincount(targets[part], minlength=classes) for part in partition])
    mixes = counts.double() / counts.sum(1, keepdim=True)
    whole = counts.sum(0).double() / counts.sum()
    return PartitionReport(
        sizes=counts.sum(1),
        labels=(counts > 0).sum(1),
        entropy=torch.special.entr(mixes).sum(1) / torch.tensor(2.0).log(),
        distance=(mixes - whole).abs().sum(1) / 2,
        pairwise=_mean_distance(mixes),
    )


def _mean_distance(mixes: Tensor) -> float:
    """Return the mean total variation over all pairs, by sorting: no table of pairs is made."""
    clients = len(mixes)
    if clients < 2:
        return 0.0
    ranks = 2 * torch.arange(clients, dtype=torch.float64) - (clients - 1)
    gaps = (ranks[:, None] * mixes.sort(0).values).sum()
    return float(gaps / (clients * (clients - 1)))


def client_gradients(
    model: nn.Module,
    population: Population,
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
) -> Tensor:
    """Return the gradient of each client's mean loss.

    Args:
        model: in any mode; it is left as it is, its gradients included.
        population: whose clients.
        loss: of outputs and targets, a mean over examples.

    Returns:
        [clients, parameters], of the parameters that require gradients, in their order.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    rows = []
    for client in range(len(population)):
        inputs, targets = population.client(client)
        found = torch.autograd.grad(loss(model(inputs), targets), parameters)
        rows.append(parameters_to_vector([gradient.contiguous() for gradient in found]))
    return torch.stack(rows)


@dataclass(frozen=True)
class Dissimilarity:
    """How much vectors of clients differ from their mean.

    Attributes:
        variance: zeta^2, mean of ||v_i - v||^2, v the mean; 0: all equal.
        ratio: B^2, mean of ||v_i||^2 over ||v||^2, at least 1; 1: all equal.
        cosine: mean cosine between a client's vector and the mean.
        correlation: ||sum of v_i||^2 / sum of ||v_i||^2 - 1, between -1 (they cancel) and
            clients - 1 (all equal); 0: as of orthogonal vectors. It decides what Rand-k-Spatial
            can gain.
    """

    variance: float
    ratio: float
    cosine: float
    correlation: float


def dissimilarity(vectors: Tensor, weights: Tensor | None = None) -> Dissimilarity:
    """Measure how much clients' gradients, updates or models differ.

    Of gradients, ``variance`` and ``ratio`` are the two measures of the field guide (equation 20);
    of models after local steps, ``variance`` is the clients' drift.

    Args:
        vectors: [clients, d].
        weights: [clients], of the mean, not negative; None: equal. ``correlation`` is unweighted.

    Source: Wang et al. 2021, arXiv:2107.06917; Jhunjhunwala et al. 2021, arXiv:2110.07751
        (correlation).
    """
    rows = vectors.double()
    shares = torch.ones(len(rows), dtype=torch.float64) if weights is None else weights.double()
    shares = shares / shares.sum()
    mean = shares @ rows
    squares = rows.square().sum(1)
    return Dissimilarity(
        variance=float(shares @ (rows - mean).square().sum(1)),
        ratio=float(shares @ squares / mean.square().sum()),
        cosine=float(shares @ F.cosine_similarity(rows, mean.expand_as(rows), dim=1)),
        correlation=float(rows.sum(0).square().sum() / squares.sum() - 1),
    )
