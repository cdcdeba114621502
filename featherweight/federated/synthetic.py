"""Populations whose heterogeneity is a number: Synthetic(alpha, beta), and quadratics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from featherweight.common import as_generator
from featherweight.federated.population import Population
from featherweight.federated.streams import stream

SMALLEST = 50  # examples of a client, as in the paper's code


def synthetic(
    alpha: float,
    beta: float,
    *,
    clients: int = 30,
    seed: int,
    features: int = 60,
    classes: int = 10,
    sizes: Sequence[int] | None = None,
) -> Population:
    """Draw logistic-regression data of clients with own models and own inputs.

    Client i labels x by the largest entry of W x + b, where the entries of W and b are N(u, 1) and
    u ~ N(0, alpha); its inputs are N(v, diag(j ** -1.2)), where the entries of v are N(B, 1) and
    B ~ N(0, beta).

    Args:
        alpha: variance of the clients' model means, at least 0: how much their models differ.
        beta: variance of the clients' input means, at least 0: how much their inputs differ.
        clients: number of clients.
        seed: of everything.
        features: of an input.
        classes: of the labels.
        sizes: numbers of examples; None: 50 plus a whole log-normal number, exp(4 + 2 z).

    Returns:
        Inputs float32 [N, features], labels int64 [N].

    Raises:
        ValueError: a variance is negative, or ``sizes`` does not give each client an example.

    Source: Li, Sahu, Zaheer, Sanjabi, Talwalkar and Smith 2020, arXiv:1812.06127, section 5.1.
    """
    if min(alpha, beta) < 0:
        raise ValueError(f"alpha and beta must be at least 0, got {alpha} and {beta}")
    generator = as_generator(stream(seed, "synthetic"))
    if sizes is None:
        normal = torch.randn(clients, generator=generator)
        sizes = [SMALLEST + int(size) for size in (4 + 2 * normal).exp()]
    if len(sizes) != clients or min(sizes) < 1:
        raise ValueError(f"sizes must give each of {clients} clients an example, got {[*sizes]}")
    scale = torch.arange(1, features + 1) ** -0.6  # the root of j ** -1.2
    inputs, labels = [], []
    for size in sizes:
        model_mean, input_mean = torch.randn(2, generator=generator) * torch.tensor(
            [alpha**0.5, beta**0.5]
        )
        weight = model_mean + torch.randn(classes, features, generator=generator)
        bias = model_mean + torch.randn(classes, generator=generator)
        centre = input_mean + torch.randn(features, generator=generator)
        x = centre + scale * torch.randn(size, features, generator=generator)
        inputs.append(x)
        labels.append((x @ weight.T + bias).argmax(1))
    indices = torch.arange(sum(sizes)).split(list(sizes))
    return Population(torch.cat(inputs), torch.cat(labels), indices)


@dataclass(frozen=True, eq=False)
class Quadratics:
    """Clients' objectives F_i(x) = (x - c_i)^T A_i (x - c_i) / 2.

    Attributes:
        curvatures: A_i, float64 [clients, d, d], symmetric and positive definite.
        centres: c_i, float64 [clients, d].
    """

    curvatures: Tensor
    centres: Tensor

    @property
    def optimum(self) -> Tensor:
        """Where the mean objective is least."""
        return self.fixed_point(self.curvatures)

    def fixed_point(self, pulls: Tensor) -> Tensor:
        """Return (sum Q_i)^-1 sum Q_i c_i: where clients that pull by Q_i hold each other.

        Args:
            pulls: Q_i, [clients, d, d].
        """
        pulled = torch.einsum("nij,nj->i", pulls, self.centres)
        found: Tensor = torch.linalg.solve(pulls.sum(0), pulled)
        return found

    def fedavg_fixed_point(self, rate: float, steps: int | Tensor) -> Tensor:
        """Return where FedAvg with full participation and gradient descent comes to rest.

        Args:
            rate: of the clients.
            steps: local steps, or int64 [clients].

        Returns:
            float64 [d]: the fixed point for Q_i = I - (I - rate A_i) ** steps_i. With unequal steps
            it is not that of the mean objective, however small the rate.

        Source: solved here; the surrogate objective behind it: Charles and Konečný 2021,
            arXiv:2103.05032.
        """
        counts = torch.as_tensor(steps).expand(len(self.centres)).tolist()
        eye = torch.eye(self.centres.shape[1], dtype=self.centres.dtype)
        pulls = [
            eye - torch.linalg.matrix_power(eye - rate * curvature, count)
            for curvature, count in zip(self.curvatures, counts, strict=True)
        ]
        return self.fixed_point(torch.stack(pulls))

    def gradients(self, x: Tensor) -> Tensor:
        """Return the gradient of each client at x [d] or at its own x [clients, d]."""
        return torch.einsum("nij,nj->ni", self.curvatures, x - self.centres)


def quadratics(
    clients: int, dimension: int, *, seed: int, spread: float = 1.0, condition: float = 10.0
) -> Quadratics:
    """Draw quadratic objectives whose heterogeneity is set by two numbers.

    Args:
        clients: number of clients.
        dimension: d.
        seed: of everything.
        spread: standard deviation of the centres, at least 0; 0: all clients have one optimum.
        condition: largest over smallest eigenvalue of each A_i, at least 1, the largest 1; 1: all
            clients have one curvature.

    Raises:
        ValueError: an argument is out of range.
    """
    if min(clients, dimension) < 1 or spread < 0 or condition < 1:
        raise ValueError(
            "clients and dimension must be at least 1, spread 0 and condition 1; got "
            f"{clients}, {dimension}, {spread} and {condition}"
        )
    generator = as_generator(stream(seed, "quadratics"))
    drawn = torch.randn(clients, dimension + 1, dimension, generator=generator, dtype=torch.float64)
    bases, _ = torch.linalg.qr(drawn[:, 1:])
    eigenvalues = torch.logspace(
        -torch.tensor(condition).log10().item(), 0, dimension, dtype=torch.float64
    )
    curvatures = torch.einsum("nij,j,nkj->nik", bases, eigenvalues, bases)
    return Quadratics(curvatures, spread * drawn[:, 0])
