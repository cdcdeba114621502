"""Claims of Jhunjhunwala, Gadhikar, Joshi & Eldar 2021, "Adaptive Quantization of Model Updates".

Least squares with noise on the targets: 512 features, four clients of 2000 examples, ten local
steps of batches of 4, 300 rounds. There gradient noise keeps updates large, which is where the
quantisation error matters.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import inf
from statistics import fmean

import torch
from torch import Tensor

from featherweight.federated.codecs import QSGD, AdaQuantFL
from featherweight.lab.claims.claim import CLAIMS, Claim, Computed
from featherweight.lab.data.seeding import derive_seed

PAPER = "Jhunjhunwala, Gadhikar, Joshi & Eldar 2021, arXiv:2102.04487"
CLIENTS, EXAMPLES, FEATURES = 4, 2000, 512
ROUNDS, STEPS, BATCH, RATE = 300, 10, 4, 0.003
TARGET = 0.05
FIXED = (3, 7, 15, 31, 63, 255)


@dataclass(frozen=True)
class Course:
    """How a training went.

    Attributes:
        excess: loss above the least one, after each round.
        sent: bytes that a client has sent by then.
    """

    excess: tuple[float, ...]
    sent: tuple[float, ...]

    @property
    def floor(self) -> float:
        """The mean excess of the last 60 rounds."""
        return fmean(self.excess[-60:])

    def bytes_to(self, target: float) -> float:
        """Return the bytes sent when the mean excess of ten rounds is first below a target."""
        for end in range(10, len(self.excess) + 1):
            if fmean(self.excess[end - 10 : end]) < target:
                return self.sent[end - 1]
        return inf


class LeastSquares:
    """The problem of a seed."""

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(derive_seed(seed, "problem"))
        self.inputs = torch.randn(CLIENTS, EXAMPLES, FEATURES, generator=generator)
        truth = torch.randn(FEATURES, generator=generator)
        noise = torch.randn(CLIENTS, EXAMPLES, generator=generator)
        self.targets = self.inputs @ truth + noise
        best = torch.linalg.lstsq(self.inputs.flatten(0, 1), self.targets.flatten()[:, None])
        self.least = self.loss(best.solution[:, 0])

    def loss(self, weights: Tensor) -> float:
        """Return the mean of half the squared residuals."""
        return float((self.inputs @ weights - self.targets).square().mean()) / 2

    def updates(self, weights: Tensor, generator: torch.Generator) -> Tensor:
        """Return what each client's local steps change, [clients, features]."""
        local = weights.repeat(CLIENTS, 1)
        rows = torch.arange(CLIENTS)[:, None]
        for _ in range(STEPS):
            chosen = torch.randint(EXAMPLES, (CLIENTS, BATCH), generator=generator)
            inputs, targets = self.inputs[rows, chosen], self.targets[rows, chosen]
            residuals = torch.einsum("cbf,cf->cb", inputs, local) - targets
            local = local - RATE / BATCH * torch.einsum("cb,cbf->cf", residuals, inputs)
        return local - weights


def train(codec: QSGD, seed: int) -> Course:
    """Train by federated averaging through a codec; all codecs see the same batches."""
    problem = LeastSquares(seed)
    generator = torch.Generator().manual_seed(derive_seed(seed, "batches"))
    weights, total = torch.zeros(FEATURES), 0.0
    loss = problem.loss(weights)
    excess, sent = [], []
    for number in range(ROUNDS):
        codec.observe(loss, number)
        updates = problem.updates(weights, generator)
        messages = [codec.encode(x, round=number, client=i) for i, x in enumerate(updates)]
        weights = weights + codec.decode_mean(messages)
        total += sum(map(len, messages)) / CLIENTS
        loss = problem.loss(weights)
        excess.append(loss - problem.least)
        sent.append(total)
    return Course(tuple(excess), tuple(sent))


@lru_cache
def course(levels: int, seed: int) -> Course:
    """Return the training with fixed levels, or of AdaQuantFL for 0."""
    return train(AdaQuantFL(1, seed=seed) if levels == 0 else QSGD(levels, seed=seed), seed)


def floor_ratio(seed: int) -> float:
    """Return AdaQuantFL's final excess loss over that of 255 levels."""
    return course(0, seed).floor / course(255, seed).floor


def coarse_floor(seed: int) -> float:
    """Return the final excess loss of 3 levels over AdaQuantFL's."""
    return course(3, seed).floor / course(0, seed).floor


def saved(seed: int) -> float:
    """Return the part of the bytes of 255 levels that AdaQuantFL saves on the way to the target."""
    return 1 - course(0, seed).bytes_to(TARGET) / course(255, seed).bytes_to(TARGET)


def saved_of_best(seed: int) -> float:
    """Return the same against the fixed number of levels that turns out best."""
    best = min(course(levels, seed).bytes_to(TARGET) for levels in FIXED)
    return 1 - course(0, seed).bytes_to(TARGET) / best


CLAIMS.add(
    Claim(
        name="adaquantfl-reaches-the-fine-floor",
        paper=PAPER,
        sentence="AdaQuantFL ends as low as fine quantisation (here: within 20 per cent of the "
        "excess loss of 255 levels).",
        measured="excess loss of the last 60 rounds over that of 255 levels",
        experiment=Computed(floor_ratio),
        region=(0.0, 1.2),
        scale=1.0,
    )
)
CLAIMS.add(
    Claim(
        name="coarse-levels-have-a-high-floor",
        paper=PAPER,
        sentence="Few fixed levels are cheap and end high (here: 3 levels, at least five times "
        "AdaQuantFL's excess loss).",
        measured="excess loss of the last 60 rounds of 3 levels over AdaQuantFL's",
        experiment=Computed(coarse_floor),
        region=(5.0, inf),
        scale=1.0,
    )
)
CLAIMS.add(
    Claim(
        name="adaquantfl-saves-bytes-against-255-levels",
        paper=PAPER,
        sentence="AdaQuantFL reaches a low loss in fewer communicated bits than fine quantisation.",
        measured=f"decrease of the bytes sent until the excess loss is {TARGET}, per cent of those "
        "of 255 levels",
        experiment=Computed(saved),
    )
)
CLAIMS.add(
    Claim(
        name="adaquantfl-saves-bytes-against-the-best-levels",
        paper=PAPER,
        sentence="AdaQuantFL reaches a low loss in fewer communicated bits than any fixed number "
        "of levels.",
        measured=f"decrease of the bytes sent until the excess loss is {TARGET}, per cent of those "
        f"of the best of {', '.join(map(str, FIXED))} levels",
        experiment=Computed(saved_of_best),
    )
)
