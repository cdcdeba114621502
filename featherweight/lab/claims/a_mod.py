"""Claims of Gadhikar et al. 2024, "Attention Is All You Need For Mixture-of-Depths Routing"."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from math import inf
from statistics import fmean
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from featherweight import depth
from featherweight.lab.claims.claim import CLAIMS, Claim, Settings
from featherweight.lab.depth_tasks import (
    Place,
    Plan,
    accuracy,
    dense,
    fit,
    task,
    with_fresh_head,
)

PAPER = "Gadhikar, Majumdar, Popp, Saranrittichai, Rapp & Schott 2024, arXiv:2412.20875"
SEEDS = (0, 1, 2, 3, 4)
CAPACITIES = (0.5, 0.125)
RATES = (3e-4, 1e-3, 3e-3)
STEPS, LOOKS = 40, 5  # of fine-tuning, and of them between two looks at the accuracy
OLD, NEW = (0, 1, 2, 3, 4), (5, 6, 7, 8, 9)
IMAGES = 60  # whose tokens are left out one by one

Arm = Callable[[nn.Module, float, int, int], nn.Module]
"""From a dense model, a capacity, a seed and a number of tokens to another model."""


def _fewer_layers(model: nn.Module, capacity: float, _seed: int, tokens: int) -> nn.Module:
    same = depth.isoflop(depth.a_mod(copy.deepcopy(model), capacity), tokens)
    return depth.fewer_layers(model, same.layers)


ARMS: dict[str, Arm] = {
    "dense": lambda model, _capacity, _seed, _tokens: copy.deepcopy(model),
    "a-mod": lambda model, capacity, _seed, _tokens: depth.a_mod(copy.deepcopy(model), capacity),
    "mod unit": lambda model, capacity, seed, _tokens: depth.mod(
        copy.deepcopy(model), capacity, gate="unit", seed=seed
    ),
    "mod raw": lambda model, capacity, seed, _tokens: depth.mod(
        copy.deepcopy(model), capacity, gate="raw", seed=seed
    ),
    "random": lambda model, capacity, seed, _tokens: depth.route(
        copy.deepcopy(model), "random-tokens", capacity, seed=seed
    ),
    "fewer layers": _fewer_layers,
}
TRAINED_ARMS = ("dense", "a-mod", "mod unit", "mod raw", "fewer layers")


def after_conversion(place: Place, arm: str, capacity: float, seeds: Sequence[int]) -> list[float]:
    """Return the test accuracy of each seed's dense model right after it was converted."""
    return [
        accuracy(ARMS[arm](dense(place, seed), capacity, seed, place.tokens), task(place).test)
        for seed in seeds
    ]


class Tuned(NamedTuple):
    """Test accuracies along the fine-tuning of one model, and validation accuracy at its end."""

    curve: list[float]
    validation: float


@lru_cache
def _tune(place: Place, arm: str, capacity: float, seed: int, rate: float, new: bool) -> Tuned:
    """Convert and train on; or, for new classes, with a fresh head on what it hasn't seen."""
    start = dense(Place(place.folder, OLD) if new else place, seed)
    place = Place(place.folder, NEW) if new else place
    start = with_fresh_head(start, len(NEW), seed) if new else start
    model = ARMS[arm](start, capacity, seed, place.tokens)
    longer = 1 if place.folder is None else 10
    plan, every = Plan(longer * STEPS, rate), longer * LOOKS if new else None
    curve = fit(model, task(place), plan, seed, every)
    return Tuned(curve, accuracy(model, task(place).validation))


def curves(
    place: Place, arm: str, capacity: float, seeds: Sequence[int], new: bool
) -> list[list[float]]:
    """Return each seed's curve at the learning rate of best mean validation accuracy."""
    capacity = 1.0 if arm == "dense" else capacity
    tried = [[_tune(place, arm, capacity, s, rate, new) for s in seeds] for rate in RATES]
    best = max(tried, key=lambda runs: fmean(run.validation for run in runs))
    return [run.curve for run in best]


def tuned(
    place: Place, arm: str, capacity: float, seeds: Sequence[int], new: bool = False
) -> list[float]:
    """Return each seed's test accuracy after fine-tuning at the arm's best learning rate."""
    return [curve[-1] for curve in curves(place, arm, capacity, seeds, new)]


def steps_to(curve: Sequence[float], goal: float) -> int:
    """Return after how many looks a curve first reaches a goal; one more than all if never."""
    return next((n for n, found in enumerate(curve) if found >= goal), len(curve))


def speed(place: Place, arm: str, capacity: float, seeds: Sequence[int]) -> list[float]:
    """Return how often faster an arm reaches the accuracy that the learned router ends with."""
    slow = curves(place, "mod unit", capacity, seeds, new=True)
    fast = curves(place, arm, capacity, seeds, new=True)
    goals = [max(curve) for curve in slow]
    pairs = zip(slow, fast, goals, strict=True)
    return [steps_to(one, goal) / max(1, steps_to(two, goal)) for one, two, goal in pairs]


Measure = Callable[[Place, str, float, Sequence[int]], list[float]]


@dataclass(frozen=True)
class Beside:
    """An experiment that compares some arms and prints all of them, with what each computes.

    Attributes:
        measure: place, arm, capacity and seeds to one number a seed.
        capacity: of the routed arms.
        better, worse: arms compared; of several the best in each seed counts.
        arms: all that are measured.
        combine: difference, or another function of the two.
        seeds: one effect each.
    """

    measure: Measure
    capacity: float
    better: Sequence[str]
    worse: Sequence[str]
    arms: Sequence[str] = TRAINED_ARMS
    combine: Callable[[float, float], float] = operator.sub
    seeds: tuple[int, ...] = SEEDS

    def effects(self, settings: Settings) -> list[float]:
        """Measure, print a line for each arm, and return the effect for each seed."""
        place = Place(settings.data if settings.scale == "paper" else None)
        found = {a: self.measure(place, a, self.capacity, self.seeds) for a in self.arms}
        base = depth.flops(dense(place, self.seeds[0]), place.tokens).total
        for arm, numbers in found.items():
            model = ARMS[arm](dense(place, self.seeds[0]), self.capacity, 0, place.tokens)
            share = depth.flops(model, place.tokens).total / base
            each = ", ".join(f"{number:.3f}" for number in numbers)
            text = f"{arm}: {fmean(numbers):.3f} ({each}) at {share:.3f} of the dense FLOPs"
            settings.console.print(text, highlight=False)
        best = (
            [max(found[arm][i] for arm in side) for i in range(len(self.seeds))]
            for side in (self.better, self.worse)
        )
        return [self.combine(one, other) for one, other in zip(*best, strict=True)]


@dataclass(frozen=True)
class Agreement:
    """Spearman's coefficient of scores and importance, mean over images and layers that are read.

    Attributes:
        seeds: one effect each.
    """

    seeds: tuple[int, ...] = SEEDS

    def effects(self, settings: Settings) -> list[float]:
        """Return the coefficient for each seed, and print that of each layer."""
        place = Place(settings.data if settings.scale == "paper" else None)
        found = [agreement(dense(place, seed), place) for seed in self.seeds]
        for layer, numbers in enumerate(zip(*found, strict=True)):
            each = ", ".join(f"{number:+.3f}" for number in numbers)
            text = f"layer {layer}: {fmean(numbers):+.3f} ({each})"
            settings.console.print(text, highlight=False)
        return [fmean(layers[0:-1:2]) for layers in found]


def agreement(model: nn.Module, place: Place) -> list[float]:
    """Correlate each layer's scores with how much the loss changes when a patch is left out."""
    images, labels = (part[:IMAGES] for part in (task(place).test.images, task(place).test.labels))
    loss = partial(F.cross_entropy, target=labels, reduction="none")
    importance = depth.token_importance(model, images, loss).abs()
    with torch.no_grad():
        scores = depth.attention_scores(model, images)[:, :, 1:]
    return [depth.correlation(importance, score).mean for score in scores]


MOD = ("mod unit", "mod raw")
for capacity in CAPACITIES:
    percent = f"{100 * capacity:g}"
    CLAIMS.add(
        Claim(
            name=f"a-mod-needs-no-training-{percent}",
            paper=PAPER,
            sentence="Right after conversion, without any training, a vision transformer routed by "
            "attention is more accurate than one with a learned router.",
            measured=f"test accuracy after conversion at capacity {percent} %, A-MoD minus the "
            "better gate of MoD, points",
            experiment=Beside(after_conversion, capacity, ["a-mod"], MOD, tuple(ARMS)),
        )
    )
    CLAIMS.add(
        Claim(
            name=f"a-mod-beats-mod-{percent}",
            paper=PAPER,
            sentence="After fine-tuning, routing by attention is more accurate than a learned "
            "router, the learning rate tuned for both.",
            measured=f"test accuracy after {STEPS} steps at capacity {percent} %, A-MoD minus the "
            "better gate of MoD, points",
            experiment=Beside(tuned, capacity, ["a-mod"], MOD),
        )
    )
    CLAIMS.add(
        Claim(
            name=f"a-mod-beats-fewer-layers-{percent}",
            paper=PAPER,
            sentence="After fine-tuning, routing by attention is more accurate than a dense model "
            "with as many layers as cost the same.",
            measured=f"test accuracy after {STEPS} steps at capacity {percent} %, A-MoD minus "
            "the first layers alone, points",
            experiment=Beside(tuned, capacity, ["a-mod"], ["fewer layers"]),
        )
    )
CLAIMS.add(
    Claim(
        name="a-mod-learns-new-classes-faster",
        paper=PAPER,
        sentence="In transfer, routing by attention reaches what a learned router ends with in "
        "fewer steps.",
        measured="steps of MoD (unit gate) over steps of A-MoD to the best accuracy of MoD on "
        "digits 5 to 9, learned after 0 to 4, at capacity 50 %",
        experiment=Beside(speed, 0.5, ["a-mod"], ["mod unit"], combine=operator.truediv),
        region=(1.0, inf),
        scale=1.0,
    )
)
CLAIMS.add(
    Claim(
        name="fewer-layers-win-in-transfer",
        paper=PAPER,
        sentence="In transfer a dense model with as many layers as cost the same is more accurate "
        "than routing by attention.",
        measured="test accuracy on digits 5 to 9, learned after 0 to 4, at capacity 50 %, the "
        "first layers alone minus A-MoD, points",
        experiment=Beside(partial(tuned, new=True), 0.5, ["fewer layers"], ["a-mod"]),
    )
)
CLAIMS.add(
    Claim(
        name="a-mod-scores-tell-importance",
        paper=PAPER,
        sentence="The attention that a token receives goes with how much the loss changes when it "
        "is left out.",
        measured="Spearman's coefficient over the patches of an image, mean over images and over "
        "the layers whose scores are read",
        experiment=Agreement(),
        scale=1.0,
    )
)
