"""Claims of Jacobs, Gadhikar, Rubio-Madrigal & Burkholz 2025, "Hyperbolic Aware Minimization"."""

from __future__ import annotations

import math
from itertools import islice, pairwise

import torch
from torch import Tensor, nn

from featherweight import sparse
from featherweight.lab.claims.claim import CLAIMS, Claim, Computed, Tuned, accuracy_gain
from featherweight.lab.digits import accuracy, tasks, train
from featherweight.optim import HamSGD
from featherweight.optim.implicit_bias import closed_form, trajectory

PAPER = "Jacobs, Gadhikar, Rubio-Madrigal & Burkholz 2025, arXiv:2506.02630"


def regression(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Draw 12 equations of 40 unknowns with a solution of 4 nonzero entries.

    Returns:
        Features, targets and the sparse solution, float64.
    """
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(12, 40, generator=generator, dtype=torch.float64) / math.sqrt(12)
    solution = torch.zeros(40, dtype=torch.float64)
    solution[torch.randperm(40, generator=generator)[:4]] = torch.tensor(
        [1.5, -2.0, 1.0, -1.0], dtype=torch.float64
    )
    return features, features @ solution, solution


def _distance(seed: int, rate: float) -> float:
    """Return how far HAM's path ends from the closed form, relative to its size."""
    features, targets, _ = regression(seed)
    start = torch.zeros(40, dtype=torch.float64)
    path = trajectory(lambda x: features.T @ (features @ x - targets), start, lr=rate, alpha=1.0)
    (end,) = islice(path, round(400 / rate) - 1, round(400 / rate))
    limit = closed_form(features, targets, alpha=1.0)
    return float((end - limit).norm() / limit.norm())


def _halving(seed: int) -> float:
    return _distance(seed, 0.02) / _distance(seed, 0.01)


def _towards_sparse(seed: int) -> float:
    """Return the least gain of a tenfold alpha in distance to the sparse solution."""
    features, targets, solution = regression(seed)
    distances = [
        float((closed_form(features, targets, alpha) - solution).norm())
        for alpha in (0.1, 1.0, 10.0, 100.0)
    ]
    return min(nearer - further for nearer, further in pairwise(distances))


def pruned_accuracy(seed: int, alpha: float) -> float:
    """Train digits densely, keep a tenth of both hidden layers, and return the test accuracy."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        hidden = [
            layer
            for inputs in (64, 256)
            for layer in (nn.Linear(inputs, 256), nn.BatchNorm1d(256), nn.ReLU())
        ]
        model = nn.Sequential(*hidden, nn.Linear(256, 10))
    (task,), (test,) = tasks("train", [range(10)]), tasks("test", [range(10)])
    optimizer = HamSGD(
        model.parameters(),
        lr=0.1,
        momentum=0.9,
        weight_decay=1e-4,
        alpha=alpha,
        weights=model if alpha else None,
    )
    train(model, optimizer, task, 500, seed)
    masks = sparse.magnitude(model, 0.1, "layer", include=["0.weight", "3.weight"])
    masks.apply_(model)
    return accuracy(model, test)


def _prunable(seed: int) -> float:
    return pruned_accuracy(seed, 100.0) - pruned_accuracy(seed, 0.0)


CLAIMS.add(
    Claim(
        name="ham-ends-at-its-closed-form",
        paper=PAPER,
        sentence="On underdetermined regression HAM ends where its potential is least, with an "
        "error that halves with the learning rate (here: a ratio from 1.9 to 2.1).",
        measured="distance from the closed form at learning rate 0.02 over that at 0.01",
        experiment=Computed(_halving, seeds=(0, 1, 2)),
        region=(1.9, 2.1),
        scale=1.0,
    )
)
CLAIMS.add(
    Claim(
        name="ham-moves-towards-the-sparse-solution",
        paper=PAPER,
        sentence="The larger alpha, the nearer HAM's limit is to the sparse solution of "
        "underdetermined regression.",
        measured="least decrease of the distance to the sparse solution when alpha grows tenfold, "
        "from 0.1 to 100",
        experiment=Computed(_towards_sparse),
        scale=1.0,
    )
)
CLAIMS.add(
    Claim(
        name="ham-makes-networks-prunable",
        paper=PAPER,
        sentence="Networks trained with HAM lose less accuracy when small weights are removed.",
        measured="test accuracy with a tenth of both hidden layers kept, without retraining, "
        "alpha 100 minus plain SGD, points",
        experiment=Computed(_prunable),
    )
)


RATES = (0.025, 0.05, 0.1, 0.2)
STRONG = ["fit.optimizer=ham-sgd", "fit.options.alpha=10", "fit.options.beta=0.001"]


def _tuned(method: str) -> Tuned:
    mini, paper = f"{method}-digits", f"{method}-cifar10"
    setting = ["model.name=resnet20", "data.validation=0.1"]
    own = [paper] if method == "random" else ["random-cifar10", f"sparse.method={method}"]
    return Tuned(
        arms={"ham": [mini, "fit.length=30ep", *STRONG], "plain": [mini, "fit.length=30ep"]},
        rates=RATES,
        effect=accuracy_gain("ham", "plain"),
        paper_arms={
            "ham": [*own, *setting, STRONG[0], "fit.options.alpha=100", STRONG[2]],
            "plain": [*own, *setting],
        },
    )


for method in ("random", "rigl", "acdc"):
    CLAIMS.add(
        Claim(
            name=f"ham-helps-{method}",
            paper=PAPER,
            sentence=f"Sparse training by {method} reaches a higher accuracy with HAM, the "
            "learning rate tuned for both.",
            measured=f"test accuracy of {method} with HAM minus {method} with SGD at density 1/64, "
            "each at its best learning rate, points",
            experiment=_tuned(method),
        )
    )
