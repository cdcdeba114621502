"""Clients that see or name things differently: feature skew and concept shift."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from featherweight.common import as_generator
from featherweight.federated.population import Population
from featherweight.federated.streams import stream


def noisy(population: Population, *, seed: int, largest: float) -> Population:
    """Add Gaussian noise of a level of its own to each client's inputs.

    Client i of M gets the level ``largest * (i + 1) / M``: clients differ in features alone.

    Args:
        population: floating-point inputs; clients must not share examples.
        seed: of the noise.
        largest: standard deviation of the noisiest client, at least 0; 0: no change.

    Raises:
        ValueError: ``largest`` is negative, or clients share examples.
    """
    if largest < 0:
        raise ValueError(f"largest must be at least 0, got {largest}")
    _own_examples(population)
    generator = as_generator(stream(seed, "feature skew"))
    inputs = population.inputs.clone()
    for client, indices in enumerate(population.clients):
        noise = torch.randn(inputs[indices].shape, generator=generator)
        inputs[indices] += largest * (client + 1) / len(population) * noise
    return replace(population, inputs=inputs)


def relabelled(population: Population, *, seed: int, groups: int, classes: int) -> Population:
    """Permute the labels of each group of clients: the same input means different things.

    Client i belongs to group i modulo ``groups``; the first group keeps its labels.

    Args:
        population: integer targets in 0..classes-1; clients must not share examples.
        seed: of the permutations.
        groups: number of groups, at least 1; 1: no change.
        classes: number of labels.

    Raises:
        ValueError: ``groups`` is below 1, or clients share examples.
    """
    if groups < 1:
        raise ValueError(f"groups must be at least 1, got {groups}")
    _own_examples(population)
    rng = np.random.default_rng(stream(seed, "concept shift"))
    names = [np.arange(classes), *(rng.permutation(classes) for _ in range(groups - 1))]
    targets = population.targets.clone()
    for client, indices in enumerate(population.clients):
        targets[indices] = torch.from_numpy(names[client % groups])[targets[indices]]
    return replace(population, targets=targets)


def _own_examples(population: Population) -> None:
    if len(population.indices.unique()) < len(population.indices):
        raise ValueError("population: clients share examples, which cannot differ between them")
