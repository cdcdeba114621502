"""Small federations on which the claims about federated optimisation are tested."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from math import nan
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor, nn

from featherweight.federated.algorithms import Algorithm
from featherweight.federated.local import Local
from featherweight.federated.partition import dirichlet
from featherweight.federated.population import Population
from featherweight.federated.sampling import Uniform
from featherweight.federated.simulate import simulate
from featherweight.lab.claims.claim import Settings
from featherweight.lab.data import load
from featherweight.lab.federated_data import make_clients
from featherweight.lab.federated_recipe import (
    EvaluateRecipe,
    FederatedDataRecipe,
    FederatedRecipe,
    PartitionRecipe,
    SettingRecipe,
)
from featherweight.lab.models import build

WINDOW = 10
"""Last rounds whose test accuracies are averaged: single rounds are noisy."""


@dataclass(frozen=True, eq=False)
class Federation:
    """Clients, and what their model is tested on.

    Attributes:
        clients: that train.
        images: of the test, [N, C, H, W], standardised.
        labels: int64 [N].
    """

    clients: Population
    images: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Work:
    """What is trained, and how long.

    Attributes:
        algorithm: fresh for each run.
        rate: the clients' learning rate.
        rounds: of training.
        cohort: clients of a round.
        epochs: passes over a client's images in a round.
        batch_size: images a step.
    """

    algorithm: Callable[[], Algorithm]
    rate: float
    rounds: int
    cohort: int = 10
    epochs: int = 1
    batch_size: int = 4


def digits(seed: int) -> Federation:
    """Divide digits among 100 clients of 10 images and few labels (Dirichlet, alpha 0.1)."""
    data = load("digits", validation=0)
    labels = data.train.labels
    parts = dirichlet(labels, clients=100, seed=seed, alpha=0.1)
    train, test = (
        (part.images - data.mean.view(-1, 1, 1)) / data.std.view(-1, 1, 1)
        for part in (data.train, data.test)
    )
    return Federation(Population(train, labels, parts), test, data.test.labels)


@lru_cache(maxsize=1)
def writers(folder: Path) -> Federation:
    """Read MNIST, one client for each of the 539 people who wrote its training images."""
    recipe = FederatedRecipe(
        setting=SettingRecipe(kind="cross-device"),
        data=FederatedDataRecipe(name="mnist", path=str(folder)),
        partition=PartitionRecipe(method="natural", clients=None),
        evaluate=EvaluateRecipe(split="pooled", fraction=1e-4),
    )
    made = make_clients(recipe, 0)
    return Federation(made.train, made.test.inputs, made.test.targets)


def accuracy(federation: Federation, work: Work, seed: int) -> float:
    """Train from scratch, and return the mean test accuracy after the last rounds.

    Args:
        federation: who trains.
        work: how.
        seed: of weights, batches and cohorts; runs of one seed share them.
    """
    shape = federation.images.shape[1:]
    options = {"width": 64, "depth": 1, "norm": "none"}
    model = build("mlp", classes=10, shape=(shape[0], shape[1], shape[2]), seed=seed, **options)
    simulation = simulate(
        model,
        federation.clients,
        work.algorithm(),
        sampler=Uniform(len(federation.clients), work.cohort, seed),
        local=Local(work.rate, epochs=work.epochs, batch_size=work.batch_size),
        seed=seed,
    )
    found = []
    for record in simulation.rounds(work.rounds):
        if record.round >= work.rounds - WINDOW:
            found.append(_tested(simulation.model, federation))
    return fmean(found)


def _tested(model: nn.Module, federation: Federation) -> float:
    with torch.no_grad():
        right = model.eval()(federation.images).argmax(1) == federation.labels
    return float(right.float().mean())


def gain(more: Work, less: Work) -> Callable[[Federation, int], float]:
    """Make the effect "test accuracy of one way to train minus that of another"."""

    def effect(federation: Federation, seed: int) -> float:
        return accuracy(federation, more, seed) - accuracy(federation, less, seed)

    return effect


def longer(work: Work, factor: int) -> Work:
    """Return the same work for more rounds."""
    return replace(work, rounds=factor * work.rounds)


@dataclass(frozen=True)
class OnDigits:
    """An experiment on digits.

    Attributes:
        effect: of a federation and a seed.
        seeds: one effect each.
    """

    effect: Callable[[Federation, int], float]
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)

    def effects(self, settings: Settings) -> list[float]:
        """Return the effect for each seed."""
        return [self.effect(digits(seed), seed) for seed in self.seeds]


@dataclass(frozen=True)
class ByWriter:
    """An experiment on MNIST by writer; without its files there is no effect, and no verdict.

    Attributes:
        effect: of a federation and a seed.
        seeds: one effect each.
    """

    effect: Callable[[Federation, int], float]
    seeds: tuple[int, ...] = (0, 1, 2)

    def effects(self, settings: Settings) -> list[float]:
        """Return the effect for each seed; NaN where the files are missing."""
        folder = settings.data or Path(os.environ.get("FEATHERWEIGHT_DATA", ""))
        if not any((folder / name).is_file() for name in ("writers.npz", "mnist/writers.npz")):
            settings.console.print(
                "no writers.npz of MNIST: give --data FOLDER, or set FEATHERWEIGHT_DATA",
                highlight=False,
            )
            return [nan for _ in self.seeds]
        return [self.effect(writers(folder), seed) for seed in self.seeds]
