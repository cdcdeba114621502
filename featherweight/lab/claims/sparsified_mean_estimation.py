"""Claims of Jhunjhunwala et al. 2021, "... Correlations in Sparsified Mean Estimation".

At mini scale the data are digits (64 features), ten clients, six entries a message. ``--scale
paper --data FOLDER`` takes the test images of Fashion-MNIST or MNIST, padded to 32 by 32 (1024
features), and 102 entries. Rand-k, Spatial and Temporal send the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import log2
from statistics import fmean

import torch
from torch import Tensor
from torch.nn import functional as F

from featherweight.federated.codecs import Codec, RandK, RandKSpatial, RandKTemporal, Wangni
from featherweight.federated.codecs import spatial as theory
from featherweight.federated.mean import Trace, k_means, logistic_regression, power_iteration
from featherweight.lab.claims.claim import CLAIMS, Claim, Computed, Settings
from featherweight.lab.data import load
from featherweight.lab.data.seeding import derive_seed

PAPER = "Jhunjhunwala, Mallick, Gadhikar, Kadhe & Joshi 2021, arXiv:2110.07751"
CLIENTS = 10
ROUNDS = 30
Make = Callable[[int, int], Codec]  # entries, seed
MAKERS: dict[str, Make] = {
    "rand-k": lambda k, seed: RandK(k, seed=seed),
    "spatial": lambda k, seed: RandKSpatial(k, "avg", seed=seed),
    "temporal": lambda k, seed: RandKTemporal(k, seed=seed),
}


@dataclass(frozen=True)
class Images:
    """Images on clients, chosen at random.

    Attributes:
        inputs: [examples, features], centred.
        labels: [examples].
        entries: that a message may hold.
    """

    inputs: Tensor
    labels: Tensor
    entries: int

    def clients(self, seed: int) -> list[tuple[Tensor, Tensor]]:
        """Return equal parts for ten clients."""
        generator = torch.Generator().manual_seed(derive_seed(seed, "clients"))
        size = len(self.inputs) // CLIENTS
        order = torch.randperm(len(self.inputs), generator=generator)[: size * CLIENTS]
        return [(self.inputs[own], self.labels[own]) for own in order.split(size)]


def images(settings: Settings) -> Images:
    """Return the data of the scale."""
    if settings.scale == "mini":
        digits = load("digits", validation=0).train
        inputs = digits.images.flatten(1).float() / 16
        return Images(inputs - inputs.mean(0), digits.labels, 6)
    test = load("mnist", settings.data, validation=0).test
    pixels = F.pad(test.images.float(), (2, 2, 2, 2)).flatten(1) / 255
    return Images(pixels - pixels.mean(0), test.labels, 102)


def pca(data: Images, codec: Codec, seed: int) -> Trace:
    """Find the first principal component."""
    return power_iteration([own for own, _ in data.clients(seed)], codec, rounds=ROUNDS)


def clusters(data: Images, codec: Codec, seed: int) -> Trace:
    """Find ten clusters, beginning with random examples."""
    generator = torch.Generator().manual_seed(derive_seed(seed, "start"))
    start = data.inputs[torch.randperm(len(data.inputs), generator=generator)[:10]]
    return k_means([own for own, _ in data.clients(seed)], codec, rounds=ROUNDS, start=start)


def classifier(data: Images, codec: Codec, seed: int) -> Trace:
    """Fit logistic regression with steps large enough for noise to matter."""
    return logistic_regression(data.clients(seed), codec, rounds=100, classes=10, learning_rate=4.0)


@dataclass(frozen=True)
class Compared:
    """By which fraction one codec's figure is below another's, at the same data and seed.

    Attributes:
        task: `pca`, `clusters` or `classifier`.
        figure: of a trace, smaller is better.
        better, worse: how both codecs are made.
        seeds: one effect each.
    """

    task: Callable[[Images, Codec, int], Trace]
    figure: Callable[[Trace], float]
    better: Make
    worse: Make
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)

    def effects(self, settings: Settings) -> list[float]:
        """Return the effect for each seed."""
        data = images(settings)
        return [self._effect(data, seed) for seed in self.seeds]

    def _effect(self, data: Images, seed: int) -> float:
        entries = data.entries * (1 if self.task is pca else 10)  # vectors are 10 times as long
        better, worse = (
            self.figure(self.task(data, make(entries, seed), seed))
            for make in (self.better, self.worse)
        )
        return 1 - better / worse


def error(trace: Trace) -> float:
    """Return the mean relative squared error of the means."""
    return fmean(trace.errors)


def objective(trace: Trace) -> float:
    """Return the mean objective of the last ten rounds."""
    return fmean(trace.objective[-10:])


def wangni_at_equal_bytes(entries: int, seed: int) -> Codec:
    """Return Wangni's codec with as many entries as pay for their indices, a tenth of all."""
    index = log2(10) + 1.5  # bits, of Rice's code
    return Wangni(round(entries * 32 / (32 + index)), seed=seed)


def formula_ratio(seed: int) -> float:
    """Return Spatial-Avg's mean squared error over the closed form, on correlated vectors."""
    generator = torch.Generator().manual_seed(derive_seed(seed, "vectors"))
    common = torch.randn(2048, generator=generator)
    vectors = common + torch.randn(CLIENTS, 2048, generator=generator)
    codec, mean, errors = RandKSpatial(0.1, "avg", seed=seed), vectors.mean(0), []
    for number in range(60):
        messages = [codec.encode(x, round=number, client=i) for i, x in enumerate(vectors)]
        errors.append(float((codec.decode_mean(messages) - mean).square().sum()))
    values = theory.transform_values(theory.slope("avg", CLIENTS), CLIENTS)
    share = round(0.1 * 2048) / 2048
    return fmean(errors) / theory.squared_error(
        values, share, theory.correlation(vectors / CLIENTS)
    )


CLAIMS.add(
    Claim(
        name="spatial-error-is-the-closed-form",
        paper=PAPER,
        sentence="The mean squared error of Rand-k-Spatial is the closed form in the clients' "
        "correlation (here: within 3 per cent).",
        measured="simulated error of Spatial-Avg over the formula",
        experiment=Computed(formula_ratio),
        region=(0.97, 1.03),
        scale=1.0,
    )
)
for better, says in {
    "spatial": "Rand-k-Spatial (Avg) estimates means better than Rand-k at the same bytes",
    "temporal": "Rand-k-Temporal estimates means better than Rand-k at the same bytes",
}.items():
    for name, task, figure, measured in (
        ("pca", pca, error, "mean relative squared error over 30 power iterations"),
        ("k-means", clusters, objective, "mean squared distance to the nearest of 10 centroids"),
        ("logistic-regression", classifier, objective, "training loss after 100 large steps"),
    ):
        CLAIMS.add(
            Claim(
                name=f"{better}-beats-rand-k-in-{name}",
                paper=PAPER,
                sentence=f"{says}: {name.replace('-', ' ')} over distributed images.",
                measured=f"decrease of the {measured}, per cent of Rand-k's",
                experiment=Compared(task, figure, MAKERS[better], MAKERS["rand-k"]),
            )
        )
CLAIMS.add(
    Claim(
        name="spatial-beats-wangni-at-equal-bytes",
        paper=PAPER,
        sentence="Rand-k-Spatial (Avg) also beats sparsification with optimal probabilities "
        "(Wangni et al.), whose indices are paid for.",
        measured="decrease of the mean relative squared error over 30 power iterations, per cent "
        "of Wangni's",
        experiment=Compared(pca, error, MAKERS["spatial"], wangni_at_equal_bytes),
    )
)
