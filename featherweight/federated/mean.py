"""Computations on distributed data that need nothing but means of vectors, through any codec.

Each runs for some rounds; in each, every client computes a vector from its own data and what was
broadcast, sends it through the codec, and the server uses the estimated mean.

Source: Jhunjhunwala et al. 2021, arXiv:2110.07751, section 5.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from featherweight.federated.codecs.codec import Codec


@dataclass(frozen=True)
class Estimate:
    """An estimated mean.

    Attributes:
        mean: [length].
        bytes: size of all messages.
    """

    mean: Tensor
    bytes: int


@dataclass(frozen=True)
class Trace:
    """A computation and how it went.

    Attributes:
        result: what was computed.
        objective: its quality after each round.
        errors: squared error of each round's mean over the squared norm of the true one; 0 if both
            are zero.
        bytes: size of all messages.
    """

    result: Tensor
    objective: tuple[float, ...]
    errors: tuple[float, ...]
    bytes: int


def estimate_mean(
    vectors: Sequence[Tensor],
    codec: Codec,
    *,
    round: int = 0,
    weights: Sequence[float] | None = None,
) -> Estimate:
    """Encode one vector a client, and decode the mean of all.

    Args:
        vectors: [length] each; client i sends vector i.
        codec: of all.
        round: number of the round.
        weights: positive, up to a common factor; None for equal ones.
    """
    given = [1.0] * len(vectors) if weights is None else weights
    messages = [
        codec.encode(vector, round=round, client=client, weight=weight)
        for client, (vector, weight) in enumerate(zip(vectors, given, strict=True))
    ]
    return Estimate(codec.decode_mean(messages), sum(map(len, messages)))


def power_iteration(
    data: Sequence[Tensor], codec: Codec, *, rounds: int, start: Tensor | None = None
) -> Trace:
    """Find the direction of largest variance, by power iteration.

    Clients send X_i^T X_i v.

    Args:
        data: [examples, features] of each client, centred.
        codec: of the vectors.
        rounds: iterations.
        start: [features]; None for equal entries.

    Returns:
        A unit vector [features]; the objective is the fraction of the variance along it.
    """
    features = data[0].shape[1]
    v = torch.ones(features) if start is None else start
    total = sum(float(own.square().sum()) for own in data)

    def local(v: Tensor) -> list[Tensor]:
        return [own.T @ (own @ v) for own in data]

    def quality(v: Tensor) -> float:
        along = sum(float((own @ v).square().sum()) for own in data)
        return along / total if total else 0.0

    return _run(v / v.norm(), local, lambda _, mean: _unit(mean), quality, codec, rounds)


def k_means(data: Sequence[Tensor], codec: Codec, *, rounds: int, start: Tensor) -> Trace:
    """Cluster by Lloyd's algorithm on means of the clients' centroids.

    A client without an example in a cluster sends the cluster's present centroid.

    Args:
        data: [examples, features] of each client.
        codec: of the vectors, [clusters * features].
        rounds: iterations.
        start: [clusters, features].

    Returns:
        Centroids [clusters, features]; the objective is the mean squared distance to the nearest.
    """

    def local(centroids: Tensor) -> list[Tensor]:
        return [_centroids(own, centroids).flatten() for own in data]

    def quality(centroids: Tensor) -> float:
        nearest = [torch.cdist(own, centroids).square().amin(1) for own in data]
        return float(torch.cat(nearest).mean())

    return _run(start, local, lambda _, mean: mean.reshape(start.shape), quality, codec, rounds)


def logistic_regression(
    data: Sequence[tuple[Tensor, Tensor]],
    codec: Codec,
    *,
    rounds: int,
    classes: int,
    learning_rate: float,
    weight_decay: float = 0.0,
) -> Trace:
    """Fit a linear classifier by gradient descent on means of the clients' gradients.

    Args:
        data: inputs [examples, features] and labels [examples] of each client.
        codec: of the gradients, [classes * (features + 1)].
        rounds: steps.
        classes: how many.
        learning_rate: of the steps.
        weight_decay: adds this times half the squared norm to the loss.

    Returns:
        [classes, features + 1], the last column is the bias; the objective is the mean over clients
        of the loss.
    """
    padded = [(F.pad(inputs, (0, 1), value=1.0), labels) for inputs, labels in data]

    def loss(own: tuple[Tensor, Tensor], weights: Tensor) -> Tensor:
        inputs, labels = own
        penalty = weights.square().sum() * (weight_decay / 2)
        return F.cross_entropy(inputs @ weights.T, labels) + penalty

    def local(weights: Tensor) -> list[Tensor]:
        gradient = torch.func.grad(loss, argnums=1)
        return [gradient(own, weights).flatten() for own in padded]

    def step(weights: Tensor, mean: Tensor) -> Tensor:
        return weights - learning_rate * mean.reshape(weights.shape)

    def quality(weights: Tensor) -> float:
        return float(torch.stack([loss(own, weights) for own in padded]).mean())

    start = torch.zeros(classes, padded[0][0].shape[1])
    return _run(start, local, step, quality, codec, rounds)


def _run(
    state: Tensor,
    local: Callable[[Tensor], list[Tensor]],
    update: Callable[[Tensor, Tensor], Tensor],
    quality: Callable[[Tensor], float],
    codec: Codec,
    rounds: int,
) -> Trace:
    objective, errors, sent = [], [], 0
    for number in range(rounds):
        vectors = local(state)
        found = estimate_mean(vectors, codec, round=number)
        true = torch.stack(vectors).mean(0)
        errors.append(_relative(found.mean - true, true))
        state = update(state, found.mean)
        objective.append(quality(state))
        sent += found.bytes
    return Trace(state, tuple(objective), tuple(errors), sent)


def _relative(error: Tensor, true: Tensor) -> float:
    lost, whole = float(error.square().sum()), float(true.square().sum())
    return lost / whole if lost else 0.0


def _unit(vector: Tensor) -> Tensor:
    norm = vector.norm()
    return vector / norm if norm > 0 else torch.full_like(vector, len(vector) ** -0.5)


def _centroids(points: Tensor, centroids: Tensor) -> Tensor:
    nearest = torch.cdist(points, centroids).argmin(1)
    members = F.one_hot(nearest, len(centroids)).to(points.dtype)
    counts = members.sum(0)[:, None]
    means = (members.T @ points) / counts.clamp(min=1)
    return torch.where(counts > 0, means, centroids)
